"""What the fixtures `unikernel`, `blockimage` and `subtest` are: objects that a test calls."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from tender.checks import parse_size
from tender.errors import ImageError
from tender.image.elf import TARGETS
from tender.image.file import open_image
from tender.testing.disk import DiskImage
from tender.testing.session import of_this_test
from tender.testing.unikernel import Unikernel, needs_software

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from typing_extensions import Unpack

    from tender.embed.interfaces import GuestOptions, NetSpec
    from tender.testing.session import Session


class UnikernelFactory:
    """The fixture `unikernel`."""

    def __init__(
        self, session: Session, shell: Callable[[dict[str, Any]], None], folder: Path
    ) -> None:
        self._session = session
        self._shell = shell
        self._folder = folder

    def __call__(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        net: Mapping[str, NetSpec] | None = None,
        start: bool = True,
        patience: float | None = None,
        **options: Unpack[GuestOptions],
    ) -> Unikernel:
        """Start a guest; it is stopped when the test ends, or the scope of the fixture.

        `kernel` is a path relative to the test's folder or to pytest's root, `args` the guest's
        command line, and `options` those of tender.Guest: block, mem_mib, cpu, clock...
        With start=False it is not started yet: use `guest.start()`, or `with guest:`. `patience`
        is the timeout, in seconds, of its methods that are given none.

        Raises FileNotFoundError if there is no such image, and what `Guest.start` raises.
        """
        session = self._session
        image = session.find(kernel)
        if not _is_spt(image):  # such a guest has neither
            in_software = options.get("cpu", "auto") in ("auto", "soft")
            if session.record and in_software and not options.get("snapshots"):
                options.setdefault("record", session.scratch() / f"{len(session.guests)}.rec")
            if not needs_software(net or {}, options):
                options.setdefault("cpu", session.cpu)
            if session.trace:
                options.setdefault("trace", session.trace_file())
        seconds = session.patience if patience is None else patience
        guest = Unikernel(image, *args, net=net, patience=seconds, **options)
        guest.session_of_test, guest.can_debug = of_this_test, not _is_spt(image)
        session.add_guest(guest, (net or {}).values())
        if start:
            guest.start()
        return guest

    def build(
        self,
        *sources: str | Path,
        manifest: str | Path | None = None,
        output: str | Path | None = None,
        target: str | None = None,
        cc: str | None = None,
        cflags: Sequence[str] = (),
        fp: bool = False,
    ) -> Path:
        """Build an image as `ptender build` does; returns its path.

        `output` is relative to the test's temporary folder. Raises BuildError.
        """
        from tender.image.build import build

        found = [str(self._session.find(source)) for source in sources]
        found_manifest = None if manifest is None else str(self._session.find(manifest))
        image = self._folder / (output or Path(found[0]).with_suffix(".hvt").name)
        build(found, found_manifest, str(image), target=target, cc=cc, cflags=cflags, fp=fp)
        return image

    @property
    def guests(self) -> list[Unikernel]:
        """All guests of this fixture, in the order in which they were made."""
        return list(self._session.guests)

    def shell(self) -> None:
        """Open a Python shell with the test's names, if --ptender-interactive is given."""
        frame = sys._getframe(1)
        self._shell({**frame.f_globals, **frame.f_locals})


def _is_spt(path: Path | str) -> bool:
    """Whether it is an image for Solo5's spt target."""
    try:
        return TARGETS[open_image(path).target] == "spt"
    except ImageError:
        return False  # a start says what it is


class BlockImageFactory:
    """The fixture `blockimage`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(
        self,
        content: int | bytes | bytearray | str | os.PathLike[str],
        *,
        readonly: bool = False,
        sector_size: int = 512,
    ) -> DiskImage:
        """Make a disk in memory.

        `content` is its size (1 << 20, "1M"), its bytes, or a file that is copied;
        `sector_size` is in bytes. Raises FileNotFoundError, or DeviceError for what is no disk.
        """
        if isinstance(content, (str, os.PathLike)):
            content = self._file_or_size(content)
        seed = self._session.seed
        disk = DiskImage(content, readonly=readonly, sector_size=sector_size, seed=seed)
        self._session.disks.append(disk)
        return disk

    def _file_or_size(self, text: str | os.PathLike[str]) -> Path | int:
        """The file of this name; a size if there is none."""
        try:
            return self._session.find(text, "file")
        except FileNotFoundError as error:
            if os.path.isabs(text):
                raise
            try:
                return parse_size(os.fspath(text))
            except ValueError:
                raise FileNotFoundError(f"{error}; nor is it a size, as 1M") from None


class SubtestFactory:
    """The fixture `subtest`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @contextmanager
    def __call__(self, name: str, go_on: bool = False) -> Iterator[None]:
        """A part of the test. If it fails, the test ends; with `go_on`, it fails at its end."""
        print(f"sub-test: {name}")
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self._ended(name, began, f"FAILED: {type(error).__name__}: {error}")
            if not go_on:
                raise
            self._session.failures.append(f"{name}\n{traceback.format_exc()}")
        except BaseException as error:
            self._ended(name, began, type(error).__name__)
            raise
        else:
            self._ended(name, began, "passed")

    def _ended(self, name: str, began: float, how: str) -> None:
        line = f"{name}: {how} ({time.monotonic() - began:.2f} s)"
        self._session.subtests.append(line)
        print(f"sub-test: {line}")
