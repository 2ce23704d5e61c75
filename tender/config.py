"""What a user asks for, as values: the machine and its devices. No I/O.

Each value checks its fields when it is made, whoever makes it, and raises UsageError. Whether the
host can provide what it describes is found out where it is opened.
"""

from __future__ import annotations

import os

from tender.boot import layout
from tender.dataclass import dataclass, field
from tender.errors import DeviceError, InvalidValue, UsageError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping, Sequence
    from typing import Any, TypeAlias

    from tender.dataclass import Check, Converted

    NetValue: TypeAlias = "Tap | Descriptor | UserNet"
    BlockValue: TypeAlias = "BlockFile | BlockDescriptor | BlockRemote"

    Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    MacField: TypeAlias = Converted[str | bytes | None, bytes | None]
    AddressesField: TypeAlias = Converted[str | Sequence[str], tuple[str, ...]]
    PathField: TypeAlias = Converted[Path, str]
    OptionalPathField: TypeAlias = Converted[Path | None, str | None]
    TraceField: TypeAlias = Converted[Path | int | None, str | int | None]
    GatewayField: TypeAlias = Converted[str | None, str]
    UserField: TypeAlias = Converted[str | int | None, str | None]

TARGETS = ("hvt", "spt")
ENGINES = ("c", "python")
SECTOR_SIZE = 512
SECTOR_SIZE_MAX = 1 << 15  # the largest power of two that the manifest's u16 holds
OVERLAY_MIN, OVERLAY_MAX = 4096, 1 << 30  # bytes; the second is that of the default
MTU = 1500  # of a socket: Ethernet's own
MTU_MIN, MTU_MAX = 68, 65535  # what IPv4 needs, and what the manifest's u16 holds
SANDBOXES = ("on", "require", "off")
CPUS = ("auto", "kvm", "native", "soft")
VIRTUAL_START_NS = 1_767_225_600 * 1_000_000_000  # 2026-01-01T00:00:00Z
VIRTUAL_TICK_NS = 1000
_INTERFACE_NAME_MAX = 15  # bytes: IFNAMSIZ with its NUL
_FD_MAX = (1 << 31) - 1
_INT64_MAX = (1 << 63) - 1
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
NAME_MAX = 64  # letters of a guest's name
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


# Checks of fields: each takes the field's name and a value, and returns what is kept.


def optional(check: Check) -> Check:
    """The same check, where None is allowed as well."""
    return lambda name, value: None if value is None else check(name, value)


def whole(least: int, most: int, expected: str = "") -> Check:
    """A whole number of a range; `expected` describes it in place of its bounds."""
    expected = expected or f"a whole number from {least} to {most}"

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InvalidValue(name, value, expected)
        return int(value)

    return check


