"""`Guest`: what programs that embed the tender see.

The rule here: a guest is described when it is made, and nothing of the host is touched before it
is started; after it has ended nothing of it is left. It runs in this process, on a thread of its
own (or on the caller's, with `run`), without a sandbox.
"""

from __future__ import annotations

import os
import sys
import threading

from tender import machine
from tender.boot import layout
from tender.config import BlockFile, Config, Descriptor, Tap, VirtualTime
from tender.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tender.machine import Outcome

KICK_EVERY_S = 0.01


class Guest:
    """A unikernel in this process.

    `kernel` is the image's path and `args` its command line. `net` and `block` say what each
    device that the manifest declares is attached to, by its name there. `mem_mib` is the guest's
    memory in MiB. `console` is where its output goes: a descriptor or a file with one, standard
    output if None. `dumpcore` is a folder for the core file of a guest that aborts. `warn` is
    called with one line of text when the host has trouble with a device; standard error if None.
    `cpu` is "kvm", "soft" or "auto"; `clock` gives the guest a virtual time and `instructions`
    a limit, both of them on the software CPU.

    `start`, `wait` and `stop` raise TenderError where the guest can't start (see tender.errors).
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        mem_mib: int = layout.MEM_DEFAULT // layout.MIB,
        net: Mapping[str, Tap | Descriptor] | None = None,
        block: Mapping[str, BlockFile] | None = None,
        console: int | _HasFileno | None = None,
        dumpcore: str | os.PathLike[str] | None = None,
        warn: Callable[[str], None] | None = None,
        cpu: str = "auto",
        clock: VirtualTime | None = None,
        instructions: int | None = None,
    ) -> None:
        if console is None:
            console = 1
        self.config = Config(
            kernel=os.fspath(kernel),
            args=args,
            mem_bytes=mem_mib * layout.MIB,
            net=tuple((net or {}).items()),
            block=tuple((block or {}).items()),
            dumpcore=None if dumpcore is None else os.fspath(dumpcore),
            console_fd=console if isinstance(console, int) else console.fileno(),
            cpu=cpu,
            clock=clock,
            instructions=instructions,
        )
        self._warn = warn or _to_stderr
        self._stop = Stop()
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    def run(self) -> Outcome:
        """Run the guest on this thread until it ends. Another thread can call `stop`."""
        self._run()
        return self._result()

    def start(self) -> Guest:
        """Run the guest on a thread of its own."""
        if self._thread is not None:
            raise RuntimeError("this guest was started already")
        self._thread = threading.Thread(target=self._run, name=f"guest {self.config.kernel}")
        self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the guest's end; TimeoutError after `timeout` seconds, and it goes on."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the guest still runs after {timeout} s")
        return self._result()

    def stop(self) -> Outcome:
        """End the guest, if it has not ended by itself, and say how it ended."""
        while self._thread is not None and self._thread.is_alive():
            self._stop.request()
            self._thread.join(KICK_EVERY_S)
        return self._result()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Guest:
        return self.start()

    def __exit__(self, exc_type: object, *_: object) -> None:
        if self._thread is None:
            return
        try:
            self.stop()
        except BaseException:
            if exc_type is None:  # else the error of the with block is the one to see
                raise

    def _run(self) -> None:
        try:
            self._outcome = machine.run(self.config, self._stop, self._warn)
        except BaseException as error:
            self._error = error

    def _result(self) -> Outcome:
        if self._error is not None:
            raise self._error
        if self._outcome is None:
            raise RuntimeError("this guest was not started")
        return self._outcome


def _to_stderr(text: str) -> None:
    print(f"ptender: {text}", file=sys.stderr, flush=True)


if TYPE_CHECKING:
    from typing import Protocol

    class _HasFileno(Protocol):
        def fileno(self) -> int: ...
