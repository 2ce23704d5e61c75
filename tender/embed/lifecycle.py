"""A guest of a program from its start to its end: its state, its process, its devices.

The rule here: each step is made by one thread, and none of them by the main thread, where Ctrl-C
would raise in the middle of one: what is half done would be a guest that nobody can end.
"""

from __future__ import annotations

import os
import threading
from enum import Enum

from tender.embed import program, protocol, reactor
from tender.embed.devices import Devices, describe
from tender.embed.latch import Latch
from tender.embed.process import Process
from tender.errors import GuestEnded, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tender.config import Config
    from tender.embed.console import Console
    from tender.embed.interfaces import BlockSpec, NetSpec, Sink
    from tender.embed.snapshots import Snapshot
    from tender.outcome import Outcome


class State(Enum):
    """The states of a guest."""

    NEW = "not started"
    STARTING = "starting"  # its devices are opened, and its process is started
    RUNNING = "running"  # it has a process
    DEAD = "dead"  # its process ended while another thread was still starting it
    CLOSING = "closing"  # its process has ended, or there was none; its devices are closed
    ENDED = "ended"


_NEXT = {
    State.NEW: {State.STARTING},
    State.STARTING: {State.RUNNING, State.DEAD, State.CLOSING},
    State.RUNNING: {State.CLOSING},
    State.DEAD: {State.CLOSING},
    State.CLOSING: {State.ENDED},
    State.ENDED: set(),
}


