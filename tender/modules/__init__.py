"""The modules: each answers some hypercalls.

A module has `hypercalls()`, which maps numbers to handlers; a handler is called with the guest's
memory and its argument block, reads each field once, and replies in the block.
"""

from __future__ import annotations

from tender._native import ffi
from tender.outcome import Counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Warn = Callable[[str], None]


STEP = 1 << 20  # bytes that one call of the host moves: between two, a stop request is seen


def new_counters() -> Any:
    """What a device has done, as a struct counters that the engine counts in too.

    Errors are the host's; drops are frames or output that the host did not take.
    """
    return ffi.new("struct counters *")


def counters_value(counters: Any) -> Counters:
    """A struct counters as a value."""
    return Counters(*(getattr(counters, name) for name in Counters.__annotations__))


class DeviceErrors:
    """Failures of the host at one device: each is counted, each kind is warned of once."""

    def __init__(self, device: str, warn: Warn) -> None:
        self._device = device
        self._warn = warn
        self._warned: set[str] = set()

    def report(self, counters: Any, what: str) -> None:
        """Count it as an error of the device, and warn of it once."""
        counters.errors += 1
        self.warn_once(what)

    def warn_once(self, what: str) -> None:
        """Warn once per text."""
        if what not in self._warned:
            self._warned.add(what)
            self._warn(f"{self._device}: {what}; the guest goes on")
