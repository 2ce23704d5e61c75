"""`ptender policy`: the system calls that a tender may make, for one command line.

The rule here: nothing is attached, made or locked. What is shown is computed from the command line
and the kernel's manifest by the same functions as in a run; tests compare the two.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import textwrap

from tender._native import lib
from tender.accel import KINDS, choice, choose, ring_region
from tender.assemble import file_sizes
from tender.backends import BlockFile
from tender.boot.layout import PAGE_SIZE
from tender.cleanup import Cleanup
from tender.cli import commandline
from tender.clock import HostClock
from tender.config import usable_memory
from tender.dataclass import dataclass
from tender.errors import UsageError
from tender.image.file import open_image
from tender.modules.assign import assign, assign_pcaps, check_all_attached
from tender.observe import counters
from tender.observe.core import Target
from tender.sandbox import fdtable, seccomp
from tender.sandbox.fdtable import FdTable, overlay_handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.accel import Kind
    from tender.backends import BlockValue, NetValue
    from tender.config import Config
    from tender.image.elf import Image
    from tender.sandbox.policy import Rule

OFFSET_MAX = (1 << 63) - 1
OPTIONS = ("--bpf", "--json")  # beside those of a run
HELP = "ptender policy --help"
USAGE = """\
usage: ptender policy [--bpf | --json] [OPTIONS] KERNEL [ARGS]

Show which system calls `ptender OPTIONS KERNEL ARGS` may make while the guest
runs. No device is attached, and the guest is not run. SIZE is the length of a
file; a disk that can't be opened counts as the largest there can be.

  --bpf    the filter of the guest's thread, as raw struct sock_filter:
           ptender policy --bpf k.hvt | scmp_bpf_disasm
  --json   everything, also the filter of the network ring's thread
"""

MEANINGS = {
    "console": "the guest's output: standard output",
    "stderr": "the tender's own messages: standard error",
    "vcpu": "the guest's CPU in KVM; /dev/kvm itself is closed",
    "guest-process": "the process that runs the guest's code",
    "epoll": "what the guest waits for: its networks and the timer",
    "timer": "... and how long",
    "kick": "wakes the thread of the network ring",
    "core": "the core file, which has no name yet",
    "pagemap": "which memory the guest has touched: /proc/self/pagemap",
    "memory-file": "the guest's memory, of which it touched what is no hole",
    "core-helper": "the process that gives the core file its name",
    "snapshot": "what the guest is saved to",
    "snapshot-helper": "the process that passes requests for snapshots on",
    "trace": "the trace",
    "record": "the record of the run",
    "replay": "the record that is replayed",
    "pidfile": "the PID file, which is locked as long as it is open",
    "report-file": "the report on the guest's end",
    "gdb-listen": "where a debugger connects",
    "gdb": "the debugger, while there is one",
    "gdb-in": "the debugger: standard input",
    "gdb-out": "... and standard output",
    "stats": "the counters page and its lock",
}


@dataclass
class Shown:
    """What a command line may do: its descriptors, what each is, and both threads' rules."""

    table: FdTable
    descriptors: dict[int, tuple[str, str]]  # by number: labels, meaning
    main: list[Rule]
    ring: list[Rule]


def main(argv: list[str]) -> str | bytes:
    """The command; `argv` without the program's name and `policy`. Returns what it prints."""
    flags = [each for each in argv if each in OPTIONS]
    rest = [each for each in argv if each not in OPTIONS]
    line = commandline.with_demo(_command_line(rest))
    if line.help:
        return USAGE.rstrip()
    if line.config is None:
        raise UsageError(f"Missing KERNEL operand; see {HELP}")
    shown = show(line.config)
    if "--json" in flags:
        return json.dumps(facts(shown), indent=2)
    if "--bpf" in flags:
        if os.isatty(1):
            raise UsageError("--bpf: output is binary; add | scmp_bpf_disasm, or > FILE")
        return _compiled(shown.main, shown.table)
    return text(shown, shutil.get_terminal_size().columns if os.isatty(1) else None)


def _command_line(arguments: list[str]) -> commandline.CommandLine:
    """`OPTIONS KERNEL ARGS`; where the kernel comes first, `KERNEL OPTIONS` as well."""
    if len(arguments) > 1 and not arguments[0].startswith("-"):
        try:
            line = commandline.parse([*arguments[1:], arguments[0]])
        except UsageError:
            pass
        else:
            if line.config and line.config.kernel == arguments[0] and not line.config.args:
                return line
    return commandline.parse(arguments, HELP, OPTIONS)


