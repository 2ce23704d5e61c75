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
from tender.config import Config, VirtualTime
from tender.devices import Wiring
from tender.record import replace
from tender.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tender.console_capture import Console, Sink
    from tender.devices import BlockSpec, NetSpec
    from tender.machine import Outcome

KICK_EVERY_S = 0.01


class Guest:
    """A unikernel in this process.

    `kernel` is the image's path and `args` its command line. `net` and `block` say what each
    device that the manifest declares is attached to, by its name there (see tender.devices).
    `mem_mib` is the guest's memory in MiB. What it says is in `guest.console`; `console` gets it
    as well: a callable, a stream, a file or a descriptor. `dumpcore` is a folder for the core
    file of a guest that aborts. `warn` is called with one line of text when there is trouble with
    a device; standard error if None. `cpu` is "kvm", "soft" or "auto"; `clock` gives the guest a
    virtual time and `instructions` a limit, both of them on the software CPU.

    `run`, `wait` and `stop` raise TenderError where the guest could not start (see
    tender.errors).
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        mem_mib: int = layout.MEM_DEFAULT // layout.MIB,
        net: Mapping[str, NetSpec] | None = None,
        block: Mapping[str, BlockSpec] | None = None,
        console: Sink = None,
        dumpcore: str | os.PathLike[str] | None = None,
        warn: Callable[[str], None] | None = None,
        cpu: str = "auto",
        clock: VirtualTime | None = None,
        instructions: int | None = None,
    ) -> None:
        self.config = Config(
            kernel=os.fspath(kernel),
            args=args,
            mem_bytes=mem_mib * layout.MIB,
            dumpcore=None if dumpcore is None else os.fspath(dumpcore),
            cpu=cpu,
            clock=clock,
            instructions=instructions,
        )
        self._warn = warn or _to_stderr
        self._devices = net or {}, block or {}, console
        self._wiring: Wiring | None = None
        self._stop = Stop()
        self._begun = False
        self._ended = False
        # Held while the guest runs. A lock and not an Event: Ctrl-C in a wait must break neither.
        self._busy = threading.Lock()
        self._runner = 0  # the thread that runs the guest
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    def run(self) -> Outcome:
        """Run the guest on this thread until it ends. Another thread can call `stop`."""
        self._begin()
        self._wire()
        self._run()
        return self._result()

    def start(self) -> Guest:
        """Run the guest on a thread of its own. `wait` and `stop` tell whether it could start."""
        self._begin()
        self._wire()
        # A daemon: a guest that nobody stops does not keep the program from ending.
        threading.Thread(target=self._run, name=f"guest {self.config.kernel}", daemon=True).start()
        return self

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the guest's end; TimeoutError after `timeout` seconds, and it goes on."""
        self._check_begun()
        if not self._wait(-1 if timeout is None else timeout):
            raise TimeoutError(f"the guest still runs after {timeout} s")
        return self._result()

    def stop(self) -> Outcome:
        """End the guest, if it has not ended by itself, and say how it ended.

        Any thread may call it, but the one that runs the guest (as from `warn`).
        """
        self._check_begun()
        wiring = self._wiring
        here = threading.get_ident() == self._runner or (wiring and wiring.serves_here())
        if here and not self._ended:
            raise RuntimeError("a guest's own thread can't wait for its end")
        self._stop.request()
        while not self._wait(KICK_EVERY_S):
            self._stop.request()
        return self._result()

    @property
    def running(self) -> bool:
        return self._begun and not self._ended

    @property
    def console(self) -> Console:
        """What the guest says; RuntimeError where it has not started."""
        if self._wiring is None:
            raise RuntimeError("this guest was not started, or could not be")
        return self._wiring.console

    def __enter__(self) -> Guest:
        return self.start()

    def __exit__(self, exc_type: object, *_: object) -> None:
        try:
            self.stop()
        except BaseException:
            if exc_type is None:  # else the error of the with block is the one to see
                raise

    def _begin(self) -> None:
        if self._begun:
            raise RuntimeError("this guest was started already")
        self._begun = True
        self._busy.acquire()

    def _wait(self, timeout: float) -> bool:
        if not self._ended and self._busy.acquire(timeout=timeout):
            self._busy.release()
        return self._ended

    def _check_begun(self) -> None:
        if not self._begun:
            raise RuntimeError("this guest was not started")

    def _wire(self) -> None:
        try:
            self._wiring = wiring = Wiring(*self._devices, self._report)
            devices = {"net": wiring.net, "block": wiring.block, "console_fd": wiring.console_fd}
            self.config = replace(self.config, **devices)
        except BaseException as error:
            self._error = error

    def _report(self, device: str, what: BaseException | str) -> None:
        text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
        self._warn(f"{device}: {text}")

    def _run(self) -> None:
        self._runner = threading.get_ident()
        how = "it could not start"
        try:
            if self._wiring is not None:
                self._outcome = machine.run(self.config, self._stop, self._warn)
                how = f"{self._outcome.reason}, status {self._outcome.status}"
        except BaseException as error:
            self._error = error
        finally:
            if self._wiring is not None:
                self._wiring.close(how)
            self._ended = True
            self._busy.release()

    def _result(self) -> Outcome:
        if self._error is not None:
            raise self._error
        if self._outcome is None:
            raise RuntimeError("this guest has no outcome")
        return self._outcome


def _to_stderr(text: str) -> None:
    print(f"ptender: {text}", file=sys.stderr, flush=True)
