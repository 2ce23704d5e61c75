"""A program's side of a guest's devices, without a guest: the other end is played here."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tender._native import lib
from tender.backends import BlockDescriptor, BlockFile, BlockRemote, Descriptor, Tap
from tender.cleanup import Cleanup
from tender.config import Config
from tender.embed.block_memory import BlockMemory
from tender.embed.capture import Capture
from tender.embed.console import Console
from tender.embed.devices import Devices
from tender.errors import ConfigError, DeviceError, TenderError
from tender.host import block
from tender.host.remote import HEADER, READ, STATUS, WRITE
from tender.image.manifest import Device
from tender.modules.block import BlockDevice
from tender.stop import Stop
from tests.descriptors import open_descriptors
from tests.unit.interrupts import at_every_moment
from tests.waiting import PATIENCE_S

DISK = Device("storage", lib.MFT_DEV_BLOCK_BASIC, 1)
PORT = Device("service", lib.MFT_DEV_NET_BASIC, 2)
FRAME = bytes(range(60))
OK, AGAIN, EINVAL, EUNSPEC = lib.HVT_R_OK, lib.HVT_R_AGAIN, lib.HVT_R_EINVAL, lib.HVT_R_EUNSPEC


class Told(list[tuple[str, Any]]):
    """What was reported."""

    def __call__(self, device: str, what: object) -> None:
        self.append((device, what))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def cleanup() -> Iterator[Cleanup]:
    with Cleanup() as value:
        yield value


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No descriptor and no thread, but those of the reactor."""
    from tender.embed.reactor import reactor

    reactor().call_soon(bool)
    descriptors, threads = open_descriptors(), threading.active_count()

    def is_clean() -> bool:
        return open_descriptors() <= descriptors and threading.active_count() <= threads

    yield
    deadline = time.monotonic() + PATIENCE_S
    while not is_clean() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_clean(), (open_descriptors() - descriptors, threading.enumerate())


def opened(
    nets: Any, blocks: Any, sink: Any, report: Any, console: Console | None = None
) -> Devices:
    return Devices(nets, blocks, None, sink, report, console or Console())


# The console.


def captured(sink: Any, told: Told, *pieces: bytes) -> Console:
    capture = Capture(Console(), sink, lambda what: told("console", what))
    for piece in pieces:
        os.write(capture.guest_fd, piece)
    capture.close("halted")
    assert capture.console.ended
    return capture.console


def test_all_output_is_in_when_it_is_closed(told: Told) -> None:
    for size in (0, 1, 100, 60_000):
        assert captured(None, told, bytes(size)).data == bytes(size)
        assert captured(lambda _: None, told, bytes(size)).data == bytes(size)


def test_output_is_passed_on(told: Told, tmp_path: Path) -> None:
    pieces: list[bytes] = []
    captured(pieces.append, told, b"to a ", b"callable")
    assert b"".join(pieces) == b"to a callable"
    with open(tmp_path / "log", "w") as file:
        file.write("before ")
        captured(file, told, b"to a file")
    assert (tmp_path / "log").read_bytes() == b"before to a file"
    text, raw = io.StringIO(), io.BytesIO()
    captured(text, told, "\u00e4".encode()[:1], "\u00e4".encode()[1:], b"\xff\n")
    captured(raw, told, b"\xff\n")
    assert (text.getvalue(), raw.getvalue()) == ("ä\ufffd\n", b"\xff\n")
    reader, writer = os.pipe()
    captured(writer, told, b"to a pipe")
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"to a pipe"
    assert not told


def test_a_sink_may_raise(told: Told) -> None:
    pieces: list[bytes] = []

    def broken(piece: bytes) -> None:
        pieces.append(piece)
        raise ZeroDivisionError

    assert captured(broken, told, b"kept all the same").text == "kept all the same"
    assert [type(what) for _, what in told] == [ZeroDivisionError] * len(pieces)


def test_a_sink_that_is_gone_is_left_alone(told: Told) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert captured(writer, told, b"kept").text == "kept"
    os.close(writer)
    ((_, error),) = told
    assert isinstance(error, BrokenPipeError)