def one_of(choices: tuple[str, ...]) -> Check:
    """One of the choices."""

    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise InvalidValue(name, value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        return str(value)

    return check


def as_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InvalidValue(name, value, "True or False")
    return value


def as_path(name: str, value: Any) -> str:
    """A path, which is kept as a string."""
    text = _text(os.fsdecode(value)) if isinstance(value, (str, bytes, os.PathLike)) else None
    if not text:
        raise InvalidValue(name, value, "a path")
    return text


def as_interface_name(name: str, value: Any) -> str:
    """A name that Linux lets an interface have (dev_valid_name(), and no pattern)."""
    text = _text(value) or ""
    if (
        not 0 < len(os.fsencode(text)) <= _INTERFACE_NAME_MAX
        or text in (".", "..")
        or any(letter in "/:%," or letter.isspace() for letter in text)
    ):
        raise InvalidValue(
            name,
            value,
            f"an interface name of 1 to {_INTERFACE_NAME_MAX} bytes, without space and /:%,",
        )
    return text


def as_guest_name(name: str, value: Any) -> str:
    """A name for lists of guests."""
    text = _text(value) or ""
    if not 0 < len(text) <= NAME_MAX or not _NAME_LETTERS.issuperset(text):
        expected = f"a name of 1 to {NAME_MAX} letters, digits, '.', '_' and '-'"
        raise InvalidValue(name, value, expected)
    return text


def as_mac(name: str, value: Any) -> bytes | None:
    """A unicast MAC address: 6 bytes, or a string as 52:54:00:12:34:56.

    None means a random one, and so does all zero, as for solo5-hvt: it is kept as None.
    """
    if value is None:
        return None
    mac = _parse_mac(value) if isinstance(value, str) else value
    if not isinstance(mac, bytes) or len(mac) != 6 or mac[0] & 1:
        raise InvalidValue(name, value, "a unicast MAC address, as in 52:54:00:12:34:56")
    return mac if any(mac) else None


def _parse_mac(text: str) -> bytes:
    parts = text.split(":")
    # int() itself would take a sign, spaces and the digits of other scripts as well.
    if all(1 <= len(part) <= 2 and _HEX_DIGITS.issuperset(part) for part in parts):
        return bytes(int(part, 16) for part in parts)
    return b""


def as_addresses(name: str, value: Any) -> tuple[str, ...]:
    """One address with its prefix length, or several."""
    if not isinstance(value, (str, tuple, list)):
        raise InvalidValue(name, value, "a sequence of addresses")
    return tuple(as_address(name, each) for each in ((value,) if isinstance(value, str) else value))


def as_address(name: str, value: Any) -> str:
    """`10.0.0.1/24` or `fd00::1/64`: an address with its prefix length."""
    import ipaddress

    try:
        if isinstance(value, str) and "/" in value:
            return ipaddress.ip_interface(value).with_prefixlen
    except ValueError:
        pass
    raise InvalidValue(name, value, "an address with its prefix length, as in 10.0.0.1/24")


def as_ipv4_interface(name: str, value: Any) -> str:
    """`10.0.0.1/24`."""
    address = as_address(name, value)
    if ":" in address:
        raise InvalidValue(name, value, "an IPv4 address with its prefix length, as in 10.0.0.1/24")
    return address


def as_ipv4(name: str, value: Any) -> str:
    """`10.0.0.1`."""
    if not _is_ipv4(value):
        raise InvalidValue(name, value, "an IPv4 address, as in 10.0.0.1")
    return str(value)


def _is_ipv4(value: Any) -> bool:
    import ipaddress

    try:
        return isinstance(value, str) and bool(ipaddress.IPv4Address(value))
    except ValueError:
        return False


def _first_address(interface: ipaddress.IPv4Interface) -> str:
    """The first address of its network that is not its own; its own where there is no other."""
    hosts = interface.network.hosts()
    return str(next((host for host in hosts if host != interface.ip), interface.ip))


def as_forwards(name: str, value: Any) -> dict[int | str, int]:
    """Ports of the host, with or without an IPv4 address, to ports of the guest; 0: a free one."""
    kept: dict[int | str, int] = {}
    for outside, inside in value.items() if hasattr(value, "items") else [(value, None)]:
        at, colon, text = outside.rpartition(":") if isinstance(outside, str) else ("", "", outside)
        port, to = _port(text), _port(inside)
        if port is None or not to or (colon and not _is_ipv4(at)):
            raise InvalidValue(
                name, value, "host ports to guest ports, as in {8080: 80} or {'0.0.0.0:8080': 80}"
            )
        kept[f"{at}:{port}" if colon else port] = to
    return kept


def _port(value: Any) -> int | None:
    """The number of a port, which may be a string; None for anything else."""
    if isinstance(value, str) and is_number(value):
        value = int(value)
    is_port = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 16
    return int(value) if is_port else None


def as_sector_size(name: str, value: Any) -> int:
    """A power of two."""
    is_size = isinstance(value, int) and SECTOR_SIZE <= value <= SECTOR_SIZE_MAX
    if not is_size or value & (value - 1):
        raise InvalidValue(name, value, f"a power of two from {SECTOR_SIZE} to {SECTOR_SIZE_MAX}")
    return int(value)


def as_overlay(name: str, value: Any) -> bool | int:
    """True or False, or a size in bytes."""
    return value if isinstance(value, bool) else _overlay_size(name, value)


def check_capacity(capacity: int, size: int) -> None:
    """Raise DeviceError unless `capacity` bytes are a number of sectors of `size` bytes."""
    if capacity <= 0 or capacity % size:
        raise DeviceError(
            f"Backing storage size must be block aligned: {capacity} bytes is not a multiple of "
            f"{size}, or nothing"
        )


def _arguments(_: str, value: Any) -> tuple[str, ...]:
    texts = tuple(map(_text, value))
    for number, (argument, text) in enumerate(zip(value, texts, strict=True), 1):
        if text is None:
            expected = "a string that can be encoded, without NUL"
            raise UsageError(f"argument {number} of the guest: {shown(argument)} is not {expected}")
    return texts  # type: ignore[return-value]


def _text(value: Any) -> str | None:
    """A string that the kernel can be given: it can be encoded, and has no NUL. Else None."""
    try:
        if isinstance(value, str) and b"\0" not in os.fsencode(value):
            return str.__str__(value)  # of a subclass, a plain one
    except UnicodeEncodeError:
        pass
    return None


def _trace(name: str, value: Any) -> str | int:
    return as_descriptor(name, value) if isinstance(value, int) else as_path(name, value)


def _gdb(name: str, value: Any) -> int | str:
    if value == "-" or (_text(value) and "/" in str(value)):
        return str(value)
    port = _port(value)
    if not port:
        raise InvalidValue(
            name, value, "a port number, the path of a socket (with a /), or - for standard input"
        )
    return port


def _pcap(name: str, value: Any) -> tuple[tuple[str | None, str], ...]:
    return tuple((device, as_path(name, path)) for device, path in value)


def _user(name: str, value: Any) -> str:
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    text = str(value) if is_id else _text(value)
    if text is None:
        raise InvalidValue(name, value, "a user: a name or a number")
    return text


def _clock(name: str, value: Any) -> VirtualTime:
    if not isinstance(value, VirtualTime):
        raise InvalidValue(name, value, "a VirtualTime(...)")
    return value


as_cpu = one_of(CPUS)
as_port = whole(1, 65535, "a port number from 1 to 65535")
as_descriptor = whole(0, _FD_MAX, "the number of an open descriptor")
as_mtu = whole(MTU_MIN, MTU_MAX)
_overlay_size = whole(OVERLAY_MIN, _INT64_MAX, f"a size of at least {OVERLAY_MIN} bytes")
_count = whole(1, _INT64_MAX)


@dataclass
class Tap:
    """A tap interface of the host.

    Args:
        name: The interface.
        create: Make it for this guest; it is gone when the guest ends. Else it must exist.
        addr: With `create`, its addresses with prefix lengths, as in "10.0.0.1/24".
        mtu: With `create`, in bytes.
        bridge: With `create`, the bridge that it is added to.
        mac: The guest's address: 6 bytes, or a string as in "52:54:00:12:34:56". Random and
            locally administered when None.

    Raises:
        UsageError: a field has a wrong type or value. Whether the host has it is found out when
            the guest starts.
    """

    name: str = field(as_interface_name)
    create: bool = field(as_flag, default=False)
    addr: AddressesField = field(as_addresses, default=())
    mtu: int | None = field(optional(as_mtu), default=None)
    bridge: str | None = field(optional(as_interface_name), default=None)
    mac: MacField = field(as_mac, default=None)

    def __post_init__(self) -> None:
        if not self.create and (self.addr or self.mtu or self.bridge):
            raise UsageError("addr, mtu and bridge set up a new tap, and need create")


@dataclass
class Descriptor:
    """An open descriptor: a tap, or a socket that carries one frame per message.

    It stays the program's: the guest has a copy.

    Args:
        fd: Of a tap, or of a datagram or seqpacket socket.
        mtu: In bytes; None: the tap's, or 1500 for a socket.
        mac: As in Tap.
        sync_fd: A seqpacket socket on which the guests and hosts of a network agree on their
            virtual time (tender/rendezvous.py); at most one for a guest, which must have a virtual
            clock.

    Raises:
        UsageError: as for Tap.
    """

    fd: int = field(as_descriptor)
    mtu: int | None = field(optional(as_mtu), default=None)
    mac: MacField = field(as_mac, default=None)
    sync_fd: int | None = field(optional(as_descriptor), default=None)


@dataclass
class UserNet:
    """A network through passt: without root, without a tap.

    The guest reaches what the host reaches.

    Args:
        forward: TCP ports of the host to ports of the guest, as in {8080: 80}. Port 0 of the host
            is one that is free when the guest starts; `Guest.ports` has it.
        forward_udp: The same for UDP.
        host_address: What these ports are bound to, except those whose key has an address of its
            own, as in "0.0.0.0:8080".
        address: The guest's address with its prefix length; DHCP gives it as well.
        gateway: The gateway's address, in the same network. None: the first one that is not the
            guest's.
        mtu: In bytes.
        mac: As in Tap.
        reach_host: What the guest sends to `gateway` goes to the host's own 127.0.0.1; else it
            reaches no address of the host's loopback.

    Raises:
        UsageError: as for Tap.
    """

    forward: Mapping[int | str, int] = field(as_forwards, default={})
    forward_udp: Mapping[int | str, int] = field(as_forwards, default={})
    host_address: str = field(as_ipv4, default="127.0.0.1")
    address: str = field(as_ipv4_interface, default="10.0.0.2/24")
    gateway: GatewayField = field(optional(as_ipv4), default=None)
    mtu: int = field(as_mtu, default=MTU)
    mac: MacField = field(as_mac, default=None)
    reach_host: bool = field(as_flag, default=False)

    def __post_init__(self) -> None:
        import ipaddress

        interface = ipaddress.IPv4Interface(self.address)
        if self.gateway is None:
            self.__dict__["gateway"] = first = _first_address(interface)
            if first == str(interface.ip):
                expected = "an address of a network with room for a gateway"
                raise InvalidValue("address", self.address, expected)
        gateway = ipaddress.IPv4Address(self.gateway)
        if gateway not in interface.network or gateway == interface.ip:
            expected = f"another address of the network of {self.address}"
            raise InvalidValue("gateway", self.gateway, expected)


@dataclass
class BlockFile:
    """A file or block device of the host. A writable one is locked while the guest runs.

    Args:
        path: Of the file; its size must be a multiple of `sector_size`.
        readonly: Whether the guest may only read.
        sector_size: In bytes, a power of two from 512 on.
        overlay: Leave the file as it was: what the guest writes is in memory, and gone with it.
            A number is how many bytes that may be, in pages of 4096; True: a quarter of the
            machine's memory, at most 1 GiB. A write for which there is no room fails.

    Raises:
        UsageError: as for Tap.
    """

    path: PathField = field(as_path)
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)  # bytes
    overlay: bool | int = field(as_overlay, default=False)

    def __post_init__(self) -> None:
        if self.readonly and self.overlay:
            raise UsageError("a read-only disk needs no overlay: leave out one of the two")


