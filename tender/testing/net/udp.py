"""UDP ports of a host."""

from __future__ import annotations

from collections import deque

from tender.checks import as_port
from tender.testing.net.packets import Datagram
from tender.testing.net.stack import INBOX_FRAMES, Stack, as_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class UdpService(Protocol):
        """What takes the datagrams of a port: with the switch's lock held, and never waiting."""

        def put(self, mac: bytes, datagram: Datagram) -> None: ...


class UdpPort:
    """A UDP port of a host."""

    def __init__(self, stack: Stack, number: int) -> None:
        self.number = number
        self._stack = stack
        self._inbox: deque[Datagram] = deque(maxlen=INBOX_FRAMES)

    def send(self, address: str, port: int, data: bytes) -> None:
        """Send one datagram; waits for ARP if the MAC of its next hop is not known."""
        as_port("port", port)
        as_data("data", data)
        own, _ = self._stack.route(address)
        datagram = Datagram(own, self.number, address, port, data)
        self._stack.send_datagram(self._stack.resolve(address), datagram)

    def receive(self, timeout: float | None = None) -> Datagram:
        """The next datagram; raises TimeoutError after `timeout` seconds without one."""
        failure = f"no datagram came to UDP port {self.number} of {self._stack.address}"
        self._stack.wait(lambda: self._inbox, timeout, lambda: failure)
        return self._inbox.popleft()

    def __repr__(self) -> str:
        return f"<UDP {self._stack.address}:{self.number}>"

    def put(self, _mac: bytes, datagram: Datagram) -> None:
        self._inbox.append(datagram)
