"""All that one test has of the harness: its guests, switches and disks, and what is kept of them.

The rule here: what a test makes ends with it, in the reverse order, whatever else goes wrong.
Nothing is written before a test has failed; what is then is in tender/testing/report.py.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from tender.config import parse_size
from tender.errors import UsageError
from tender.testing import report
from tender.testing.disk import DiskImage
from tender.testing.net.port import GuestPort
from tender.testing.net.switch import Switch
from tender.testing.unikernel import Unikernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Unpack

    from tender.embed.interfaces import NetSpec
    from tender.testing.unikernel import GuestOptions

NAME_MAX = 150  # letters of a folder's name


class Lab:
    """What a test's fixtures have in common.

    `folders` are where images are looked for. `artifacts` gives the folder for what a failed
    test leaves, `scratch` one for what is removed with the test. `cpu` is what guests run on,
    `trace` whether their hypercalls are kept, `patience` the timeout of verbs that have none, in
    seconds, and `seed` what all chance comes from.
    """

    def __init__(
        self,
        name: str,
        folders: list[Path],
        artifacts: Callable[[], Path],
        scratch: Callable[[], Path] | None = None,
        *,
        cpu: str = "auto",
        patience: float = 60.0,
        seed: str | None = None,
        trace: bool = True,
    ) -> None:
        self.name = name
        self.cpu = cpu
        self.patience = patience
        self.seed = name if seed is None else seed
        self.guests: list[Unikernel] = []
        self.switches: list[Switch] = []
        self.disks: list[DiskImage] = []
        self.subtests: list[str] = []  # what became of each, as lines
        self.failures: list[str] = []  # of sub-tests after which the test went on
        self.deaths: list[str] = []  # of guests that nobody has asked how they ended
        self._numbers = itertools.count()  # of switches
        self._folders = folders
        self._artifacts = artifacts
        self._trace = trace
        self._new_folder = scratch or (lambda: Path(tempfile.mkdtemp(prefix="ptender-")))
        self._folder: Path | None = None  # for what is gone after a test that has passed
        self._closed = False

    # ---- Making ----

    def find(self, file: str | os.PathLike[str]) -> Path:
        """A file by its path, relative to the test's folder or to pytest's root."""
        found = self._look_for(file)
        if found is None:
            raise FileNotFoundError(f"there is no {self._where(file, 'image')}")
        return found

    def _look_for(self, file: str | os.PathLike[str]) -> Path | None:
        places = (folder / file for folder in self._folders)
        return next((path for path in places if path.is_file()), None)

    def _where(self, file: str | os.PathLike[str], what: str) -> str:
        """What could not be found, and where."""
        if os.path.isabs(file):
            return f"file {file}"
        places = " or in ".join(dict.fromkeys(map(str, self._folders)))
        return f"{what} {str(file)!r} in {places}"

    def start(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        start: bool = True,
        net: Mapping[str, NetSpec] | None = None,
        patience: float | None = None,
        **options: Unpack[GuestOptions],
    ) -> Unikernel:
        """See the fixture `unikernel`."""
        options.setdefault("cpu", self.cpu)
        if self._trace:
            options.setdefault("trace", self._scratch() / f"{len(self.guests)}.trace")
        for port in (net or {}).values():
            switch = port.switch if isinstance(port, GuestPort) else None
            if isinstance(switch, Switch) and switch not in self.all_switches():
                self.switches.append(switch)  # made by the test itself
        seconds = self.patience if patience is None else patience
        guest = Unikernel(self.find(kernel), *args, net=net, patience=seconds, **options)
        self.guests.append(guest)
        if start:
            guest.start()
        return guest

    def switch(self, *, virtual: bool = False) -> Switch:
        numbers = self._numbers
        switch = Switch(virtual=virtual, seed=self.seed, patience=self.patience, numbers=numbers)
        self.switches.append(switch)
        return switch

    def all_switches(self) -> list[Switch]:
        """With those that are further ones of a switch."""
        found = list(self.switches)
        for switch in found:  # which grows here
            found += switch.others
        return found

    def disk(
        self,
        content: int | bytes | bytearray | str | os.PathLike[str],
        readonly: bool,
        sector_size: int,
    ) -> DiskImage:
        """See the fixture `blockimage`."""
        if isinstance(content, (str, os.PathLike)):
            content = self._disk(content)
        disk = DiskImage(content, readonly=readonly, sector_size=sector_size, seed=self.seed)
        self.disks.append(disk)
        return disk

    def _disk(self, text: str | os.PathLike[str]) -> Path | int:
        """A file, or where there is none of that name, a size."""
        found = self._look_for(text)
        if found is not None:
            return found
        try:
            return parse_size(os.fspath(text))
        except UsageError:
            size = "" if os.path.isabs(text) else "; nor is it a size, as 1M"
            raise FileNotFoundError(f"there is no {self._where(text, 'file')}{size}") from None

    # ---- Sub-tests ----

    @contextmanager
    def subtest(self, name: str, go_on: bool = False) -> Iterator[None]:
        """See the fixture `subtest`."""
        print(f"sub-test: {name}")
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self._subtest_ended(name, began, f"FAILED: {type(error).__name__}: {error}")
            if not go_on:
                raise
            self.failures.append(f"{name}\n{traceback.format_exc()}")
        except BaseException as error:
            self._subtest_ended(name, began, type(error).__name__)
            raise
        else:
            self._subtest_ended(name, began, "passed")

    def _subtest_ended(self, name: str, began: float, how: str) -> None:
        line = f"{name}: {how} ({time.monotonic() - began:.2f} s)"
        self.subtests.append(line)
        print(f"sub-test: {line}")

    # ---- The end ----

    def close(self) -> None:
        """End all guests, then close what they were attached to. Idempotent.

        Raises the first error of a guest that could not start and that nobody has asked.
        """
        if self._closed:
            return
        self._closed = True
        unasked = [guest for guest in self.guests if not guest.asked]
        errors = [error for guest in reversed(self.guests) if (error := _end(guest))]
        for number, guest in enumerate(self.guests):
            if guest in unasked and (how := guest.died()):
                self.deaths.append(f"guest {number} ({guest.kernel}) has ended by itself: {how}")
        for switch in self.switches:
            switch.close()
        for disk in self.disks:
            disk.close()
        if errors:
            raise errors[-1]

    def clean(self) -> None:
        """Remove what was for a report only."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _scratch(self) -> Path:
        if self._folder is None:
            self._folder = self._new_folder()
        return self._folder

    # ---- What is kept ----

    def folder(self) -> Path:
        """Where this test leaves what it leaves."""
        return self._artifacts() / folder_name(self.name)

    def forget(self) -> None:
        """The test runs now: what an earlier run has left says nothing any more."""
        shutil.rmtree(self.folder(), ignore_errors=True)

    def keep(self) -> list[tuple[str, str]]:
        """A failed test: end all guests, fill the folder; titles and texts for the report."""
        try:
            self.close()
        except Exception as error:
            self.failures.append(f"ending the guests: {error}")
        artifacts = report.Artifacts(self.folder())
        parts = self.guests, self.all_switches(), self.disks
        sections = report.sections(artifacts, *parts)
        if self.subtests:
            sections.append(("sub-tests", "\n".join(self.subtests)))
        about = artifacts.about()
        if about:
            about.append(f"chance: seed {self.seed!r} (--ptender-seed)")
        return [*sections, ("artifacts", "\n".join(about))] if about else sections


def folder_name(test: str) -> str:
    """A name for the folder of a test, which is no other test's: one would delete the other's.

    `test_net.py::test_ping` is `test_net.py_test_ping`. Where more than that has to be changed, or
    something cut off, a short hash of the node id tells it from others that look alike.
    """
    plain = test.replace("::", "_", 1)
    name = re.sub(r"[^\w.=-]+", "_", plain, flags=re.ASCII).strip("_")[-NAME_MAX:]
    if name == plain:
        return name
    return f"{name}-{hashlib.sha256(test.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _end(guest: Unikernel) -> BaseException | None:
    """End a guest whatever it does; what kept it from starting, if nobody was told yet."""
    try:
        guest.stop()
    except RuntimeError:
        pass  # it was never started
    except Exception as error:
        told, guest.told_error = guest.told_error, True
        return None if told else error
    return None
