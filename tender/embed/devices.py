"""The program's side of one guest's devices.

The rule here: only values and descriptors go to the guest's process; whoever opened a descriptor
closes it.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from io import FileIO

from tender.backends import BlockDescriptor, BlockFile, BlockRemote, Descriptor, Tap, UserNet
from tender.dataclass import replace
from tender.embed import validation
from tender.embed.block_memory import BlockMemory
from tender.embed.capture import Capture
from tender.embed.file_locks import FileLocks
from tender.embed.python_devices import BlockService, NetService
from tender.embed.reactor import show_exception
from tender.embed.validation import BLOCK_VALUES, NET_VALUES
from tender.errors import DeviceError, HostError, shown
from tender.host import keep_descriptor, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from tender.backends import BlockValue, NetValue
    from tender.config import Config
    from tender.embed.console import Console
    from tender.embed.interfaces import BlockSpec, NetSpec, Sink
    from tender.embed.python_devices import Service
    from tender.embed.snapshots import Requester

    Report = Callable[[str, BaseException | str], None]

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
PROBLEMS_MAX = 20  # that are reported of one device


class Devices:
    """The devices and the console of one guest, opened for it.

    `net`, `block`, `kernel_fd` and `console_fd` go into its Config; `image` is the kernel where it
    is not a path; `descriptors` are all the numbers in them. With `snapshots`, it can be saved.
    Raises TenderError, and then leaves nothing behind. `report` is called with a device and a
    problem of it, from any thread.
    """

    def __init__(
        self,
        net: Mapping[str, NetSpec],
        block: Mapping[str, BlockSpec],
        image: bytes | int | None,
        sink: Sink,
        report: Report,
        console: Console,
        *,
        snapshots: bool = False,
    ) -> None:
        self._report = _Reports(report)
        self.requester: Requester | None = None  # for snapshots
        self._at_end: list[Callable[[], object]] = []  # called at the guest's end, last first
        self._owned: list[FileIO] = []  # the guest's ends, but for the console's
        self._threads: list[Service] = []
        self._given: set[int] = set()
        self.ports: dict[int | str, int] = {}  # of the host, by port of the guest
        try:
            self._capture = Capture(console, sink, lambda what: self._report("console", what))
        except OSError as error:
            raise HostError("cannot open a console", "socketpair", error.errno or 0) from None
        try:
            self.net = tuple((name, self._net(name, spec)) for name, spec in net.items())
            self.block = tuple((name, self._block(name, spec)) for name, spec in block.items())
            self.kernel_fd = None if image is None else self._kernel(image)
            if snapshots:
                from tender.embed.snapshots import Requester

                self.requester = Requester()
                _not_for_forks.update(self.requester.sockets)
                self._at_end.append(self.requester.close)
        except BaseException as error:
            try:
                self.close("it was not started")
            except Exception as other:
                self._report("its devices", other)
            if isinstance(error, OSError):
                raise HostError("cannot attach devices", None, error.errno or 0) from None
            raise

    @property
    def console_fd(self) -> int:
        return self._capture.guest_fd

    @property
    def descriptors(self) -> list[int]:
        """Every descriptor of the guest's, each once: what a child process gets a copy of."""
        devices = [fd for _, spec in (*self.net, *self.block) for fd in _descriptors(spec).values()]
        kernel = [] if self.kernel_fd is None else [self.kernel_fd]
        saved = self.requester.descriptors if self.requester else ()
        return list(dict.fromkeys([self.console_fd, *kernel, *saved, *devices]))

    def attached(self, config: Config, numbers: Mapping[int, int]) -> Config:
        """`config` with these devices; `numbers` has the child's number of each descriptor."""
        return replace(
            config,
            net=tuple((name, _renumbered(spec, numbers)) for name, spec in self.net),
            block=tuple((name, _renumbered(spec, numbers)) for name, spec in self.block),
            console_fd=numbers[self.console_fd],
            kernel_fd=None if self.kernel_fd is None else numbers[self.kernel_fd],
            snapshots=self.requester and tuple(numbers[fd] for fd in self.requester.descriptors),
        )

    def handed_over(self) -> None:
        """Close the guest's ends, of which the child has copies."""
        self._capture.handed_over()
        if self.requester:
            self.requester.handed_over()
        for file in self._owned:
            file.close()

    def close(self, how: str = "") -> None:
        """Read the guest's last output, close everything, join the threads. Idempotent.

        `how` is how the guest ended. May be called from any thread, also from one of a device or
        the console. Everything is closed, whatever a device raises; after a Ctrl-C in it, the next
        call does the rest.
        """
        ends = [lambda end=end: self._end(end) for end in reversed(self._at_end)]
        _call_all([self.handed_over, lambda: self._capture.close(how), *ends])

    def _end(self, end: Callable[[], object]) -> None:
        """Call it, unless it has returned before."""
        try:
            end()
        except Exception:
            self._at_end.remove(end)
            raise
        self._at_end.remove(end)

    def serves_here(self) -> bool:
        """Whether this is a thread of a device or console of this guest.

        It must not wait for the guest, which may be waiting for it.
        """
        return self._capture.is_here() or any(thread.is_here() for thread in self._threads)

    def _kernel(self, image: bytes | int) -> int:
        if isinstance(image, int):
            return self._copy(image, f"kernel={image}")
        fd = os.memfd_create("kernel")
        self._owned.append(FileIO(fd))
        write_all(fd, image)
        return fd

    def _net(self, name: str, spec: Any) -> NetValue:
        where = f"network device '{name}'"
        attached: NetValue
        spec = validation.net(spec, where)
        if isinstance(spec, Descriptor):
            copies = {
                name: self._copy(fd, f"{where}: {name}={fd}")
                for name, fd in _descriptors(spec).items()
            }
            return replace(spec, **copies)
        if isinstance(spec, Tap):
            return spec
        if isinstance(spec, UserNet):
            return self._user_net(spec, where)
        if hasattr(spec, "attach"):
            attached = self._attach(spec, where, NET_VALUES, _NO_NET)
        elif hasattr(spec, "send") or hasattr(spec, "receive"):
            report = lambda what: self._report(where, what)  # noqa: E731
            attached = self._start(NetService(spec, where, report))
        else:
            raise DeviceError(f"{where}: {shown(spec)} is {_NO_NET}")
        return attached

    def _user_net(self, spec: UserNet, where: str) -> Descriptor:
        from tender.host import passt

        started = passt.start(spec, where)
        self.ports.update(started.ports)
        self._owned.append(FileIO(started.device.fd))
        link = socket.socket(fileno=os.dup(started.device.fd))
        _not_for_forks.update((self._owned[-1], link))
        self._at_end.append(lambda: _end_passt(link))
        return started.device

    def _block(self, name: str, spec: Any) -> BlockValue:
        where = f"block device '{name}'"
        attached: BlockValue
        spec = validation.block(spec, where)
        if isinstance(spec, (BlockDescriptor, BlockRemote)):
            fd = self._copy(spec.fd, f"{where}: fd={spec.fd}")
            if isinstance(spec, BlockDescriptor):
                self._at_end.append(_file_locks.begin(fd))
            return replace(spec, fd=fd)
        if isinstance(spec, BlockFile):
            return spec
        if hasattr(spec, "attach"):
            attached = self._attach(spec, where, BLOCK_VALUES, _NO_BLOCK)
            if isinstance(attached, BlockDescriptor) and not isinstance(spec, BlockMemory):
                self._at_end.append(_file_locks.begin(attached.fd))
        elif hasattr(spec, "read"):
            report = lambda what: self._report(where, what)  # noqa: E731
            attached = self._start(BlockService(spec, where, report))
        else:
            memory = "; for a disk with this content: BlockMemory(...)"
            hint = memory if isinstance(spec, (bytes, bytearray, memoryview)) else ""
            raise DeviceError(f"{where}: {shown(spec)} is {_NO_BLOCK}{hint}")
        return attached

    def _attach(self, spec: Any, where: str, values: tuple[type, ...], none_of: str) -> Any:
        """What its `attach` returns: one of `values`, whose descriptors are closed here."""
        detach = getattr(spec, "detach", None)
        try:
            attached = spec.attach()
        except DeviceError as error:
            raise type(error)(f"{where}: {error}") from None
        if detach is not None:
            self._at_end.append(detach)
        if not isinstance(attached, values):
            raise DeviceError(f"{where}: attach() gave {shown(attached)}, which is {none_of}")
        try:
            for fd in _descriptors(attached).values():
                self._owned.append(FileIO(fd))
        except OSError:
            raise DeviceError(
                f"{where}: attach() gave {shown(attached)}: no such descriptor"
            ) from None
        return attached

    def _start(self, service: Service) -> Any:
        self._owned.append(FileIO(service.spec.fd))
        self._threads.append(service)
        self._at_end += [service.close_device, service.close]
        service.start()
        return service.spec

    def _copy(self, fd: int, where: str) -> int:
        """A copy of a descriptor, as the program may close its own."""
        if fd in self._given:
            raise DeviceError(f"{where}: it is given twice")
        self._given.add(fd)
        copy = keep_descriptor(fd, where)
        try:
            self._owned.append(FileIO(copy))
        except IsADirectoryError:
            os.close(copy)
            raise DeviceError(f"{where}: a directory") from None
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
        del first  # which holds this frame: a reference cycle that would keep the devices


