"""The program's side of one guest's devices: `Wiring`, and what can be attached.

The rule here: what goes to the guest's tender is values and descriptors, never an object; who
opened a descriptor closes it. What a guest, or a tender that was taken over, sends back is
checked here.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import weakref
from errno import ECONNRESET, EIO, EPIPE
from io import FileIO

from tender import arguments, reactor
from tender.config import (
    SECTOR_SIZE,
    BlockDescriptor,
    BlockFile,
    BlockRemote,
    Descriptor,
    StreamNet,
    Tap,
    UserNet,
)
from tender.console_capture import PATIENCE_S, Capture
from tender.errors import DeviceError, HostError
from tender.modules import keep_descriptor
from tender.modules.block import check_sectors
from tender.modules.remote import HEADER, PIECE, READ, STATUS, WRITE
from tender.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Protocol

    from tender.config import BlockValue, NetValue
    from tender.console_capture import Console, Sink

    Report = Callable[[str, BaseException | str], None]

    class AttachableNet(Protocol):
        """Something that gives a guest a network device when it starts.

        The descriptor in what `attach` gives belongs to the guest from then on. An optional
        `detach()` is called when the guest has ended.
        """

        def attach(self) -> NetValue: ...

    class AttachableBlock(Protocol):
        """The same for a block device."""

        def attach(self) -> BlockValue: ...

    class NetSender(Protocol):
        """A network device in Python: gets each frame that the guest sends.

        The frames that it gives back, one or several, are sent to the guest. It is called on a
        thread of its own and may block; then frames are lost, as on a wire. `mtu` (int) and `mac`
        (the guest's, 6 bytes or a string) are optional attributes, as is `close()`, called at the
        end.
        """

        def send(self, frame: bytes) -> bytes | Iterable[bytes] | None: ...

    class NetReceiver(Protocol):
        """A network device in Python: asked for the frames that the guest is to receive.

        It is called on a thread of its own, again as soon as the guest has room, and may block;
        None: there are no more.
        """

        def receive(self) -> bytes | None: ...

    class BlockPython(Protocol):
        """A block device in Python, of `capacity` bytes (or `size`, or `len()`).

        `write(offset, data)` makes it writable, unless its `readonly` says otherwise;
        `sector_size` is 512 if it has none. It is called on a thread of its own, with pieces of at
        most 64 KiB. An OSError gives the guest an error, any other exception as well.
        """

        def read(self, offset: int, length: int) -> bytes: ...

    NetSpec = str | NetValue | AttachableNet | NetSender | NetReceiver
    BlockSpec = str | os.PathLike[str] | BlockValue | AttachableBlock | BlockPython

_NET_VALUES = (Tap, Descriptor, StreamNet)
_BLOCK_VALUES = (BlockFile, BlockDescriptor, BlockRemote)
RETRY_S = 0.1  # after an exception of receive()
KINDS_MAX = 20  # of trouble that are told of one device
ERRNO_MAX = 4095  # Linux, include/linux/err.h
FRAME_ROOM = 1 << 17  # bytes: more than the largest frame
BYTES = (bytes, bytearray, memoryview)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Wiring:
    """The devices and the console of one guest, opened for it.

    `net`, `block` and `console_fd` go into its Config; `descriptors` are all the numbers in them.
    Raises TenderError, and then has left nothing behind. `report` is called with the device and
    what went wrong there, from any thread.
    """

    def __init__(
        self,
        net: Mapping[str, NetSpec],
        block: Mapping[str, BlockSpec],
        console: Sink,
        report: Report,
    ) -> None:
        self._report = _Reports(report)
        self._ends: list[Callable[[], object]] = []  # what is done at the guest's end, last first
        self._owned: list[FileIO] = []  # the guest's ends, but for the console's
        self._threads: list[_Service] = []
        self._given: set[int] = set()
        try:
            self._capture = Capture(console, lambda what: self._report("console", what))
        except OSError as error:
            raise HostError("cannot open a console", "socketpair", error.errno or 0) from None
        try:
            self.net = tuple((name, self._net(name, spec)) for name, spec in net.items())
            self.block = tuple((name, self._block(name, spec)) for name, spec in block.items())
        except BaseException as error:
            try:
                self.close("it was not started")
            except Exception as other:
                self._report("its devices", other)
            if isinstance(error, OSError):
                raise HostError("cannot attach devices", None, error.errno or 0) from None
            raise

    @property
    def console(self) -> Console:
        return self._capture.console

    @property
    def console_fd(self) -> int:
        return self._capture.guest_fd

    @property
    def descriptors(self) -> list[int]:
        """Every descriptor of the guest's, each once: what a child process gets a copy of."""
        devices = [fd for _, spec in (*self.net, *self.block) for fd in _descriptors(spec).values()]
        return [self.console_fd, *devices]

    def with_descriptors(
        self, numbers: Mapping[int, int]
    ) -> tuple[tuple[tuple[str, NetValue], ...], tuple[tuple[str, BlockValue], ...], int]:
        """`net`, `block` and `console_fd` with the numbers that the child has for them."""
        net = tuple((name, _renumbered(spec, numbers)) for name, spec in self.net)
        block = tuple((name, _renumbered(spec, numbers)) for name, spec in self.block)
        return net, block, numbers[self.console_fd]

    def handed_over(self) -> None:
        """The child has its copies: close the guest's ends here."""
        self._capture.handed_over()
        for file in self._owned:
            file.close()

    def close(self, how: str = "") -> None:
        """The guest has ended, and `how`: take in its last output, close, join. Idempotent.

        May be called from any thread; on one of the wiring's own, it does not wait for that. All
        is given back, whatever a device raises; what Ctrl-C has kept from it, by the next call.
        """
        ends = [lambda end=end: self._end(end) for end in reversed(self._ends)]
        _call_all([self.handed_over, lambda: self._capture.close(how), *ends])

    def _end(self, end: Callable[[], object]) -> None:
        """Call what belongs to the end, until it has come back once."""
        try:
            end()
        except Exception:
            self._ends.remove(end)
            raise
        self._ends.remove(end)

    def serves_here(self) -> bool:
        """Whether this is a thread of a device or console of this guest.

        It must not wait for the guest, which may be waiting for it.
        """
        return self._capture.is_here() or any(thread.is_here() for thread in self._threads)

    def _net(self, name: str, spec: Any) -> NetValue:
        where = f"network device '{name}'"
        attached: NetValue
        spec = arguments.net(spec, where)
        if isinstance(spec, (Descriptor, StreamNet)):
            copies = {
                name: self._copy(fd, f"@{fd}: Could not attach interface")
                for name, fd in _descriptors(spec).items()
            }
            return replace(spec, **copies)
        if isinstance(spec, Tap):
            return spec
        if isinstance(spec, UserNet):
            return self._user_net(spec, where)
        if hasattr(spec, "attach"):
            attached = arguments.net(self._attach(spec, where, _NET_VALUES, _NO_NET), where)
        elif hasattr(spec, "send") or hasattr(spec, "receive"):
            report = lambda what: self._report(where, what)  # noqa: E731
            attached = self._start(_NetService(spec, where, report))
        else:
            raise DeviceError(f"{where}: {spec!r} is {_NO_NET}")
        return attached

    def _user_net(self, spec: UserNet, where: str) -> StreamNet:
        from tender import usernet

        fd = usernet.start(spec, where)
        self._owned.append(FileIO(fd))
        link = socket.socket(fileno=os.dup(fd))
        _not_for_forks.update((self._owned[-1], link))
        self._ends.append(lambda: _end_passt(link))
        return StreamNet(fd, spec.mtu, spec.mac)

    def _block(self, name: str, spec: Any) -> BlockValue:
        where = f"block device '{name}'"
        attached: BlockValue
        spec = arguments.block(spec, where)
        if isinstance(spec, (BlockDescriptor, BlockRemote)):
            fd = self._copy(spec.fd, f"@{spec.fd}: Could not open block device")
            if isinstance(spec, BlockDescriptor):
                self._ends.append(_file_locks.begin(fd))
            return replace(spec, fd=fd)
        if isinstance(spec, BlockFile):
            return spec
        if hasattr(spec, "attach"):
            attached = arguments.block(self._attach(spec, where, _BLOCK_VALUES, _NO_BLOCK), where)
            if isinstance(attached, BlockDescriptor) and not isinstance(spec, BlockMemory):
                self._ends.append(_file_locks.begin(attached.fd))
        elif hasattr(spec, "read"):
            report = lambda what: self._report(where, what)  # noqa: E731
            attached = self._start(_BlockService(spec, where, report))
        else:
            raise DeviceError(f"{where}: {spec!r} is {_NO_BLOCK}")
        return attached

    def _attach(self, spec: Any, where: str, values: tuple[type, ...], none_of: str) -> Any:
        """What it gives: one of `values`, whose descriptors are the guest's from now on."""
        detach = getattr(spec, "detach", None)
        try:
            attached = spec.attach()
        except DeviceError as error:
            raise type(error)(f"{where}: {error}") from None
        if detach is not None:
            self._ends.append(detach)
        if not isinstance(attached, values):
            raise DeviceError(f"{where}: attach() gave {attached!r}, which is {none_of}")
        try:
            for fd in _descriptors(attached).values():
                self._owned.append(FileIO(fd))
        except (OSError, ValueError, TypeError):  # of FileIO, for numbers that are none
            raise DeviceError(f"{where}: attach() gave {attached!r}: no such descriptor") from None
        return attached

    def _start(self, service: _Service) -> Any:
        self._owned.append(FileIO(service.spec.fd))
        self._threads.append(service)
        self._ends += [service.close_device, service.close]
        service.start()
        return service.spec

    def _copy(self, fd: int, where: str) -> int:
        """A descriptor of the wiring's own: the program may close the one it gave."""
        if fd in self._given:
            raise DeviceError(f"{where}: it is given twice")
        self._given.add(fd)
        copy = keep_descriptor(fd, where)
        self._owned.append(FileIO(copy))
        return copy


def _call_all(functions: list[Callable[[], object]]) -> None:
    """Call all of them, whatever one raises; then raise that, Ctrl-C before any other."""
    first: BaseException | None = None
    for function in functions:
        try:
            function()
        except BaseException as error:
            if first is None or (isinstance(first, Exception) and not isinstance(error, Exception)):
                first = error
    try:
        if first is not None:
            raise first
    finally:
        del first  # which holds this frame: a ring that would keep the devices for a while


def _end_passt(link: socket.socket) -> None:
    """`link` is a copy of the guest's end of its socket pair."""
    from tender import usernet

    with link:
        try:
            link.shutdown(socket.SHUT_WR)  # it ends now, also where Ctrl-C ends the wait
        except OSError:  # gone already
            return
        usernet.wait_for_end(os.dup(link.fileno()))


class _FileLocks:
    """The locks that guests take on files which the program has open as well.

    A lock belongs to the open file (flock(2)), so it does not end with the guest's process. When
    the last guest on that file has ended it is given back, unless the program had one before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By device and inode: the guests on it, each as its copy, and the copies to unlock.
        self._files: dict[tuple[int, int], tuple[set[FileIO], list[FileIO]]] = {}

    def begin(self, fd: int) -> Callable[[], object]:
        """A guest is about to lock `fd`; gives what is to be called when it has ended."""
        copy = FileIO(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        info = os.fstat(fd)
        key = info.st_dev, info.st_ino
        with self._lock:
            guests, files = self._files.setdefault(key, (set(), []))
            guests.add(copy)
            if not _is_locked(fd):
                files.append(copy)
        return lambda: self._end(key, copy)

    def _end(self, key: tuple[int, int], copy: FileIO) -> None:
        with self._lock:
            guests, files = self._files.get(key, (set(), []))
            guests.discard(copy)
            if copy not in files:
                copy.close()
            if not guests:
                for file in files:
                    _unlock(file)
                self._files.pop(key, None)


def _is_locked(fd: int) -> bool:
    """Whether the open file has a lock. Source: Linux, Documentation/filesystems/proc.rst."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            return any(line.startswith("lock:") and " FLOCK " in line for line in lines)
    except OSError:
        return True  # not known: whose it is then, neither


def _unlock(file: FileIO) -> None:
    if not file.closed:
        try:
            fcntl.flock(file, fcntl.LOCK_UN)
        except OSError:  # a file system without locks
            pass
        file.close()


_file_locks = _FileLocks()


def _after_fork() -> None:
    """In a forked child, whose copies would keep passt and a guest's other end from seeing ends."""
    global _file_locks
    _file_locks = _FileLocks()
    for each in list(_not_for_forks):
        each.close()


_not_for_forks: weakref.WeakSet[FileIO | socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)


class _Reports:
    """What is told of a guest's devices: each kind once per device, and KINDS_MAX of them.

    A guest may be able to make trouble without end. A kind is the type and text of an exception.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._told: dict[str, set[tuple[type, str]]] = {}

    def __call__(self, device: str, what: BaseException | str) -> None:
        """Tell it if it is new. What is raised by who is told is shown, and ends no thread."""
        try:
            kind = type(what), str(what)
            with self._lock:
                told = self._told.setdefault(device, set())
                if kind in told or len(told) > KINDS_MAX:
                    return
                told.add(kind)
                is_last = len(told) > KINDS_MAX
            self._report(device, _LAST if is_last else what)
        except Exception:
            reactor.show_exception()


_LAST = f"more than {KINDS_MAX} kinds of trouble: no more will be told"
_NO_NET = (
    "none of Tap (or its name), Descriptor, UserNet, an object with attach(), "
    "one with send(frame) or receive()"
)
_NO_BLOCK = (
    "none of BlockFile (or a path), BlockMemory, BlockDescriptor, an object with attach(), "
    "one with read(offset, length)"
)


def _renumbered(spec: Any, numbers: Mapping[int, int]) -> Any:
    changes = {name: numbers[fd] for name, fd in _descriptors(spec).items()}
    return replace(spec, **changes) if changes else spec


def _descriptors(spec: Any) -> dict[str, int]:
    """The open descriptors of a value, by field."""
    found = {name: getattr(spec, name, None) for name in ("fd", "sync_fd")}
    return {name: fd for name, fd in found.items() if type(fd) is not bool and isinstance(fd, int)}


class _Service:
    """Threads that serve a device in Python over one end of a socket pair."""

    spec: Any

    def __init__(self, report: Callable[[BaseException | str], None]) -> None:
        self._report = report
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guest_fd = theirs.detach()
        self._threads: list[threading.Thread] = []
        self._left = 0  # threads that use the socket
        self._lock = threading.Lock()
        self._closing = False
        self._open = threading.Lock()  # held until it is closed; an Event is none for Ctrl-C
        self._open.acquire()

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
        """Let the device have what the guest has sent, and wake who waits for more."""
        self._closing = True
        if self._open.locked():
            self._open.release()
        with self._lock:
            if self._left:
                self._ours.shutdown(socket.SHUT_RDWR)
        self._join(self._threads[0])

    def close_device(self) -> None:
        """Tell the device that nothing more comes."""

    def _join(self, thread: threading.Thread) -> None:
        if thread.ident is not None and not self.is_here():
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self._report(f"its device still does not return after {PATIENCE_S:.0f} s")

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except OSError as error:
            # When the guest ends, so does its end of the socket.
            if not self._closing and error.errno not in (EPIPE, ECONNRESET):
                self._report(error)
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._ours.close()


class _NetService(_Service):
    """Serves a NetSender, a NetReceiver, or what is both."""

    def __init__(
        self, device: Any, where: str, report: Callable[[BaseException | str], None]
    ) -> None:
        mtu, mac = getattr(device, "mtu", None), getattr(device, "mac", None)
        spec = arguments.net(Descriptor(0, mtu=mtu, mac=mac), where)
        super().__init__(report)
        self._device = device
        self.spec = replace(spec, fd=self._guest_fd)
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
        while frame := self._ours.recv(FRAME_ROOM):
            try:
                answer = send(frame) if send else None
                for reply in (answer,) if isinstance(answer, BYTES) else answer or ():
                    self._answer(reply)
            except BaseException as error:  # also of sys.exit(), which would end the thread alone
                self._report(error)

    def _answer(self, frame: Any) -> None:
        """A frame for a guest that has no room is lost: it would keep its own frames waiting."""
        try:
            self._ours.send(frame, socket.MSG_DONTWAIT)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass

    def _give_frames(self) -> None:
        while not self._closing:
            try:
                frame = self._device.receive()
                if frame is None:
                    return
                frame = memoryview(frame)
            except BaseException as error:
                self._report(error)
                self._open.acquire(timeout=RETRY_S)
            else:
                self._ours.send(frame)


class _BlockService(_Service):
    """Serves a BlockPython. Requests come from a process that a guest may have taken over."""

    def __init__(
        self, device: Any, where: str, report: Callable[[BaseException | str], None]
    ) -> None:
        capacity = _capacity(device, where)
        self._readonly = bool(getattr(device, "readonly", not hasattr(device, "write")))
        sector_size = getattr(device, "sector_size", SECTOR_SIZE)
        spec = arguments.block(BlockRemote(0, capacity, self._readonly, sector_size), where)
        super().__init__(report)
        self._device = device
        self.spec = replace(spec, fd=self._guest_fd)
        self._add(self._serve)

    def _serve(self) -> None:
        while request := self._ours.recv(HEADER.size + PIECE + 1):
            try:
                reply = STATUS.pack(0) + self._answer(request)
            except BaseException as error:
                self._report(error)
                reply = STATUS.pack(_errno(error))
            self._ours.send(reply)

    def _answer(self, request: bytes) -> bytes:
        if len(request) < HEADER.size:
            raise ValueError("a request without a header, which no tender makes")
        operation, length, offset = HEADER.unpack_from(request)
        data = request[HEADER.size :]
        wanted = {READ: 0, WRITE: length}.get(operation)
        inside = length <= PIECE and offset + length <= self.spec.capacity
        if not inside or len(data) != wanted or (operation == WRITE and self._readonly):
            raise ValueError(
                f"a request that no tender makes: operation {operation} with {len(data)} bytes, "
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
    """What the guest's side is told: a number of Linux's, which the program's may be none of."""
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
            f"{where}: {device!r} has no capacity: bytes, as `capacity`, `size` or len()"
        )
    return value


