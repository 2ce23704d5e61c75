"""What is compiled; all the rest of the packaging is in pyproject.toml."""

import os
import platform
import runpy

from setuptools import setup
from setuptools.command.build_ext import build_ext

FREESTANDING = [
    *("-std=gnu11", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fPIE", "-no-pie"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mgeneral-regs-only"),
    *("-fcf-protection=none", "-U_FORTIFY_SOURCE", "-I."),
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
        if platform.machine() != "x86_64":
            return
        for program, sources, linking in PROGRAMS:
            self._program(program, [*FREESTANDING, *sources.split(), *linking.split()])

    def _program(self, program: str, words: list[str]) -> None:
        output = program if self.inplace else os.path.join(self.build_lib, program)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        self.spawn(["cc", *words, "-o", output])


setup(
    cffi_modules=["abi/ffi_build.py:native", "abi/ffi_build.py:soft"],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
