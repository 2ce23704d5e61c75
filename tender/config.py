"""What a user asks for, as values: the machine and its devices. No I/O.

The rule here: a value says what is wanted, in the user's terms; whether it can be had is found
out where it is attached.
"""

from __future__ import annotations

from tender._abi import lib
from tender.boot import layout
from tender.dataclass import dataclass
from tender.errors import ConfigError, DeviceError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TypeAlias, TypeVar

    from tender.image.manifest import Device, Manifest

    NetValue: TypeAlias = "Tap | Descriptor | StreamNet | UserNet"
    BlockValue: TypeAlias = "BlockFile | BlockDescriptor | BlockRemote"

    Spec = TypeVar("Spec")

ENGINES = ("c", "python")
SECTOR_SIZE = 512
MTU = 1500  # of a socket: Ethernet's own
MTU_MIN, MTU_MAX = 68, 65535  # what IPv4 needs, and what the manifest can say
SANDBOXES = ("on", "require", "off")
CPUS = ("auto", "kvm", "soft")
VIRTUAL_START_NS = 1_767_225_600 * 1_000_000_000  # 2026-01-01T00:00:00Z
VIRTUAL_TICK_NS = 1000
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass
class Tap:
    """A tap interface of the host.

    With `create` it is made for this guest, set up with `addr` (as in `10.0.0.1/24`), `mtu` and
    `bridge`, and gone when the guest ends. `mac` is the guest's address (6 bytes), random and
    locally administered when None.
    """

    name: str
    create: bool = False
    addr: tuple[str, ...] = ()
    mtu: int | None = None
    bridge: str | None = None
    mac: bytes | None = None


@dataclass
class Descriptor:
    """An open descriptor: a tap, or a socket that carries one frame per message.

    `sync_fd` is a seqpacket socket on which those on this network agree on their virtual time
    (tender/rendezvous.py); one for a guest, which must have a virtual clock.
    """

    fd: int
    mtu: int | None = None  # None: the tap's, or 1500 for a socket
    mac: bytes | None = None
    sync_fd: int | None = None


@dataclass
class StreamNet:
    """A stream socket on which 4 bytes (big-endian) before each frame say its length."""

    fd: int
    mtu: int | None = None  # None: 1500
    mac: bytes | None = None


@dataclass
class UserNet:
    """A network through passt: without root, without a tap.

    The guest is at `address`, which DHCP tells it as well, and reaches what the host reaches. TCP
    ports of the host come to the guest by `forward` ({8080: 80}), UDP ports by `forward_udp`; they
    are bound to `host_address`, unless the key has one of its own ("0.0.0.0:8080"). With
    `reach_host`, and with any UDP port, what the guest sends to `gateway` goes to the host's own
    127.0.0.1; else it can't reach that.
    """

    forward: Mapping[int | str, int] = {}
    forward_udp: Mapping[int | str, int] = {}
    host_address: str = "127.0.0.1"
    address: str = "10.0.0.2/24"
    gateway: str = "10.0.0.1"
    mtu: int = MTU
    mac: bytes | None = None
    reach_host: bool = False


@dataclass
class BlockFile:
    """A file or block device of the host. A writable one is locked while the guest runs.

    With `overlay` it stays as it was: what the guest writes is in memory, and gone with it.
    """

    path: str
    readonly: bool = False
    sector_size: int = SECTOR_SIZE  # bytes, a power of two >= 512
    overlay: bool = False


@dataclass
class BlockDescriptor:
    """An open descriptor of a file, a block device or a memfd."""

    fd: int
    readonly: bool = False
    sector_size: int = SECTOR_SIZE


@dataclass
class BlockRemote:
    """A device that is served at the other end of a seqpacket socket: see modules/remote.py."""

    fd: int
    capacity: int  # bytes
    readonly: bool = False
    sector_size: int = SECTOR_SIZE


@dataclass
class VirtualTime:
    """A clock that starts at `start_ns` since the epoch and takes `tick_ns` to be read."""

    start_ns: int = VIRTUAL_START_NS
    tick_ns: int = VIRTUAL_TICK_NS


@dataclass
class Config:
    """A guest to run.

    A device's name may be None where the manifest declares just one of its kind that nothing
    else is attached to.
    """

    kernel: str
    args: tuple[str, ...] = ()
    mem_bytes: int = layout.MEM_DEFAULT
    net: tuple[tuple[str | None, NetValue], ...] = ()
    block: tuple[tuple[str | None, BlockValue], ...] = ()
    dumpcore: str | None = None
    console_fd: int = 1
    console_limit: int | None = None  # bytes per second; what is beyond is dropped
    trace: str | int | None = None  # a file or descriptor for a line of JSON per hypercall
    net_ring: bool | None = None  # offer the network ring; None: where it helps
    engine: str = ENGINES[0]  # what answers hypercalls whose device is a plain descriptor
    hugepages: bool = False  # ask the kernel to hold guest memory in pages of 2 MiB
    cpu: str = "auto"  # or "kvm", "soft": see tender/accel.py
    clock: VirtualTime | None = None  # None: the host's
    sandbox: str = SANDBOXES[0]  # see tender/sandbox/sandbox.py
    user: str | None = None  # who the tender becomes when root starts it: NAME or UID[:GID]
    instructions: int | None = None  # how many the guest may execute; None: any number