@dataclass
class BlockDescriptor:
    """An open descriptor of a file, a block device or a memfd; locked as a BlockFile is.

    Args:
        fd: It stays the program's: the guest has a copy.
        readonly: Whether the guest may only read.
        sector_size: In bytes, a power of two from 512 on.

    Raises:
        UsageError: as for Tap.
    """

    fd: int = field(as_descriptor)
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)


@dataclass
class BlockRemote:
    """A device that is served at the other end of a seqpacket socket: see host/remote.py."""

    fd: int = field(as_descriptor)
    capacity: int = field(whole(0, _INT64_MAX))  # bytes
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)

    def __post_init__(self) -> None:
        check_capacity(self.capacity, self.sector_size)


@dataclass
class VirtualTime:
    """A guest's clock that advances only by what the guest does.

    Args:
        start_ns: Its first time, in nanoseconds since the epoch; 2026-01-01 by default.
        tick_ns: How much it advances each time it is read, in nanoseconds.

    Raises:
        UsageError: as for Tap.
    """

    start_ns: int = field(
        whole(0, (1 << 64) - 1, "a time between 1970 and 2554"), default=VIRTUAL_START_NS
    )
    tick_ns: int = field(whole(1, _INT64_MAX), default=VIRTUAL_TICK_NS)


