"""What a guest's devices can be attached to, as values: taps, files, descriptors. No I/O.

Each value checks its fields when it is made, whoever makes it, and raises UsageError. Whether the
host can provide what it describes is found out where it is opened (tender/host/).
"""

from __future__ import annotations

from tender.checks import (
    INT64_MAX,
    MTU,
    as_addresses,
    as_descriptor,
    as_flag,
    as_interface_name,
    as_ipv4,
    as_ipv4_interface,
    as_ipv6_interface,
    as_mac,
    as_mtu,
    as_path,
    is_ipv4,
    is_ipv6,
    is_path,
    looks_like_size,
    one_of,
    optional,
    port_number,
    whole,
)
from tender.dataclass import dataclass, field
from tender.errors import DeviceError, InvalidValue, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping, Sequence
    from typing import Any, TypeAlias

    from tender.checks import Path, PathField
    from tender.dataclass import Converted

    NetValue: TypeAlias = "Tap | Descriptor | UserNet"
    BlockValue: TypeAlias = "BlockFile | BlockDescriptor | BlockRemote"

    MacField: TypeAlias = Converted[str | bytes | None, bytes | None]
    AddressesField: TypeAlias = Converted[str | Sequence[str], tuple[str, ...]]
    OverlayField: TypeAlias = Converted[bool | int | Path, bool | int | str]
    GatewayField: TypeAlias = Converted[str | None, str]

SECTOR_SIZE = 512
SECTOR_SIZE_MAX = 1 << 15  # the largest power of two that the manifest's u16 holds
SYNCS = ("none", "fsync", "always")
OVERLAY_MIN, OVERLAY_MAX = 4096, 1 << 30  # bytes; the second is that of the default


def as_forwards(name: str, value: Any) -> dict[int | str, int]:
    """Ports of the host, with or without an address, to ports of the guest; 0: a free one."""
    kept: dict[int | str, int] = {}
    for outside, inside in value.items() if hasattr(value, "items") else [(value, None)]:
        at, colon, text = outside.rpartition(":") if isinstance(outside, str) else ("", "", outside)
        port, to = port_number(text), port_number(inside)
        is_ip6 = at.startswith("[") and at.endswith("]") and is_ipv6(at[1:-1])
        if port is None or not to or (colon and not is_ip6 and not is_ipv4(at)):
            raise InvalidValue(
                name, value, "host ports to guest ports, as in {8080: 80} or {'0.0.0.0:8080': 80}"
            )
        kept[f"{at}:{port}" if colon else port] = to
    return kept


def as_sector_size(name: str, value: Any) -> int:
    """A power of two."""
    is_size = isinstance(value, int) and SECTOR_SIZE <= value <= SECTOR_SIZE_MAX
    if not is_size or value & (value - 1):
        raise InvalidValue(name, value, f"a power of two from {SECTOR_SIZE} to {SECTOR_SIZE_MAX}")
    return int(value)


def as_overlay(name: str, value: Any) -> bool | int | str:
    """True or False, a size in bytes, or a path, which is a string that looks like no size."""
    if isinstance(value, str) and looks_like_size(value):
        expected = f"a size in bytes (a number) or a path (a file of this name is './{value}')"
        raise InvalidValue(name, value, expected)
    if is_path(value):
        return as_path(name, value)
    return value if isinstance(value, bool) else int(_overlay_size(name, value))


def check_capacity(capacity: int, size: int) -> None:
    """Raise DeviceError unless `capacity` bytes are a number of sectors of `size` bytes."""
    if capacity <= 0 or capacity % size:
        raise DeviceError(
            f"Backing storage size must be block aligned: {capacity} bytes is not a multiple of "
            f"{size}, or nothing"
        )


def _check_sync(sync: str, readonly: bool) -> None:
    if readonly and sync != "none":
        raise UsageError(f"a read-only disk is not written to: leave out sync={sync}")


_amount = whole(1, 1 << 48)
as_sync = one_of(SYNCS)
_overlay_size = whole(OVERLAY_MIN, INT64_MAX, f"a size of at least {OVERLAY_MIN} bytes")