def test_a_slow_sink_slows_the_guest(told: Told) -> None:
    may_go = threading.Event()
    capture = Capture(
        Console(), lambda _: may_go.wait(PATIENCE_S), lambda what: told("console", what)
    )
    os.set_blocking(capture.guest_fd, False)
    written = 0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            written += os.write(capture.guest_fd, bytes(4096))
        except BlockingIOError:
            break
    assert 4096 <= written < 1 << 22
    may_go.set()
    capture.close()
    assert len(capture.console.data) == written


def test_a_sink_may_have_the_guest_closed(told: Told) -> None:
    """As by a callback that stops the guest at a word."""
    closed = threading.Event()

    def stop(_: bytes) -> None:
        assert capture.is_here()
        capture.close()
        closed.set()

    capture = Capture(Console(), stop, lambda what: told("console", what))
    os.write(capture.guest_fd, b"x")
    assert closed.wait(PATIENCE_S)


def test_a_copy_of_the_guests_end_does_not_keep_it_open(told: Told) -> None:
    for sink in (None, lambda _: None):
        capture = Capture(Console(), sink, lambda what: told("console", what))
        copy = os.dup(capture.guest_fd)
        os.write(copy, b"last words")
        capture.close()
        assert capture.console.text == "last words"
        os.close(copy)


@pytest.mark.parametrize("sink", [True, 1.5, b"log", object()])
def test_what_is_no_sink(sink: Any, told: Told) -> None:
    with pytest.raises(ConfigError, match="console: .* is none of a callable"):
        opened({}, {}, sink, told)


class Odd(io.StringIO):
    """A stream whose fileno() is what is wished."""

    def __init__(self, fd: Any = None) -> None:
        super().__init__()
        self.fd = fd

    def fileno(self) -> Any:
        if self.fd is None:
            raise AttributeError
        return self.fd


def test_streams_with_an_odd_fileno(told: Told) -> None:
    stream = Odd()
    captured(stream, told, b"written")
    assert stream.getvalue() == "written"
    for fd in ("1", 1.0, True):
        with pytest.raises(ConfigError, match=f"console: .*: fileno.. gave {fd!r}, not a desc"):
            opened({}, {}, Odd(fd), told)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        file.write("not taken")
        with pytest.raises(ConfigError, match="console: .*: .*Broken pipe"):
            opened({}, {}, file, told)
        with open("/dev/null", "w") as null:
            os.dup2(null.fileno(), file.fileno())


def test_a_text_stream_that_is_not_its_descriptors_file(told: Told) -> None:
    """As sys.stdout in Jupyter, which shows what is written to it in the notebook."""
    reader, writer = os.pipe()
    stream = Odd(writer)
    captured(stream, told, b"shown")
    os.close(writer)
    assert stream.getvalue() == "shown"
    with open(reader, "rb") as pipe:
        assert not pipe.read()


def test_a_descriptor_that_is_none(told: Told) -> None:
    for fd in (9999, -1, 1 << 40):
        with pytest.raises(DeviceError, match=f"console: @{fd}: no such descriptor"):
            opened({}, {}, fd, told)


# The devices of a guest.


