"""What a guest says, as its program sees it: kept, waited for, and passed on.

The rule here: nothing that the guest says is lost on the way. A consumer that is slow slows the
guest's own write(2); memory holds the last `limit` bytes, and `lost` says how many came before.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import socket
import threading
from io import FileIO, TextIOBase
from math import inf
from time import monotonic

from tender.embed import reactor, validation
from tender.embed.latch import Latch
from tender.errors import ConfigError, GuestEnded, UsageError
from tender.host import keep_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.embed.interfaces import ConsoleSink, Sink

LIMIT = 4 << 20  # bytes that are kept
CHUNK = 1 << 16  # bytes, what a pipe holds
TOLD_LINES = 20  # the last ones, in an error
PATIENCE_S = 5.0  # how long a consumer may take for one piece once the guest has ended
REASON_S = 1.0  # how long the end of the output may be ahead of the word about the guest's end


class Console:
    """The output of one guest. All of it may be used from any thread, also after the end."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.lost = 0  # bytes before those that are kept
        self._data = bytearray()
        self._lock = threading.Lock()
        self._news = Latch()  # of the next output, or the end
        self._ended = False
        self._how = ""

    @property
    def data(self) -> bytes:
        """The last `limit` bytes that the guest has said."""
        with self._lock:
            return bytes(self._data)

    @property
    def text(self) -> str:
        """The same as text: UTF-8, with U+FFFD for what is none."""
        return self.data.decode(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._ended

    def lines(self) -> list[str]:
        """The lines that are complete or at the end, without their ends."""
        return self.text.splitlines()

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]:
        """Wait until `pattern` is found in `text` (re.search, `^` and `$` at every line).

        What was said before the call counts. Raises TimeoutError after `timeout` seconds (None:
        never), and GuestEnded as soon as the guest has ended without it.
        """
        wanted = compile_pattern(pattern)
        limit = validation.seconds("timeout", timeout)
        deadline = inf if limit is None else monotonic() + limit
        seen = -1
        while True:
            self._wait_for_news(seen, deadline)
            with self._lock:
                seen, ended = self._size(), self._ended
            match = wanted.search(self.text)
            if match:
                return match
            if ended:
                raise GuestEnded(self._missing(wanted, self._end_of_guest(deadline)))
            if monotonic() >= deadline:
                raise TimeoutError(self._missing(wanted, f"within {timeout} s"))

    def _size(self) -> int:
        return self.lost + len(self._data)

    def _wait_for_news(self, seen: int, deadline: float) -> None:
        self._wait(lambda: self._size() != seen or self._ended, deadline)

    def _end_of_guest(self, deadline: float) -> str:
        """How it ended, which may be known a moment after its output has."""
        self._wait(lambda: bool(self._how), min(deadline, monotonic() + REASON_S))
        return f"before its end ({self._how})" if self._how else "before its end"

    def _wait(self, come: Callable[[], bool], deadline: float) -> None:
        """Wait until `come`, which is called with the lock held, is true, or for `deadline`."""
        while True:
            with self._lock:
                left = deadline - monotonic()
                if come() or left <= 0:
                    return
                news = self._news
            news.wait(left)

    def _missing(self, wanted: re.Pattern[str], when: str) -> str:
        lines = self.lines()[-TOLD_LINES:]
        last = "the last lines" if lines else "it said nothing"
        told = "".join(f"\n  {line}" for line in lines)
        return f"the guest did not say {wanted.pattern!r} {when}; {last}{':' if told else ''}{told}"

    def feed(self, chunk: bytes) -> None:
        """Take in what the guest has said."""
        with self._lock:
            self._data += chunk
            over = len(self._data) - self.limit
            if over > 0:
                del self._data[:over]
                self.lost += over
            self._wake()

    def end(self, how: str = "") -> None:
        """Nothing comes any more; `how` the guest has ended, where it is known."""
        with self._lock:
            self._ended = True
            self._how = self._how or how
            self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, Latch()
        news.set()


def compile_pattern(pattern: Any) -> re.Pattern[str]:
    """What is to be looked for in a guest's output, line by line; raises UsageError."""
    if isinstance(pattern, str):
        return re.compile(pattern, re.MULTILINE)
    if not isinstance(pattern, re.Pattern) or not isinstance(pattern.pattern, str):
        raise UsageError(f"pattern={pattern!r} is not a string, nor a compiled pattern of one")
    return pattern


