"""Real guests on what a program attaches to them."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tender import (
    BlockDescriptor,
    BlockFile,
    BlockMemory,
    Descriptor,
    Guest,
    GuestEnded,
    Outcome,
    Rate,
)
from tender.errors import ConfigError, DeviceError
from tests.guest.conftest import Build, Run
from tests.waiting import PATIENCE_S, wait_until, wait_until_asleep

pytestmark = pytest.mark.usefixtures("cpu")

HOST_MAC = bytes.fromhex("020000000001")
ARP_REQUEST = (
    b"\xff" * 6 + HOST_MAC + bytes.fromhex("08060001080006040001") + HOST_MAC
    + bytes([10, 0, 0, 1]) + bytes(6) + bytes([10, 0, 0, 2])
)  # fmt: skip
GUEST_IP, HOST_IP = bytes([10, 0, 0, 2]), bytes([10, 0, 0, 1])


def made(kernel: Path, *args: str, **options: Any) -> Guest:
    return Guest(kernel, *args, mem_mib=8, **options)


def start(kernel: Path, *args: str, **options: Any) -> Guest:
    return made(kernel, *args, **options).start()


def run(kernel: Path, *args: str, **options: Any) -> tuple[Outcome, str]:
    with made(kernel, *args, **options) as running:
        return running.wait(PATIENCE_S), running.console.text


# The console.


def test_the_console_is_kept_and_not_printed(
    guest: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome, text = run(guest("hello"), "a", "few", "words")
    assert outcome.status == 0
    assert "a few words" in text
    assert text.endswith("solo5_exit(0) called\n")
    assert "a few words" not in "".join(capfd.readouterr())


def test_a_program_waits_for_words(guest: Build) -> None:
    with made(guest("sleep"), "300") as running:
        assert running.console.wait_for(r"^Solo5: solo5_exit\((\d+)\)", PATIENCE_S).group(1) == "0"
    with made(guest("loop")) as running:
        with pytest.raises(TimeoutError, match=r"'never' within 0.1 s"):
            running.console.wait_for("never", timeout=0.1)
        threading.Timer(0.2, running.stop).start()
        with pytest.raises(GuestEnded, match=r"before its end \(.*stopped"):
            running.console.wait_for("never", PATIENCE_S)
    ended = pytest.raises(GuestEnded, match=r"never' before its end \(.*\n  Solo5: .*")
    with ended, made(guest("exit"), "3") as running:
        running.console.wait_for("never", PATIENCE_S)


def test_the_console_goes_where_it_is_sent(guest: Build, tmp_path: Path) -> None:
    pieces: list[bytes] = []
    text = io.StringIO()
    with open(tmp_path / "log", "wb") as file:
        said = [run(guest("hello"), console=sink)[1] for sink in (pieces.append, text, file)]
    assert said == [b"".join(pieces).decode(), text.getvalue(), (tmp_path / "log").read_text()]
    assert "Hello" in said[0]


def test_a_slow_consumer_slows_the_guest_and_loses_nothing(guest: Build) -> None:
    may_go = threading.Event()
    got = []

    def slow(piece: bytes) -> None:
        may_go.wait(PATIENCE_S)
        got.append(piece)

    running = start(guest("flood"), console=slow)
    assert running.pid
    wait_until_asleep(running.pid)
    blocked = sum(map(len, got)) + len(running.console.data)
    may_go.set()
    outcome = running.stop()
    assert blocked < 1 << 20
    lines = b"".join(got).split(b"flood ")[1:-1]
    assert [int(line) for line in lines] == list(range(len(lines)))
    assert sum(map(len, got)) == running.console.lost + len(running.console.data)
    assert outcome.reason == "stopped"


def test_a_consumer_can_not_wait_for_its_guest(guest: Build) -> None:
    told: list[str] = []

    def stop(_: bytes) -> None:
        running.stop()

    running = made(guest("flood"), console=stop, warn=told.append)
    running.start()
    running.console.wait_for("flood 100", PATIENCE_S)
    assert running.stop().reason == "stopped"
    assert told[0].startswith("console: RuntimeError: ")


# Disks.


def test_a_disk_in_memory_is_seen_by_the_program(guest: Build) -> None:
    disk = BlockMemory(1 << 20)
    for times, note in ((1, "water"), (2, "the plants")):
        outcome, text = run(guest("disk"), note, block={"storage": disk})
        assert outcome.status == 0
        assert f"Started {times} time" in text
        assert note.encode() in disk.read(0, 512)
    disk.write(0, bytes(512))
    _, text = run(guest("disk"), block={"storage": disk})
    assert "Started 1 time now" in text
    outcome, text = run(guest("block"), block={"storage": BlockMemory(bytes(1 << 16))})
    assert (outcome.status, "SUCCESS" in text) == (0, True)
    sectors = BlockMemory(1 << 16, sector_size=4096, readonly=True)
    outcome, text = run(guest("readonlyblock"), block={"ro": sectors})
    assert "SUCCESS" in text, text


def test_memory_has_one_guest_at_a_time(guest: Build) -> None:
    disk = BlockMemory(1 << 16)
    with made(guest("hold"), block={"storage": disk}) as first:
        first.console.wait_for("held", PATIENCE_S)
        with pytest.raises(DeviceError, match="'storage': .*attached to another guest"):
            start(guest("block"), block={"storage": disk}).wait(PATIENCE_S)
    assert run(guest("block"), block={"storage": disk})[0].status == 0


def test_a_file_is_free_again_when_its_guest_has_ended(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    with open(image, "r+b") as file:
        for storage in (BlockDescriptor(file.fileno()), image, BlockDescriptor(file.fileno())):
            assert run(guest("disk"), block={"storage": storage})[0].status == 0


def test_an_overlay_leaves_the_image_as_it_was(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    image.chmod(0o444)
    overlay = BlockFile(str(image), overlay=True)
    for _ in range(2):
        assert "Started 1 time now" in run(guest("disk"), block={"storage": overlay})[1]
        assert "SUCCESS" in run(guest("block"), block={"storage": overlay})[1]
    assert image.read_bytes() == bytes(1 << 16)


def test_an_overlay_in_a_file_outlives_its_guest(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    image, overlay = tmp_path / "disk.img", tmp_path / "overlay"
    image.write_bytes(bytes(1 << 16))
    spec = BlockFile(image, overlay=overlay, sync="fsync")
    assert "Started 1 time now" in run(guest("disk"), block={"storage": spec})[1]
    for option in ("", ",sync=always"):
        done = ptender("--mem=8", f"--block={image},overlay={overlay}{option}", guest("disk"))
        assert done.returncode == 0, done
    assert "Started 4 times now" in run(guest("disk"), block={"storage": spec})[1]
    assert "SUCCESS" in run(guest("block"), block={"storage": spec})[1]
    assert image.read_bytes() == bytes(1 << 16)
    image.write_bytes(bytes(1 << 16))
    with pytest.raises(DeviceError, match="the image has been modified since it was made"):
        run(guest("disk"), block={"storage": spec})


@pytest.mark.parametrize("engine", ["c", "python"])
def test_an_overlay_and_a_descriptor_on_the_command_line(
    ptender: Run, guest: Build, tmp_path: Path, engine: str
) -> None:
    image = tmp_path / "a,disk.img"
    image.write_bytes(bytes(1 << 16))
    words = ["--engine", engine, "--mem=8", "--block"]
    done = ptender(*words, f"storage={image},overlay", guest("block"))
    assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done
    assert image.read_bytes() == bytes(1 << 16)
    with open(image, "r+b") as file:
        fd = file.fileno()
        done = ptender(*words, f"@{fd}", guest("block"), pass_fds=[fd])
        assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done
        assert image.read_bytes() != bytes(1 << 16)
        done = ptender(*words, f"ro=@{fd},ro", guest("readonlyblock"), pass_fds=[fd])
        assert "SUCCESS" in done.stdout, done


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_limited_disk_is_slower_and_works(
    ptender: Run, guest: Build, tmp_path: Path, engine: str
) -> None:
    image, report = tmp_path / "disk.img", tmp_path / "report"
    image.write_bytes(bytes(1 << 16))
    begun = time.monotonic()
    done = ptender(
        f"--engine={engine}", "--mem=8", f"--block={image}", f"--report={report}",
        "--block-rate=storage=4ops,burst=1ops", guest("disk"),
    )  # fmt: skip
    assert (done.returncode, "Started 1 time now" in done.stdout) == (0, True), done
    counters = json.loads(report.read_text())["statistics"]["block"]["storage"]
    assert time.monotonic() - begun >= 0.5, "two of the three operations have waited"
    delays = counters.pop("delays")
    assert delays in (0, 1, 2), "a slow machine may do so few by itself"
    assert counters == {"calls": 3, "bytes": 1536, "errors": 0, "drops": 0}
    rate = {"storage": Rate(ops=100, burst_ops=1)}
    outcome, _ = run(guest("disk"), block={"storage": BlockFile(image)}, block_rate=rate)
    assert outcome.stats.block["storage"].bytes == 1536
    with pytest.raises(DeviceError, match="^block_rate: Resource not declared in manifest"):
        run(guest("disk"), block={"storage": BlockFile(image)}, block_rate={"other": Rate(ops=1)})
    done = ptender("--mem=8", f"--block={image}", "--net-rate=1M", guest("disk"))
    assert done.stderr == ("ptender: --net-rate: the guest's manifest declares no network device\n")


def test_a_network_in_slow_motion(guest: Build) -> None:
    """Each answer takes what the limits allow: none is lost, and each has waited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    rate = {"service": Rate(ops=100, burst_ops=1)}
    with ours, theirs:
        net = {"service": Descriptor(theirs.fileno())}
        with made(guest("ping"), net=net, net_rate=rate) as running:
            assert ours.recv(2000)[12:14] == b"\x08\x06", "it announces itself"
            begun = time.monotonic()
            for _ in range(5):
                ours.send(ARP_REQUEST)
            assert [ours.recv(2000)[20:22] for _ in range(5)] == [b"\0\2"] * 5
            assert time.monotonic() - begun >= 0.04
            stats = running.stop().stats.net["service"]
    assert (stats.received.drops, stats.sent.drops) == (0, 0)


