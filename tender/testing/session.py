"""The guests, switches and disks of one test, or of all tests of a module or a run, and what is
kept of them when a test fails.

The rule here: what fixtures make is ended or closed with their scope, in the reverse order,
whatever else fails. No file is written before a test has failed; report.py writes them then.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from pathlib import Path

from tender.testing import report
from tender.testing.net.port import GuestPort
from tender.testing.net.switch import Switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tender.embed.interfaces import Cpu
    from tender.testing.disk import DiskImage
    from tender.testing.unikernel import Unikernel

NAME_MAX = 150  # characters of a folder's name


class Session:
    """What the fixtures of one scope share: of a test, of a module, or of pytest's session.

    Images are looked for in `folders`. `scratch` returns a folder that is removed at the end.
    `cpu` is what guests run on, `trace` whether their hypercalls are recorded, `patience` the
    timeout in seconds of methods that are given none, and `seed` the seed of all randomness.
    `wider` returns the sessions of wider scopes that the same test uses.
    """

    def __init__(
        self,
        name: str,
        folders: list[Path],
        scratch: Callable[[], Path],
        *,
        cpu: Cpu,
        patience: float,
        seed: str | None,
        trace: bool,
        record: bool = False,
        gdb: int | str | None = None,
        say: Callable[[str], None] = print,
        wider: Callable[[], list[Session]] = list,
        is_test: bool = True,
    ) -> None:
        self.name = name
        self.cpu = cpu
        self.patience = patience
        self.trace = trace
        self.record = record  # the runs of guests whose CPU the test does not choose
        self.gdb = gdb  # where the first guest waits for a debugger
        self.say = say  # a line for whoever runs the test
        self.seed = name if seed is None else seed
        self.guests: list[Unikernel] = []
        self.switches: list[Switch] = []
        self.disks: list[DiskImage] = []
        self.subtests: list[str] = []  # their results, as lines
        self.failures: list[str] = []  # of sub-tests after which the test went on
        self.bad_ends: list[str] = []  # of guests whose outcome the test has not looked at
        self._numbers = itertools.count()  # of switches
        self._folders = folders
        self._wider = wider
        self._new_folder = scratch
        self._folder: Path | None = None  # the scratch folder
        self.closed = False
        self.is_test = is_test  # its scope is one test
        _open.append(self)

    def find(self, file: str | os.PathLike[str], what: str = "image") -> Path:
        """The path of a file that is given relative to the test's folder or to pytest's root.

        Raises FileNotFoundError, in which the file is called `what`.
        """
        for folder in self._folders:
            if (folder / file).is_file():
                return folder / file
        if os.path.isabs(file):
            raise FileNotFoundError(f"there is no file {file}")
        places = " or in ".join(dict.fromkeys(map(str, self._folders)))
        raise FileNotFoundError(f"there is no {what} {str(file)!r} in {places}")

    def switch(self, *, virtual: bool = False) -> Switch:
        numbers = self._numbers
        switch = Switch(virtual=virtual, seed=self.seed, patience=self.patience, numbers=numbers)
        self.switches.append(switch)
        return switch

    def add_switches(self, net: Iterable[object]) -> None:
        """Add the switches of these network devices that the test has made by itself."""
        known = [switch for each in [*self._wider(), self] for switch in each.all_switches()]
        for port in net:
            switch = port.switch if isinstance(port, GuestPort) else None
            if isinstance(switch, Switch) and switch not in known:
                known.append(switch)
                self.switches.append(switch)

    def add_guest(self, guest: Unikernel, net: Iterable[object]) -> None:
        """A guest that ends with this scope, and is not started yet; `net` are its networks."""
        self.add_switches(net)
        if self.gdb is not None and guest.can_debug:
            at = _next(self.gdb, self.number())
            self.say(f"ptender: a guest waits for a debugger: {guest.debug(at)}")
        self.guests.append(guest)

    def trace_file(self) -> Path:
        """Where the hypercalls of the next guest are recorded."""
        return self.scratch() / f"{len(self.guests)}.trace"

    def number(self) -> int:
        """The number of the next guest, among those that a test sees."""
        return sum(len(each.guests) for each in [*self._wider(), self])

    def all_switches(self) -> list[Switch]:
        """The switches, with those that `Switch.another` has made."""
        found = list(self.switches)
        for switch in found:  # the list grows while it is read
            found += switch.others
        return found

    def scratch(self) -> Path:
        """The scratch folder, made when it is first needed."""
        if self._folder is None:
            self._folder = self._new_folder()
        return self._folder

    # ---- The end of the test ----

    def close(self) -> None:
        """End all guests, then close their switches and disks. Idempotent.

        Raises the first start error that was not raised in the test.
        """
        if self.closed:
            return
        self.closed = True
        _open.remove(self)
        unchecked = [guest for guest in self.guests if not guest.outcome_checked]
        errors = [error for guest in reversed(self.guests) if (error := _end(guest))]
        self.bad_ends = self._describe_ends(unchecked)
        for switch in self.switches:
            switch.close()
        for disk in self.disks:
            disk.close()
        if errors:
            raise errors[-1]

    def clean(self) -> None:
        """Remove the scratch folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def take_bad_ends(self) -> list[str]:
        """The guests that have failed since the last call, unless a test has looked at it."""
        unchecked = [guest for guest in self.guests if not guest.outcome_checked]
        ends = self._describe_ends(unchecked)
        for guest in unchecked:
            guest.outcome_checked = bool(guest.bad_end())
        return ends

    def _describe_ends(self, guests: list[Unikernel]) -> list[str]:
        first = self.number() - len(self.guests)
        return [
            f"guest {number} ({guest.kernel}) has ended by itself: {how}"
            for number, guest in enumerate(self.guests, first)
            if guest in guests and (how := guest.bad_end())
        ]


