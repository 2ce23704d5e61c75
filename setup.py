"""What is compiled; all the rest of the packaging is in pyproject.toml."""

import os
import platform

from setuptools import setup
from setuptools.command.build_ext import build_ext

PROGRAM = "tender/cpu/native-guest"
# Without a C library, at an address that leaves the low 4 GiB to the guest (tender/cpu/native.h).
FLAGS = [
    *("-std=gnu11", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fPIE", "-no-pie", "-s"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mgeneral-regs-only"),
    *("-fcf-protection=none", "-U_FORTIFY_SOURCE"),
    "-Wl,-z,noexecstack,-z,norelro,--build-id=none,-Ttext-segment=0x500000000000",
]


class BuildExt(build_ext):  # type: ignore[misc]
    """The extension modules, and on x86_64 the program of a native guest's process."""

    def run(self) -> None:
        """Build all."""
        super().run()
        if platform.machine() != "x86_64":
            return
        output = PROGRAM if self.inplace else os.path.join(self.build_lib, PROGRAM)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        self.spawn(["cc", *FLAGS, "-I.", "tender/cpu/native_guest.c", "-o", output])


setup(
    cffi_modules=["abi/ffi_build.py:native", "abi/ffi_build.py:soft"],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
