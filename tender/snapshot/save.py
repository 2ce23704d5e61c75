"""Saving a guest at one of its hypercalls, when somebody asks for it.

A request interrupts the guest. From then on Python answers its hypercalls, and behind the first of
them the guest is saved: no instruction is half done there. A guest that waits in POLL is saved
waiting. Its files are open before lockdown.
"""

from __future__ import annotations

import os
from errno import EIO
from time import monotonic_ns, time_ns

from tender._native import lib
from tender.cpu import features, saved
from tender.cpu.vcpu import IoOut, Mmio
from tender.errors import HostError, UsageError, setting
from tender.hypercalls import decode
from tender.image.elf import EM_X86_64, MACHINES
from tender.observe import touched
from tender.snapshot import file
from tender.snapshot.file import PendingPoll, Snapshot, VirtualNow
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from tender.accel import Kind
    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.vcpu import Engine, Exit, Vcpu
    from tender.devices import Devices
    from tender.image.elf import Image
    from tender.loop import ExitHook
    from tender.memory import GuestMemory
    from tender.modules.poll import Poll
    from tender.stop import Stop

    class Requests(Protocol):
        """Who asks for snapshots."""

        def waiting(self) -> bool:
            """Whether somebody asks for one now; takes the request, and does not wait."""

        def begin(self) -> bool:
            """The guest can be saved: whether that is still wanted."""

        def done(self, error: str) -> bool:
            """It is saved, or not, for a reason; whether the guest is to end."""


def check(devices: Devices) -> None:
    """Raise UsageError for what keeps a guest from being saved."""
    if "sync" in devices.fds:
        name = setting("--snapshots", "snapshots=")
        raise UsageError(f"{name}: not with virtual time that guests share")


def use_machine_counter(vcpu: Vcpu[Any], kind: Kind, image: Image, clock: HostClock) -> None:
    """Let the software CPU's counter be the machine's: other CPUs can go on from there."""
    is_same = MACHINES[image.machine] == os.uname().machine
    if kind.name == "soft" and is_same and not clock.virtual:
        vcpu.set_counter(lib.host_ticks(), lib.host_ticks_hz())


class Saver:
    """Saves a guest; a hook of loop.run, in front of `inner`.

    `fds` has the file that is written to ("snapshot") and what tells which memory is touched;
    `pieces` are the headers of the guest's image, and `hz` is what it takes for the frequency of
    its counter. `known` are the features of the CPU that it was saved with before. The file is
    overwritten each time.
    """

    def __init__(
        self,
        requests: Requests,
        fds: Mapping[str, int],
        pieces: Mapping[int, bytes],
        config: Config,
        vcpu: Vcpu[Any],
        engine: Engine | None,
        memory: GuestMemory,
        poll: Poll,
        devices: Devices,
        clock: HostClock,
        hz: int,
        stop: Stop,
        inner: ExitHook | None,
        image: Image,
        known: frozenset[str],
    ) -> None:
        self.has_ended = False  # the guest, because it was saved
        self._requests = requests
        self._fds = fds
        self._pieces = tuple(pieces.items())
        self._config = config
        self._vcpu = vcpu
        self._engine = engine
        self._memory = memory
        self._poll = poll
        self._devices = devices
        self._clock = clock
        self._hz = hz
        self._stop = stop
        self._inner = inner
        self._image = image
        self._known = known
        self._exit: Exit | None = None
        self._is_wanted = False
        vcpu.get_state()  # imports what it needs, which it can't after lockdown
        stop.on_interrupt.append(self._on_interrupt)

    def before(self, exit: Exit) -> None:
        """As loop.ExitHook has it."""
        self._exit = exit
        if self._inner:
            self._inner.before(exit)

    def after(self, error: BaseException | None) -> None:
        """As loop.ExitHook has it: the guest is saved here."""
        if self._inner:
            self._inner.after(error)
        if self._is_wanted and error is None and isinstance(self._exit, (IoOut, Mmio)):
            number, _ = decode(self._exit)
            if number != lib.HVT_HYPERCALL_HALT:
                self._save(None)

    def _on_interrupt(self) -> None:
        """The guest was interrupted, or a hypercall of it that waits."""
        if not self._is_wanted and self._requests.waiting():
            self._is_wanted = True
            if self._engine:
                self._vcpu.use_engine(None, None)
        deadline_ns = self._poll.deadline_ns
        if self._is_wanted and deadline_ns and self._exit is not None:
            _, gpa = decode(self._exit)
            self._save(PendingPoll(gpa, max(0, deadline_ns - monotonic_ns())))

    def _save(self, poll: PendingPoll | None) -> None:
        self._is_wanted = False
        if self._engine:
            self._vcpu.use_engine(self._engine, None)
        if not self._requests.begin():
            return
        error = ""
        try:
            self._write(poll)
        except (OSError, HostError) as failed:
            number = getattr(failed, "errno", 0)
            error = os.strerror(number or EIO) if isinstance(failed, OSError) else str(failed)
        if self._requests.done(error):
            self.has_ended = True
            raise Stopped

    def _features(self, state: Any) -> frozenset[str]:
        """What the guest may have chosen its code by: here, and where it was restored from."""
        view, image = self._memory.view, self._image
        code = [(each.start, each.end) for each in image.segments if each.executable]
        looks = any(features.looks_at_cpuid(view[start:end]) for start, end in code)
        if image.machine != EM_X86_64 or not (looks or self._config.exec_heap):
            return frozenset()
        return self._known | features.usable(features.shown(self._vcpu.cpuid), state.xcr0)

    def _write(self, poll: PendingPoll | None) -> None:
        state = self._vcpu.get_state()
        virtual = None
        if self._config.clock:
            cell = self._clock.cell
            virtual = VirtualNow(self._config.clock, int(cell.now_ns), int(cell.random))
        records = file.encode(
            Snapshot(
                self._memory.size,
                self._pieces,
                saved.encode(state),
                self._vcpu.counter(),
                self._hz,
                time_ns(),
                self._devices.attached(),
                self._config.exec_heap,
                poll,
                virtual,
                self._features(state),
            )
        )
        fd, offset = self._fds["snapshot"], file.memory_offset(len(records))
        os.ftruncate(fd, 0)
        os.ftruncate(fd, offset + self._memory.size)
        touched.pwrite(fd, memoryview(records), 0)
        touched.write(fd, offset, self._fds, self._memory, self._stop.check_request)