def test_values_and_descriptors(told: Told, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    memory = BlockMemory(4096)
    nets: dict[str, Any] = {"tap": Tap("tap0"), "service": Descriptor(theirs.fileno(), mtu=9000)}
    with ours, theirs:
        devices = opened(nets, {"file": BlockFile("x"), "storage": memory}, None, told)
        (_, tap), (name, port) = devices.net
        assert (tap, name) == (Tap("tap0"), "service")
        assert isinstance(port, Descriptor)
        assert (port.mtu, port.fd == theirs.fileno()) == (9000, False)
        (_, file), (_, disk) = devices.block
        assert file == BlockFile("x")
        assert isinstance(disk, BlockDescriptor)
        assert sorted(devices.descriptors) == sorted([devices.console_fd, port.fd, disk.fd])
        numbers = {fd: fd + 1000 for fd in devices.descriptors}
        config = devices.attached(Config("k"), numbers)
        assert config.net == (("tap", tap), ("service", Descriptor(port.fd + 1000, mtu=9000)))
        assert config.block == (("file", file), ("storage", BlockDescriptor(disk.fd + 1000)))
        assert config.console_fd == devices.console_fd + 1000
        devices.handed_over()
        for fd in numbers:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
        devices.close()
        devices.close()
        assert theirs.fileno() >= 0
        os.fstat(theirs.fileno())
    del memory


class Attachable:
    def __init__(self, value: object) -> None:
        self.value = value
        self.steps: list[str] = []

    def attach(self) -> Any:
        self.steps.append("attach")
        return self.value

    def detach(self) -> None:
        self.steps.append("detach")


def test_what_can_attach_itself(told: Told) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    port = Attachable(Descriptor(theirs.detach()))
    devices = opened({"service": port}, {}, None, told)
    assert port.steps == ["attach"]
    devices.close()
    assert port.steps == ["attach", "detach"]
    with ours, pytest.raises(ConnectionError):
        ours.send(b"x")


def test_all_is_given_back_where_one_step_is_interrupted(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Wire):
        def close(self) -> None:
            super().close()
            if self.closed == 1:
                raise KeyboardInterrupt

    def interrupt(how: str = "") -> None:
        if how:
            raise KeyboardInterrupt

    memory, wire, console = BlockMemory(4096), Interrupted(), Console()
    tap = Attachable(Tap("tap0"))
    devices = opened({"tap": tap, "service": wire}, {"storage": memory}, None, told, console)
    with monkeypatch.context() as patch:
        patch.setattr(console, "end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            devices.close("halted")
    assert tap.steps == ["attach", "detach"]
    os.close(memory.attach().fd)
    assert wire.closed == 1
    devices.close("halted")
    assert console.ended
    assert (wire.closed, tap.steps) == (2, ["attach", "detach"])
    devices.close()
    assert wire.closed == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a WeakSet
@pytest.mark.parametrize("with_sink", [False, True])
def test_what_an_interrupt_has_left_is_given_back_by_the_next_close(
    told: Told, with_sink: bool
) -> None:
    memory = BlockMemory(4096)
    every: list[tuple[Devices, Console]] = []

    def prepare() -> Any:
        blocks: dict[str, Any] = {"storage": memory, "python": Disk()}
        sink = (lambda _: None) if with_sink else None
        console = Console()
        devices = opened({"service": Wire()}, blocks, sink, told, console)
        every.append((devices, console))
        os.write(devices.console_fd, b"last words")
        return devices.close

    def check() -> None:
        devices, console = every.pop()
        devices.close("halted")
        os.close(memory.attach().fd)
        memory.detach()
        assert console.ended
        for thread in threads_of_devices():
            thread.join(PATIENCE_S)
        assert not threads_of_devices()

    before = open_descriptors()
    at_every_moment(prepare, check)
    assert open_descriptors() <= before
    assert not told


def threads_of_devices() -> list[threading.Thread]:
    names = ("ptender device", "ptender console")
    return [thread for thread in threading.enumerate() if thread.name in names]


def test_wrong_devices_leave_nothing(told: Told) -> None:
    first = Attachable(Tap("tap0"))
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"service": 5}, {}, "network device 'service': 5 is none of Tap .*, Descriptor, UserNet"),
        ({"service": BlockFile("x")}, {}, "network device 'service': .* is none of Tap"),
        ({"service": Attachable(7)}, {}, r"'service': attach\(\) gave 7, which is none of Tap"),
        ({}, {"storage": None}, "block device 'storage': None is none of BlockFile"),
        ({}, {"storage": Attachable(None)}, r"'storage': attach\(\) gave None"),
        (
            {"service": Descriptor(9999)},
            {},
            "^network device 'service': fd=9999: no such descriptor$",
        ),
        (
            {},
            {"storage": BlockDescriptor(9999)},
            "^block device 'storage': fd=9999: no such descriptor$",
        ),
        ({}, {"storage": io.BytesIO(b"")}, "'storage': .* has no capacity.*BlockDescriptor"),
        ({}, {"storage": bytes(1 << 20)}, r"'storage': b.{99}\.\.\. is none .*: BlockMemory\("),
        ({"service": Attachable(Descriptor(9999))}, {}, r"gave .*: no such descriptor"),
        ({}, {"storage": Attachable(BlockDescriptor(9999))}, r"gave .*: no such descriptor"),
        ({"service": with_attributes(Wire(), mtu="1500")}, {}, "'service': mtu='1500' is not a"),
        ({"service": with_attributes(Wire(), mtu=1500.0)}, {}, "'service': mtu=1500.0 is not a"),
        (
            {"service": with_attributes(Wire(), mac="02:0")},
            {},
            "'service': mac='02:0' is not .* MAC",
        ),
        ({}, {"storage": with_attributes(Disk(), sector_size="512")}, "sector_size='512' is not"),
        ({}, {"storage": with_attributes(Disk(), sector_size=None)}, "sector_size=None is not a"),
    ]
    for nets, blocks, message in wrong:
        with pytest.raises(DeviceError, match=message) as raised:
            opened({"first": first, **nets}, blocks, None, told)
        assert "\n" not in str(raised.value)
        assert first.steps[-2:] == ["attach", "detach"]