class Lifecycle:
    """One run of a guest.

    `net` and `block` are what its devices are attached to, `sink` is what gets its console output
    beside `console`; `image` is the kernel's bytes or descriptor where it is not a path. `fresh`
    and `snapshots` are as for Guest; `on_end` is called when the guest has ended, unless it could
    not start.
    """

    def __init__(
        self,
        net: Mapping[str, NetSpec],
        block: Mapping[str, BlockSpec],
        sink: Sink,
        console: Console,
        warn: Callable[[str], None],
        *,
        image: bytes | int | None,
        fresh: bool,
        snapshots: bool,
        on_end: Callable[[], object] | None,
    ) -> None:
        self.process = Process(warn, self._process_ended)
        self.state = State.NEW
        self.ended = Latch()
        self.result: Outcome | BaseException | None = None  # an error: it could not start
        self.program = os.getpid()  # the process that has started it
        self._net, self._block, self._sink = net, block, sink
        self._console, self._warn = console, warn
        self._image, self._fresh, self._snapshots = image, fresh, snapshots
        self._user_on_end = on_end
        self._devices: Devices | None = None
        self._lock = threading.Lock()  # of the state
        self._worker = 0  # the thread that starts it or closes its devices, meanwhile
        self._on_end: set[Callable[[], object]] = set()  # called when it has ended

    @property
    def ports(self) -> Mapping[int | str, int]:
        """The ports of the host that a UserNet forwards; empty before it is started."""
        return self._devices.ports if self._devices is not None else {}

    def start(self, config: Config, deadline: float | None) -> None:
        """As Guest.start; `deadline` is in seconds from its start."""
        if threading.current_thread() is threading.main_thread():
            self._start_on_thread(config, deadline)
        else:
            self._start(config, deadline)

    def _start_on_thread(self, config: Config, deadline: float | None) -> None:
        errors: list[BaseException] = []
        done = Latch()

        def start() -> None:
            try:
                self._start(config, deadline)
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        try:
            threading.Thread(target=start, name="ptender start", daemon=True).start()
            done.wait()
        except BaseException:
            self.process.kill()
            raise
        if errors:
            raise errors[0]

    def _start(self, config: Config, deadline: float | None) -> None:
        with self._lock:
            self.check_new()
            self._enter(State.STARTING)
            self.program = os.getpid()
            self._worker = threading.get_ident()
        try:
            self._launch(config, deadline)
        except BaseException as error:
            self._launched(error)
            raise
        self._launched()
        if not self.process.started:
            self.ended.wait()
            if isinstance(self.result, BaseException):
                raise self.result

    def _launch(self, config: Config, deadline: float | None) -> None:
        """Open the devices, and hand them to a process with what it is to run."""
        devices = Devices(
            self._net,
            self._block,
            self._image,
            self._sink,
            self._report,
            self._console,
            snapshots=self._snapshots,
        )
        self._devices = devices
        try:
            descriptors = devices.descriptors
            numbers = protocol.numbers_in_child(descriptors)
            attached = devices.attached(config, numbers)
            self.process.start(attached, descriptors, deadline, fresh=self._fresh)
        finally:
            devices.handed_over()

    def _launched(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._worker = 0
            if self.process.pid is None:
                self.result = error
            elif self.state is State.STARTING:
                self._enter(State.RUNNING)
                return
            self._enter(State.CLOSING)
        self._close_on_thread()

    def _process_ended(self) -> None:
        """Called when its process has ended, by a thread that must not wait."""
        with self._lock:
            if self.state is State.STARTING:
                self._enter(State.DEAD)  # the thread that starts it goes on from here
                return
            self._enter(State.CLOSING)
        self._close_on_thread()

    def _close_on_thread(self) -> None:
        if not program.program_ends():
            try:
                threading.Thread(target=self._close, name="ptender end", daemon=True).start()
                return
            except RuntimeError:  # no thread can be started
                pass
        self._close()

    def _close(self) -> None:
        """Find out how it ended, read its last output and close its devices."""
        self._worker = threading.get_ident()
        if self.result is None:
            self.result = self._read_outcome()
        how = _summary(self.result)
        try:
            if self._devices is not None:
                self._devices.close(how)
        except Exception as error:
            self._report("its devices", error)
        finally:
            self._console.end(how)
            with self._lock:
                self._enter(State.ENDED)
                self._worker = 0
            self.ended.set()
        for call in list(self._on_end):
            call()
        if self._user_on_end is not None and not isinstance(self.result, BaseException):
            on_end, self._user_on_end = self._user_on_end, None  # which has the guest itself
            try:
                on_end()
            except Exception as error:
                self._report("on_end", error)

    def _read_outcome(self) -> Outcome | BaseException:
        try:
            return self.process.outcome()
        except BaseException as error:
            return error

    def save(self, name: str, timeout_s: float, *, stop: bool) -> Snapshot:
        """As Guest.snapshot; `name` is the guest's."""
        self.check_can_wait()
        if not self._snapshots:
            raise UsageError("this guest can't be saved: it was made without snapshots=True")
        devices = self._devices
        if self.state is not State.RUNNING or devices is None or devices.requester is None:
            raise GuestEnded("the guest has ended and was not saved")
        return devices.requester.save(name, self.process.interrupt, timeout_s, stop=stop)

    def _enter(self, state: State) -> None:
        """Change the state, with the lock held."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"a guest that is {self.state.value} can't be {state.value}")
        self.state = state

    async def wait_async(self, timeout_s: float | None) -> bool:
        """Wait for its end; False: it has not ended after `timeout_s` (None: no limit)."""
        from tender.embed.aio import Flag

        ended = Flag()
        self._on_end.add(ended.set)
        try:
            return self.ended.is_set or await ended.wait(timeout_s)
        finally:
            self._on_end.discard(ended.set)

    def check_new(self) -> None:
        if self.state is not State.NEW:
            raise RuntimeError("this guest was started already")

    def check_started(self) -> None:
        if self.state is State.NEW:
            raise RuntimeError("this guest was not started")
        if self.program != os.getpid():
            raise RuntimeError("this guest is that of the process which this one was forked from")

    def check_can_wait(self) -> None:
        self.check_started()
        if not self.ended.is_set and self._is_own_thread():
            raise RuntimeError("a guest's own thread can't wait for its end")

    def _is_own_thread(self) -> bool:
        if reactor.reactor().is_here() or threading.get_ident() == self._worker:
            return True
        return self._devices is not None and self._devices.serves_here()

    def _report(self, device: str, problem: BaseException | str) -> None:
        self._warn(f"{device}: {describe(problem)}")


def _summary(result: Outcome | BaseException) -> str:
    if isinstance(result, BaseException):
        return "it could not start"
    return f"{result.reason}, status {result.status}"