class Capture:
    """The channel behind a Console: `guest_fd` is the guest's end, the other one is read here.

    `sink` gets all of it as well: a callable (pieces of bytes as they come), a descriptor, a
    file, or a stream with `write`. It may block, so it is served by a thread of its own.
    `report` is called with the exception of a sink that raises.

    A socket pair and no pipe: its end can be had though a copy of the guest's end is still open.
    """

    def __init__(
        self, sink: Sink, report: Callable[[BaseException | str], None], limit: int = LIMIT
    ) -> None:
        self.console = Console(limit)
        self._report = report
        self._sink = None if sink is None else open_sink(sink)
        try:
            self._ours, theirs = socket.socketpair()
        except OSError:
            if self._sink is not None:
                self._sink.close()
            raise
        self._lock = threading.Lock()  # of what is closed by whom
        self._steps = 0  # of the thread, to see whether it goes on
        self._closing = self._closed = self._thread_ended = False
        self.guest_fd = theirs.detach()
        self._guest_end = FileIO(self.guest_fd)  # closes it once, whatever comes between
        self._thread: threading.Thread | None = None
        if self._sink is None:
            self._ours.setblocking(False)
            reactor.reactor().register(self._ours.fileno(), reactor.READ, self._readable)
        else:
            self._thread = threading.Thread(target=self._serve, name="ptender console", daemon=True)
            self._thread.start()

    def handed_over(self) -> None:
        """The guest has its end in another process: close it here."""
        self._guest_end.close()
        self.guest_fd = -1

    def is_here(self) -> bool:
        """Whether this is the thread that calls the sink."""
        return self._thread is threading.current_thread()

    def close(self, how: str = "") -> None:
        """The guest has ended (`how`): take in what it has left, then close. Idempotent.

        What Ctrl-C has kept from it is done by the next call.
        """
        if self._closed:
            return
        with self._lock:
            self._closing = True
            if self._thread is not None and not self._thread_ended:
                # What is on the way is still read, and then there is an end.
                self._ours.shutdown(socket.SHUT_RD)
        self.handed_over()
        if self._thread is None:
            self._take_rest()
        else:
            self._join(self._thread)
        self.console.end(how)
        self._closed = True

    def _take_rest(self) -> None:
        fd = self._ours.fileno()
        if fd >= 0:
            reactor.reactor().unregister(fd)
            while self._take():
                pass
            self._ours.close()

    def _readable(self, _events: int) -> None:
        if self._take() is False:
            reactor.reactor().unregister(self._ours.fileno())
            self.console.end()

    def _take(self) -> bool | None:
        """Read one piece; False at the end, None where there is none now."""
        try:
            chunk = self._ours.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:  # it was left unread, or another thread has closed it
            return False
        self.console.feed(chunk)
        return bool(chunk)

    def _serve(self) -> None:
        try:
            while chunk := self._ours.recv(CHUNK):
                self.console.feed(chunk)
                self._pass_on(chunk)
                self._steps += 1
        except ConnectionResetError:
            pass
        self._pass_on(b"")
        self.console.end()
        with self._lock:
            self._thread_ended = True
            if self._closing:
                self._ours.close()

    def _pass_on(self, chunk: bytes) -> None:
        """Give the sink one piece; nothing at the end. A file that is broken stays so."""
        sink = self._sink
        try:
            if sink is not None:
                (sink.write(chunk) if chunk else sink.close())
        except BaseException as error:
            self._report(error)
            if chunk and sink is not None and not sink.goes_on:
                self._pass_on(b"")
                self._sink = None

    def _join(self, thread: threading.Thread) -> None:
        """Wait for the thread for as long as its sink takes anything."""
        steps = -1
        while thread.is_alive() and not self.is_here():
            if steps == self._steps:
                self._report(f"nobody takes the output: given up after {PATIENCE_S:.0f} s")
                break
            steps = self._steps
            thread.join(PATIENCE_S)
        with self._lock:
            if self._thread_ended:
                self._ours.close()


class _Callback:
    """A sink that is called."""

    goes_on = True  # after an exception

    def __init__(self, function: Callable[[bytes], object]) -> None:
        self.write = function

    def close(self) -> None:
        pass


class _Writer:
    """A sink that is a stream without a descriptor, of text or of bytes."""

    goes_on = False

    def __init__(self, stream: ConsoleSink) -> None:
        self._stream = stream
        self._is_text = isinstance(stream, TextIOBase) or hasattr(stream, "encoding")
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def write(self, chunk: bytes) -> None:
        self._put(self._decode(chunk) if self._is_text else chunk)

    def close(self) -> None:
        if self._is_text:
            self._put(self._decode(b"", True))

    def _put(self, data: str | bytes) -> None:
        self._stream.write(data)
        flush = getattr(self._stream, "flush", None)
        if flush is not None:
            flush()


class _Descriptor:
    """A sink that is an open descriptor: a copy of it, which the program can't close."""

    goes_on = False

    def __init__(self, fd: int) -> None:
        self._fd = keep_descriptor(fd, f"console: @{fd}")

    def write(self, chunk: bytes) -> None:
        while chunk:
            try:
                chunk = chunk[os.write(self._fd, chunk) :]
            except BlockingIOError:  # somebody who shares it has wished it so
                waiting = select.poll()
                waiting.register(self._fd, select.POLLOUT)
                waiting.poll()

    def close(self) -> None:
        os.close(self._fd)


def open_sink(
    sink: Callable[[bytes], object] | ConsoleSink | int,
) -> _Callback | _Writer | _Descriptor:
    """What `console=` may be; raises ConfigError for what is none of it."""
    if isinstance(sink, int) and not isinstance(sink, bool):
        return _Descriptor(sink)
    if hasattr(sink, "fileno"):
        fd = _fileno(sink)
        if fd is not None:
            return _Descriptor(fd)
    if hasattr(sink, "write"):
        return _Writer(sink)
    if callable(sink):
        return _Callback(sink)
    raise ConfigError(
        f"console: {sink!r} is none of a callable, a descriptor, a file, a stream with write()"
    )


def _fileno(stream: Any) -> int | None:
    """Its descriptor, after what the program itself has written there; None: it has none."""
    try:
        fd = stream.fileno()
    except Exception:  # a stream in memory, one that is closed, one around something else
        return None
    if type(fd) is not int:
        raise ConfigError(f"console: {stream!r}: its fileno() is {fd!r}, which is no descriptor")
    flush = getattr(stream, "flush", None)
    if flush is not None:
        try:
            flush()
        except (OSError, ValueError) as error:
            raise ConfigError(f"console: {stream!r}: {error}") from None
    return fd