def with_attributes(device: Any, **attributes: Any) -> Any:
    device.__dict__.update(attributes)
    return device


def test_the_address_of_a_device_may_be_a_string(told: Told) -> None:
    wire = with_attributes(Wire(), mac="02:00:00:00:00:01")
    devices = opened({"service": wire}, {}, None, told)
    ((_, spec),) = devices.net
    devices.close()
    assert spec.mac == bytes.fromhex("020000000001")


def test_a_descriptor_is_given_once(told: Told) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        port = Descriptor(theirs.fileno())
        with pytest.raises(DeviceError, match="given twice"):
            opened({"a": port, "b": port}, {}, None, told)


# Block devices in memory.


def test_memory_is_read_and_written() -> None:
    memory = BlockMemory(b"abc" + bytes(1021))
    assert (len(memory), memory.read(0, 3)) == (1024, b"abc")
    memory.write(1020, b"tail")
    assert memory.data[1020:] == b"tail"
    for offset, length in ((-1, 1), (1024, 1), (0, 1025), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            memory.read(offset, length)
    with pytest.raises(ValueError, match="not inside"):
        memory.write(1021, b"tail")
    given = memory.attach()
    for size in (512, 2048):
        with pytest.raises(PermissionError):
            os.ftruncate(given.fd, size)
    with pytest.raises(DeviceError, match="attached to another guest"):
        memory.attach()
    os.close(given.fd)
    memory.detach()
    os.close(memory.attach().fd)


def test_an_interrupted_attach_leaves_memory_to_the_next_guest() -> None:
    memory = BlockMemory(4096)
    before = open_descriptors()
    given: list[BlockDescriptor] = []

    def check() -> None:
        if given:
            given.pop()
            memory.detach()
        memory.attach()
        memory.detach()
        for fd, _ in open_descriptors() - before:
            os.close(fd)

    at_every_moment(lambda: lambda: given.append(memory.attach()), check)


@pytest.mark.parametrize(("content", "sector"), [(0, 512), (1000, 512), (512, 1024), (b"", 512)])
def test_sizes_of_memory(content: Any, sector: int) -> None:
    with pytest.raises(DeviceError, match="Backing storage size must be block aligned"):
        BlockMemory(content, sector_size=sector)
    with pytest.raises(DeviceError, match="sector_size=1000 is not a power of two"):
        BlockMemory(4096, sector_size=1000)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (10**30 * 512, {}, "no file can be that large"),
        (-1, {}, "capacity=-1 is not a whole number"),
        ("text", {}, "'text' is neither a size in bytes nor bytes"),
        (None, {}, "None is neither a size in bytes nor bytes"),
        (4096, {"sector_size": "512"}, "sector_size='512' is not a power of two"),
        (4096, {"readonly": "yes"}, "readonly='yes' is not True or False"),
    ],
)
def test_what_is_no_memory(content: Any, more: Any, message: str) -> None:
    with pytest.raises(TenderError, match=message) as raised:
        BlockMemory(content, **more)
    assert str(raised.value).isprintable()


def _warn(told: Told | None, text: str) -> None:
    if told is not None:
        told("warn", text)


def attach_block(spec: Any, cleanup: Cleanup, told: Told | None = None) -> BlockDevice:
    return block.attach(
        DISK,
        spec,
        cleanup,
        Stop(),
        lambda text: _warn(told, text),
    )


