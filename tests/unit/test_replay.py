"""A record of hypercalls, written and replayed over real devices; and records that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender._native import lib
from tender.clock import VirtualClock
from tender.config import Config, VirtualTime
from tender.cpu.vcpu import IoOut
from tender.errors import ConfigError, GuestFault, ImageError
from tender.image.elf import EM_X86_64
from tender.image.file import ImageFile
from tender.outcome import Outcome
from tender.replay import record
from tender.replay.file import Record, ReplayError
from tender.replay.replay import Replay
from tests.unit import elves
from tests.unit.rig import ARGS, CAPACITY, DATA, DISK, NUMBERS, PORT, TEXT, Rig

FRAME = bytes(range(60))
IMAGE = elves.image()
Call = Callable[[Any], None]


class Recording:
    """A rig whose hypercalls go through `dispatch`, which records or replays them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.rig = Rig(folder, "python")
        self.clock = VirtualClock(VirtualTime(1_000_000_000, 10))
        self.dispatch: Callable[[IoOut], object]

    def call(self, name: str, at: int = ARGS, **fields: int) -> bytes:
        self.rig.put(name, at=at, **fields)
        self.dispatch(IoOut(lib.HVT_HYPERCALL_PIO_BASE + NUMBERS[name], 4, at))
        return bytes(self.rig.memory.view)


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Recording, record.Recorder]]:
    recording = Recording(tmp_path / "recorded")
    rig = recording.rig
    image = tmp_path / "guest.hvt"
    image.write_bytes(IMAGE)
    fd = os.open(tmp_path / "rec", os.O_WRONLY | os.O_CREAT)
    file = ImageFile(str(image))
    config = Config(str(image), ("one", "two"), mem_bytes=rig.memory.size)
    record.begin(fd, config, recording.clock, b"manifest", file)
    file.close()
    recorder = record.Recorder(
        fd, rig.memory, rig.modules, EM_X86_64, recording.clock, rig.stop, rig.warnings.append
    )
    recording.dispatch = recorder.dispatch
    yield recording, recorder
    os.close(fd)
    rig.close()


@pytest.fixture
def replaying(tmp_path: Path) -> Iterator[Callable[[], tuple[Recording, Replay]]]:
    closing: list[Callable[[], None]] = []

    def open_replay() -> tuple[Recording, Replay]:
        recording = Recording(tmp_path / f"replayed{len(closing)}")
        rig = recording.rig
        file = Record(str(tmp_path / "rec"))
        replay = Replay(file.fd, rig.memory, rig.modules, EM_X86_64, recording.clock, rig.stop)
        recording.dispatch = replay.dispatch
        closing.extend((file.close, rig.close))
        return recording, replay

    yield open_replay
    for each in closing:
        each()


def run(recording: Recording, wire: bool) -> list[bytes]:
    """One of everything; the guest's memory after each."""
    call, rig = recording.call, recording.rig
    rig.memory.view[DATA : DATA + 60] = FRAME
    seen = [call("WALLTIME")]
    seen.append(call("PUTS", data_gpa=DATA, len=60))
    seen.append(call("BLOCK_WRITE", handle=DISK, offset=512, data_gpa=DATA, len=512))
    seen.append(call("BLOCK_READ", handle=DISK, offset=512, data_gpa=DATA + 4096, len=512))
    seen.append(call("BLOCK_READ", handle=DISK, offset=CAPACITY, data_gpa=DATA, len=512))
    seen.append(call("NET_READ", handle=PORT, data_gpa=DATA, len=1514))
    if wire:
        rig.wire.send(FRAME[::-1])
    seen.append(call("POLL", timeout_nsecs=10**12))
    seen.append(call("NET_READ", handle=PORT, data_gpa=DATA, len=1514))
    seen.append(call("NET_WRITE", handle=PORT, data_gpa=DATA, len=60))
    seen.append(call("NET_WRITE", handle=9, data_gpa=DATA, len=60))
    # The block of the reply lies in the data.
    seen.append(call("BLOCK_READ", handle=DISK, offset=0, data_gpa=ARGS - 8, len=512))
    seen.append(call("WALLTIME"))
    return seen


