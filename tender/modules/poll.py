"""POLL: wait until a network device is readable, or until a time has passed.

The rule here: it returns by its timeout, to the nanosecond where the host can, also where the
process was stopped in the meantime. With no time to wait it costs one system call.
"""

from __future__ import annotations

import errno
from time import monotonic_ns

from tender._native import ffi, lib
from tender.errors import HostError
from tender.modules import new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.clock import HostClock
    from tender.hypercalls import Handler
    from tender.memory import GuestMemory
    from tender.modules.net import Net, NetDevice
    from tender.modules.rendezvous import Rendezvous
    from tender.stop import Stop

U64 = (1 << 64) - 1
_FOREVER_NS = 1 << 62  # 146 years: in virtual time as well, who waits so long waits for a frame
_DEAD = lib.POLLERR | lib.POLLHUP | lib.POLLNVAL


class Poll:
    """Waits for the devices of `net`."""

    def __init__(
        self, net: Net, stop: Stop, clock: HostClock, rendezvous: Rendezvous | None = None
    ) -> None:
        self.counters = new_counters()
        self._net = net
        self._stop = stop
        self._clock = clock
        self._rendezvous = rendezvous
        self.begun = 0  # the deadline of this call, in ns, where the engine has begun it
        self.deadline_ns = 0  # of the call that waits now; 0: none does
        self._limited: dict[int, int] = {}  # when frames may be read again, by handle
        self.pollset = ffi.new("struct pollset *")
        self.watch()

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {lib.HVT_HYPERCALL_POLL: self.poll}

    def poll(self, _memory: GuestMemory, block: Any) -> None:
        """POLL: wait for a frame, `timeout_nsecs` at most.

        The devices that have one, as a set of bits by handle, and how many they are.
        """
        timeout_ns = block.timeout_nsecs
        self.counters.calls += 1
        shared = self._rendezvous is not None
        virtual = self._clock.virtual and (shared or timeout_ns < _FOREVER_NS)
        ready_set = self._wait(0 if virtual else timeout_ns)
        if self._rendezvous is not None and not ready_set:
            self._rendezvous.wait(timeout_ns if timeout_ns < _FOREVER_NS else None)
            ready_set = self._wait(0)
        elif virtual and not ready_set:
            self._clock.advance(timeout_ns)
        block.ready_set = ready_set
        block.ret = bin(ready_set).count("1")

    def _wait(self, timeout_ns: int) -> int:
        """The set of ready handles, 0 at the timeout."""
        deadline_ns, self.begun = self.begun, 0
        if deadline_ns:
            self.deadline_ns = deadline_ns
            self._stop.check()  # what interrupted the engine may be a request
        if timeout_ns and not deadline_ns:
            deadline_ns = min(monotonic_ns() + timeout_ns, U64)
        self.deadline_ns = deadline_ns
        try:
            return self._wait_until(deadline_ns)
        finally:
            self.deadline_ns = 0
            if self._limited:
                self._limited.clear()
                self.watch()

    def _wait_until(self, deadline_ns: int) -> int:
        while True:
            end_ns = min([deadline_ns, *self._limited.values()])
            count = lib.host_poll(self.pollset, end_ns)
            if count > 0:
                ready_set = self._ready()
                if ready_set:
                    return ready_set
            elif count == 0 and end_ns == deadline_ns:
                return 0
            elif count == 0:
                self._limited.clear()  # one of them is due
                self.watch()
            elif ffi.errno != errno.EINTR:
                raise HostError("cannot wait for devices", "ppoll", ffi.errno)
            self._stop.check()

    def watch(self) -> None:
        """Set what to wait for; a descriptor whose peer is gone would be ready for ever, and one
        with a frame that may not be read yet until then."""
        live = [
            device
            for device in self._net.devices.values()
            if not device.gone and device.handle not in self._limited
        ]
        for index, device in enumerate(live):
            self.pollset.fds[index] = {"fd": device.fd, "events": lib.POLLIN}
            self.pollset.handles[index] = device.handle
        self.pollset.count = len(live)

    def _must_wait(self, device: NetDevice) -> bool:
        """Whether a frame of the device waits that may not be read yet."""
        due_ns = device.rate_in.due_ns() if device.rate_in else 0
        if device.rate_in and due_ns:
            device.rate_in.note_wait()
            self._limited[device.handle] = due_ns
        return bool(due_ns)

    def _ready(self) -> int:
        ready_set = 0
        stale = False
        for index in range(self.pollset.count):
            events = self.pollset.fds[index].revents
            device = self._net.devices[self.pollset.handles[index]]
            if events & _DEAD:
                device.look()
            if device.gone or (events & lib.POLLIN and self._must_wait(device)):
                stale = True
            elif events & lib.POLLIN:
                ready_set |= 1 << device.handle
        if stale:
            self.watch()
        return ready_set
