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
from tender.boot.x86_64 import MXCSR_MM
from tender.cpu import features, saved
from tender.cpu.vcpu import IoOut, Mmio
from tender.dataclass import replace
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
    from typing import Any

    from tender.accel import Kind
    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.vcpu import Engine, Exit, Vcpu
    from tender.devices import Devices
    from tender.image.elf import Image
    from tender.image.manifest import Attached
    from tender.memory import GuestMemory
    from tender.modules.poll import Poll
    from tender.snapshot.helper import Requests
    from tender.stop import Stop


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


def template(
    config: Config,
    pieces: Mapping[int, bytes],
    mem_bytes: int,
    attached: Mapping[int, Attached],
    hz: int,
) -> Snapshot:
    """What all snapshots of a guest that was booted have in common."""
    virtual = VirtualNow(config.clock, 0, 0) if config.clock else None
    return Snapshot(
        mem_bytes=mem_bytes,
        pieces=tuple(pieces.items()),
        state=b"",
        counter=0,
        hz=hz,
        wall_ns=0,
        attached=attached,
        exec_heap=config.exec_heap,
        virtual=virtual,
    )


class Saver:
    """Saves a guest; a hook of loop.run.

    `snapshot` is what it was restored from, or `template`: what all of its snapshots have in
    common. Each overwrites the file of the one before.
    """

    def __init__(
        self,
        requests: Requests,
        snapshot: Snapshot,
        vcpu: Vcpu[Any],
        engine: Engine | None,
        memory: GuestMemory,
        poll: Poll,
        clock: HostClock,
        stop: Stop,
    ) -> None:
        self.has_ended = False  # the guest, because it was saved
        self._requests = requests
        self._snapshot = snapshot
        self._image = snapshot.image()
        self._vcpu = vcpu
        self._engine = engine
        self._memory = memory
        self._poll = poll
        self._clock = clock
        self._stop = stop
        self._exit: Exit | None = None
        self._is_wanted = False
        vcpu.get_state()  # imports what it needs, which it can't after lockdown
        stop.on_interrupt.append(self._on_interrupt)

    def before(self, exit: Exit) -> None:
        """As loop.ExitHook has it."""
        self._exit = exit

    def after(self, error: BaseException | None) -> None:
        """As loop.ExitHook has it: the guest is saved here."""
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
            os.ftruncate(self._requests.fds["snapshot"], 0)  # gives the disk back
        if self._requests.done(error):
            self.has_ended = True
            raise Stopped

    def _write(self, poll: PendingPoll | None) -> None:
        snapshot, state = self._snapshot, self._vcpu.get_state()
        virtual = snapshot.virtual
        if virtual:
            cell = self._clock.cell
            virtual = replace(virtual, now_ns=int(cell.now_ns), random=int(cell.random))
        snapshot = replace(
            snapshot,
            state=saved.encode(state),
            counter=self._vcpu.counter(),
            wall_ns=time_ns(),
            poll=poll,
            virtual=virtual,
            features=snapshot.features | self._features(state),
        )
        fds, records = self._requests.fds, file.encode(snapshot)
        fd, offset = fds["snapshot"], file.memory_offset(len(records))
        os.ftruncate(fd, 0)
        os.ftruncate(fd, offset + self._memory.size)
        touched.pwrite(fd, memoryview(records), 0)
        touched.write(fd, offset, fds, self._memory, self._stop.check_request)

    def _features(self, state: Any) -> frozenset[str]:
        """What the guest may have chosen its code by, or has set."""
        view, image = self._memory.view, self._image
        if image.machine != EM_X86_64:
            return frozenset()
        code = [(each.start, each.end) for each in image.segments if each.executable]
        looks = any(features.looks_at_cpuid(view[start:end]) for start, end in code)
        if not looks and not self._snapshot.exec_heap:
            return frozenset({"misalignsse"} if state.fpu.mxcsr & MXCSR_MM else ())
        return features.usable(features.shown(self._vcpu.cpuid), state.xcr0)