def test_a_replay_gives_what_was_recorded(
    recorded: tuple[Recording, record.Recorder], replaying: Any
) -> None:
    recording, recorder = recorded
    first = run(recording, wire=True)
    with pytest.raises(GuestFault) as fault:
        recording.call("PUTS", data_gpa=1 << 40, len=1)
    outcome = Outcome("fault", 1, error=fault.value)
    recorder.end(outcome)
    assert os.read(recording.rig.output, 100) == FRAME

    again, replay = replaying()
    assert run(again, wire=False) == first
    with pytest.raises(GuestFault) as same:
        again.call("PUTS", data_gpa=1 << 40, len=1)
    assert (str(same.value), same.value.hypercall) == (str(fault.value), fault.value.hypercall)
    assert os.read(again.rig.output, 100) == FRAME
    assert again.clock.cell.now_ns == recording.clock.cell.now_ns
    assert replay.end(Outcome("fault", 1, error=same.value)).error is same.value


def test_a_fault_of_the_block_itself(
    recorded: tuple[Recording, record.Recorder], replaying: Any
) -> None:
    for recording in (recorded[0], replaying()[0]):
        exit = IoOut(lib.HVT_HYPERCALL_PIO_BASE + NUMBERS["WALLTIME"], 4, TEXT)
        with pytest.raises(GuestFault, match="Invalid guest access: protected gpa=0x100000"):
            recording.dispatch(exit)


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("POLL", {"timeout_nsecs": 1},
         r"hypercall 2: POLL at 0x200000, timeout_nsecs=0x1; recorded: NET_WRITE at 0x200000, "
         r"handle=0x3 data_gpa=0x201000 len=0x3c"),
        ("NET_WRITE", {"handle": PORT, "data_gpa": DATA, "len": 61},
         r"len=0x3d; recorded: NET_WRITE at 0x200000, .* len=0x3c"),
        ("NET_WRITE", {"handle": PORT, "data_gpa": DATA, "len": 60},
         r"what it passes out is not what was recorded"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(
    recorded: tuple[Recording, record.Recorder],
    replaying: Any,
    name: str,
    fields: dict[str, int],
    text: str,
) -> None:
    recording, recorder = recorded
    recording.rig.memory.view[DATA : DATA + 60] = FRAME
    recording.call("WALLTIME")
    recording.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=60)
    recorder.end(Outcome("stopped", 1, signo=15))
    again, _ = replaying()
    again.call("WALLTIME")
    with pytest.raises(ReplayError, match=text):
        again.call(name, **fields)


def test_the_end_of_a_record(recorded: tuple[Recording, record.Recorder], replaying: Any) -> None:
    recording, recorder = recorded
    recording.call("WALLTIME")
    again, replay = replaying()
    again.call("WALLTIME")
    with pytest.raises(ReplayError, match=r"the record ends before hypercall 2, WALLTIME$"):
        again.call("WALLTIME")
    outcome = Outcome("halted", 0)
    assert "went on, or was cut off" in str(replay.end(outcome).error)

    recorder.end(Outcome("stopped", 1, signo=15))
    again, replay = replaying()
    again.call("WALLTIME")
    with pytest.raises(ReplayError, match=r"before hypercall 2, WALLTIME: stopped, status 1$"):
        again.call("WALLTIME")
    again, replay = replaying()
    again.call("WALLTIME")
    assert "recorded run ended so: stopped, status 1" in str(replay.end(outcome).error)