def test_a_descriptor_is_a_disk(cleanup: Cleanup, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    for flags, readonly, message in [
        (os.O_RDWR, False, None),
        (os.O_RDONLY, True, None),
        (os.O_RDONLY, False, "open for reading only .*add ,ro"),
        (os.O_WRONLY, True, "open for writing only"),
    ]:
        fd = os.open(path, flags)
        if message is None:
            device = attach_block(BlockDescriptor(fd, readonly), cleanup)
            assert (device.capacity, device.readonly, device.fd) == (4096, readonly, fd)
        else:
            with pytest.raises(DeviceError, match=message):
                attach_block(BlockDescriptor(fd, readonly), cleanup)
        os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(DeviceError, match="neither a file nor a block device"):
        attach_block(BlockDescriptor(reader, readonly=True), cleanup)
    os.close(reader)
    os.close(writer)


# Overlays.


def test_an_overlay_leaves_the_file_as_it_was(cleanup: Cleanup, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = os.urandom(5 * 4096 + 512)
    path.write_bytes(content)
    path.chmod(0o444)
    device = attach_block(BlockFile(str(path), overlay=True), cleanup)
    expected = bytearray(content)
    sizes = [(0, 512), (4096 - 512, 1024), (8192, 4096), (100, 7), (12288, 8704), (20480, 512)]
    for offset, size in sizes:
        data = os.urandom(size)
        assert device.write(offset, memoryview(data)) == OK
        expected[offset : offset + size] = data
        seen = bytearray(len(expected))
        assert device.read(0, memoryview(seen)) == OK
        assert seen == expected
        part = bytearray(3000)
        assert device.read(3000, memoryview(part)) == OK
        assert part == expected[3000:6000]
    assert device.write(0, memoryview(b"")) == device.read(0, memoryview(bytearray())) == OK
    assert path.read_bytes() == content


def test_an_overlay_shares_its_file_with_readers(cleanup: Cleanup, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    attach_block(BlockFile(str(path), overlay=True), cleanup)
    attach_block(BlockFile(str(path), overlay=True), cleanup)
    attach_block(BlockFile(str(path), readonly=True), cleanup)
    with pytest.raises(DeviceError, match="locked by"):
        attach_block(BlockFile(str(path)), cleanup)


def test_a_file_that_becomes_shorter_under_an_overlay(
    cleanup: Cleanup, tmp_path: Path, told: Told
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    device = attach_block(BlockFile(str(path), overlay=True), cleanup, told)
    assert device.write(0, memoryview(bytes(512))) == OK
    os.truncate(path, 512)
    assert device.read(4096, memoryview(bytearray(512))) == EUNSPEC
    assert device.write(4096, memoryview(bytes(512))) == EUNSPEC  # the rest of the page is lost
    assert device.write(4096, memoryview(bytes(4096))) == OK
    assert device.read(0, memoryview(bytearray(8192))) == OK
    assert [what for _, what in told] == [
        "block device 'storage': the file became shorter; the guest goes on"
    ]


# Block devices in Python.


class Disk:
    """Remembers; `wrong` is what its next read gives or raises."""

    sector_size = 1024

    def __init__(self, size: int = 1 << 18) -> None:
        self.content = bytearray(size)
        self.calls: list[tuple[int, int]] = []
        self.wrong: Any = None

    @property
    def capacity(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> Any:
        self.calls.append((offset, length))
        wrong, self.wrong = self.wrong, None
        if isinstance(wrong, BaseException):
            raise wrong
        return self.content[offset : offset + length] if wrong is None else wrong

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data


def test_a_disk_in_python(cleanup: Cleanup, told: Told) -> None:
    disk = Disk()
    devices = opened({}, {"storage": disk}, None, told)
    cleanup.callback(devices.close)
    ((_, spec),) = devices.block
    assert isinstance(spec, BlockRemote)
    device = attach_block(spec, cleanup)
    assert (device.capacity, device.sector_size, device.readonly) == (1 << 18, 1024, False)
    data = os.urandom(100_000)
    assert device.write(1000, memoryview(data)) == OK
    back = bytearray(200_000)
    assert device.read(0, memoryview(back)) == OK
    assert back == disk.content[:200_000]
    assert back[1000:101_000] == data
    assert max(length for _, length in disk.calls) == 1 << 16
    assert not told


WRONG = [ZeroDivisionError(), OSError(28, "full"), b"short", 5, "text", SystemExit()]
WRONG += [OSError(-5, "minus"), OSError("a", "b"), OSError(1 << 40, "far"), OSError(0, "none")]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_exception_is_a_result_code_and_reported(
    cleanup: Cleanup, told: Told, wrong: Any
) -> None:
    disk = Disk()
    devices = opened({}, {"storage": disk}, None, told)
    cleanup.callback(devices.close)
    device = attach_block(devices.block[0][1], cleanup, told)
    disk.wrong = wrong
    assert device.read(0, memoryview(bytearray(512))) == EUNSPEC
    assert device.read(0, memoryview(bytearray(512))) == OK
    ((where, error),) = told
    assert where == "block device 'storage'"
    assert isinstance(error, type(wrong) if isinstance(wrong, BaseException) else Exception)


def test_each_kind_of_trouble_is_told_once(cleanup: Cleanup, told: Told) -> None:
    disk, other = Disk(), Disk()
    devices = opened({}, {"storage": disk, "other": other}, None, told)
    cleanup.callback(devices.close)
    device, second = (attach_block(spec, cleanup, told) for _, spec in devices.block)
    for number in [*range(100), 0, 1]:
        disk.wrong = ValueError(f"of kind {number // 2}")
        assert device.read(0, memoryview(bytearray(512))) == EUNSPEC
    texts = [f"of kind {number}" for number in range(20)]
    assert [str(what) for _, what in told] == [
        *texts,
        "more than 20 different problems: no more are reported",
    ]
    other.wrong = ValueError("of kind 0")
    assert second.read(0, memoryview(bytearray(512))) == EUNSPEC
    assert told[-1][0] == "block device 'other'"


def test_receive_that_always_raises_is_told_once(told: Told) -> None:
    asked = threading.Semaphore(0)

    class Broken:
        def receive(self) -> bytes:
            asked.release()
            raise ValueError("broken")

    devices = opened({"service": Broken()}, {}, None, told)
    for _ in range(3):
        assert asked.acquire(timeout=PATIENCE_S)
    devices.close()
    assert [str(what) for _, what in told] == ["broken"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_is_told_may_raise(cleanup: Cleanup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices are served all the same, and what was raised is shown."""
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))

    def warn(_device: str, _what: object) -> None:
        raise KeyError

    disk = Disk()
    devices = opened({"service": Wire()}, {"storage": disk}, None, warn)
    cleanup.callback(devices.close)
    ((_, spec),) = devices.net
    assert isinstance(spec, Descriptor)
    device = attach_block(devices.block[0][1], cleanup)
    disk.wrong = ZeroDivisionError()
    assert device.read(0, memoryview(bytearray(512))) == EUNSPEC
    assert device.read(0, memoryview(bytearray(512))) == OK
    with socket.socket(fileno=os.dup(spec.fd)) as guest:
        guest.settimeout(PATIENCE_S)
        guest.send(b"\xff" + FRAME)
        guest.send(FRAME)
        assert guest.recv(2000) == FRAME
    assert shown == [KeyError, KeyError]


def test_a_disk_without_write_is_read_only(cleanup: Cleanup, told: Told) -> None:
    class Zeros:
        def __len__(self) -> int:
            return 4096

        def read(self, _offset: int, length: int) -> bytes:
            return bytes(length)

    devices = opened({}, {"storage": Zeros()}, None, told)
    cleanup.callback(devices.close)
    device = attach_block(devices.block[0][1], cleanup)
    assert device.readonly
    assert device.write(0, memoryview(bytes(512))) == EUNSPEC


def test_requests_that_no_tender_makes(told: Told) -> None:
    """The guest may have taken over its tender: it gets nothing but its own disk."""
    disk = Disk()
    devices = opened({}, {"storage": disk}, None, told)
    (spec,) = (spec for _, spec in devices.block)
    assert isinstance(spec, BlockRemote)
    with socket.socket(fileno=os.dup(spec.fd)) as end:
        end.settimeout(PATIENCE_S)
        for request in [
            b"x",
            HEADER.pack(READ, 512, (1 << 18) - 511),
            HEADER.pack(READ, 512, (1 << 64) - 1),
            HEADER.pack(READ, (1 << 16) + 1, 0),
            HEADER.pack(READ, 512, 0) + b"more",
            HEADER.pack(WRITE, 512, 0) + bytes(511),
            HEADER.pack(WRITE, 0xFFFFFFFF, 0),
            HEADER.pack(77, 512, 0),
            os.urandom(70_000),
        ]:
            end.send(request)
            assert STATUS.unpack(end.recv(1 << 17))[0]
    assert not disk.calls
    assert len(told) == 9
    devices.close()


class Peer:
    """What answers a RemoteBlock wrongly."""

    def __init__(self, cleanup: Cleanup, told: Told) -> None:
        self.end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.detach()
        cleanup.callback(lambda: os.close(fd))
        cleanup.callback(self.end.close)
        self.device = attach_block(BlockRemote(fd, 4096), cleanup, told)

    def read(self) -> int:
        return self.device.read(0, memoryview(bytearray(512)))


@pytest.mark.parametrize("reply", [b"x", STATUS.pack(0), STATUS.pack(0) + bytes(511)])
def test_replies_that_no_program_makes(cleanup: Cleanup, told: Told, reply: bytes) -> None:
    peer = Peer(cleanup, told)
    peer.end.send(reply)
    assert [peer.read(), peer.read()] == [EUNSPEC, EUNSPEC]
    ((_, text),) = told
    assert "the peer gave" in text


def test_a_program_that_is_gone(cleanup: Cleanup, told: Told) -> None:
    peer = Peer(cleanup, told)
    peer.end.close()
    assert [peer.read(), peer.read()] == [EUNSPEC, EUNSPEC]
    assert len(told) == 1
    peer = Peer(cleanup, told)
    threading.Timer(0.05, peer.end.close).start()
    assert peer.read() == EUNSPEC


def test_a_remote_disk_wants_a_seqpacket_socket(cleanup: Cleanup) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(DeviceError, match="not a seqpacket socket"):
        attach_block(BlockRemote(theirs.fileno(), 4096), cleanup)
    with open("/dev/null") as file, pytest.raises(DeviceError, match="not a seqpacket socket"):
        attach_block(BlockRemote(file.fileno(), 4096), cleanup)


# Network devices in Python.


class Wire:
    """Gives back what it is sent, doubled, and what is put into `waiting`."""

    mtu = 9000
    mac = bytes.fromhex("020000000001")

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.waiting: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()
        self.closed = 0

    def send(self, frame: bytes) -> list[bytes]:
        self.sent.append(frame)
        if frame[0] == 0xFF:
            raise ZeroDivisionError
        return [frame, frame]

    def receive(self) -> bytes | None:
        frame = self.waiting.get()
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        self.closed += 1
        self.waiting.put(None)


@pytest.mark.parametrize("length", [0, 1, 13, 9019, 131_072])
def test_what_is_no_frame_reaches_no_device_and_ends_nothing(told: Told, length: int) -> None:
    """As a guest that has taken over its process can send it."""
    wire = Wire()
    devices = opened({"service": wire}, {}, None, told)
    ((_, spec),) = devices.net
    assert isinstance(spec, Descriptor)
    with socket.socket(fileno=os.dup(spec.fd)) as guest:
        guest.settimeout(PATIENCE_S)
        guest.send(bytes(length))
        guest.send(bytes(length))
        guest.send(FRAME)
        assert guest.recv(2000) == FRAME
    devices.close()
    assert wire.sent == [FRAME]
    ((device, error),) = told
    bound = "less than 14" if length < 14 else "more than 9018"
    assert device == "network device 'service'"
    assert str(error).startswith(f"the guest sent a frame of {bound} bytes")


def test_an_empty_request_ends_no_block_device(told: Told) -> None:
    devices = opened({}, {"storage": Disk()}, None, told)
    ((_, spec),) = devices.block
    assert isinstance(spec, BlockRemote)
    with socket.socket(fileno=os.dup(spec.fd)) as guest:
        guest.settimeout(PATIENCE_S)
        guest.send(b"")
        assert guest.recv(100) == STATUS.pack(errno.EIO)
        guest.send(HEADER.pack(READ, 512, 0))
        assert len(guest.recv(1000)) == STATUS.size + 512
    devices.close()
    ((_, error),) = told
    assert "malformed request: no header" in str(error)


def test_a_network_device_in_python(told: Told) -> None:
    wire = Wire()
    devices = opened({"service": wire}, {}, None, told)
    ((_, spec),) = devices.net
    assert isinstance(spec, Descriptor)
    assert (spec.mtu, spec.mac) == (9000, Wire.mac)
    with socket.socket(fileno=os.dup(spec.fd)) as guest:
        guest.settimeout(PATIENCE_S)
        guest.send(FRAME)
        assert [guest.recv(2000), guest.recv(2000)] == [FRAME, FRAME]
        wire.waiting.put(FRAME + b"by itself")
        assert guest.recv(2000) == FRAME + b"by itself"
        wire.waiting.put(ValueError("once"))
        wire.waiting.put(FRAME + b"again")
        assert guest.recv(2000) == FRAME + b"again"
        guest.send(b"\xff" + FRAME)
        guest.send(FRAME + b"last words")
        devices.close()
    assert wire.sent == [FRAME, b"\xff" + FRAME, FRAME + b"last words"]
    assert wire.closed == 1
    assert [(where, type(what)) for where, what in told] == [
        ("network device 'service'", ValueError),
        ("network device 'service'", ZeroDivisionError),
    ]


def test_one_half_of_a_device_is_enough(told: Told) -> None:
    class Source:
        frames = iter([FRAME, FRAME[::-1], None])

        def receive(self) -> bytes | None:
            return next(self.frames)

    class Drain:
        def __init__(self) -> None:
            self.frames: list[bytes] = []

        def send(self, frame: bytes) -> None:
            self.frames.append(frame)

    drain = Drain()
    devices = opened({"a": Source(), "b": drain}, {}, None, told)
    (_, source), (_, other) = devices.net
    assert isinstance(source, Descriptor)
    assert isinstance(other, Descriptor)
    with socket.socket(fileno=os.dup(source.fd)) as end:
        end.settimeout(PATIENCE_S)
        assert [end.recv(100), end.recv(100)] == [FRAME, FRAME[::-1]]
        end.send(b"nobody takes it")
    os.write(other.fd, FRAME)
    devices.close()
    assert drain.frames == [FRAME]
    assert not told


def test_frames_that_no_wire_carries(told: Told) -> None:
    """They are dropped, and told once per kind: the guest would get what is too long cut."""

    class Source:
        frames = iter([bytes(13), bytes(1519), bytes(70000), bytes(1518), None])

        def receive(self) -> bytes | None:
            return next(self.frames)

    class Async:
        async def send(self, frame: bytes) -> bytes:
            return frame

    devices = opened({"a": Source(), "b": Async()}, {}, None, told)
    (_, source), (_, other) = devices.net
    assert isinstance(source, Descriptor)
    assert isinstance(other, Descriptor)
    with socket.socket(fileno=os.dup(source.fd)) as end:
        end.settimeout(PATIENCE_S)
        assert end.recv(100000) == bytes(1518)
    os.write(other.fd, FRAME)
    devices.close()
    assert sorted(str(what) for _, what in told) == [
        "a frame of less than 14 bytes: dropped",
        "a frame of more than 1518 bytes (the MTU and a header): dropped",
        "send() is async: make it a plain function",
    ]


def test_the_locks_of_descriptors(cleanup: Cleanup, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file, open(path, "r+b") as other:
        attach_block(BlockDescriptor(file.fileno()), cleanup)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_the_lock_of_the_programs_file_ends_with_its_guest(
    cleanup: Cleanup, told: Told, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file, open(path, "r+b") as other:

        def is_locked() -> bool:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(other, fcntl.LOCK_UN)
            return False

        def start(spec: Any) -> Devices:
            devices = opened({}, {"storage": spec}, None, told)
            attach_block(devices.block[0][1], cleanup)
            assert is_locked()
            return devices

        disk = BlockDescriptor(file.fileno())
        for spec in (disk, Attachable(BlockDescriptor(os.dup(file.fileno())))):
            devices = start(spec)
            devices.close()
            assert not is_locked()
            devices.close()
        first, second = start(disk), start(disk)
        first.close()
        assert is_locked()  # the other one's
        second.close()
        assert not is_locked()
        fcntl.flock(file, fcntl.LOCK_EX)
        start(disk).close()
        assert is_locked()  # the program's own


@pytest.mark.parametrize("error", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_holds(
    cleanup: Cleanup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """SMB answers EACCES."""

    def flock(_fd: int, _operation: int) -> None:
        raise OSError(error, os.strerror(error))

    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DeviceError, match=r"disk\.img: locked by another process"):
        attach_block(BlockFile(str(path)), cleanup)
