"""Devices in Python: the threads that serve them over one end of a socket pair.

The rule here: an exception of a device is reported, and ends no thread; what the guest's process
sends may come from a guest that has taken it over, and is checked.
"""

from __future__ import annotations

import socket
import threading
from errno import ECONNRESET, EIO, EPIPE

from tender.backends import SECTOR_SIZE, BlockRemote, Descriptor
from tender.checks import MTU
from tender.dataclass import replace
from tender.embed import validation
from tender.embed.capture import PATIENCE_S
from tender.embed.latch import Latch
from tender.embed.protocol import receive
from tender.errors import DeviceError, shown
from tender.host.remote import HEADER, PIECE, READ, STATUS, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

RETRY_S = 0.1  # after an exception of receive()
ERRNO_MAX = 4095  # Linux, include/linux/err.h
HEADER_BYTES, TAG_BYTES = 14, 4  # of an Ethernet frame: IEEE 802.3, 802.1Q
BYTES = (bytes, bytearray, memoryview)


class Service:
    """Threads that serve a device in Python over one end of a socket pair."""

    spec: Any

    def __init__(self, report: Callable[[BaseException | str], None]) -> None:
        self._report = report
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guest_fd = theirs.detach()
        self._threads: list[threading.Thread] = []
        self._left = 0  # threads that use the socket
        self._lock = threading.Lock()
        self._closing = Latch()

    def _add(self, loop: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(
            target=self._run, args=(loop,), name="ptender device", daemon=True
        )
        self._threads.append(thread)
        self._left += 1
        return thread

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_here(self) -> bool:
        return threading.current_thread() in self._threads

    def close(self) -> None:
        """Let the device take what the guest has sent; then end the threads."""
        self._closing.set()
        with self._lock:
            if self._left:
                self._ours.shutdown(socket.SHUT_RDWR)
        self._join(self._threads[0])

    def close_device(self) -> None:
        """Call the device's own `close`, if it has one."""

    def _join(self, thread: threading.Thread) -> None:
        if thread.ident is not None and not self.is_here():
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self._report(f"the device has not returned after {PATIENCE_S:.0f} s")

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except OSError as error:
            # The guest's end of the socket is closed when the guest ends.
            if not self._closing.is_set and error.errno not in (EPIPE, ECONNRESET):
                self._report(error)
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._ours.close()


class NetService(Service):
    """Serves a NetSender, a NetReceiver, or a device that is both."""

    def __init__(
        self, device: Any, where: str, report: Callable[[BaseException | str], None]
    ) -> None:
        mtu, mac = getattr(device, "mtu", None), getattr(device, "mac", None)
        spec = validation.make(where, Descriptor, 0, mtu, mac)
        super().__init__(report)
        self._device = device
        self.spec = replace(spec, fd=self._guest_fd)
        self._most = (spec.mtu or MTU) + HEADER_BYTES + TAG_BYTES
        self._add(self._take_frames)
        if hasattr(device, "receive"):
            self._add(self._give_frames)

    def close_device(self) -> None:
        close = getattr(self._device, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:
                self._report(error)

    def _take_frames(self) -> None:
        send = getattr(self._device, "send", None)
        while (frame := receive(self._ours, self._most + 1)) is not None:
            try:
                self._check(len(frame), "the guest sent a frame")
                answer = send(frame) if send else None
                if hasattr(answer, "__await__"):
                    answer.close()  # type: ignore[union-attr]  # it is never awaited, and reported here
                    raise TypeError("send() is async: make it a plain function")
                for reply in (answer,) if isinstance(answer, BYTES) else answer or ():
                    self._answer(self._checked(reply))
            except BaseException as error:  # also sys.exit(), which would only end the thread
                self._report(error)

    def _checked(self, frame: Any) -> memoryview:
        """The frame, if Ethernet allows its length; the guest would get a longer one truncated."""
        view = memoryview(frame).cast("B")
        self._check(len(view), "a frame")
        return view

    def _check(self, length: int, what: str) -> None:
        if length < HEADER_BYTES:
            raise ValueError(f"{what} of less than {HEADER_BYTES} bytes: dropped")
        if length > self._most:
            raise ValueError(
                f"{what} of more than {self._most} bytes (the MTU and a header): dropped"
            )

    def _answer(self, frame: memoryview) -> None:
        """Send it to the guest, or drop it if the guest has no room: waiting would block `send`."""
        try:
            self._ours.send(frame, socket.MSG_DONTWAIT)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass

    def _give_frames(self) -> None:
        while not self._closing.is_set:
            try:
                frame = self._device.receive()
                if frame is None:
                    return
                frame = self._checked(frame)
            except BaseException as error:
                self._report(error)
                self._closing.wait(RETRY_S)
            else:
                self._ours.send(frame)


class BlockService(Service):
    """Serves a BlockDevice. Requests come from a process that a guest may have taken over."""

    def __init__(
        self, device: Any, where: str, report: Callable[[BaseException | str], None]
    ) -> None:
        capacity = _capacity(device, where)
        self._readonly = bool(getattr(device, "readonly", not hasattr(device, "write")))
        sector_size = getattr(device, "sector_size", SECTOR_SIZE)
        spec = validation.make(where, BlockRemote, 0, capacity, self._readonly, sector_size)
        super().__init__(report)
        self._device = device
        self.spec = replace(spec, fd=self._guest_fd)
        self._add(self._serve)

    def _serve(self) -> None:
        while (request := receive(self._ours, HEADER.size + PIECE + 1)) is not None:
            try:
                reply = STATUS.pack(0) + self._answer(request)
            except BaseException as error:
                self._report(error)
                reply = STATUS.pack(_errno(error))
            self._ours.send(reply)

    def _answer(self, request: bytes) -> bytes:
        if len(request) < HEADER.size:
            raise ValueError("malformed request: no header")
        operation, length, offset = HEADER.unpack_from(request)
        data = request[HEADER.size :]
        wanted = {READ: 0, WRITE: length}.get(operation)
        inside = length <= PIECE and offset + length <= self.spec.capacity
        if not inside or len(data) != wanted or (operation == WRITE and self._readonly):
            raise ValueError(
                f"malformed request: operation {operation} with {len(data)} bytes, "
                f"offset={offset:#x}, length={length:#x}"
            )
        if operation == WRITE:
            self._device.write(offset, data)
            return b""
        answer = bytes(self._device.read(offset, length))
        if len(answer) != length:
            raise ValueError(f"read({offset}, {length}) gave {len(answer)} bytes")
        return answer


def _errno(error: BaseException) -> int:
    """The error number for the guest's side: EIO if the exception has none of Linux's."""
    number = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) and 0 < number <= ERRNO_MAX else EIO


def _capacity(device: Any, where: str) -> int:
    """In bytes; `capacity`, `size`, or the length."""
    value = getattr(device, "capacity", None)
    if value is None:
        value = getattr(device, "size", None)
    if value is None and hasattr(device, "__len__"):
        value = len(device)
    if not isinstance(value, int) or not 0 < value < 1 << 63:
        raise DeviceError(
            f"{where}: {shown(device)} has no capacity: bytes, as `capacity`, `size` or len(); "
            "an open file is attached by BlockDescriptor(file.fileno())"
        )
    return value