_open: list[Session] = []  # the widest first


def of_this_test() -> Session:
    """The session of the test that runs; RuntimeError if it uses no fixture of its own scope."""
    if not _open or not _open[-1].is_test:
        raise RuntimeError("a clone ends with its test: let the test use `unikernel` as well")
    return _open[-1]


def _next(at: int | str, number: int) -> int | str:
    """Where guest `number` of a test waits for a debugger."""
    if isinstance(at, int):
        return at + number
    return f"{at}.{number}" if number else at


# ---- Artifacts ----


def remove_artifacts(folder: Path, test: str) -> None:
    """Remove those of an earlier run."""
    shutil.rmtree(folder / folder_name(test), ignore_errors=True)


def keep_artifacts(
    folder: Path, test: str, sessions: list[Session], own: Session | None
) -> list[tuple[str, str]]:
    """Fill the folder of a failed test; titles and texts for the report.

    The guests of `own`, the session of the test, are ended. Others go on.
    """
    if own is not None:
        try:
            own.close()
        except Exception as error:
            own.failures.append(f"ending the guests: {error}")
    artifacts = report.Artifacts(folder / folder_name(test))
    sections = report.sections(
        artifacts,
        [guest for each in sessions for guest in each.guests],
        [switch for each in sessions for switch in each.all_switches()],
        [disk for each in sessions for disk in each.disks],
    )
    for each in sessions:
        each.take_bad_ends()  # the report has them
    if own is not None and own.subtests:
        sections.append(("sub-tests", "\n".join(own.subtests)))
    about = artifacts.about()
    if about:
        about.append(f"random seed: {sessions[-1].seed!r} (--ptender-seed)")
    return [*sections, ("artifacts", "\n".join(about))] if about else sections


def folder_name(test: str) -> str:
    """A folder name for a test that no other test has: one would remove the other's files.

    `test_net.py::test_ping` is `test_net.py_test_ping`. Where other characters are replaced, or
    the name is shortened, a short hash of the node id keeps it unique.
    """
    plain = test.replace("::", "_", 1)
    name = re.sub(r"[^\w.=-]+", "_", plain, flags=re.ASCII).strip("_")[-NAME_MAX:]
    if name == plain:
        return name
    return f"{name}-{hashlib.sha256(test.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _end(guest: Unikernel) -> BaseException | None:
    """End a guest; returns the error of its start, unless the test has raised it already."""
    try:
        guest.stop()
    except RuntimeError:
        pass  # it was never started
    except Exception as error:
        raised, guest.start_error_raised = guest.start_error_raised, True
        return None if raised else error
    return None
