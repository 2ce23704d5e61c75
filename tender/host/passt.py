"""A network for a guest without root and without a tap: passt, behind a filter of frames.

Both are started, and passt has its ports, before the guest runs; they end by themselves when the
guest's end of the socket pair is closed, however that happens. Nothing is written to the file
system for them. frame_filter.c says what passes.
Source: passt(1), and what release 2023-03-09 does.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import subprocess
from errno import EACCES, EADDRINUSE

from tender.backends import Descriptor
from tender.dataclass import dataclass, replace
from tender.errors import DeviceError, reason
from tender.host import random_mac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tender.backends import UserNet

COMMAND = "passt"
FILTER = os.path.join(os.path.dirname(__file__), "frame-filter")
RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
START_S = 20  # passt goes into the background when it is ready, in some 10 ms
END_S = 5
GATEWAY6 = "fe80::1"  # link-local: passt announces such a one as the guest's router
IPV6_ROUTES = "/proc/net/ipv6_route"
TRIES = 5  # to have a free port that is still free when passt binds it
IN_USE = os.strerror(EADDRINUSE)
_NOT_ALLOWED = (
    "Permission denied: ports below {first} are for root "
    "(net.ipv4.ip_unprivileged_port_start); use a higher one, as 8080"
)
_NOISE = ("Failed to send", "Don't run as root")  # lines that are not about an error


@dataclass
class Started:
    """A network that is there.

    `device` is the guest's end, a descriptor that the caller closes; `ports` the host's port for
    each TCP port of the guest, and for each UDP port as "udp:53"; `chosen` has a line for each
    port that was not named.
    """

    device: Descriptor
    ports: Mapping[int | str, int]
    chosen: tuple[str, ...]


def start(net: UserNet, where: str) -> Started:
    """Start passt and its frame filter.

    Raises DeviceError, which says what is missing or in use.
    """
    if net.address6 is not None and not _has_ipv6_route():
        raise DeviceError(f"{where}: IPv6 needs an interface with a default route for it")
    guest, filter_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with guest, filter_end:
        stream, named = _start_passt(net, where)
        words = [FILTER, str(filter_end.fileno()), str(stream.fileno()), *_guarded(net)]
        with stream:
            done = _run(where, words, [filter_end, stream])
        filter_end.close()
        mac = net.mac or random_mac()
        if done.returncode or not _introduce(guest, net, mac):
            why = done.stderr.decode(errors="replace").strip()
            raise DeviceError(f"{where}: the frame filter of passt: {why or 'it has ended'}")
        device = Descriptor(guest.detach(), net.mtu, mac)
        return Started(device, _ports(named), tuple(_chosen(net, named)))


def _start_passt(net: UserNet, where: str) -> tuple[socket.socket, UserNet]:
    """Start passt: the socket for its frames, and the network with ports for those that are 0."""
    for attempt in range(TRIES):
        named = _with_free_ports(net)
        stream, passt_end = socket.socketpair()
        with passt_end:
            words = [COMMAND, "--fd", str(passt_end.fileno()), *arguments(named)]
            done = _run(where, [*words, *_resolvers(named)], [passt_end])
        # In a program that ignores SIGCHLD, or reaps any child, every status is 0: check that the
        # other end is open as well.
        if not done.returncode and not _is_closed(stream):
            break
        stream.close()
        why = _reason(named, done.stderr.decode(errors="replace"))
        if named == net or attempt == TRIES - 1 or not why.endswith(IN_USE):
            raise DeviceError(f"{where}: {why}")
    return stream, named


def _with_free_ports(net: UserNet) -> UserNet:
    """The same network; where the host's port is 0, one that nobody has now."""
    changes = {}
    for field, kind in (("forward", socket.SOCK_STREAM), ("forward_udp", socket.SOCK_DGRAM)):
        changes[field] = {
            _free_port(outside, net.host_address, kind): inside
            for outside, inside in getattr(net, field).items()
        }
    return replace(net, **changes)