@dataclass
class Config:
    """A guest to run.

    A device's name may be None where the manifest declares just one of its kind that nothing
    else is attached to.
    """

    kernel: PathField = field(as_path)
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
    report: OptionalPathField = field(optional(as_path), default=None)
    # Where the command writes its PID: see tender/observe/pidfile.py.
    pidfile: OptionalPathField = field(optional(as_path), default=None)
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


def guest_name(config: Config) -> str:
    """The guest's name in lists: `name`, or else the file name of its kernel."""
    if config.name is not None:
        return config.name
    name = "".join(
        letter if letter in _NAME_LETTERS else "_" for letter in os.path.basename(config.kernel)
    )
    return name[:NAME_MAX] or "guest"


def is_number(text: str) -> bool:
    """Whether it is a number of decimal digits, and not longer than a 64-bit number can be.

    Python itself refuses to read those of more than 4300 digits.
    """
    return text.isascii() and text.isdigit() and len(text) < 20


def parse_size(text: str, unit: str = "M") -> int:
    """A size in bytes: `64` (in `unit`), `64M`, `1G`, `65536K`, also with `B` or `iB`.

    Raises ValueError.
    """
    number = text.upper().removesuffix("B").removesuffix("I")
    if number[-1:] in _UNITS:
        unit = number[-1]
        number = number[:-1]
    if not is_number(number) or not int(number):
        raise ValueError(text)
    return int(number) * _UNITS.get(unit, 1)


def usable_memory(mem_bytes: int) -> int:
    """The guest memory to provide for what was asked for: a multiple of 2 MiB, at least 2 MiB."""
    return max(layout.MEM_MIN, mem_bytes // layout.MEM_STEP * layout.MEM_STEP)
