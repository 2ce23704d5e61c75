"""The compiled modules of the tender, made by cffi in API mode with the limited API.

`tender._native`  the layouts of the ABI, host calls, stop requests, the sandbox; on x86_64 also KVM
                  and the engine
`tender._soft`    the CPU in software: loaded only by a run on it

The rule here: a declaration is written once. Where the tender or the ABI makes it, that is the
header that C includes, and cffi reads the same file. A .cdef file names what the tender uses of
the system's headers; the C compiler fills in values and offsets.

As a program, this file writes the stubs, tender/_native.pyi and tender/_soft.pyi. With
PTENDER_SANITIZE=1 in the environment, the modules are built with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# A change of any of these builds all again, and the source distribution has them all.
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("abi", "tender")
    for suffix in ("c", "h", "cdef", "lds")
    for path in ROOT.glob(f"{folder}/**/*.{suffix}")
    if not path.name.startswith("_")  # made by cffi
)
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
HARDENED = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
MACHINE = sysconfig.get_platform().rpartition("-")[2]  # also where another one builds for it
COMPILED = {"_native": HARDENED, "_soft": HARDENED}
LINKED: dict[str, list[str]] = {"_native": [], "_soft": []}
if MACHINE == "x86_64":
    # By the linker, because Debian's C library has objects without a note for it. A shadow stack
    # does not allow the emulator's longjmp() to another stack.
    COMPILED = {
        "_native": [*HARDENED, "-fcf-protection"],
        "_soft": [*HARDENED, "-fcf-protection=branch"],
    }
    LINKED["_native"] = ["-Wl,-z,shstk"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def declarations(text: str) -> str:
    """What cffi's parser takes of a header or a .cdef file.

    It has no preprocessor and no _Atomic; for a constant that is an expression, it asks the
    compiler ("...").
    """
    lines = []
    for line in text.splitlines():
        constant = re.match(r"#define (\w+) (\S+)", line)
        if constant and re.fullmatch(r"0x[0-9a-fA-F]+u?|\d+u?", constant[2]):
            line = f"#define {constant[1]} {constant[2]}"
        elif constant:
            line = f"#define {constant[1]} ..."
        elif line.startswith("#"):
            continue
        lines.append(line)
    return "\n".join(lines).replace("_Atomic ", "")


def make(name: str, included: list[str], c_files: list[str]) -> FFI:
    """A module of what its files declare; C includes its headers, after those `included`."""
    ffi = FFI()
    for file in MODULES[name]:
        ffi.cdef(declarations((ROOT / file).read_text()))
    headers = [file for file in [*included, *MODULES[name]] if file.endswith(".h")]
    sanitized = os.environ.get("PTENDER_SANITIZE") == "1"
    flags = SANITIZED if sanitized else COMPILED[name]
    ffi.set_source(
        f"tender.{name}",
        "\n".join(f'#include "{header}"' for header in headers),
        sources=c_files,
        include_dirs=[str(ROOT)],
        depends=SOURCES,
        define_macros=[("Py_LIMITED_API", "0x030A0000")],
        py_limited_api=True,
        extra_compile_args=["-std=gnu11", "-O2", "-fvisibility=hidden", *WARNINGS, *flags],
        extra_link_args=["-Wl,-z,relro", "-Wl,-z,now", *(flags if sanitized else LINKED[name])],
        libraries=["dl"],
    )
    return ffi


LINE = 100  # characters

LAYOUTS = ["abi/note.h", "abi/hvt.h", "abi/ring.h", "abi/spt.h", "abi/stats.h"]
HOST = ["tender/host/host.cdef", "tender/host/host.h", "tender/host/rate.h"]
HOST += ["tender/stop.h", "tender/observe/pcap.h", "tender/embed/heap.h"]
SANDBOX = ["tender/sandbox/sandbox.cdef", "tender/sandbox/sandbox.h"]
KVM = ["tender/kvm.cdef", "tender/kvm.h", "tender/engine/engine.h"]
NATIVE = ["tender/cpu/native.h", "tender/cpu/tsc.h", "tender/cpu/xsave.h", "tender/spt/spt.h"]
MODULES = {"_native": [*LAYOUTS, *HOST, *SANDBOX], "_soft": ["abi/stats.h", "tender/cpu/soft.h"]}
c_files = ["tender/host/host.c", "tender/host/rate.c", "tender/stop.c", "tender/sandbox/sandbox.c"]
c_files += ["tender/observe/pcap.c", "tender/embed/heap.c"]
if MACHINE == "x86_64":  # elsewhere guests run in software
    MODULES["_native"] += KVM + NATIVE
    c_files += ["tender/kvm.c", "tender/engine/engine.c", "tender/engine/ring.c"]
    c_files += ["tender/cpu/native.c", "tender/cpu/native_process.c", "tender/cpu/tsc.c"]
    c_files += ["tender/cpu/xsave.c", "tender/spt/spt.c"]

native = make("_native", ["abi/abi.h", "tender/sandbox/constants.h"], c_files)
soft_files = [f"tender/cpu/soft{part}.c" for part in ("", "_hooks", "_watch", "_debug", "_set")]
soft = make("_soft", [], soft_files)


def stub(files: list[str]) -> str:
    """The stub of the module that declares `files`: constants and functions by name."""
    text = "\n".join(declarations((ROOT / file).read_text()) for file in files)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    constants = re.findall(r"^#define (\w+)", text, re.M)
    for members in re.findall(r"^enum \w+ \{(.*?)\}", text, re.M | re.S):
        constants += re.findall(r"\w+", members)
    functions = re.findall(r"^(\w[\w *]*?)(\w+)\(([^()]*)\);", text, re.M)
    lines = ['"""Made by abi/ffi_build.py, which says from what."""', "", "from typing import Any"]
    lines += ["", "class _Lib:"]
    lines += [f"    {name}: int" for name in sorted(constants)]
    lines += ["", *(_method(*function) for function in functions)]
    return "\n".join([*lines, "", "ffi: Any", "lib: _Lib", ""])


def _method(result: str, name: str, arguments: str) -> str:
    words = ["self"]
    for argument in arguments.split(",") if arguments != "void" else []:
        what = argument.split()[-1].lstrip("*")
        words.append(f"{'in_' if what == 'in' else what}: {_type(argument)}")
    returned = "None" if result.strip() == "void" else "Any" if "*" in result else "int"
    line = f"    def {name}({', '.join(words)}, /) -> {returned}: ..."
    if len(line) <= LINE:
        return line
    lines = "".join(f"        {word},\n" for word in [*words, "/"])  # as ruff format has it
    return f"    def {name}(\n{lines}    ) -> {returned}: ..."


def _type(argument: str) -> str:
    if "const char *" in argument:
        return "bytes"
    return "Any" if "*" in argument else "int"


if __name__ == "__main__":
    for name, declared in MODULES.items():
        (ROOT / f"tender/{name}.pyi").write_text(stub(declared))