def _end_passt(link: socket.socket) -> None:
    """`link` is a copy of the guest's end of its socket pair."""
    from tender.host import passt

    with link:
        try:
            link.shutdown(socket.SHUT_WR)  # it ends, even if Ctrl-C ends the wait
        except OSError:  # gone already
            return
        passt.wait_for_end(os.dup(link.fileno()))


_file_locks = FileLocks()


def _after_fork() -> None:
    """In a forked child, close the copies that would hide the end of a guest from passt."""
    global _file_locks
    _file_locks = FileLocks()
    for each in list(_not_for_forks):
        each.close()


_not_for_forks: weakref.WeakSet[FileIO | socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)


class _Reports:
    """The reports of a guest's devices: each problem once per device, and PROBLEMS_MAX of them.

    A guest may be able to cause problems without end. Those of the same exception type and text
    are the same.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._reported: dict[str, set[tuple[type, str]]] = {}

    def __call__(self, device: str, problem: BaseException | str) -> None:
        """Report it if it is new. An exception in `report` is printed, and ends no thread."""
        try:
            kind = type(problem), str(problem)
            with self._lock:
                reported = self._reported.setdefault(device, set())
                if kind in reported or len(reported) > PROBLEMS_MAX:
                    return
                reported.add(kind)
                is_last = len(reported) > PROBLEMS_MAX
            self._report(device, _LAST if is_last else problem)
        except Exception:
            show_exception()


_LAST = f"more than {PROBLEMS_MAX} different problems: no more are reported"
_NO_NET = (
    "none of Tap (or its name), Descriptor, UserNet, an object with attach(), "
    "one with send(frame) or receive()"
)
_NO_BLOCK = (
    "none of BlockFile (or a path), BlockMemory, BlockDescriptor, an object with attach(), "
    "one with read(offset, length)"
)


def describe(problem: BaseException | str) -> str:
    """A problem with a device in one line: an exception with its type, text and place."""
    if isinstance(problem, str):
        return problem
    text = f": {problem}" if str(problem) else ""
    return f"{type(problem).__name__}{text}{_place(problem)}"


def _place(error: BaseException) -> str:
    """Where it was raised, as " (FILE:LINE)".

    Empty for an OSError, with which a device reports what it can't do, and inside this package.
    """
    trace, place = error.__traceback__, ""
    while trace is not None and not isinstance(error, OSError):
        file = trace.tb_frame.f_code.co_filename
        place = "" if file.startswith(_PACKAGE) else f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _renumbered(spec: Any, numbers: Mapping[int, int]) -> Any:
    changes = {name: numbers[fd] for name, fd in _descriptors(spec).items()}
    return replace(spec, **changes) if changes else spec


def _descriptors(spec: Any) -> dict[str, int]:
    """The open descriptors of a value, by field."""
    found = {name: getattr(spec, name, None) for name in ("fd", "sync_fd")}
    return {name: fd for name, fd in found.items() if fd is not None}
