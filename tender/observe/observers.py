"""What watches a guest from outside it: a trace, packets, a debugger, a report of its end.

Each is opened before lockdown, and made when its descriptor has its number.
"""

from __future__ import annotations

import os

from tender.config import guest_name
from tender.image.elf import MACHINES
from tender.modules.assign import assign_pcaps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.accel import Kind
    from tender.cleanup import Cleanup
    from tender.clock import HostClock
    from tender.config import Config
    from tender.image.manifest import Manifest
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.modules.net import Net
    from tender.observe.gdb import GdbVcpu
    from tender.observe.pcap import Pcap
    from tender.observe.trace import Trace
    from tender.stop import Stop


def open_outputs(config: Config, inputs: list[os.stat_result], cleanup: Cleanup) -> dict[str, int]:
    """The descriptors of trace, report and manager of services, by label.

    None of the files in `inputs` becomes one of them. Raises TenderError.
    """
    fds = {}
    if isinstance(config.trace, str):
        from tender.observe.output import open_output

        fds["trace"] = open_output(config.trace, "trace", inputs, cleanup)
    if config.report is not None:
        from tender.observe.report import open_report

        fds["report-file"] = open_report(config.report, inputs, cleanup)
    if config.record is not None:
        from tender.observe.output import open_output

        fds["record"] = open_output(config.record, "record", inputs, cleanup)
    if config.notify is not None:
        from tender.observe import notify

        fds["notify"] = notify.open_socket(config.notify, cleanup)
    return fds


def open_pcaps(
    config: Config,
    manifest: Manifest,
    net: Net,
    fds: Mapping[str, int],
    inputs: list[os.stat_result],
    clock: HostClock,
    warn: Warn,
    cleanup: Cleanup,
) -> dict[int, Pcap]:
    """Where the packets of network devices are written to, by handle."""
    if not config.pcap:
        return {}
    from tender.observe import pcap

    files = assign_pcaps(manifest, config.pcap)
    others = [*inputs, os.fstat(fds["trace"])] if "trace" in fds else inputs
    pcaps = pcap.open_pcaps(
        {net.devices[handle].name: path for handle, path in files.items()},
        others,
        clock,
        warn,
        cleanup,
    )
    by_handle = {handle: pcaps[net.devices[handle].name] for handle in files}
    for handle, each in by_handle.items():
        net.devices[handle].pcap = each
    return by_handle


def open_gdb(config: Config, machine: int, warn: Warn, cleanup: Cleanup) -> dict[str, int]:
    """The descriptors for a debugger, by label; where it connects is said by `warn`.

    `machine` is the guest's, as its image has it.
    """
    if config.gdb is None:
        return {}
    from tender.observe import gdb_link

    fds = gdb_link.open_link(config.gdb, cleanup)
    if "gdb-listen" in fds:
        gdb = "gdb" if MACHINES[machine] == os.uname().machine else "gdb-multiarch"
        warn(f"waiting for a debugger: {gdb_link.command(config.gdb, config.kernel, gdb)}")
    return fds


def make_trace(
    config: Config,
    fds: Mapping[str, int],
    memory: GuestMemory,
    manifest: Manifest,
    clock: HostClock,
    stop: Stop,
    warn: Warn,
) -> Trace:
    """The trace that is written to `fds["trace"]`."""
    from tender.observe.trace import Trace

    names = {device.handle: device.name for device in manifest.devices}
    return Trace(fds["trace"], guest_name(config), memory, names, clock.elapsed_ns, stop, warn)


def make_gdb(
    config: Config,
    kind: Kind,
    fds: Mapping[str, int],
    vcpu: Any,
    memory: memoryview,
    stop: Stop,
) -> GdbVcpu:
    """The vCPU as a debugger has it; `memory` is where breakpoints are written to."""
    from tender.observe.gdb import GdbVcpu
    from tender.observe.gdb_link import Link

    debug = vcpu
    if kind.name == "kvm":
        from tender.observe.gdb_kvm import KvmDebug

        debug = KvmDebug(vcpu, memory)
    elif kind.name == "native":
        from tender.observe.gdb_native import NativeDebug

        debug = NativeDebug(vcpu, memory)
    return GdbVcpu(vcpu, debug, memory, config.kernel, Link(fds, stop), stop)