def show(config: Config) -> Shown:
    """Compute what a run of `config` may do; raises TenderError."""
    if config.sandbox == "off":
        raise UsageError("--sandbox=off: there is no policy without the sandbox")
    if config.replay:
        config, image = _recorded(config)
    elif config.restore:
        config, image = _restored(config)
    else:
        image = open_image(config.kernel)
    is_spt = image.target == lib.ABI_TARGET_SPT
    if is_spt:
        from tender.spt import refusals

        refusals.check(config, image.machine)
    nets = assign(image.manifest, lib.MFT_DEV_NET_BASIC, config.net)
    blocks = assign(image.manifest, lib.MFT_DEV_BLOCK_BASIC, config.block)
    if config.replay is None:
        check_all_attached(image.manifest, [*nets, *blocks])
    table = _spt_table(config, nets, blocks) if is_spt else _table(config, image, nets, blocks)
    specs: dict[int, NetValue | BlockValue] = {**nets, **blocks}
    devices = table.devices
    numbers = {fdtable.FIXED[name]: (name, MEANINGS[name]) for name in table.fixed}
    for device in image.manifest.devices:
        if device.handle in devices:
            kind = "network" if device.handle in nets else "block"
            what = f"{kind} device '{device.name}': {_what(specs[device.handle])}"
            numbers[fdtable.device_fd(device.handle)] = ("/".join(devices[device.handle]), what)
        overlay = overlay_handle(device.handle)
        if overlay in devices and not is_spt:
            file = getattr(specs[device.handle], "overlay", None)
            numbers[fdtable.device_fd(overlay)] = (
                "/".join(devices[overlay]),
                f"what the guest writes to '{device.name}': {file}",
            )
        if device.handle in table.pcaps:
            what = f"the packets of '{device.name}'"
            numbers[fdtable.pcap_fd(device.handle)] = ("pcap", what)
    return Shown(
        table,
        dict(sorted(numbers.items())),
        seccomp.build(table.policies(), table),
        seccomp.build(table.ring_policies(), table),
    )


def _restored(config: Config) -> tuple[Config, Image]:
    """What is restored: with the options of the saved guest, and the headers of its image."""
    from tender.snapshot.restore import SnapshotFile

    saved = SnapshotFile(config.kernel, clone=True)
    saved.close()
    return saved.config(config), saved.image


def _recorded(config: Config) -> tuple[Config, Image]:
    """What `config` has a record of, and its image."""
    from tender.image.file import ImageFile
    from tender.replay.file import Record

    record = Record(str(config.replay))
    config = record.config(config)
    record.close()
    file = ImageFile(config.kernel, config.kernel_fd)
    file.close()
    return config, file.image


