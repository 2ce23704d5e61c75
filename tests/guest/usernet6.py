"""A guest of IPv6 on passt, played by this program: `python -m tests.guest.usernet6 LINK ADDRESS`.

It runs in a network namespace whose way out is LINK, with ADDRESS. Each line that it prints is
something that it has seen; it ends with an error where it sees anything else.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tender.backends import UserNet
from tender.host import passt
from tests.waiting import PATIENCE_S

LINK, ADDRESS = sys.argv[1:]
MAC, GUEST, GUEST_LINK, GATEWAY = "02:00:00:00:00:09", "fd00:7::2", "fe80::9", "fe80::1"


def listener(address: str) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    info = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    server.bind(info[4])
    server.listen()
    server.settimeout(PATIENCE_S)
    return server


def link_address() -> str:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, _, _, name = line.split()
        if name == LINK and digits.startswith("fe80"):
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    raise AssertionError("no link-local address")


class Guest:
    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self.port = 20_000
        wire.settimeout(PATIENCE_S)

    def send(self, packet: Packet) -> None:
        self.wire.send(bytes(Ether(src=MAC, dst="52:55:0a:00:00:01") / packet))

    def receive(self, wanted: Callable[[Packet], bool]) -> Packet:
        while True:
            packet = Ether(self.wire.recv(1 << 17))
            if wanted(packet):
                return packet

    def connect(self, target: str, port: int) -> None:
        self.port += 1
        syn = TCP(sport=self.port, dport=port, flags="S", seq=1, window=60_000)
        self.send(IPv6(src=GUEST, dst=target) / syn)


def main() -> None:
    probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    outside = probe.getsockname()[1]
    probe.close()
    net = UserNet(
        address6=f"{GUEST}/64",
        mac=MAC,
        forward={f"[::1]:{outside}": 80},
        forward_udp={f"[::1]:{outside}": 7},
    )
    device = passt.start(net, "network device 'service'").device
    guest = Guest(socket.socket(fileno=device.fd))

    guest.send(IPv6(src=GUEST_LINK, dst="ff02::2") / ICMPv6ND_RS())
    advertised = guest.receive(lambda packet: ICMPv6ND_RA in packet)
    print(f"router {advertised[IPv6].src}, prefix {advertised[ICMPv6ND_RA].payload.prefix}")
    guest.send(IPv6(src=GUEST_LINK, dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt=GATEWAY))

    everywhere, loopback, old = listener("::"), listener("::1"), listener("127.0.0.1")
    link = listener(f"{link_address()}%{LINK}")
    for target in ("::1", "::", GATEWAY, "::ffff:127.0.0.1", link_address()):
        for server in (everywhere, loopback, old, link):
            guest.connect(target, server.getsockname()[1])
    guest.connect(ADDRESS, everywhere.getsockname()[1])
    everywhere.accept()
    answer = guest.receive(lambda packet: TCP in packet and packet[TCP].flags == "SA")
    assert (answer[IPv6].src, answer[TCP].dport) == (ADDRESS, guest.port)
    print("connected to the host's address")
    for server in (everywhere, loopback, old, link):
        server.setblocking(False)
        try:
            raise AssertionError(f"reached {server.accept()[0].getsockname()}")
        except BlockingIOError:
            pass
    print("and to no other")

    client = socket.create_connection(("::1", outside), timeout=PATIENCE_S)
    syn = guest.receive(lambda packet: TCP in packet and packet[TCP].flags == "S")
    assert (syn[IPv6].src, syn[IPv6].dst, syn[TCP].dport) == (GATEWAY, GUEST_LINK, 80)
    reply = TCP(sport=80, dport=syn[TCP].sport, flags="SA", seq=1, ack=syn[TCP].seq + 1)
    guest.send(IPv6(src=GUEST_LINK, dst=GATEWAY) / reply)
    client.sendall(b"hello")
    guest.receive(lambda packet: TCP in packet and bytes(packet[TCP].payload) == b"hello")
    client.close()
    print("a connection from the host's loopback")

    asker = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    asker.settimeout(PATIENCE_S)
    asker.sendto(b"question", ("::1", outside))
    asked = guest.receive(
        lambda packet: UDP in packet and bytes(packet[UDP].payload) == b"question"
    )
    reply = UDP(sport=7, dport=asked[UDP].sport) / Raw(b"answer")
    guest.send(IPv6(src=GUEST_LINK, dst=asked[IPv6].src) / reply)
    assert asker.recv(100) == b"answer"
    print("a datagram from there, and its answer")


main()
