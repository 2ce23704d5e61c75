"""Virtual time that a guest shares with others: none goes on before all of them wait.

It takes two system calls and a wait on one descriptor, a seqpacket socket that was opened before
the start. The guest's POLL sends the guest's time and how long it would sleep; the answer is the
time it has become, and frames that are due by then are in the guest's sockets. The other end is
tender/testing/net/virtual.py.
"""

from __future__ import annotations

import errno
import os
import struct

from tender._native import ffi, lib
from tender.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.clock import HostClock, VirtualClock
    from tender.stop import Stop

FOREVER = (1 << 64) - 1
_FOREVER_NS = 1 << 62
_SYNC = struct.Struct("=QQ")  # the guest's time, and until when it would sleep
_GO = struct.Struct("=Q")  # what time it is
_WAIT_MS = 1000  # how long to wait for a free queue at a time; a stop request ends the wait


class Rendezvous:
    """The tender's end."""

    def __init__(self, fd: int, clock: VirtualClock, stop: Stop) -> None:
        self._fd = fd
        self._clock = clock
        self._stop = stop
        self._pollset = ffi.new("struct pollset *")
        self._pollset.fds[0] = {"fd": fd, "events": lib.POLLIN}
        self._pollset.count = 1

    def wait(self, timeout_ns: int | None) -> None:
        """Sleep until something comes, or for `timeout_ns` of virtual time; None: for ever."""
        now_ns = self._clock.elapsed_ns()
        until_ns = FOREVER if timeout_ns is None else now_ns + timeout_ns
        try:
            os.write(self._fd, _SYNC.pack(now_ns, min(until_ns, FOREVER)))
            message = self._answer()
        except OSError as error:
            raise HostError("virtual time", "write", error.errno or 0) from None
        if len(message) < _GO.size:
            raise HostError("virtual time: the other end is closed", "read", 0)
        self._clock.advance(max(0, _GO.unpack(message)[0] - now_ns))

    def _answer(self) -> bytes:
        while True:
            count = lib.host_poll(self._pollset, _FOREVER_NS)
            self._stop.check()
            if count > 0:
                return os.read(self._fd, _GO.size)
            if count < 0 and ffi.errno != errno.EINTR:
                raise OSError(ffi.errno, os.strerror(ffi.errno))

    def wait_for_room(self, fd: int) -> None:
        """Wait until the frame before was taken: in virtual time, none is lost to a full queue."""
        lib.host_events(fd, lib.POLLOUT, _WAIT_MS)
        self._stop.check()


def open_rendezvous(fd: int, clock: HostClock, stop: Stop) -> Rendezvous:
    """Raises ConfigError where the guest's time is the host's."""
    from tender.clock import VirtualClock

    if not isinstance(clock, VirtualClock):
        raise ConfigError("a guest shares its virtual time only if it has one: clock=VirtualTime()")
    return Rendezvous(fd, clock, stop)
