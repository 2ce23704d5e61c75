"""What must be given back, in reverse order of getting it.

The rule here: it is `contextlib.ExitStack` as far as the tender needs it, without the import
(docs/decisions/0003-imports.md).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Cleanup:
    """Owns every descriptor of a machine; `close()` gives all of them back, whatever fails."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], object]] = []

    def callback(self, function: Callable[[], object]) -> None:
        """Call `function` when this is closed, before those that were given earlier."""
        self._callbacks.append(function)

    def forget(self) -> None:
        """Leave all of it to the end of this process, which gives it back as well."""
        self._callbacks.clear()

    def close(self) -> None:
        """Call everything once; the first error is raised after the last call."""
        first: BaseException | None = None
        while self._callbacks:
            try:
                self._callbacks.pop()()
            except BaseException as error:
                first = first or error
        if first:
            raise first

    def __enter__(self) -> Cleanup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