def is_number(text: str) -> bool:
    """Whether it is a number of decimal digits, and no longer than any that means something:
    Python itself refuses to read those of more than 4300."""
    return text.isascii() and text.isdigit() and len(text) < 20


def parse_size(text: str) -> int:
    """`64` (MiB, as Solo5 has it), `64M`, `1G`, `65536K`, also with `B` or `iB` -> bytes."""
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = 1 << 20
    if number[-1:] in _UNITS:
        unit = _UNITS[number[-1]]
        number = number[:-1]
    if not is_number(number) or not int(number):
        raise UsageError(f"{text!r} is not a size: a number of MiB, or one with a unit, as in 64M")
    return int(number) * unit


def parse_rate(text: str) -> int:
    """`500`, `64K`, `1M`, also with `B` or `iB` -> bytes per second."""
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.get(number[-1:], 1)
    number = number if unit == 1 else number[:-1]
    if not is_number(number) or not int(number):
        raise UsageError(f"{text!r} is not a rate: bytes per second, as in 64K or 1M")
    return int(number) * unit


def usable_memory(mem_bytes: int) -> int:
    """The guest memory that is given for a wish: a multiple of 2 MiB, 2 MiB to 4 GiB."""
    if mem_bytes > layout.MEM_MAX:
        raise ConfigError(f"guest memory of {mem_bytes >> 20} MiB is above the maximum, 4096 MiB")
    return max(layout.MEM_MIN, mem_bytes // layout.MEM_STEP * layout.MEM_STEP)


def parse_address(text: str) -> str:
    """`10.0.0.1/24` or `fd00::1/64`: an address with the length of its network."""
    import ipaddress

    try:
        if "/" in text:
            return ipaddress.ip_interface(text).with_prefixlen
    except ValueError:
        pass
    raise UsageError(f"{text!r} is not an address with its length, as in 10.0.0.1/24")


def parse_mac(text: str) -> bytes:
    """`52:54:00:12:34:56` -> 6 bytes."""
    parts = text.split(":")
    # int() itself would take a sign, spaces and the digits of other scripts as well.
    right = [1 <= len(part) <= 2 and _HEX_DIGITS.issuperset(part) for part in parts]
    if len(parts) == 6 and all(right):
        mac = bytes(int(part, 16) for part in parts)
        if not mac[0] & 1:
            return mac
    raise UsageError(f"{text!r} is not a unicast MAC address, as in 52:54:00:12:34:56")


def assign(
    manifest: Manifest, number: int, given: Iterable[tuple[str | None, Spec]]
) -> dict[int, Spec]:
    """Which device gets which spec, by handle; `number` is the device type.

    Raises DeviceError for a name that is not declared, one that is named twice, and a spec
    without a name where it is not clear what it is for.
    """
    given = list(given)
    declared = manifest.of_type(number)
    assigned: dict[int, Spec] = {}
    for name, spec in given:
        if name is not None:
            _put(assigned, _declared(declared, name), spec)
    for name, spec in given:
        if name is None:
            _put(assigned, _only(declared, assigned, number), spec)
    return assigned


def _put(assigned: dict[int, Spec], device: Device, spec: Spec) -> None:
    if device.handle in assigned:
        raise DeviceError(f"'{device.name}' is attached twice")
    assigned[device.handle] = spec


def _declared(declared: list[Device], name: str) -> Device:
    for device in declared:
        if device.name == name:
            return device
    names = ", ".join(device.name for device in declared)
    hint = f"it declares {names}" if names else "it declares no device of this kind"
    raise DeviceError(f"Resource not declared in manifest: '{name}' ({hint})")


def _only(declared: list[Device], assigned: dict[int, Spec], number: int) -> Device:
    kind, option = ("network", "net") if number == lib.MFT_DEV_NET_BASIC else ("block", "block")
    free = [device for device in declared if device.handle not in assigned]
    if len(free) == 1:
        return free[0]
    if not declared:
        raise DeviceError(f"the guest's manifest declares no {kind} device")
    if not free:
        raise DeviceError(f"every {kind} device of the guest has something attached to it already")
    names = ", ".join(device.name for device in free)
    raise DeviceError(
        f"the guest has several {kind} devices ({names}): "
        f"name one, as in --{option} {free[0].name}=..."
    )


def check_all_attached(manifest: Manifest, handles: Iterable[int]) -> None:
    """Raise DeviceError unless every declared device is among `handles`."""
    attached = set(handles)
    missing = [device for device in manifest.devices if device.handle not in attached]
    if missing:
        names = ", ".join(f"'{device.name}' of type {device.type_name}" for device in missing)
        example = {"NET_BASIC": "--net {}=TAP", "BLOCK_BASIC": "--block {}=FILE"}
        options = " ".join(example[device.type_name].format(device.name) for device in missing)
        raise DeviceError(f"All declared devices must be attached; missing: {names}: add {options}")