@pytest.mark.parametrize("engine", ["c", "python"])
def test_an_overlay_has_a_limit(ptender: Run, guest: Build, tmp_path: Path, engine: str) -> None:
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(2 << 30)  # sparse
    done = ptender(f"--engine={engine}", "--mem=8", f"--block={image},overlay=1M", guest("fill"))
    assert (done.returncode, "256 pages\nSUCCESS" in done.stdout) == (0, True), done
    text = (
        "ptender: block device 'storage': its overlay of 1048576 bytes is full; the guest goes on"
    )
    assert text in done.stderr, done
    if engine == "c":
        assert (
            "256 pages\nSUCCESS"
            in run(
                guest("fill"),
                block={"storage": BlockFile(image, overlay=1 << 20)},
                warn=lambda _: None,
            )[1]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block", "x,ro,overlay"], "a read-only disk needs no overlay"),
        (["--block", "@9,overlay"], "'overlay' is not one of ro, sector-size=N, sync="),
        (["--block", "@99"], "@99: Could not open block device: no such descriptor"),
        (["--block", "storage=@1", "--block", "storage=@1"], "@1: .* it is given twice"),
        (["--block", "@1"], "block device 'storage': "),
        (["--block", "/nonexistent,overlay"], "Could not open block device.*No such file"),
    ],
)
def test_wrong_disks(ptender: Run, guest: Build, words: list[str], message: str) -> None:
    import re

    done = ptender(*words, guest("block"))
    assert done.returncode in (1, 2)
    assert re.fullmatch(f"ptender: .*{message}.*\n", done.stderr), done