@dataclass
class Tap:
    """A tap or a macvtap of the host.

    Args:
        name: The interface.
        create: Make it for this guest; it is gone when the guest ends. Else it must exist.
        addr: With `create`, its addresses with prefix lengths, as in "10.0.0.1/24".
        mtu: With `create`, in bytes.
        bridge: With `create`, the bridge that it is added to.
        mac: The guest's address: 6 bytes, or a string as in "52:54:00:12:34:56". Random and
            locally administered when None; that of the link for a macvtap.

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
        fd: Of a tap, of the /dev/tapN of a macvtap, or of a datagram or seqpacket socket.
        mtu: In bytes; None: the tap's, or 1500 for a socket.
        mac: As in Tap.
        sync_fd: A seqpacket socket on which the guests and hosts of a network agree on their
            virtual time (tender/modules/rendezvous.py); at most one for a guest, which must have a
            virtual clock.

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
            own, as in "0.0.0.0:8080" or "[::1]:8080".
        address: The guest's address with its prefix length; DHCP gives it as well.
        gateway: The gateway's address, in the same network. None: the first one that is not the
            guest's.
        mtu: In bytes.
        mac: As in Tap.
        reach_host: What the guest sends to `gateway` goes to the host's own 127.0.0.1; else it
            reaches no address of the host's loopback.
        address6: The guest's IPv6 address with its prefix length, which is 64; router
            advertisements and DHCPv6 give it as well, and its gateway, fe80::1. None: no IPv6.

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
    address6: str | None = field(optional(as_ipv6_interface), default=None)

    def __post_init__(self) -> None:
        import ipaddress

        if self.address6 is None and any("[" in str(key) for key in self._outside()):
            raise UsageError("a forward from an IPv6 address needs an IPv6 address of the guest")
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

    def _outside(self) -> list[int | str]:
        return [*self.forward, *self.forward_udp]


def _first_address(interface: ipaddress.IPv4Interface) -> str:
    """The first address of its network that is not its own; its own where there is no other."""
    hosts = interface.network.hosts()
    return str(next((host for host in hosts if host != interface.ip), interface.ip))


@dataclass
class BlockFile:
    """A file or block device of the host. A writable one is locked while the guest runs.

    Args:
        path: Of the file; its size must be a multiple of `sector_size`.
        readonly: Whether the guest may only read.
        sector_size: In bytes, a power of two from 512 on.
        overlay: Leave the file as it was: what the guest writes is in memory, and gone with it.
            A number is how many bytes that may be, in pages of 4096; True: a quarter of the
            machine's memory, at most 1 GiB. A write for which there is no room fails. A path: what
            the guest writes is in that file and outlives it; the file is made if there is none.
        sync: What a write that has returned to the guest outlives. "none": the guest and its
            tender, and not a crash of the host, which may have it in its page cache only. "fsync":
            the same, and when the guest has ended, all is written to the disk of the host.
            "always": a crash of the host (O_DSYNC); each write waits for the disk.

    Raises:
        UsageError: as for Tap.
    """

    path: PathField = field(as_path)
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)  # bytes
    overlay: OverlayField = field(as_overlay, default=False)
    sync: str = field(as_sync, default=SYNCS[0])

    def __post_init__(self) -> None:
        if self.readonly and self.overlay:
            raise UsageError("a read-only disk needs no overlay: leave out one of the two")
        _check_sync(self.sync, self.readonly)
        if self.overlay and not isinstance(self.overlay, str) and self.sync != "none":
            raise UsageError(
                f"an overlay in memory ends with the guest: leave out sync={self.sync}"
            )


@dataclass
class BlockDescriptor:
    """An open descriptor of a file, a block device or a memfd; locked as a BlockFile is.

    Args:
        fd: It stays the program's: the guest has a copy.
        readonly: Whether the guest may only read.
        sector_size: In bytes, a power of two from 512 on.
        sync: As for BlockFile; "always" takes a descriptor that was opened with O_DSYNC.

    Raises:
        UsageError: as for Tap.
    """

    fd: int = field(as_descriptor)
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)
    sync: str = field(as_sync, default=SYNCS[0])

    def __post_init__(self) -> None:
        _check_sync(self.sync, self.readonly)


@dataclass
class Rate:
    """A limit of what a device moves: a token bucket for its bytes, and one for its operations.

    What exceeds it waits; nothing is lost. A network has it each way: for the frames that it sends
    and for those that it receives. Reads and writes of a disk have one together.

    Args:
        bytes: Per second; None for no limit.
        ops: Frames, reads or writes per second; None for no limit.
        burst_bytes: How many bytes may pass at once after a pause; None: those of one second.
        burst_ops: The same for operations.

    Raises:
        UsageError: as for Tap.
    """

    bytes: int | None = field(optional(_amount), default=None)
    ops: int | None = field(optional(_amount), default=None)
    burst_bytes: int | None = field(optional(_amount), default=None)
    burst_ops: int | None = field(optional(_amount), default=None)

    def __post_init__(self) -> None:
        if self.bytes is None and self.ops is None:
            raise UsageError("a rate limits bytes, operations or both")
        for rate, burst, of in (
            (self.bytes, self.burst_bytes, "bytes"),
            (self.ops, self.burst_ops, "operations"),
        ):
            if rate is None and burst is not None:
                raise UsageError(f"a burst of {of} needs a rate of {of}")


@dataclass
class BlockRemote:
    """A device that is served at the other end of a seqpacket socket: see host/remote.py."""

    fd: int = field(as_descriptor)
    capacity: int = field(whole(0, INT64_MAX))  # bytes
    readonly: bool = field(as_flag, default=False)
    sector_size: int = field(as_sector_size, default=SECTOR_SIZE)

    def __post_init__(self) -> None:
        check_capacity(self.capacity, self.sector_size)