def _free_port(outside: int | str, host_address: str, kind: int) -> int | str:
    address, colon, port = str(outside).rpartition(":")
    if int(port):
        return outside
    with socket.socket(_family(address), kind) as probe:
        try:
            probe.bind((address.strip("[]") or host_address, 0))
        except OSError:  # passt will say so
            return outside
        found = probe.getsockname()[1]
    return f"{address}:{found}" if colon else int(found)


def _has_ipv6_route() -> bool:
    """Whether there is a default route. Source: Linux, rt6_info_route()."""
    try:
        with open(IPV6_ROUTES, encoding="ascii") as routes:
            rows = [line.split() for line in routes]
    except OSError:  # a kernel without IPv6
        return False
    return any(int(row[0], 16) == 0 == int(row[1], 16) and row[-1] != "lo" for row in rows)


def _ports(net: UserNet) -> dict[int | str, int]:
    return {
        f"udp:{inside}" if option == "-u" else inside: port
        for option, _, port, inside in _forwards(net)
    }


def _chosen(asked: UserNet, named: UserNet) -> Iterator[str]:
    for before, (option, address, port, inside) in zip(
        _forwards(asked), _forwards(named), strict=True
    ):
        if not before[2]:
            protocol = "udp:" if option == "-u" else ""
            host = f"[{address}]" if ":" in address else address
            yield f"{protocol}{host}:{port} -> {inside}"


def _introduce(guest: socket.socket, net: UserNet, mac: bytes) -> bool:
    """Ask passt for its MAC address, so that it knows the guest's; whether it has answered.

    Until it has seen a frame of the guest's, it sends to 00:00:00:00:00:00, and a connection that
    comes then waits for 10 s.
    """
    address = socket.inet_aton(net.address.partition("/")[0])
    ask = bytes.fromhex("0001080006040001") + mac + address + bytes(6)
    guest.settimeout(START_S)
    try:
        guest.send(b"\xff" * 6 + mac + b"\x08\x06" + ask + socket.inet_aton(net.gateway))
        while answer := guest.recv(1 << 17):
            if answer[12:14] == b"\x08\x06":
                return True
    except OSError:
        pass
    return False


def _run(
    where: str, words: list[str], sockets: list[socket.socket]
) -> subprocess.CompletedProcess[bytes]:
    """Run a program that goes into the background when it is ready."""
    try:
        return subprocess.run(
            words,
            pass_fds=[each.fileno() for each in sockets],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # a Ctrl-C at the terminal is for the tender
            timeout=START_S,
            check=False,
        )
    except FileNotFoundError:
        if words[0] == COMMAND:
            raise DeviceError(f"{where}: passt is not installed: apt install passt") from None
        raise DeviceError(f"{where}: {words[0]} is missing: install ptender again") from None
    except OSError as error:
        raise DeviceError(f"{where}: {words[0]}: {reason(error.errno or 0)}") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{where}: {words[0]}: not ready after {START_S} s") from None


def _guarded(net: UserNet) -> list[str]:
    """The frame filter's arguments: where passt maps the gateway and the guest may only answer, and
    IPv6."""
    words = []
    if net.forward_udp and not net.reach_host:
        words += ["4", net.address.partition("/")[0], net.gateway]
    if net.address6 is not None:
        kind = "6host" if net.reach_host else "6"
        words += [kind, net.address6.partition("/")[0], GATEWAY6]
    return words


def _is_closed(link: socket.socket) -> bool:
    """Whether the other end is closed."""
    poll = select.poll()
    poll.register(link, 0)  # POLLHUP is always reported
    return bool(poll.poll(0))


def wait_for_end(fd: int) -> None:
    """End passt, and wait until its ports are free. `fd` is a copy of the guest's end."""
    with socket.socket(fileno=fd) as link:
        link.settimeout(END_S)
        try:
            link.shutdown(socket.SHUT_WR)
            while link.recv(1 << 16):
                pass
        except OSError:  # it has ended already, or does not in time
            pass


