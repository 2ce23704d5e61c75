"""The modules: each answers some hypercalls and says what its devices are.

A module has `hypercalls()`, which maps numbers to handlers; a handler is called with the guest's
memory and the GPA of its argument block, reads each field once, and replies in the block.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Warn = Callable[[str], None]


class Counters:
    """What a device has done. Errors are the host's, drops are frames or output it didn't take."""

    __slots__ = ("bytes", "calls", "drops", "errors")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self.errors = 0
        self.drops = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("calls", "bytes", "errors", "drops")}


class Trouble:
    """The host's trouble with one device: counted each time, told once per kind."""

    def __init__(self, device: str, warn: Warn) -> None:
        self._device = device
        self._warn = warn
        self._told: set[str] = set()

    def tell(self, counters: Counters, what: str) -> None:
        counters.errors += 1
        if what not in self._told:
            self._told.add(what)
            self._warn(f"{self._device}: {what}; the guest goes on")
