"""A network device on a stream socket: 4 bytes (big-endian) before each frame give its length.

The guest sees whole frames. What arrives in parts is kept until it is a frame, in a buffer of fixed
size; what is sent in part is kept until the rest can follow, and until then other frames are
dropped, as on a full link. The other end is passt, or QEMU with "-netdev stream".
"""

from __future__ import annotations

import errno
import os

from tender._native import lib
from tender.config import MTU_MAX
from tender.modules.net import HEADER, VLAN_TAG, NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.modules import Warn

_LENGTH = 4  # bytes
_FRAME_MOST = MTU_MAX + HEADER + VLAN_TAG  # from any sender
_ROOM = 1 << 17  # bytes: more than one frame of any length


class StreamNetDevice(NetDevice):
    """An attached stream socket."""

    in_engine = False

    def __init__(self, name: str, handle: int, fd: int, mac: bytes, mtu: int, warn: Warn) -> None:
        super().__init__(name, handle, fd, mac, mtu, warn, is_socket=True)
        self._buffer = memoryview(bytearray(_ROOM))
        self._start = self._end = 0  # the part of it in use
        self._unsent = b""  # the rest of a frame
        os.set_blocking(fd, False)

    def read(self, data: memoryview) -> tuple[int, int]:
        """As NetDevice.read: the next whole frame of the stream."""
        self.received.calls += 1
        self.flush()
        frame = self._frame() if self.is_ready() or self._fill() else None
        if frame is None:
            return lib.HVT_R_AGAIN, 0
        length = min(len(frame), len(data))
        data[:length] = frame[:length]
        self._start += _LENGTH + len(frame)
        self.received.bytes += length
        return lib.HVT_R_OK, length

    def is_ready(self) -> bool:
        """Whether a whole frame has arrived that the guest has not read."""
        return self._frame() is not None

    def is_full(self) -> bool:
        """Whether a frame is still to be sent."""
        return bool(self._unsent)

    def look(self) -> None:
        """The socket is ready: read what has arrived, send what could not be sent before."""
        self.flush()
        if not self.is_ready():
            self._fill()

    def flush(self) -> None:
        """Send the rest of a frame, or a part of it."""
        if self._unsent and not self.gone:
            try:
                self._unsent = self._unsent[os.write(self.fd, self._unsent) :]
            except BlockingIOError:
                pass
            except OSError:
                self._unsent = b""
                self.lose()

    def _send(self, data: memoryview) -> None:
        self.flush()
        if self._unsent:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        head = len(data).to_bytes(_LENGTH, "big")
        done = os.writev(self.fd, [head, data])
        if done < _LENGTH + len(data):
            self._unsent = (head + bytes(data))[done:]

    def _frame(self) -> memoryview | None:
        """The first frame, if all of it has arrived. Frames of a wrong length are skipped."""
        while self._end - self._start >= _LENGTH:
            body = self._start + _LENGTH
            length = int.from_bytes(self._buffer[self._start : body], "big")
            if length > _FRAME_MOST:
                self._start = self._end = 0
                self._errors.report(self.received, f"the peer sent a frame of {length} bytes")
                self.lose()
                return None
            if self._end - body < length:
                return None
            if HEADER <= length <= self.frame_max:
                return self._buffer[body : body + length]
            self.received.drops += 1
            self._start = body + length
        return None

    def _fill(self) -> bool:
        """Read from the socket what there is room for; whether anything arrived."""
        if self.gone:
            return False
        kept = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(kept)] = kept
        self._start, self._end = 0, len(kept)
        try:
            count = os.readv(self.fd, [self._buffer[self._end :]])
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self.lose()
        self._end += count
        return count > 0