def arguments(net: UserNet) -> list[str]:
    """The arguments of passt for this network; pure."""
    interface = ipaddress.IPv4Interface(net.address)
    gateway = ipaddress.IPv4Address(net.gateway)
    # By default passt has the MAC address of the host's interface, which no guest need know.
    mac = "52:55:" + gateway.packed.hex(":")
    passed = ["--quiet", "-a", str(interface.ip), "-g", str(gateway), "-M", mac]
    if net.address6 is None:
        passed.insert(1, "--ipv4-only")
    else:
        passed += ["-a", net.address6.partition("/")[0], "-g", GATEWAY6]
    passed += ["-n", str(interface.network.prefixlen), "-m", str(net.mtu)]
    # passt sends UDP answers to the host's 127.0.0.1 through the mapping of the gateway; nothing
    # else of the guest's passes the filter to there.
    if not net.reach_host and not net.forward_udp:
        passed += ["--no-map-gw"]
    for option, address, port, inside in _forwards(net):
        passed += [option, f"{address}/{port}:{inside}"]
    return passed


def _resolvers(net: UserNet) -> list[str]:
    """passt's arguments for the DNS servers of this host, where it would announce none.

    The guest cannot reach a resolver on the host's loopback (127.0.0.53 of systemd-resolved), but
    it can reach the servers behind that.
    """
    if net.reach_host or any(not at.is_loopback for at in _nameservers(RESOLV_CONF[0])):
        return []
    upstream = [at for at in _nameservers(RESOLV_CONF[1]) if not at.is_loopback]
    return [each for at in upstream for each in ("--dns", str(at))]


def _nameservers(path: str) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses in a file like resolv.conf(5); empty where it can't be read."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return []
    for row in rows:
        try:
            if row[:1] == ["nameserver"]:
                found.append(ipaddress.IPv4Address(row[1]))
        except (ValueError, IndexError):
            continue
    return found


def _forwards(net: UserNet) -> Iterator[tuple[str, str, int, int]]:
    """passt's option, the host's address and port, the guest's port."""
    for option, forward in (("-t", net.forward), ("-u", net.forward_udp)):
        for outside, inside in forward.items():
            address, _, port = str(outside).rpartition(":")
            yield option, address.strip("[]") or net.host_address, int(port), inside


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _reason(net: UserNet, messages: str) -> str:
    """One line about why passt has not started."""
    lines = [line for line in messages.splitlines() if line and not line.startswith(_NOISE)]
    if any("bind" in line for line in lines):
        for option, address, port, _ in _forwards(net):
            error = _bind_error(option, address, port)
            if error:
                protocol = "TCP" if option == "-t" else "UDP"
                return f"{protocol} port {port} of {address}: {error}"
    if any("interface" in line for line in lines):
        return f"passt: {lines[-1]}: it needs an interface with a default route"
    return f"passt: {lines[-1] if lines else 'it ended without a message'}"


def _bind_error(option: str, address: str, port: int) -> str:
    """Why this port can't be bound now; empty if it can."""
    kind = socket.SOCK_STREAM if option == "-t" else socket.SOCK_DGRAM
    with socket.socket(_family(address), kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        try:
            probe.bind((address, port))
            if kind == socket.SOCK_STREAM:
                probe.listen()
        except OSError as error:
            if error.errno == EACCES:
                return _NOT_ALLOWED.format(first=_first_free_port())
            return reason(error.errno or 0)
    return _NOT_ALLOWED.format(first=_first_free_port()) if port < _first_free_port() else ""


def _first_free_port() -> int:
    """The lowest port that an ordinary user may bind, which passt is.

    Source: Linux, Documentation/networking/ip-sysctl.rst.
    """
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024