def _spt_table(
    config: Config, nets: Mapping[int, NetValue], blocks: Mapping[int, BlockValue]
) -> FdTable:
    disks = {
        handle: (_capacity(spec), spec.sector_size, _overlay_bytes(spec))
        for handle, spec in blocks.items()
    }
    fixed, core = ["console", "stderr", "epoll", "timer"], None
    fixed += ["pidfile"] if config.pidfile is not None else []
    fixed += ["stats"] if counters.folder() else []
    fixed += ["report-file"] if config.report is not None else []
    if config.dumpcore is not None:
        fixed += ["core", "core-helper"]
        core = Target.size(config.mem_bytes // PAGE_SIZE * PAGE_SIZE)
    return fdtable.spt_table(tuple(fixed), nets, disks, core)


def _overlay_bytes(spec: BlockValue) -> int:
    if not isinstance(spec, BlockFile) or not spec.overlay:
        return 0
    from tender.host import overlay

    return overlay.size(spec.overlay, _capacity(spec))


def _table(
    config: Config, image: Image, nets: Mapping[int, NetValue], blocks: Mapping[int, BlockValue]
) -> FdTable:
    kind = _kind(config, image)
    specs: dict[int, NetValue | BlockValue] = {**nets, **blocks}
    devices = fdtable.labels(specs)
    fixed = ["console", "stderr", *kind.labels]
    mem_bytes = usable_memory(config.mem_bytes)
    ring_bytes = ring_region(config, image, mem_bytes, kind, devices)
    fixed += ["kick"] if ring_bytes else []
    fixed += ["stats"] if counters.folder() else []
    fixed += ["trace"] if config.trace is not None else []
    fixed += [name for name in ("record", "replay") if getattr(config, name) is not None]
    fixed += ["report-file"] if config.report is not None else []
    fixed += ["pidfile"] if config.pidfile is not None else []
    if config.gdb is not None:
        fixed += ["gdb-in", "gdb-out"] if config.gdb == "-" else ["gdb-listen", "gdb"]
    if config.dumpcore is not None or config.snapshots is not None:
        fixed += ["memory-file" if kind.shares_memory else "pagemap"]
    fixed += ["core", "core-helper"] if config.dumpcore is not None else []
    fixed += ["snapshot", "snapshot-helper"] if config.snapshots is not None else []
    capacities = {handle: _capacity(spec) for handle, spec in blocks.items()}
    capacities |= {
        overlay_handle(handle): _overlay_capacity(capacity)
        for handle, capacity in capacities.items()
        if overlay_handle(handle) in devices
    }
    sizes = fdtable.sizes(devices, capacities, file_sizes(config, mem_bytes - ring_bytes))
    pcaps = tuple(assign_pcaps(image.manifest, config.pcap))
    return FdTable(kind.name, tuple(fixed), devices, sizes, pcaps=pcaps)


def _kind(config: Config, image: Image) -> Kind:
    """What would run the guest; --cpu=auto decides as it does on this machine."""
    wanted = choice(config)
    if wanted != "auto":
        return KINDS[wanted]
    with Cleanup() as cleanup:
        return choose(config, image, HostClock(), cleanup).kind


def _capacity(spec: BlockValue) -> int:
    """The size of a disk; the largest offset there is where it can't be opened."""
    if isinstance(spec, BlockFile):
        try:
            fd = os.open(spec.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return OFFSET_MAX
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        except OSError:
            return OFFSET_MAX
        finally:
            os.close(fd)
    return OFFSET_MAX


def _overlay_capacity(capacity: int) -> int:
    from tender.host.overlay_file import Layout

    return min(Layout(capacity).size, OFFSET_MAX)


def _what(spec: Any) -> str:
    """The host's side of a device."""
    for field in ("name", "path"):
        if hasattr(spec, field):
            rights = ", overlay" if getattr(spec, "overlay", False) else ""
            rights = ", read-only" if getattr(spec, "readonly", False) else rights
            return f"{getattr(spec, field)}{rights}"
    return f"@{spec.fd}" if hasattr(spec, "fd") else "through passt"


REASON_COLUMN = 41
WHAT_COLUMN = 31


def text(shown: Shown, width: int | None = None) -> str:
    """The policy as text, wrapped to a terminal of `width` columns."""
    is_spt = shown.table.cpu == "spt"
    who = "the guest's process" if is_spt else "the tender"
    lines = [f"While the guest runs, {who} holds these descriptors and no others:", ""]
    for number, (name, what) in shown.descriptors.items():
        lines += _folded(f"  {number:3}  @{name:<22} {what}", WHAT_COLUMN, width)
    lines += ["", "and may make these system calls; any other ends it (SIGSYS):", ""]
    lines += _entries(shown.main, width)
    if shown.ring:
        lines += ["", "The thread of its network ring may make these:", ""]
        lines += _entries(shown.ring, width)
    if shown.table.cpu == "native":
        lines += [
            "",
            "The guest's process holds no descriptor and may call rt_sigreturn and futex(turn,",
            "FUTEX_WAIT|FUTEX_WAKE, _, NULL); any other call is an exception of the guest.",
        ]
    if shown.table.cpu == "soft":
        lines += [
            "",
            "The translator of the software CPU has memory that it may write and execute.",
        ]
    return "\n".join(lines)


def _entries(rules: list[Rule], width: int | None) -> list[str]:
    """One entry a line, with its reason; the reason of a long entry is on the next line."""
    lines = []
    for entry in dict.fromkeys(rule.entry for rule in rules):
        call = f"  {entry}"
        if len(call) < REASON_COLUMN - 1:
            lines += _folded(f"{call:<40} {entry.reason}", REASON_COLUMN, width)
        else:
            lines += _folded(call, 4, width)
            lines += _folded(f"{'':<40} {entry.reason}", REASON_COLUMN, width)
    return lines


def _folded(line: str, column: int, width: int | None) -> list[str]:
    """`line` wrapped between words to `width`, with the further lines indented to `column`."""
    if width is None or len(line) <= width or width < column + 20:
        return [line]
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )


def facts(shown: Shown) -> dict[str, Any]:
    """The policy for --json; a filter is a list of instructions [code, jt, jf, k]."""
    return {
        "cpu": shown.table.cpu,
        "descriptors": [
            {"number": number, "names": name.split("/"), "is": what}
            for number, (name, what) in shown.descriptors.items()
        ],
        "policies": shown.table.policies(),
        "calls": _calls(shown.main),
        "ring_calls": _calls(shown.ring),
        "bpf": _instructions(_compiled(shown.main, shown.table)),
        "ring_bpf": _instructions(seccomp.compile(shown.ring)) if shown.ring else [],
    }


def _compiled(rules: list[Rule], table: FdTable) -> bytes:
    """The filter; an spt guest's process says which call it was."""
    return seccomp.compile(rules, trap=table.cpu == "spt")


def _instructions(filter: bytes) -> list[tuple[int, int, int, int]]:
    """code, jt, jf and k of each struct sock_filter (linux/filter.h)."""
    return list(struct.iter_unpack("=HBBI", filter))


def _calls(rules: list[Rule]) -> list[dict[str, Any]]:
    entries = dict.fromkeys(rule.entry for rule in rules)
    return [
        {"call": entry.call, "arguments": list(entry.arguments), "reason": entry.reason}
        for entry in entries
    ]
