"""What is compiled; all the rest of the packaging is in pyproject.toml."""

import gzip
import os
import re
import runpy
import sysconfig
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

from distutils.command.build_scripts import build_scripts  # isort: skip  # setuptools has it

# The machine that is built for; a cross build has
# _PYTHON_HOST_PLATFORM=linux-aarch64 and CC in its environment.
MACHINE = sysconfig.get_platform().rpartition("-")[2]

OF_X86 = ["-fcf-protection=none"]
FREESTANDING = [
    *("-std=gnu11", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fPIE", "-no-pie"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mgeneral-regs-only"),
    *(*OF_X86, "-U_FORTIFY_SOURCE", "-I."),
    "-Wl,-z,noexecstack,-z,norelro,--build-id=none",
]
# What runs in the processes of guests: its output, its sources and how it is linked. The native
# CPU's program is at an address that leaves the low 4 GiB to the guest (tender/cpu/native.h); the
# code of an spt guest's process is bytes that are copied, and small.
PROGRAMS = [
    (
        "tender/cpu/native-guest",
        "tender/cpu/native_guest.c",
        "-s -Wl,-Ttext-segment=0x500000000000",
    ),
    (
        "tender/spt/code",
        " ".join(
            f"tender/spt/{name}.c" for name in ("code", "message", "core", "report", "overlay")
        ),
        "-Os -Wl,-T,tender/spt/code.lds,--oformat=binary",
    ),
]
# What is installed as a command, by each of its names.
COMMANDS = ("ptender", "ptender-oci", "solo5-hvt.2", "solo5-spt")
# What keeps a guest from the host's loopback, beside passt.
FRAME_FILTER = [
    *("tender/host/frame_filter.c", "-std=gnu11", "-O2", "-s", "-fPIE", "-pie", "-Wall"),
    *(
        "-fstack-protector-strong",
        "-U_FORTIFY_SOURCE",
        "-D_FORTIFY_SOURCE=2",
        "-Wl,-z,relro,-z,now",
    ),
]


class BuildExt(build_ext):  # type: ignore[misc]
    """The extension modules, the file of cli/freeze, and the programs that run beside a tender."""

    def run(self) -> None:
        """Build all."""
        super().run()
        target = "tender" if self.inplace else f"{self.build_lib}/tender"
        write = runpy.run_path("tender/cli/freeze.py")["write"]
        write("tender", target, in_place=bool(self.inplace))
        self._program("tender/host/frame-filter", FRAME_FILTER)
        if MACHINE != "x86_64":
            return
        for program, sources, linking in PROGRAMS:
            self._program(program, [*FREESTANDING, *sources.split(), *linking.split()])

    def _program(self, program: str, words: list[str]) -> None:
        output = program if self.inplace else os.path.join(self.build_lib, program)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        self.spawn([os.environ.get("CC", "cc"), *words, "-o", output])


class BuildScripts(build_scripts):
    """The commands."""

    def run(self) -> None:
        """Build all."""
        os.makedirs(self.build_dir, exist_ok=True)
        flags = [flag for flag in FREESTANDING if MACHINE == "x86_64" or flag not in OF_X86]
        for name in COMMANDS:
            output = os.path.join(self.build_dir, name)
            self.spawn([os.environ.get("CC", "cc"), *flags, *self.scripts, "-s", "-o", output])


COMPILED = re.compile(
    r"\.(pyc|so|o)$|^tender/(_native\.c|_soft\.c|cli/frozen\.(?!py$).*|cpu/native-guest|spt/code"
    r"|host/frame-filter)$"
)


class Sdist(sdist):  # type: ignore[misc]
    """The source distribution, the same bytes from the same sources (SOURCE_DATE_EPOCH)."""

    def make_distribution(self) -> None:
        """Pack what MANIFEST.in names, but not what is compiled."""
        self.filelist.files = [each for each in self.filelist.files if not COMPILED.search(each)]
        super().make_distribution()

    def make_archive(self, base_name: str, *_: object, base_dir: str, **__: object) -> str:
        """Pack the folder `base_dir`; returns the archive's name."""
        seconds = int(os.environ.get("SOURCE_DATE_EPOCH", os.stat("pyproject.toml").st_mtime))

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = seconds
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            return member

        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(Path(base_dir).rglob("*")):
                archive.add(path, recursive=False, filter=plain)
        return name


setup(
    cffi_modules=["abi/ffi_build.py:native", "abi/ffi_build.py:soft"],
    cmdclass={"build_ext": BuildExt, "build_scripts": BuildScripts, "sdist": Sdist},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
