"""The file that a tool makes: whole, or not there.

The rule here: everything is made in a folder of its own beside the output, and the last step is a
rename. A signal that ends the tool is an error wherever it arrives, so the folder goes away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tender.errors import BuildError
from tender.host import write_all

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def report(text: str) -> None:
    """Write lines to standard error, for whoever reads it: nobody need."""
    with contextlib.suppress(OSError):
        write_all(2, f"{text}\n".encode(errors="surrogateescape"))


class Signals:
    """The signals that end a tool: the first is raised as an error wherever it arrives.

    It waits while a process is being started (`held`), which has to be ended then as well.
    """

    def __init__(self) -> None:
        self.number = 0
        self.held = False

    def __call__(self, number: int, _frame: object) -> None:
        if not self.number:  # another one must not get in the way of tidying up
            self.number = number
            if not self.held:
                self.check()

    def check(self) -> None:
        if self.number:
            raise BuildError(f"Exiting on signal {self.number}")

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Handle those that are not ignored, as SIGHUP is under nohup."""
        self.number = 0
        before = {number: signal.getsignal(number) for number in ENDING}
        taken = [number for number in ENDING if before[number] != signal.SIG_IGN]
        try:
            for number in taken:
                signal.signal(number, self)
            yield
        finally:
            for number in taken:
                signal.signal(number, before[number])


signals = Signals()


@contextlib.contextmanager
def work_folder(output: str) -> Iterator[Path]:
    """Make a folder, beside the output unless that is written into; remove it whatever happens."""
    # Its name is known before it is there: so it goes away whenever the build is ended.
    beside = (os.path.dirname(output) or ".") if _is_replaced(output) else tempfile.gettempdir()
    folder = Path(beside, f".ptender-build-{os.urandom(8).hex()}")
    try:
        try:
            folder.mkdir(0o700)
        except OSError as error:
            raise BuildError(f"can't write {output}: {error.strerror}") from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_replaced(output: str) -> bool:
    """Whether the output is a file or folder that is replaced as a whole, or a new one.

    A FIFO, a device and what a symbolic link names (/dev/stdout) are written into.
    """
    try:
        mode = os.lstat(output).st_mode
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    except OSError:
        return True


def put_in_place(made: Path, output: str) -> None:
    """Make `made`, a file of the work folder, the output. Raises BuildError."""
    try:
        if _is_replaced(output):
            os.replace(made, output)
        else:
            fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o777)
            with open(fd, "wb") as file:
                file.write(made.read_bytes())
    except OSError as error:
        raise BuildError(f"can't write {output}: {error.strerror}") from None
