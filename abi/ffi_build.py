"""The compiled modules of the tender, made by cffi in API mode with the limited API.

`tender._abi`     layouts that guest and tender share (no calls: builds anywhere)
`tender._host`    the few POSIX calls that Python has no face for, and how a guest is interrupted
`tender._kvm`     KVM's structures and ioctls, as this machine's <linux/kvm.h> has them
`tender._soft`    the CPU in software (its engine is found at run time, if at all)
`tender._engine`  tender/engine/engine.c, the fast path
`tender._sandbox` system calls and constants of the sandbox, and libseccomp (found at run time)

A layout is written once: in this folder's headers (ours) or in the kernel's. What stands in a
.cdef file only names the fields that the tender uses; the C compiler fills in the offsets.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
LIMITED_API = [("Py_LIMITED_API", "0x030A0000")]


def make(
    name: str,
    declarations: list[str],
    source: str,
    *c_files: str,
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> FFI:
    ffi = FFI()
    for file in declarations:
        ffi.cdef((HERE / file).read_text())
    ffi.set_source(
        f"tender.{name}",
        source,
        sources=list(c_files),
        include_dirs=[str(HERE)],
        depends=[str(path) for path in HERE.glob("*.h")],  # a changed header builds all again
        define_macros=LIMITED_API,
        py_limited_api=True,
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wno-unused-function", *flags],
        libraries=libraries,
    )
    return ffi


abi = make("_abi", ["note.h", "hvt.h", "ring.h"], '#include "abi.h"')
host = make("_host", ["pollfd.cdef", "device.h", "stop.cdef", "host.cdef"], '#include "host.h"')
# The fortified longjmp() refuses to change stacks.
soft = make(
    "_soft",
    ["soft.cdef"],
    '#include "soft.h"',
    flags=["-U_FORTIFY_SOURCE"],
    libraries=["dl"] if sys.platform == "linux" else [],
)

if sys.platform == "linux":
    sandbox = make(
        "_sandbox",
        ["sandbox.cdef"],
        '#include "sandbox.h"',
        libraries=["dl"],
    )

if sys.platform == "linux" and platform.machine() == "x86_64":  # as in setup.py
    kvm = make("_kvm", ["kvm.cdef"], '#include "kvm.h"')
    engine = make(
        "_engine",
        ["pollfd.cdef", "device.h", "stop.cdef", "engine.h"],
        '#include <poll.h>\n#include "device.h"\n#include "stop.h"\n#include "engine.h"',
        "tender/engine/engine.c",
    )
