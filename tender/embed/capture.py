"""The channel through which a guest's console output comes, and the sinks that it is passed on to.

The rule here: no output is lost on the way. A slow sink slows down the guest's own write(2).
"""

from __future__ import annotations

import codecs
import os
import select
import socket
import threading
from io import FileIO, TextIOBase

from tender.embed import reactor
from tender.errors import ConfigError, shown
from tender.host import keep_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.embed.console import Console
    from tender.embed.interfaces import ConsoleSink, Sink

CHUNK = 1 << 16  # bytes, what a pipe holds
PATIENCE_S = 5.0  # how long a sink may take for one piece once the guest has ended


class Capture:
    """The channel that feeds a Console: `guest_fd` is the guest's end, the other one is read here.

    `sink` gets all output as well: a callable (pieces of bytes as they come), a descriptor, a
    file, or a stream with `write`. It may block, so it is served by a thread of its own.
    `report` is called with the exception of a sink that raises.

    It is a socket pair rather than a pipe: so its end is seen even if a copy of the guest's end is
    still open.
    """

    def __init__(
        self, console: Console, sink: Sink, report: Callable[[BaseException | str], None]
    ) -> None:
        self.console = console
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
        """The guest has ended: read its last output, then close. Idempotent.

        `how` is how it ended. After a Ctrl-C in it, the next call does the rest.
        """
        if self._closed:
            return
        with self._lock:
            self._closing = True
            if self._thread is not None and not self._thread_ended:
                # What was sent before is still read, and then the end.
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
        """Give the sink one piece; b"" is the end. A file that fails once is given no more."""
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
                self._report(f"the sink has taken no output for {PATIENCE_S:.0f} s: given up")
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
            except BlockingIOError:  # O_NONBLOCK, set by somebody who shares it
                waiting = select.poll()
                waiting.register(self._fd, select.POLLOUT)
                waiting.poll()

    def close(self) -> None:
        os.close(self._fd)


def open_sink(
    sink: Callable[[bytes], object] | ConsoleSink | int,
) -> _Callback | _Writer | _Descriptor:
    """Open what `console=` names; raises ConfigError for a wrong type."""
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
        f"console: {shown(sink)} is none of a callable, a descriptor, a file, a stream with write()"
    )


def _fileno(stream: Any) -> int | None:
    """Its descriptor, once what the program itself has written there is flushed; None: it has
    none."""
    try:
        fd = stream.fileno()
    except Exception:  # a stream in memory, one that is closed, one around something else
        return None
    if type(fd) is not int:
        raise ConfigError(f"console: {shown(stream)}: fileno() gave {shown(fd)}, not a descriptor")
    if isinstance(stream, TextIOBase) and not hasattr(stream, "buffer"):
        return None  # it writes elsewhere: fileno() of Jupyter's is its server's terminal
    flush = getattr(stream, "flush", None)
    if flush is not None:
        try:
            flush()
        except (OSError, ValueError) as error:
            raise ConfigError(f"console: {shown(stream)}: {error}") from None
    return fd
