"""PUTS: the guest's console is a descriptor, standard output for a command.

The rule here: the console never ends a guest for what the host can't store; but where its reader
is gone for good (EPIPE), nobody is left to run the guest for.
"""

from __future__ import annotations

import errno

from tender._abi import lib
from tender._host import ffi as host
from tender._host import lib as hostlib
from tender.errors import HostError
from tender.memory import Layout
from tender.modules import STEP, Trouble, new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.hypercalls import Handler
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.stop import Stop

_PUTS = Layout("hvt_puts")
_WAIT_MS = 1000  # how long to wait for room at a time; a stop request ends the wait


class Console:
    """Writes what the guest says to `fd`."""

    def __init__(self, fd: int, stop: Stop, warn: Warn) -> None:
        self.fd = fd
        self.counters = new_counters()
        self.begun = 0  # bytes of this call that the engine has written
        self._stop = stop
        self._trouble = Trouble("console", warn)

    def hypercalls(self) -> dict[int, Handler]:
        return {lib.HVT_HYPERCALL_PUTS: self.puts}

    def puts(self, memory: GuestMemory, gpa: int) -> None:
        block = memory.at(_PUTS, gpa, out=False)
        data_gpa, length = block.data_gpa, block.len
        memory.readable(data_gpa, length)
        self.counters.calls += 1
        self.counters.bytes += length
        begun, self.begun = self.begun, 0
        data_gpa, length = data_gpa + begun, max(0, length - begun)  # the block may have changed
        while length:
            written = hostlib.host_write(self.fd, memory.address(data_gpa), min(length, STEP))
            if written < 0:
                if not self._go_on(host.errno):
                    return
                continue
            self._stop.check()
            data_gpa += written
            length -= written

    def _go_on(self, error: int) -> bool:
        """What to do when a write failed: True to try again, False to drop the output."""
        if error == errno.EINTR:
            self._stop.check()
            return True
        if error == errno.EAGAIN:
            self._wait_for_room()
            return True
        if error == errno.EPIPE:
            raise HostError("console: nobody reads it any more", "write", error)
        self.counters.drops += 1
        self._trouble.tell(self.counters, f"output lost: {HostError('write', 'write', error)}")
        return False

    def _wait_for_room(self) -> None:
        # A descriptor that is shared with others can be non-blocking by their wish.
        hostlib.host_events(self.fd, hostlib.POLLOUT, _WAIT_MS)
        self._stop.check()
