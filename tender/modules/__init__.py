"""The modules: each answers some hypercalls and says what its devices are.

A module has `hypercalls()`, which maps numbers to handlers; a handler is called with the guest's
memory and the GPA of its argument block, reads each field once, and replies in the block.
"""

from __future__ import annotations

import fcntl
import os

from tender._host import ffi
from tender.dataclass import replace
from tender.errors import DeviceError
from tender.outcome import Counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from tender.cleanup import Cleanup

    Warn = Callable[[str], None]

    Spec = TypeVar("Spec")
    Given = tuple[tuple["str | None", Spec], ...]

STEP = 1 << 20  # bytes that one call of the host moves: between two, a stop request is seen


def new_counters() -> Any:
    """What a device has done, as a struct counters that the engine counts in too.

    Errors are the host's; drops are frames or output that the host did not take.
    """
    return ffi.new("struct counters *")


def counters_value(counters: Any) -> Counters:
    """A struct counters as a value."""
    return Counters(*(getattr(counters, name) for name in Counters.__annotations__))


def keep_descriptors(given: Given[Spec], what: str, cleanup: Cleanup) -> Given[Spec]:
    """The same specs with descriptors of the tender's own in them.

    To be called before the tender opens anything: then a number that the user did not pass is
    not open, and can't name something of the tender's.
    """
    kept: dict[int, int] = {}
    for _, spec in given:
        fd = getattr(spec, "fd", None)
        if fd is not None:
            if fd in kept:
                raise DeviceError(f"@{fd}: {what}: it is given twice")
            kept[fd] = keep_descriptor(fd, f"@{fd}: {what}")
            cleanup.callback(lambda fd=kept[fd]: os.close(fd))  # type: ignore[misc]
    return tuple(
        (name, replace(spec, fd=kept[spec.fd]) if hasattr(spec, "fd") else spec)
        for name, spec in given
    )


def keep_descriptor(fd: int, where: str) -> int:
    """A copy of somebody's descriptor, that nobody else closes."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except (OSError, OverflowError, ValueError):
        raise DeviceError(f"{where}: no such descriptor") from None


class Trouble:
    """The host's trouble with one device: counted each time, told once per kind."""

    def __init__(self, device: str, warn: Warn) -> None:
        self._device = device
        self._warn = warn
        self._told: set[str] = set()

    def tell(self, counters: Any, what: str) -> None:
        """Count it as an error of the device, and warn of it once."""
        counters.errors += 1
        self.warn_once(what)

    def warn_once(self, what: str) -> None:
        """Warn once per text."""
        if what not in self._told:
            self._told.add(what)
            self._warn(f"{self._device}: {what}; the guest goes on")
