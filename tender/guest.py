"""`Guest`: what programs that embed the tender see.

The rule here: a guest is described when it is made, and nothing of the host is touched before it
is started; after it has ended nothing of it is left. It runs in a child process of its own
(tender/embed/process.py).
"""

from __future__ import annotations

import os
import sys
import threading
from time import monotonic

from tender import accel
from tender.boot import layout
from tender.dataclass import replace
from tender.embed import process, protocol, reactor, validation
from tender.embed.devices import Devices
from tender.embed.latch import Latch
from tender.embed.process import Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from tender.config import VirtualTime
    from tender.embed.console import Console
    from tender.embed.interfaces import BlockSpec, NetSpec, Sink
    from tender.outcome import Outcome

KICK_EVERY_S = 0.01  # of a guest that is asked to end, until it has
GRACE_S = 5.0
_HERE = os.path.join(os.path.dirname(__file__), "")


class Guest:
    """A unikernel, run by this program.

    `kernel` is the image's path and `args` its command line. `net` and `block` say what each
    device that the manifest declares is attached to, by its name there (see tender.embed.devices).
    `mem_mib` is the guest's memory in MiB. What it says is in `guest.console`; `console` gets it
    as well: a callable, a stream, a file or a descriptor. `console_limit` drops what it says
    beyond so many bytes per second. `dumpcore` is a folder for the core file of a guest that
    aborts, `trace` a file for a line of JSON per hypercall. `warn` is called with one line of
    text when there is trouble with a device; standard error if None. It may be called from any
    thread, and must not wait for the guest. `cpu` is "kvm", "soft" or "auto"; `clock` gives the
    guest a virtual time and `instructions` a limit, both of them on the software CPU. `deadline`
    is how many seconds the guest may take, from its start; then it is stopped, and killed where
    that does not help.

    The guest has a process of its own, with a sandbox: `sandbox` is "on", "require" (a layer that
    this machine can't give is an error) or "off", and `user` is who it runs as where the program
    is root's.

    All methods may be called from any thread, but for those of the guest itself: what is called
    by its devices, its console or `warn` can't wait for its end (RuntimeError).
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        mem_mib: int = layout.MEM_DEFAULT // layout.MIB,
        net: Mapping[str, NetSpec] | None = None,
        block: Mapping[str, BlockSpec] | None = None,
        console: Sink = None,
        console_limit: int | None = None,
        dumpcore: str | os.PathLike[str] | None = None,
        trace: str | os.PathLike[str] | None = None,
        warn: Callable[[str], None] | None = None,
        cpu: str = "auto",
        clock: VirtualTime | None = None,
        instructions: int | None = None,
        deadline: float | None = None,
        sandbox: str = "on",
        user: str | int | None = None,
    ) -> None:
        self.config = validation.build_config(
            kernel,
            args,
            mem_mib=mem_mib,
            console_limit=console_limit,
            dumpcore=dumpcore,
            trace=trace,
            cpu=cpu,
            clock=clock,
            instructions=instructions,
            sandbox=sandbox,
            user=user,
        )
        self.deadline = validation.seconds("deadline", deadline)
        self._warn = _guarded(validation.warn(warn) or _to_stderr)
        self._specs = validation.devices("net", net), validation.devices("block", block), console
        self._devices: Devices | None = None
        self._program = os.getpid()
        self._process = Process(self._warn, self._has_ended)
        self._starter = 0  # the thread that starts it, while it does
        self._settler = 0  # and the one that takes in what is left of it
        self._begun = False
        self._launched = Latch()  # it has been started, or can't be: its devices are not in use
        self._ended = Latch()  # all is known of its end
        self._lock = threading.Lock()  # of its start and of what follows
        self._callbacks: list[Callable[[], None]] = []
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    # What it is.

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._begun and not self._ended.is_set

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before that, and where it could not start."""
        return self._outcome

    @property
    def pid(self) -> int | None:
        """The process that it runs in, or ran in."""
        return self._process.pid

    @property
    def layers(self) -> tuple[str, ...]:
        """What its sandbox consists of, in the words of `ptender -v`; empty before it runs."""
        return self._process.layers

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """The layers of the sandbox that this machine can't give, each with its reason, as
        "namespaces: Operation not permitted". With sandbox="require" they are an error instead."""
        return self._process.missing_layers

    @property
    def console(self) -> Console:
        """What the guest says; RuntimeError where it has not started."""
        if self._devices is None:
            raise RuntimeError("this guest was not started, or could not be")
        return self._devices.console

    def __repr__(self) -> str:
        how = "not started"
        if self._begun:
            how = f"process {self.pid}" if self.running else "ended"
        return f"<Guest {self.config.kernel}: {how}>"

    # Starting and ending.

    def start(self) -> Self:
        """Start it; returns when all its devices are attached and it is about to run.

        Raises TenderError where it can't (see tender.errors), with the words of the command.
        """
        if threading.current_thread() is threading.main_thread():
            self._start_beside()
        else:
            self._start()
        return self

    def run(self) -> Outcome:
        """Start it and wait for its end. Another thread can call `stop`."""
        self._check_not_begun()
        try:
            self.start()
            return self.wait()
        except BaseException:
            self._process.kill()
            raise

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for its end; TimeoutError after `timeout` seconds, and it goes on.

        Raises the TenderError of a guest that could not start.
        """
        self._check_waiting()
        if not self._ended.wait(validation.seconds("timeout", timeout)):
            raise TimeoutError(f"the guest still runs after {timeout} s")
        return self._result()

    def stop(self, grace: float = GRACE_S) -> Outcome:
        """End it, if it has not ended by itself, and say how it ended.

        One that does not end within `grace` seconds is killed.
        """
        self._check_waiting()
        patience = _patience(grace)
        self._process.request_stop()
        while not self._ended.wait(KICK_EVERY_S):
            self._press(patience)
        return self._result()

    def kill(self) -> Outcome:
        """End its process at once, whatever it is doing, and say how it ended."""
        self._check_begun()
        self._process.kill()
        self._check_waiting()
        self._ended.wait()
        return self._result()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, exc_type: object, *_: object) -> None:
        if self._program != os.getpid():
            return  # a fork of the program leaves the block as well
        try:
            self.stop()
        except BaseException as error:
            if not isinstance(error, Exception):
                self._process.kill()  # Ctrl-C once more
            if exc_type is None:  # else the error of the with block is the one to see
                raise

    # The same for asyncio.

    async def start_async(self) -> Self:
        """`start`, while other tasks go on. Where its task is cancelled, the guest is killed."""
        import asyncio

        try:
            return await asyncio.get_running_loop().run_in_executor(None, self.start)
        except asyncio.CancelledError:
            self._press(patience=0)
            raise

    async def wait_async(self, timeout: float | None = None) -> Outcome:
        """`wait`, while other tasks go on."""
        import asyncio

        self._check_begun()
        timeout = validation.seconds("timeout", timeout)
        loop = asyncio.get_running_loop()
        ended: Future[None] = loop.create_future()
        self._when_ended(lambda: _resolve(loop, ended))
        try:
            await asyncio.wait_for(ended, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the guest still runs after {timeout} s") from None
        return self._result()

    async def stop_async(self, grace: float = GRACE_S) -> Outcome:
        """`stop`, while other tasks go on."""
        self._check_begun()
        patience = _patience(grace)
        wait_s = KICK_EVERY_S
        while True:
            self._press(patience)
            try:
                return await self.wait_async(wait_s)
            except TimeoutError:
                wait_s = min(0.1, 2 * wait_s)

    async def __aenter__(self) -> Self:
        return await self.start_async()

    async def __aexit__(self, exc_type: object, *_: object) -> None:
        try:
            await self.stop_async()
        except BaseException as error:
            if not isinstance(error, Exception):
                self._process.kill()
            if exc_type is None:
                raise

    # Inside.

    def _press(self, patience: float) -> None:
        """Ask it to end once more, or kill it where `patience` (time.monotonic()) is over."""
        if monotonic() < patience:
            self._process.request_stop()
        else:
            self._process.kill()

    def _start_beside(self) -> None:
        """Start it on another thread, and wait for that.

        Ctrl-C raises in the middle of whatever a program's main thread does, and what is left half
        done here would be a guest that nobody can end.
        """
        errors: list[BaseException] = []
        done = Latch()

        def start() -> None:
            try:
                self._start()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        try:
            threading.Thread(target=start, name="ptender start", daemon=True).start()
            done.wait()
        except BaseException:
            self._press(patience=0)
            raise
        if errors:
            raise errors[0]

    def _start(self) -> None:
        self._begin()
        if not self._process.started:
            self._ended.wait()
            if self._error is not None:
                raise self._error

    def _begin(self) -> None:
        """Start its process, once."""
        with self._lock:
            self._check_not_begun()
            self._program = os.getpid()
            self._starter = threading.get_ident()
            self._begun = True
        try:
            try:
                self._launch()
            finally:
                self._starter = 0
                self._launched.set()
        except BaseException as error:
            self._failed(error)
            raise

    def _launch(self) -> None:
        config = replace(self.config, cpu=accel.choice(self.config))
        self._devices = devices = Devices(*self._specs, self._report)
        try:
            descriptors = list(dict.fromkeys(devices.descriptors))
            numbers = protocol.numbers_in_child(descriptors)
            net, block, console_fd = devices.with_descriptors(numbers)
            config = replace(config, net=net, block=block, console_fd=console_fd)
            self._process.start(config, descriptors, self.deadline)
        finally:
            devices.handed_over()

    def _failed(self, error: BaseException) -> None:
        """It has not come as far as to have a process."""
        if self._process.pid is None:
            self._error = error
            self._has_ended()

    def _has_ended(self) -> None:
        """Called when its process has ended, by a thread that must not wait."""
        if not process.program_ends():
            try:
                threading.Thread(target=self._settle, name="ptender end", daemon=True).start()
                return
            except RuntimeError:  # no room for one more
                pass
        self._settle()

    def _settle(self) -> None:
        """Take in what is left of its devices: on a thread that no Ctrl-C comes to."""
        self._settler = threading.get_ident()
        try:
            self._launched.wait()
            how = self._conclude()
            if self._devices is not None:
                self._devices.close(how)
        except Exception as error:
            self._report("its devices", error)
        finally:
            with self._lock:
                self._ended.set()
                callbacks, self._callbacks = self._callbacks, []
            self._settler = 0
        for call in callbacks:
            call()

    def _conclude(self) -> str:
        if self._error is not None:
            return "it could not start"
        try:
            outcome = self._process.outcome()
        except BaseException as error:
            self._error = error
            return "it could not start"
        self._outcome = outcome
        return f"{outcome.reason}, status {outcome.status}"

    def _when_ended(self, call: Callable[[], None]) -> None:
        with self._lock:
            if not self._ended.is_set:
                self._callbacks.append(call)
                return
        call()

    def _check_not_begun(self) -> None:
        if self._begun:
            raise RuntimeError("this guest was started already")

    def _check_begun(self) -> None:
        if not self._begun:
            raise RuntimeError("this guest was not started")
        if self._program != os.getpid():
            raise RuntimeError("this guest is that of the process which this one was forked from")

    def _check_waiting(self) -> None:
        self._check_begun()
        if not self._ended.is_set and self._is_its_own_thread():
            raise RuntimeError("a guest's own thread can't wait for its end")

    def _is_its_own_thread(self) -> bool:
        if reactor.reactor().is_here() or threading.get_ident() in (self._starter, self._settler):
            return True
        return self._devices is not None and self._devices.serves_here()

    def _result(self) -> Outcome:
        if self._error is not None:
            raise self._error
        if self._outcome is None:
            raise RuntimeError("this guest has no outcome")
        return self._outcome

    def _report(self, device: str, what: BaseException | str) -> None:
        if not isinstance(what, str):
            says = f": {what}" if str(what) else ""
            what = f"{type(what).__name__}{says}{_place(what)}"
        self._warn(f"{device}: {what}")


def _place(error: BaseException) -> str:
    """Where it was raised.

    Empty for an OSError, by which a device says what it can't, and for those of this package.
    """
    trace, place = error.__traceback__, ""
    if isinstance(error, OSError):
        return place
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        place = "" if file.startswith(_HERE) else f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _resolve(loop: AbstractEventLoop, future: Future[None]) -> None:
    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:  # the loop is closed: nobody waits
        pass


def _patience(grace: float) -> float:
    """Until when (time.monotonic()) to wait for one that is asked to end."""
    limit = validation.seconds("grace", grace)
    return float("inf") if limit is None else monotonic() + limit


def _guarded(warn: Callable[[str], None]) -> Callable[[str], None]:
    """The same; what it raises ends none of the threads that call it, and is shown."""
    return lambda text: reactor.call(lambda: warn(text))


def _to_stderr(text: str) -> None:
    if sys.stderr is not None:  # closed, where the program has closed it
        print(f"ptender: {text}", file=sys.stderr, flush=True)