class Disk:
    """A disk in Python, whose calls from the `fails_from`th on fail."""

    def __init__(self, fails_from: int = 1 << 30, error: type[Exception] = ZeroDivisionError):
        self.content = bytearray(8192)
        self.capacity = len(self.content)
        self.left, self.error = fails_from, error
        self.threads: set[int] = set()

    def read(self, offset: int, length: int) -> bytes:
        self._count()
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._count()
        self.content[offset : offset + len(data)] = data

    def _count(self) -> None:
        self.threads.add(threading.get_ident())
        self.left -= 1
        if self.left < 0:
            raise self.error


def test_a_disk_in_python(guest: Build) -> None:
    disk = Disk()
    outcome, text = run(guest("block"), block={"storage": disk})
    assert (outcome.status, "SUCCESS" in text) == (0, True)
    assert disk.content.count(0) < 6000
    assert outcome.stats.block["storage"].bytes == 16384
    assert threading.get_ident() not in disk.threads


def without_lines(told: list[str]) -> list[str]:
    return [re.sub(r":[0-9]+\)$", ")", text) for text in told]


def test_an_exception_is_an_error_for_the_guest_and_is_reported(guest: Build) -> None:
    told: list[str] = []
    disk = Disk(fails_from=1)
    outcome, text = run(guest("disk"), block={"storage": disk}, warn=told.append)
    assert "the first block can't be written" in text
    assert outcome.reason == "halted"
    assert without_lines(told) == [f"block device 'storage': ZeroDivisionError ({__file__})"]
    assert outcome.stats.block["storage"].errors == 1
    told.clear()
    _, text = run(guest("disk"), block={"storage": Disk(0, OSError)}, warn=told.append)
    assert "the first block can't be read" in text
    assert told == ["block device 'storage': OSError"]


