"""The console output of a guest, as its program sees it: kept, waited for and read by lines."""

from __future__ import annotations

import re
import threading
import time
from math import inf
from time import monotonic

from tender.embed import validation
from tender.embed.latch import Latch
from tender.errors import GuestEnded, UsageError, one_line, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

LIMIT = 4 << 20  # bytes that are kept
SHOWN_LINES = 20  # the last ones, in an error
REASON_S = 1.0  # how long the end of the output may come before the reason for it
# Between two searches of the output comes a pause of so many times what the first one took: a
# guest that prints single bytes costs a fifth of a CPU, however long its output is.
PAUSE_FACTOR = 4


class Console:
    """The output of one guest.

    The last `limit` bytes (4 MiB) are kept. Every method may be called from any thread, also after
    the guest has ended. `for line in console` and `async for line in console` give the lines as
    they come, without their ends, until the guest has ended.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lost = 0
        self._data = bytearray()
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], object]] = set()  # called at each output and the end
        self._ended = False
        self._reason = ""

    @property
    def data(self) -> bytes:
        """The output that is kept, as bytes."""
        with self._lock:
            return bytes(self._data)

    @property
    def text(self) -> str:
        """The output that is kept, as text: UTF-8, with U+FFFD for what is not."""
        return self.data.decode(errors="replace")

    @property
    def lost(self) -> int:
        """How many bytes came before those that are kept."""
        return self._lost

    @property
    def ended(self) -> bool:
        """Whether the output has ended: the guest has."""
        return self._ended

    def lines(self) -> list[str]:
        """The lines of `text`, without their ends; the last one may be incomplete.

        Iterate over the console itself to wait for lines that are still to come.
        """
        lines = self.text.replace("\r\n", "\n").split("\n")
        return lines if lines[-1] else lines[:-1]

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]:
        """Wait until a pattern is found in the output, including what came before the call.

        Args:
            pattern: What `re.search` is to find in `text`; in a string, `^` and `$` match at
                every line.
            timeout: Seconds, None for no limit. A single search can't be interrupted, so a pattern
                that backtracks endlessly outlasts it.

        Returns:
            The match.

        Raises:
            TimeoutError: it was not found in time; the text has the last lines of the output.
            GuestEnded: the guest has ended without it; the text says how, with the last lines.
            UsageError: the pattern or the timeout has a wrong type.
        """
        search = _Search(self, pattern, timeout)
        if not self._wait(search.look, search.timeout_s):
            raise TimeoutError(search.failure(self._within(search.timeout_s)))
        if search.match is None:
            self._wait(self._has_reason, REASON_S)
            raise GuestEnded(search.failure(self._before_end()))
        return search.match

    async def wait_for_async(
        self, pattern: str | re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]:
        """`wait_for` for asyncio: other tasks run meanwhile."""
        search = _Search(self, pattern, timeout)
        if not await self._wait_async(search.look, search.timeout_s):
            raise TimeoutError(search.failure(self._within(search.timeout_s)))
        if search.match is None:
            await self._wait_async(self._has_reason, REASON_S)
            raise GuestEnded(search.failure(self._before_end()))
        return search.match

    def __iter__(self) -> Iterator[str]:
        """Give each line once it is complete, from the first that is kept, until the guest ends.

        Lines that are lost (see `lost`) before they are asked for are skipped.
        """
        reader = _LineReader(self)
        while not reader.at_end:
            self._wait(reader.look, None)
            yield from reader.take()

    async def __aiter__(self) -> AsyncIterator[str]:
        """`__iter__` for asyncio."""
        reader = _LineReader(self)
        while not reader.at_end:
            await self._wait_async(reader.look, None)
            for line in reader.take():
                yield line

    def since(self, position: int) -> tuple[bytes, int, bool]:
        """The output from a position on.

        Args:
            position: In bytes, counted from the start of the output.

        Returns:
            What is kept from there on, the position where that starts, which is later where bytes
            were lost, and whether the output has ended.
        """
        with self._lock:
            start = max(position, self._lost)
            return bytes(self._data[start - self._lost :]), start, self._ended

    def feed(self, chunk: bytes) -> None:
        """Add output of the guest: for whoever reads it."""
        with self._lock:
            self._data += chunk
            excess = len(self._data) - self._limit
            if excess > 0:
                del self._data[:excess]
                self._lost += excess
        self._notify()

    def end(self, reason: str = "") -> None:
        """End the output; `reason` says how the guest ended, once that is known."""
        with self._lock:
            self._ended = True
            self._reason = self._reason or reason
        self._notify()

    def _notify(self) -> None:
        for call in list(self._listeners):
            call()

    def _wait(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until `is_done()`, which is called after each output and at the end; False: not yet
        after `timeout_s` (None: no limit)."""
        limit = inf if timeout_s is None else monotonic() + timeout_s
        while True:
            news = Latch()
            self._listeners.add(news.set)
            try:
                began = monotonic()
                if is_done():
                    return True
                now = monotonic()
                if now >= limit:
                    return False
                news.wait(None if limit == inf else limit - now)
            finally:
                self._listeners.discard(news.set)
            time.sleep(_pause(now - began, limit))

    async def _wait_async(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """`_wait` for asyncio."""
        import asyncio

        from tender.embed.aio import Flag

        limit = inf if timeout_s is None else monotonic() + timeout_s
        while True:
            news = Flag()
            self._listeners.add(news.set)
            try:
                began = monotonic()
                if is_done():
                    return True
                now = monotonic()
                if now >= limit:
                    return False
                await news.wait(None if limit == inf else limit - now)
            finally:
                self._listeners.discard(news.set)
            await asyncio.sleep(_pause(now - began, limit))

    def _has_reason(self) -> bool:
        return bool(self._reason)

    def _before_end(self) -> str:
        return f"before its end ({self._reason})" if self._reason else "before its end"

    def _within(self, timeout_s: float | None) -> str:
        return f"within {timeout_s or 0:g} s"


class _Search:
    """The search for a pattern in output that grows."""

    def __init__(self, console: Console, pattern: object, timeout: object) -> None:
        self.match: re.Match[str] | None = None
        self.timeout_s = validation.seconds("timeout", timeout)
        self._console = console
        self._pattern = _compiled(pattern)
        self._size = -1  # of the output, when it was last searched

    def look(self) -> bool:
        """Whether the search is over: the pattern is found, or the output has ended."""
        data, start, ended = self._console.since(0)
        if start + len(data) != self._size:
            self._size = start + len(data)
            self.match = self._pattern.search(data.decode(errors="replace"))
        return ended or self.match is not None

    def failure(self, when: str) -> str:
        """The text of the error; what the guest printed is made printable."""
        lines = self._console.lines()[-SHOWN_LINES:]
        last = "the last lines:" if lines else "it said nothing"
        quoted = "".join(f"\n  {one_line(line)}" for line in lines)
        return f"the guest did not say {self._pattern.pattern!r} {when}; {last}{quoted}"


class _LineReader:
    """The lines of output that grows. Each byte is looked at once."""

    def __init__(self, console: Console) -> None:
        self.at_end = False
        self._console = console
        self._position = 0  # in the output, of what is not read yet
        self._pieces: list[bytes] = []  # of a line that is not complete
        self._lines: list[bytes] = []  # that are, and not taken

    def look(self) -> bool:
        """Whether there is a line to take, or the output has ended."""
        data, start, self.at_end = self._console.since(self._position)
        if start != self._position:
            self._pieces.clear()  # the rest of that line is lost
        self._position = start + len(data)
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._lines.append(b"".join([*self._pieces, line]))
            self._pieces.clear()
        self._pieces.append(rest)
        if self.at_end and any(self._pieces):
            self._lines.append(b"".join(self._pieces))
            self._pieces.clear()
        return self.at_end or bool(self._lines)

    def take(self) -> list[str]:
        """The complete lines that were not taken before."""
        lines, self._lines = self._lines, []
        return [line.removesuffix(b"\r").decode(errors="replace") for line in lines]


def _pause(search_s: float, limit: float) -> float:
    return max(0.0, min(PAUSE_FACTOR * search_s, limit - monotonic()))


def _compiled(pattern: object) -> re.Pattern[str]:
    if isinstance(pattern, str):
        return re.compile(pattern, re.MULTILINE)
    if not isinstance(pattern, re.Pattern) or not isinstance(pattern.pattern, str):
        raise UsageError(f"pattern={shown(pattern)} is not a string, nor a compiled pattern of one")
    return pattern
