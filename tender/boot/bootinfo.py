"""Boot info, manifest copy and command line, as the guest finds them.

The rule here: pure, and everything is built from values that are meant for the guest: no
descriptor, pointer or path of the host can get in.
"""

from __future__ import annotations

from tender._native import ffi, lib
from tender.boot import layout
from tender.checks import encoded
from tender.dataclass import dataclass
from tender.errors import ConfigError


@dataclass
class BootInfo:
    """What the guest gets at its start."""

    mem_bytes: int
    kernel_end: int  # GPA
    cpu_cycle_freq: int  # Hz
    cmdline: bytes
    manifest: bytes
    net_ring_gpa: int = 0  # 0: no ring


def join_cmdline(args: tuple[str, ...]) -> bytes:
    """The guest's command line: its arguments joined by single spaces, without a NUL."""
    cmdline = encoded(" ".join(args))  # the bytes that the user typed
    if len(cmdline) > layout.CMDLINE_MAX:
        raise ConfigError(
            f"the guest's command line is {len(cmdline)} bytes, "
            f"longer than the maximum {layout.CMDLINE_MAX}"
        )
    return cmdline


def build(info: BootInfo) -> bytes:
    """The bytes that go to layout.BOOT_INFO."""
    cmdline_gpa = layout.MANIFEST + len(info.manifest)
    head = ffi.new(
        "struct hvt_boot_info *",
        {
            "mem_size": info.mem_bytes,
            "kernel_end": info.kernel_end,
            "cpu_cycle_freq": info.cpu_cycle_freq,
            "cmdline_gpa": cmdline_gpa,
            "mft_gpa": layout.MANIFEST,
            "host_features": lib.HVT_FEATURE_NET_RING if info.net_ring_gpa else 0,
            "net_ring_gpa": info.net_ring_gpa,
        },
    )
    return bytes(ffi.buffer(head)) + info.manifest + info.cmdline + b"\0"
