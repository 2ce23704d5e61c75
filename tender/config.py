"""What a user asks for, as values: the machine and its devices. No I/O.

Each value checks its fields when it is made, whoever makes it, and raises UsageError. Whether the
host can provide what it describes is found out where it is opened. What devices are attached to
is in backends.py.
"""

from __future__ import annotations

from tender.boot import layout
from tender.checks import (
    INT64_MAX,
    as_descriptor,
    as_flag,
    as_path,
    one_of,
    optional,
    plain_text,
    port_number,
    whole,
)
from tender.dataclass import dataclass, field
from tender.errors import InvalidValue, UsageError, setting, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from tender.backends import BlockValue, NetValue, Rate
    from tender.checks import Path, PathField
    from tender.dataclass import Converted

    OptionalPathField: TypeAlias = Converted[Path | None, str | None]
    SnapshotsField: TypeAlias = Converted[
        Path | tuple[int, ...] | None, str | tuple[int, int] | None
    ]
    TraceField: TypeAlias = Converted[Path | int | None, str | int | None]
    UserField: TypeAlias = Converted[str | int | None, str | None]

TARGETS = ("hvt", "spt")
ENGINES = ("c", "python")
CLOCK_RESUMES = ("continue", "catch-up")
SANDBOXES = ("on", "require", "off")
CPUS = ("auto", "kvm", "native", "soft")
VIRTUAL_START_NS = 1_767_225_600 * 1_000_000_000  # 2026-01-01T00:00:00Z
VIRTUAL_TICK_NS = 1000
NAME_MAX = 64  # letters of a guest's name
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def as_guest_name(name: str, value: Any) -> str:
    """A name for lists of guests."""
    text = plain_text(value) or ""
    if not 0 < len(text) <= NAME_MAX or not _NAME_LETTERS.issuperset(text):
        expected = f"a name of 1 to {NAME_MAX} letters, digits, '.', '_' and '-'"
        raise InvalidValue(name, value, expected)
    return text


def _arguments(_: str, value: Any) -> tuple[str, ...]:
    texts = tuple(map(plain_text, value))
    for number, (argument, text) in enumerate(zip(value, texts, strict=True), 1):
        if text is None:
            expected = "a string that can be encoded, without NUL"
            raise UsageError(f"argument {number} of the guest: {shown(argument)} is not {expected}")
    return texts  # type: ignore[return-value]


def _trace(name: str, value: Any) -> str | int:
    return as_descriptor(name, value) if isinstance(value, int) else as_path(name, value)


def _snapshots(name: str, value: Any) -> str | tuple[int, int]:
    if isinstance(value, tuple):
        file, requests = value
        return as_descriptor(name, file), as_descriptor(name, requests)
    return as_path(name, value)


def _gdb(name: str, value: Any) -> int | str:
    if value == "-" or (plain_text(value) and "/" in str(value)):
        return str(value)
    port = port_number(value)
    if not port:
        raise InvalidValue(
            name, value, "a port number, the path of a socket (with a /), or - for standard input"
        )
    return port


def _pcap(name: str, value: Any) -> tuple[tuple[str | None, str], ...]:
    return tuple((device, as_path(name, path)) for device, path in value)


def _user(name: str, value: Any) -> str:
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    text = str(value) if is_id else plain_text(value)
    if text is None:
        raise InvalidValue(name, value, "a user: a name or a number")
    return text


def _clock(name: str, value: Any) -> VirtualTime:
    if not isinstance(value, VirtualTime):
        raise InvalidValue(name, value, "a VirtualTime(...)")
    return value


as_cpu = one_of(CPUS)
_count = whole(1, INT64_MAX)


@dataclass
class VirtualTime:
    """A guest's clock that advances only by what the guest does.

    Args:
        start_ns: Its first time, in nanoseconds since the epoch; 2026-01-01 by default.
        tick_ns: How much it advances each time it is read, in nanoseconds.

    Raises:
        UsageError: a field has a wrong type or value.
    """

    start_ns: int = field(
        whole(0, (1 << 64) - 1, "a time between 1970 and 2554"), default=VIRTUAL_START_NS
    )
    tick_ns: int = field(whole(1, INT64_MAX), default=VIRTUAL_TICK_NS)