def test_what_a_run_was_started_with(
    recorded: tuple[Recording, record.Recorder], tmp_path: Path
) -> None:
    file = Record(str(tmp_path / "rec"))
    header = file.header
    assert (header.args, header.manifest, header.tick_ns) == (("one", "two"), b"manifest", 10)
    assert os.pread(file.image, 1 << 20, 0) == IMAGE
    config = file.config(Config("x", name="y"))
    assert (config.kernel, config.name) == (str(tmp_path / "guest.hvt"), "y")
    os.close(config.kernel_fd or -1)
    file.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_record_is_not_trusted(
    recorded: tuple[Recording, record.Recorder], tmp_path: Path, data: st.DataObject
) -> None:
    """Cut off or changed anywhere: one error, or a replay that ends with one."""
    whole = (tmp_path / "rec").read_bytes()
    if not data.draw(st.booleans()):
        text = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - len(IMAGE) - 1))
        text = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    path = tmp_path / "changed"
    path.write_bytes(text)
    try:
        Record(str(path)).close()
    except ConfigError as error:
        assert "not a record that can be replayed: " in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["self", "x" * 100_000, "\x1b[2J\nptender: all is well"])
def test_the_names_of_a_header_are_not_shown(
    recorded: tuple[Recording, record.Recorder], tmp_path: Path, name: str
) -> None:
    whole, path = (tmp_path / "rec").read_bytes(), tmp_path / "changed"
    size = int.from_bytes(whole[16:20], "little")
    text = json.dumps({**json.loads(whole[28 : 28 + size]), name: 1}).encode()
    path.write_bytes(whole[:16] + len(text).to_bytes(4, "little") + whole[20:28] + text)
    with pytest.raises(ConfigError, match="replayed: its header: not the fields of one$"):
        Record(str(path))


def test_a_record_that_cannot_be_read(
    recorded: tuple[Recording, record.Recorder], replaying: Any, tmp_path: Path
) -> None:
    recording, _ = recorded
    recording.call("WALLTIME")
    again, replay = replaying()
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, replay._fd)
    os.close(folder)
    with pytest.raises(ReplayError, match="^cannot read the record: Is a directory$"):
        again.call("WALLTIME")
    outcome = replay.end(Outcome("halted", 0))
    assert (outcome.reason, outcome.status) == ("host", 1)
    assert str(outcome.error) == "cannot read the record: Is a directory"


def test_the_holes_of_a_record_take_no_memory(
    recorded: tuple[Recording, record.Recorder], tmp_path: Path
) -> None:
    """A small file can say that its image is large."""
    whole = (tmp_path / "rec").read_bytes()
    size, path = 1 << 30, tmp_path / "holes"
    head = whole[: whole.index(IMAGE) + len(IMAGE)].replace(
        len(IMAGE).to_bytes(8, "little"), size.to_bytes(8, "little"), 1
    )
    path.write_bytes(head)
    os.truncate(path, len(head) - len(IMAGE) + size)
    file = Record(str(path))
    info = os.fstat(file.image)
    assert info.st_size == size
    assert info.st_blocks * 512 < 1 << 20
    assert os.pread(file.image, len(IMAGE), 0) == IMAGE
    assert os.read(file.fd, 1) == b""
    file.close()
    os.truncate(path, len(head) - len(IMAGE) + size - 1)
    with pytest.raises(ConfigError, match="ends too early"):
        Record(str(path))


def test_a_record_that_can_not_be_read() -> None:
    with pytest.raises(ImageError, match="/proc/self/mem: Input/output error"):
        Record("/proc/self/mem")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=st.binary(min_size=0, max_size=200))
def test_an_event_is_not_trusted(
    recorded: tuple[Recording, record.Recorder], replaying: Any, tmp_path: Path, event: bytes
) -> None:
    again, _ = replaying()
    head, tail = os.pipe()
    os.write(tail, bytes([NUMBERS["NET_READ"]]) + event)
    os.close(tail)
    rig = again.rig
    replay = Replay(head, rig.memory, rig.modules, EM_X86_64, again.clock, rig.stop)
    again.dispatch = replay.dispatch
    with pytest.raises((ReplayError, GuestFault)):
        again.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514)
    os.close(head)
