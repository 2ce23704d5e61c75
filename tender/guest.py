"""`Guest`: a unikernel that a program runs.

The rule here: nothing of the host is touched before a guest is started, and nothing of it is left
once it has ended. It runs in a child process of its own (tender/embed/process.py).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from math import inf
from time import monotonic

from tender.boot import layout
from tender.checks import as_flag
from tender.config import Config
from tender.dataclass import replace
from tender.embed import reactor, validation
from tender.embed.console import Console
from tender.embed.lifecycle import Lifecycle, State
from tender.embed.saving import Saving
from tender.errors import InvalidValue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from tender.backends import Rate
    from tender.config import VirtualTime
    from tender.embed.interfaces import (
        BlockSpec,
        Cpu,
        NetSpec,
        SandboxMode,
        Sink,
    )
    from tender.outcome import Outcome

STOP_EVERY_S = 0.01  # between two stop requests to a guest that has not ended
STOP_EVERY_MAX_S = 0.1  # the same for asyncio, after some
GRACE_S = 5.0
GDB_PORT = 1234  # gdb's own custom, and Solo5's


class Guest(Saving):
    """A unikernel, run by this program in a process of its own, with a sandbox.

    Every method may be called from any thread, except that code which the guest itself calls
    (a device in Python, a console callback, `warn`) can't wait for its end: that is a
    RuntimeError. A guest runs once.

    As a context manager, sync or async, it is started at the beginning of the block and stopped
    at its end.

    Args:
        kernel: The image: its path, its bytes, or an open descriptor of its file, which stays the
            program's.
        args: The guest's command line.
        mem_mib: Guest memory in MiB.
        net: What each network device of the manifest is attached to, by its name: a Tap (or its
            name as a string), Descriptor, UserNet, NetSender, NetReceiver or NetAttachable.
        block: The same for block devices: a BlockFile (or a path), BlockMemory, BlockDescriptor,
            BlockDevice or BlockAttachable.
        net_rate: Limits of what network devices move, by the devices' names.
        block_rate: The same for block devices.
        console: Gets the console output, in addition to the attribute `console`: a callable that
            takes bytes, a stream, a file or a descriptor. The guest waits for a slow one.
        console_limit: Bytes per second of console output; lines that exceed it are dropped.
        dumpcore: A folder for the core file of a guest that aborts.
        trace: A file for one line of JSON per hypercall.
        record: A file that the run is recorded in, for `ptender --replay`; on the software CPU.
        pcap: Files for the packets of network devices (pcapng), by the devices' names.
        warn: Called with one line of text when the host has a problem with a device, from any
            thread; it must not block. Standard error if None.
        cpu: "kvm", "native" (a process of its own runs the guest's code, without KVM), "soft" (the
            software CPU) or "auto": the first of these that this machine can have.
        clock: Gives the guest a virtual time; on the software CPU.
        instructions: How many instructions the guest may execute; on the software CPU.
        exec_heap: Let the guest execute its heap, as a JIT does. On KVM it always can; on the other
            CPUs a jump to data is an exception of the guest.
        deadline: Seconds that the guest may run, from its start. Then it is stopped, and killed two
            seconds later if it has not ended.
        sandbox: "on", "require" (a layer that this machine can't provide is an error) or "off".
        user: Who the guest's process runs as if the program is root's: a name or a UID.
        name: Its name for `ptender ps`, `stats` and `metrics`: 1 to 64 letters, digits, ".", "_"
            and "-". The file name of the kernel if None; it need not be unique.
        on_end: Called with the guest when it has ended, from any thread; `guest.outcome` says how,
            and what waits for its end goes on. It must not block. Not called for a guest that could
            not start, which `start` raises.
        fresh: Execute a Python for this guest, in the place of a fork that has the addresses of the
            program's other guests in it (docs/threat-model.md).
        snapshots: It can be saved while it runs: `snapshot`, `fork`.

    Raises:
        UsageError: an argument has a wrong type or value. Whether a device can be had is found out
            by `start`.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | bytes | int,
        *args: str,
        mem_mib: int = layout.MEM_DEFAULT // layout.MIB,
        net: Mapping[str, NetSpec] | None = None,
        block: Mapping[str, BlockSpec] | None = None,
        net_rate: Mapping[str, Rate] | None = None,
        block_rate: Mapping[str, Rate] | None = None,
        console: Sink = None,
        console_limit: int | None = None,
        dumpcore: str | os.PathLike[str] | None = None,
        trace: str | os.PathLike[str] | None = None,
        record: str | os.PathLike[str] | None = None,
        pcap: Mapping[str, str | os.PathLike[str]] | None = None,
        warn: Callable[[str], None] | None = None,
        cpu: Cpu = "auto",
        clock: VirtualTime | None = None,
        instructions: int | None = None,
        exec_heap: bool = False,
        deadline: float | None = None,
        sandbox: SandboxMode = "on",
        user: str | int | None = None,
        name: str | None = None,
        on_end: Callable[[Guest], object] | None = None,
        fresh: bool = False,
        snapshots: bool = False,
    ) -> None:
        path, image = validation.kernel(kernel)
        self.config = Config(
            kernel=path,
            args=args,
            mem_bytes=validation.mem_mib("mem_mib", mem_mib) * layout.MIB,
            net_rate=validation.rates("net_rate", net_rate),
            block_rate=validation.rates("block_rate", block_rate),
            console_limit=console_limit,
            dumpcore=dumpcore,
            trace=validation.trace(trace),
            record=record,
            pcap=validation.pcap(pcap),
            cpu=cpu,
            clock=clock,
            instructions=instructions,
            exec_heap=exec_heap,
            sandbox=sandbox,
            user=user,
            name=name,
        )
        self._console = self._new_console()
        self.deadline = validation.seconds("deadline", deadline)
        self._life = Lifecycle(
            validation.devices("net", net),
            validation.devices("block", block),
            console,
            self._console,
            _guarded(validation.warn(warn) or _print),
            image=image,
            fresh=as_flag("fresh", fresh),
            snapshots=as_flag("snapshots", snapshots),
            on_end=on_end and partial(validation.on_end(on_end), self),
        )

    # What it is.

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._life.state not in (State.NEW, State.ENDED)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before that, and if it could not start."""
        return None if isinstance(self._life.result, BaseException) else self._life.result

    @property
    def pid(self) -> int | None:
        """The PID of the process that it runs in, or ran in; None before it has one."""
        return self._life.process.pid

    @property
    def ports(self) -> dict[int | str, int]:
        """The ports of the host that a UserNet forwards, by port of the guest: {80: 40123}.

        UDP ports are "udp:53". Empty before the guest is started.
        """
        return dict(self._life.ports)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of its sandbox, named as by `ptender -v`; empty before it runs."""
        return self._life.process.layers

    @property
    def missing_layers(self) -> tuple[str, ...]:
        """The layers of the sandbox that this machine can't provide, each with its reason, such as
        "namespaces: Operation not permitted". With sandbox="require" they are an error instead."""
        return self._life.process.missing_layers

    @property
    def console(self) -> Console:
        """Its console output; RuntimeError if it was not started."""
        if self._life.state is State.NEW:
            raise RuntimeError("this guest was not started")
        return self._console

    def __repr__(self) -> str:
        state = self._life.state
        what = f"process {self.pid}" if state is State.RUNNING else state.value
        return f"<Guest {self.config.kernel}: {what}>"

    # Starting and ending.

    def debug(self, at: int | str = GDB_PORT) -> str:
        """Let it wait for gdb or lldb before its first instruction, when it is started.

        `start` does not wait for the debugger. A deadline does not, either.

        Args:
            at: A port of 127.0.0.1, or the path of a Unix socket (with a "/").

        Returns:
            The command of gdb that connects to it.

        Raises:
            UsageError: `at` is neither.
            RuntimeError: it was started already.
        """
        from tender.observe.gdb_link import STDIO, command

        self._life.check_new()
        if at == STDIO:
            raise InvalidValue("at", at, "a port number, or the path of a socket (with a /)")
        self.config = replace(self.config, gdb=at)
        return command(at, self.config.kernel)

    def start(self) -> Self:
        """Start it; returns when all its devices are attached and it is about to run.

        Returns:
            The guest itself.

        Raises:
            TenderError: it can't start; the text is the line that the command would print. See
                tender.errors for the classes.
            RuntimeError: it was started already.
        """
        self._life.start(self.config, self.deadline)
        return self

    def run(self) -> Outcome:
        """Start it and wait for its end. It is killed if that is interrupted, as by Ctrl-C.

        Returns:
            How it ended.

        Raises:
            TenderError: it can't start.
            RuntimeError: it was started already.
        """
        self._life.check_new()
        try:
            self.start()
            return self.wait()
        except BaseException:
            self._life.process.kill()
            raise

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for its end.

        Args:
            timeout: Seconds; None for no limit.

        Returns:
            How it ended. Its process is gone then, and all its output has arrived.

        Raises:
            TimeoutError: it still runs after `timeout`, and goes on.
            TenderError: it could not start.
            RuntimeError: it was not started, or this thread is one that the guest waits for.
        """
        self._life.check_can_wait()
        if not self._life.ended.wait(validation.seconds("timeout", timeout)):
            raise TimeoutError(f"the guest still runs after {timeout} s")
        return self._get_result()

    def stop(self, grace: float = GRACE_S) -> Outcome:
        """Ask it to end, and wait for that.

        Args:
            grace: Seconds after which it is killed.

        Returns:
            How it ended: reason "stopped" and status 0, unless it ended by itself before.

        Raises:
            TenderError: it could not start.
            RuntimeError: as `wait`.
        """
        self._life.check_can_wait()
        kill_at = _kill_at(grace)
        self._life.process.request_stop()
        while not self._life.ended.wait(STOP_EVERY_S):
            self._ask_or_kill(kill_at)
        return self._get_result()

    def kill(self) -> Outcome:
        """End its process at once, whatever it is doing, and wait for that.

        Returns:
            How it ended: reason "killed", unless it ended before.

        Raises:
            TenderError: it could not start.
            RuntimeError: as `wait`; the process is killed all the same.
        """
        self._life.check_started()
        self._life.process.kill()
        self._life.check_can_wait()
        self._life.ended.wait()
        return self._get_result()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, exc_type: object, *_: object) -> None:
        if self._life.program != os.getpid():
            return  # a fork of the program leaves the block as well
        try:
            self.stop()
        except BaseException as error:
            self._kill_if_interrupted(error)
            if exc_type is None:  # else the error of the with block is the one to see
                raise

    # The same for asyncio: other tasks run meanwhile.

    async def start_async(self) -> Self:
        """`start` for asyncio. If its task is cancelled, the guest is killed."""
        import asyncio

        try:
            return await asyncio.get_running_loop().run_in_executor(None, self.start)
        except asyncio.CancelledError:
            self._life.process.kill()
            raise

    async def run_async(self) -> Outcome:
        """`run` for asyncio. If its task is cancelled, the guest is killed."""
        self._life.check_new()
        try:
            await self.start_async()
            return await self.wait_async()
        except BaseException:
            self._life.process.kill()
            raise

    async def wait_async(self, timeout: float | None = None) -> Outcome:
        """`wait` for asyncio."""
        self._life.check_started()
        if not await self._life.wait_async(validation.seconds("timeout", timeout)):
            raise TimeoutError(f"the guest still runs after {timeout} s")
        return self._get_result()

    async def stop_async(self, grace: float = GRACE_S) -> Outcome:
        """`stop` for asyncio."""
        self._life.check_started()
        kill_at = _kill_at(grace)
        wait_s = STOP_EVERY_S
        self._life.process.request_stop()
        while not await self._life.wait_async(wait_s):
            self._ask_or_kill(kill_at)
            wait_s = min(STOP_EVERY_MAX_S, 2 * wait_s)
        return self._get_result()

    async def kill_async(self) -> Outcome:
        """`kill` for asyncio."""
        self._life.check_started()
        self._life.process.kill()
        await self._life.wait_async(None)
        return self._get_result()

    async def __aenter__(self) -> Self:
        return await self.start_async()

    async def __aexit__(self, exc_type: object, *_: object) -> None:
        try:
            await self.stop_async()
        except BaseException as error:
            self._kill_if_interrupted(error)
            if exc_type is None:
                raise

    def _ask_or_kill(self, kill_at: float) -> None:
        if monotonic() < kill_at:
            self._life.process.request_stop()
        else:
            self._life.process.kill()

    def _kill_if_interrupted(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            self._life.process.kill()

    def _get_result(self) -> Outcome:
        if isinstance(self._life.result, BaseException):
            raise self._life.result
        if self._life.result is None:
            raise RuntimeError("this guest has no outcome")
        return self._life.result

    def _new_console(self) -> Console:
        """The guest's console; a subclass may have one of its own."""
        return Console()


def _kill_at(grace: float) -> float:
    """When (time.monotonic()) a guest that was asked to end is killed."""
    grace_s = validation.seconds("grace", grace)
    return inf if grace_s is None else monotonic() + grace_s


def _guarded(warn: Callable[[str], None]) -> Callable[[str], None]:
    """`warn` such that an exception in it is printed, and ends none of the threads that call it."""
    return lambda text: reactor.call(lambda: warn(text))


def _print(text: str) -> None:
    if sys.stderr is not None:  # closed, if the program has closed it
        print(f"ptender: {text}", file=sys.stderr, flush=True)
