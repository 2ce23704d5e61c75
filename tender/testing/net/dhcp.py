"""A DHCP server of a host. Sources: RFC 2131 (the protocol), 2132 (the options).

An address stays with the MAC that it was given to, until that releases it: leases do not expire.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from tender.checks import as_mac
from tender.errors import InvalidValue, UsageError
from tender.testing.net.packets import BROADCAST, Datagram, mac_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface

    from tender.testing.net.stack import Stack

SERVER, CLIENT = 67, 68  # ports
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
POOL_MAX = 1 << 16  # addresses
_REQUESTED, _LEASE, _TYPE, _SERVER_ID = 50, 51, 53, 54  # options
_MASK, _ROUTER, _DNS = 1, 3, 6
_PAD, _END = 0, 255
_TO_ALL = 0x8000  # the client takes no unicast yet
_EVERYONE = "255.255.255.255"
_HEADER = struct.Struct("!4BIHH4s4s4s4s16s192x4s")
_COOKIE = bytes.fromhex("63825363")
_ETHERNET = 1, 6  # the kind and the size of a MAC


@dataclass(frozen=True)
class Message:
    """A message of a client."""

    kind: int
    xid: int
    flags: int
    client: str  # its address, or 0.0.0.0
    mac: bytes
    options: dict[int, bytes]


class DhcpServer:
    """A DHCP server, from Host.dhcp. `leases` has the address of each MAC that has one."""

    def __init__(
        self,
        stack: Stack,
        interface: IPv4Interface | IPv6Interface,
        first: str,
        last: str,
        router: str | None,
        dns: str | None,
        lease_s: float,
    ) -> None:
        self.leases: dict[str, str] = {}
        self._stack = stack
        self._own = str(interface.ip)
        self._free = _pool(interface, first, last)
        self._offers: dict[bytes, str] = {}  # and leases
        given = {_MASK: interface.network.netmask.packed, _ROUTER: _packed("router", router)}
        self._options = {key: value for key, value in given.items() if value}
        self._options |= {_DNS: _packed("dns", dns)} if dns else {}
        if not 1 <= lease_s < 1 << 32:
            raise InvalidValue("lease", lease_s, "a number of seconds, as 3600")
        self._lease = struct.pack("!I", int(lease_s))

    def wait_for(self, mac: str | bytes, timeout: float | None = None) -> str:
        """The address that it has leased to a MAC, as `port.mac`; TimeoutError if it has none."""
        wanted = mac_text(as_mac("mac", mac) or bytes(6))
        failure = f"{wanted} has no address from DHCP"
        self._stack.wait(lambda: wanted in self.leases, timeout, lambda: failure)
        return self.leases[wanted]

    def __repr__(self) -> str:
        return f"<DHCP server {self._own}: {len(self.leases)} leases, {len(self._free)} free>"

    def put(self, _mac: bytes, datagram: Datagram) -> None:
        message = parse(datagram.data)
        if message is None or self._is_for_another(message):
            return
        if message.kind == DISCOVER:
            self._on_discover(message)
        elif message.kind == REQUEST:
            self._on_request(message)
        elif message.kind == INFORM:
            self._answer(message, ACK, "0.0.0.0", {})
        elif message.kind in (RELEASE, DECLINE):
            address = self._offers.pop(message.mac, None)
            self.leases.pop(mac_text(message.mac), None)
            if address and message.kind == RELEASE:
                self._free.append(address)

    def _is_for_another(self, message: Message) -> bool:
        server = message.options.get(_SERVER_ID)
        return server is not None and server != IPv4Address(self._own).packed

    def _on_discover(self, message: Message) -> None:
        if message.mac not in self._offers:
            wanted = _address(message.options.get(_REQUESTED))
            if not self._free:
                return
            address = wanted if wanted in self._free else self._free[0]
            self._free.remove(address)
            self._offers[message.mac] = address
        self._answer(message, OFFER, self._offers[message.mac], {_LEASE: self._lease})

    def _on_request(self, message: Message) -> None:
        wanted = _address(message.options.get(_REQUESTED)) or message.client
        if wanted != self._offers.get(message.mac):
            self._answer(message, NAK, "0.0.0.0", {})
            return
        self.leases[mac_text(message.mac)] = wanted
        self._answer(message, ACK, wanted, {_LEASE: self._lease})

    def _answer(self, message: Message, kind: int, given: str, more: dict[int, bytes]) -> None:
        own = IPv4Address(self._own).packed
        options = {_TYPE: bytes([kind]), _SERVER_ID: own, **more}
        options |= self._options if kind != NAK else {}
        data = build(message, given, own, options)
        to = next((each for each in (message.client, given) if each != "0.0.0.0"), _EVERYONE)
        mac = message.mac
        if kind == NAK or message.flags & _TO_ALL:
            to = _EVERYONE
        if to == _EVERYONE:
            mac = BROADCAST
        self._stack.send_datagram(mac, Datagram(self._own, SERVER, to, CLIENT, data))


def build(message: Message, given: str, server: bytes, options: dict[int, bytes]) -> bytes:
    """The answer to `message`, with the client's new address and the server's."""
    client, given_ = IPv4Address(message.client).packed, IPv4Address(given).packed
    addresses = client, given_, server, bytes(4)
    head = 2, *_ETHERNET, 0, message.xid, 0, message.flags
    body = b"".join(bytes([code, len(value)]) + value for code, value in options.items())
    return _HEADER.pack(*head, *addresses, message.mac, _COOKIE) + body + bytes([_END])


def parse(data: bytes) -> Message | None:
    """A client's message, straight from its network; None for anything else."""
    if len(data) < _HEADER.size:
        return None
    op, *kind, _, xid, _, flags, client, _, _, relay, mac, cookie = _HEADER.unpack_from(data)
    if op != 1 or tuple(kind) != _ETHERNET or any(relay) or cookie != _COOKIE:
        return None
    options = _options(data[_HEADER.size :])
    found = options.get(_TYPE, b"")
    if len(found) != 1:
        return None
    return Message(found[0], xid, flags, str(IPv4Address(client)), mac[:6], options)


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            break
        found[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return found


def _address(option: bytes | None) -> str | None:
    return str(IPv4Address(option)) if option is not None and len(option) == 4 else None


def _packed(name: str, address: str | None) -> bytes:
    from tender.checks import as_ipv4

    return b"" if address is None else IPv4Address(as_ipv4(name, address)).packed


def _pool(interface: IPv4Interface | IPv6Interface, first: str, last: str) -> list[str]:
    """The addresses from `first` to `last`, without the server's."""
    if interface.version != 4:
        raise UsageError(f"DHCP is for IPv4, and the host has the address {interface.ip}")
    begin = int.from_bytes(_packed("first", first), "big")
    end = int.from_bytes(_packed("last", last), "big")
    for address in (first, last):
        if IPv4Address(address) not in interface.network:
            raise UsageError(f"{address} is not in {interface.network}")
    if not 0 <= end - begin < POOL_MAX:
        raise UsageError(f"{first} to {last} are not 1 to {POOL_MAX} addresses")
    pool = [str(IPv4Address(number)) for number in range(begin, end + 1)]
    return [address for address in pool if address != str(interface.ip)]