def test_a_guest_whose_disk_does_not_answer_can_be_stopped(guest: Build) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow(Disk):
        def read(self, offset: int, length: int) -> bytes:
            asked.set()
            answer.wait(PATIENCE_S)
            return super().read(offset, length)

    running = start(guest("disk"), block={"storage": Slow()})
    assert asked.wait(PATIENCE_S)
    threading.Timer(0.5, answer.set).start()
    assert running.stop().reason == "stopped"


# Networks.


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ping_frame(guest_mac: bytes, number: int) -> bytes:
    icmp = struct.pack(">BBHHH", 8, 0, 0, 7, number) + b"a few words of ping"[:18]
    icmp = icmp[:2] + checksum(icmp).to_bytes(2, "big") + icmp[4:]
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 1, 0, 64, 1, 0, HOST_IP, GUEST_IP)
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return guest_mac + HOST_MAC + b"\x08\x00" + head + icmp


class Pinger:
    """Answers what the guest says of itself (ARP) with a ping, and each answer with the next."""

    def __init__(self, count: int, error: bool = False) -> None:
        self.left = count
        self.error = error
        self.done = threading.Event()

    def send(self, frame: bytes) -> bytes | None:
        if self.error:
            raise ZeroDivisionError
        if frame[12:14] == b"\x08\x00" and frame[34] == 0:
            self.left -= 1
        if not self.left:
            self.done.set()
            return None
        return ping_frame(frame[6:12], self.left)


def test_a_network_in_python(guest: Build) -> None:
    net = Pinger(100)
    with made(guest("ping"), "--limit=100", net={"service": net}) as running:
        assert net.done.wait(PATIENCE_S)
        assert running.wait(PATIENCE_S).status == 0
    assert "answered 100 pings" in running.console.text


def test_frames_from_a_program_that_may_block(guest: Build) -> None:
    class Source:
        mac = bytes.fromhex("020000000002")
        left = 20

        def receive(self) -> bytes | None:
            if not self.left:
                return None
            self.left -= 1
            return ping_frame(self.mac, self.left)

    with made(guest("ping"), "--limit=20", net={"service": Source()}) as running:
        assert running.wait(PATIENCE_S).status == 0
    assert "mac 02:00:00:00:00:02" in running.console.text


def test_an_exception_of_a_network_is_reported_and_the_guest_goes_on(guest: Build) -> None:
    told: list[str] = []
    net = Pinger(1, error=True)
    with made(guest("ping"), net={"service": net}, warn=told.append) as running:
        running.console.wait_for("listening", PATIENCE_S)
        wait_until(lambda: told)
        with pytest.raises(TimeoutError):
            running.wait(0.2)
        assert running.running
        running.stop()
    assert without_lines(told) == [f"network device 'service': ZeroDivisionError ({__file__})"]


def test_what_is_no_device(guest: Build) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"net": {"service": object()}}, DeviceError),
        ({"block": {"storage": 5}}, DeviceError),
        ({"console": 1.5}, ConfigError),
    ]
    for options, kind in wrong:
        with pytest.raises(kind, match="is none of"):
            start(guest("ping"), **options).wait(PATIENCE_S)


def test_nothing_is_left_of_a_program_that_dies(guest: Build) -> None:
    code = f"""
import os
import re
import re
from tender import BlockMemory, Guest
class Net:
    def send(self, frame): pass
    def receive(self): import time; time.sleep(1000)
guest = Guest({str(guest("ping"))!r}, mem_mib=8, net={{"service": Net()}}).start()
guest.console.wait_for("listening", 60)
os.kill(os.getpid(), 9)
"""
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (-9, b"", b"")
