"""NET_READ, NET_WRITE: a network device is a descriptor that carries one frame per message.

A tap or a socket makes no difference once it is attached. Frames have their Ethernet header and no
vnet header. What the host cannot take or give is a result code.
"""

from __future__ import annotations

import errno
import posix as os

from tender._native import lib
from tender.modules import DeviceErrors, new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.hypercalls import Handler
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.modules.rate import RateLimit
    from tender.observe.pcap import Pcap

HEADER = 14  # Ethernet
VLAN_TAG = 4


class NetDevice:
    """An attached network device."""

    def __init__(
        self, name: str, handle: int, fd: int, mac: bytes, mtu: int, warn: Warn, *, is_socket: bool
    ) -> None:
        self.name = name
        self.handle = handle
        self.fd = fd
        self.mac = mac
        self.mtu = mtu
        self.frame_max = mtu + HEADER + VLAN_TAG
        self.gone = False
        self.received = new_counters()
        self.sent = new_counters()
        self._errors = DeviceErrors(f"network device '{name}'", warn)
        self.wait_for_room: Callable[[int], None] | None = None  # where no frame may be lost
        self.rate_in: RateLimit | None = None  # of what is received
        self.rate_out: RateLimit | None = None  # ... and sent
        self.pcap: Pcap | None = None  # where its frames are recorded
        self._is_socket = is_socket

    def count_in(self, counters: Any) -> None:
        """Count in these two from now on (struct counters[2]): what is received, and sent."""
        self.received, self.sent = counters + 0, counters + 1

    def read(self, data: memoryview) -> tuple[int, int]:
        """Receive one frame into `data`: a result code and the frame's length."""
        self.received.calls += 1
        if self.rate_in and self.rate_in.due_ns():
            self.rate_in.note_wait()
            return lib.HVT_R_AGAIN, 0
        try:
            length = os.readv(self.fd, [data])
        except BlockingIOError:
            return lib.HVT_R_AGAIN, 0
        except OSError as error:
            # A tap that is down: nothing waits there, and something may again.
            self._errors.report(self.received, f"receive: {os.strerror(error.errno or 0)}")
            return lib.HVT_R_AGAIN, 0
        if not length:  # an empty message, or the end of a socket, which POLL notices
            return lib.HVT_R_AGAIN, 0
        self.received.bytes += length
        if self.rate_in:
            self.rate_in.take(length, self.received)
        return lib.HVT_R_OK, length

    def write(self, data: memoryview) -> int:
        """Send one frame; a result code. A full queue drops the frame, as a wire does."""
        self.sent.calls += 1
        if not HEADER <= len(data) <= self.frame_max:
            self.sent.drops += 1
            return lib.HVT_R_EINVAL
        if self.rate_out:
            self.rate_out.wait_and_take(len(data), self.sent)
        try:
            self._send(data)
        except OSError as error:
            return self._not_sent(error.errno or 0)
        self.sent.bytes += len(data)
        return lib.HVT_R_OK

    def _send(self, data: memoryview) -> None:
        while True:
            try:
                os.writev(self.fd, [data])
            except BlockingIOError:
                if self.wait_for_room is None:
                    raise
                self.wait_for_room(self.fd)
            else:
                return

    def _not_sent(self, error: int) -> int:
        self.sent.drops += 1
        if error in (errno.EAGAIN, errno.ENOBUFS):
            return lib.HVT_R_OK
        if error in (errno.EINVAL, errno.EMSGSIZE):
            return lib.HVT_R_EINVAL  # no frame at all, or none that fits
        self._errors.report(self.sent, f"send: {os.strerror(error)}")
        return lib.HVT_R_EUNSPEC

    def warn_once(self, what: str) -> None:
        """Warn of a failure that the ring's thread has met and counted."""
        self._errors.warn_once(what)

    def look(self) -> None:
        """Find out why the descriptor is ready for another reason than a frame.

        A datagram socket has an error (nobody listened to an earlier frame) and works on; anything
        else has lost its peer, and the guest sees a link on which nothing comes, once it has read
        the frames that came before.
        """
        events = lib.host_events(self.fd, 0, 0)
        if self._is_socket and events == lib.POLLERR:
            self.read(memoryview(bytearray(1)))
            events = lib.host_events(self.fd, 0, 0)
        if events > 0 and not (self._is_socket and lib.host_bytes_waiting(self.fd) > 0):
            self.lose()

    def lose(self) -> None:
        if not self.gone:
            self.gone = True
            self._errors.report(self.received, "disconnected")


class Net:
    """The guest's network devices, by handle."""

    def __init__(self, devices: dict[int, NetDevice]) -> None:
        self.devices = devices

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {
            lib.HVT_HYPERCALL_NET_READ: self.net_read,
            lib.HVT_HYPERCALL_NET_WRITE: self.net_write,
        }

    def net_read(self, memory: GuestMemory, block: Any) -> None:
        """NET_READ: one frame of at most `length` bytes to `data`, and its length.

        AGAIN: none waits; EINVAL: no network device.
        """
        device, data_gpa, length = self.devices.get(block.handle), block.data_gpa, block.len
        if device is None:
            block.ret = lib.HVT_R_EINVAL
            return
        data = memory.writable(data_gpa, length)
        result, received = device.read(data)
        if device.pcap and received:
            device.pcap.write(lib.PCAP_INBOUND, data[:received])
        block.len = received
        block.ret = result

    def net_write(self, memory: GuestMemory, block: Any) -> None:
        """NET_WRITE: send one frame of `length` bytes at `data`; `ret` is a result code."""
        device, data_gpa, length = self.devices.get(block.handle), block.data_gpa, block.len
        if device is None:
            block.ret = lib.HVT_R_EINVAL
            return
        data = memory.readable(data_gpa, length)
        drops = device.sent.drops
        block.ret = device.write(data)
        if device.pcap and HEADER <= length <= device.frame_max:
            dropped = lib.PCAP_DROPPED if device.sent.drops != drops else 0
            device.pcap.write(lib.PCAP_OUTBOUND | dropped, data)