_MEMORY = "block device in memory"


def _memory_size(content: Any) -> int:
    try:
        is_size = isinstance(content, int) and not isinstance(content, bool)
        size = int(content) if is_size else memoryview(content).nbytes
    except TypeError:
        raise DeviceError(f"{_MEMORY}: {content!r} is neither a size in bytes nor bytes") from None
    if size >= 1 << 63:
        raise DeviceError(f"{_MEMORY}: no file can be that large")
    return size


class BlockMemory:
    """A block device in memory, which the program can look at and change while the guest runs.

    `content` is its size in bytes, or its first content. One guest has it at a time; what was
    written stays until it is closed, or collected.
    """

    def __init__(
        self,
        content: int | bytes | bytearray | memoryview,
        *,
        sector_size: int = SECTOR_SIZE,
        readonly: bool = False,
    ) -> None:
        size = _memory_size(content)
        arguments.block(BlockDescriptor(0, readonly, sector_size), _MEMORY)
        check_sectors(_MEMORY, size, sector_size)
        self.size, self.sector_size, self.readonly = size, sector_size, readonly
        self._lock = threading.Lock()
        self._attached = False
        self._fd = os.memfd_create("ptender-block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd)
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise HostError(
                f"a block device of {size} bytes in memory", "ftruncate", error.errno or 0
            ) from None
        if not isinstance(content, int):
            self.write(0, content)
        # Nobody who has the descriptor can make it shorter under somebody else's feet.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)

    def __len__(self) -> int:
        return self.size

    @property
    def data(self) -> bytes:
        """All of it, as it is now."""
        return self.read(0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; ValueError where they are not all inside."""
        self._check(offset, length)
        pieces = []
        while length:
            piece = os.pread(self._fd, length, offset)
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`, whether or not the guest may."""
        rest = memoryview(data).cast("B")
        self._check(offset, len(rest))
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            offset, rest = offset + done, rest[done:]

    def attach(self) -> BlockDescriptor:
        """For a guest that starts."""
        taken = False
        try:
            with self._lock:
                if self._attached:
                    raise DeviceError("this memory is attached to another guest")
                taken = self._attached = True
            fd = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 3)
            return BlockDescriptor(fd, self.readonly, self.sector_size)
        except BaseException:  # Ctrl-C too: no guest would come that lets go of it
            if taken:
                self.detach()
            raise

    def detach(self) -> None:
        """The guest has ended."""
        with self._lock:
            self._attached = False

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside [0, {self.size})")
