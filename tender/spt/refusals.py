"""What an spt guest can't have, by name.

There is no tender beside a running spt guest: what needs one between guest and host can't be had.
"""

from __future__ import annotations

import os

from tender.backends import BlockRemote, Descriptor
from tender.errors import DeviceError, HostError, UsageError, option, setting
from tender.image.elf import MACHINES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.config import Config

NO_TENDER = "no tender is beside a running spt guest"


def check(config: Config, machine: int) -> None:
    """Raise UsageError or DeviceError for what no spt guest can have, HostError for a guest for
    another machine (EM_*) than this one."""
    here, guest = os.uname().machine, MACHINES[machine]
    if not here == guest == "x86_64":
        raise HostError(
            f"spt: x86_64 guests run on x86_64; this guest is for {guest}, this machine is {here}"
        )
    refused = {
        ("--trace", "trace"): config.trace is not None,
        ("--pcap", "pcap"): bool(config.pcap),
        ("--console-limit", "console_limit"): config.console_limit is not None,
        ("--clock", "clock"): config.clock is not None,
        ("--net-rate", "net_rate"): bool(config.net_rate),
        ("--block-rate", "block_rate"): bool(config.block_rate),
        ("--snapshots", "snapshots"): config.snapshots is not None,
        ("--instructions", "instructions"): config.instructions is not None,
        ("--net-ring", "net_ring"): bool(config.net_ring),
        ("--engine", "engine"): config.engine != "c",
    }
    for names, given in refused.items():
        if given:
            raise UsageError(f"{setting(*names)}: an spt guest can't have it: {NO_TENDER}")
    if config.gdb is not None:
        raise UsageError(
            f"{setting('--gdb', 'gdb')}: an spt guest is a process: attach to it, gdb -p PID"
        )
    if config.cpu != "auto":
        raise UsageError(
            f"{option('cpu', config.cpu)}: an spt guest runs as a process, on this machine's CPU: "
            "leave it out"
        )
    for name, spec in (*config.net, *config.block):
        why = _why_not(spec)
        if why:
            raise DeviceError(f"{f'device {name!r}' if name else 'a device'}: {why}: {NO_TENDER}")


def _why_not(spec: object) -> str:
    if isinstance(spec, BlockRemote):
        return "an spt guest can't have a disk that a program serves"
    if isinstance(spec, Descriptor) and spec.sync_fd is not None:
        return "an spt guest can't have virtual time"
    if isinstance(getattr(spec, "overlay", None), str):
        return "an spt guest can't have an overlay in a file"
    if getattr(spec, "sync", "none") == "fsync":
        return "an spt guest can't have sync=fsync (sync=always it can)"
    return ""