@dataclass
class Config:
    """A guest to run.

    A device's name may be None where the manifest declares just one of its kind that nothing
    else is attached to.
    """

    kernel: PathField = field(as_path)  # with kernel_fd, what messages call it
    args: tuple[str, ...] = field(_arguments, default=())
    mem_bytes: int = field(
        whole(1, layout.MEM_MAX, f"a size of at most {layout.MEM_MAX >> 20} MiB"),
        default=layout.MEM_DEFAULT,
    )
    net: tuple[tuple[str | None, NetValue], ...] = ()
    block: tuple[tuple[str | None, BlockValue], ...] = ()
    dumpcore: OptionalPathField = field(optional(as_path), default=None)
    console_fd: int = field(as_descriptor, default=1)
    console_limit: int | None = field(optional(_count), default=None)  # bytes per second
    # A file or descriptor for a line of JSON per hypercall.
    trace: TraceField = field(optional(_trace), default=None)
    # Files for the packets of network devices.
    pcap: tuple[tuple[str | None, str], ...] = field(_pcap, default=())
    # Rate limits of network and block devices.
    net_rate: tuple[tuple[str | None, Rate], ...] = ()
    block_rate: tuple[tuple[str | None, Rate], ...] = ()
    report: OptionalPathField = field(optional(as_path), default=None)
    # An open descriptor of the kernel, which the tender closes.
    kernel_fd: int | None = field(optional(as_descriptor), default=None)
    # The kernel is a snapshot, which goes on; see tender/snapshot/.
    restore: bool = field(as_flag, default=False)
    # ... also where it went on before.
    clone: bool = field(as_flag, default=False)
    # ... and what became of the time since it was saved.
    clock_resume: str = field(one_of(CLOCK_RESUMES), default=CLOCK_RESUMES[0])
    # The folder of the file that the guest is saved to on request; or, of a program, that file and
    # the socket with its requests.
    snapshots: SnapshotsField = field(optional(_snapshots), default=None)
    # Where the command writes its PID: see tender/observe/pidfile.py.
    pidfile: OptionalPathField = field(optional(as_path), default=None)
    # Files that the run is recorded in, or replayed from: see tender/replay/.
    record: OptionalPathField = field(optional(as_path), default=None)
    replay: OptionalPathField = field(optional(as_path), default=None)
    # Offer the network ring; None: where it helps.
    net_ring: bool | None = field(optional(as_flag), default=None)
    # What answers hypercalls whose device is a plain descriptor.
    engine: str = field(one_of(ENGINES), default=ENGINES[0])
    # Ask the kernel to hold guest memory in pages of 2 MiB.
    hugepages: bool = field(as_flag, default=False)
    cpu: str = field(as_cpu, default=CPUS[0])  # see tender/accel.py
    clock: VirtualTime | None = field(optional(_clock), default=None)  # None: the host's
    sandbox: str = field(one_of(SANDBOXES), default=SANDBOXES[0])  # see tender/sandbox/sandbox.py
    # Who the tender becomes when root starts it: NAME or UID[:GID].
    user: UserField = field(optional(_user), default=None)
    # Let the guest execute its heap where data is not executable: see tender/accel.py.
    exec_heap: bool = field(as_flag, default=False)
    # Where a debugger connects: a port of 127.0.0.1, the path of a socket, or "-".
    gdb: int | str | None = field(optional(_gdb), default=None)
    # The socket of the manager of services, as NOTIFY_SOCKET names it.
    notify: str | None = None
    # How many the guest may execute; None: any number.
    instructions: int | None = field(optional(_count), default=None)
    # The only target whose guests run: under the name of a tender of Solo5's.
    target: str | None = field(optional(one_of(TARGETS)), default=None)
    name: str | None = field(optional(as_guest_name), default=None)  # see guest_name

    def __post_init__(self) -> None:
        if self.record is not None and (self.restore or self.snapshots is not None):
            other = (
                setting("--restore", "restore")
                if self.restore
                else setting("--snapshots", "snapshots")
            )
            raise UsageError(f"{setting('--record', 'record')}: it does not go with {other}")
        if self.clock is not None and (self.net_rate or self.block_rate):
            raise UsageError("a rate limit is one of the host's time, and the clock is virtual")


def guest_name(config: Config) -> str:
    """The guest's name in lists: `name`, or else the file name of its kernel."""
    if config.name is not None:
        return config.name
    name = "".join(
        letter if letter in _NAME_LETTERS else "_" for letter in config.kernel.rpartition("/")[2]
    )
    return name[:NAME_MAX] or "guest"


def usable_memory(mem_bytes: int) -> int:
    """The guest memory to provide for what was asked for: a multiple of 2 MiB, at least 2 MiB."""
    return max(layout.MEM_MIN, mem_bytes // layout.MEM_STEP * layout.MEM_STEP)
