"""`--pcap`: the packets of a guest, in a file that tcpdump and Wireshark read."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tender import Descriptor, Guest
from tests.guest.conftest import PTENDER, Build, Run
from tests.unit.test_pcapng import read
from tests.waiting import wait_until, wait_until_asleep

IN, OUT = 1, 2
ASKED, ANSWERED = bytes(range(60)), bytes([0x55]) * 60  # guest-bindings/tests/frames.c


@contextmanager
def wire() -> Iterator[tuple[socket.socket, int]]:
    """The program's end, where a frame waits for the guest already, and the guest's descriptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    ours.send(ASKED)
    with ours, theirs:
        yield ours, theirs.fileno()


def fill(fd: int) -> None:
    """Until the socket takes no more."""
    os.set_blocking(fd, False)
    try:
        while True:
            os.write(fd, bytes(1000))
    except BlockingIOError:
        pass


def packets(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """The direction, the frame and the comment of each."""
    section, interface, *rest = read(data)
    assert (section[0], interface[0], interface[2][2]) == (0x0A0D0D0A, 1, b"service")
    return [
        (int.from_bytes(options[2], "little"), body[20:80], options.get(1, b""))
        for _, body, options in rest
    ]


def times_ns(data: bytes) -> list[int]:
    return [
        int.from_bytes(body[4:8], "little") << 32 | int.from_bytes(body[8:12], "little")
        for _, body, _ in read(data)[2:]
    ]


@pytest.mark.parametrize("engine", ["c", "python"])
def test_both_directions(ptender: Run, guest: Build, tmp_path: Path, engine: str) -> None:
    file = tmp_path / "packets.pcapng"
    begun = time.time_ns()
    with wire() as (_, fd):
        options = ["--mem=8", f"--engine={engine}", f"--pcap=service={file}", f"--net=@{fd}"]
        done = ptender(*options, guest("frames"), pass_fds=[fd])
    assert (done.returncode, done.stderr) == (0, ""), done
    data = file.read_bytes()
    assert packets(data) == [(IN, ASKED, b""), (OUT, ANSWERED, b"")]
    received, sent = times_ns(data)
    assert begun <= received <= sent <= time.time_ns()


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_frame_that_found_no_room(
    ptender: Run, guest: Build, tmp_path: Path, engine: str
) -> None:
    file = tmp_path / "packets.pcapng"
    with wire() as (_, fd):
        fill(fd)
        options = ["--mem=8", f"--engine={engine}", f"--pcap={file}", f"--net=@{fd}"]
        done = ptender(*options, guest("frames"), pass_fds=[fd])
    assert (done.returncode, done.stderr) == (0, ""), done
    assert packets(file.read_bytes()) == [(IN, ASKED, b""), (OUT, ANSWERED, b"dropped")]


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_full_disk(cpu: str, guest: Build, tmp_path: Path, engine: str) -> None:
    """One line, and the guest goes on: here a file may get longer by a part of a packet only."""
    file = tmp_path / "packets.pcapng"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fd = theirs.fileno()
        options = ["--mem=8", f"--engine={engine}", f"--pcap={file}", f"--net=@{fd}"]
        options.append("--sandbox=off")  # so that its limit can be set from here
        process = subprocess.Popen(
            [str(PTENDER), *options, str(guest("frames"))],
            pass_fds=[fd], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(lambda: file.exists() and file.stat().st_size)
        wait_until_asleep(process.pid)
        room = file.stat().st_size + 40
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        ours.send(ASKED)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, (output, errors)
    assert "SUCCESS" in output
    assert errors.splitlines()[1:] == [
        "ptender: packets of network device 'service': they end here: write: File too large; "
        "the guest goes on"
    ]


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_reader_that_goes_away(ptender: Run, guest: Build, tmp_path: Path, engine: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def leave() -> None:
        os.set_blocking(reader, True)
        wait_until(lambda: bool(os.read(reader, 1 << 16)))  # the end, while nobody writes yet
        os.close(reader)
        ours.send(ASKED)

    with ours, theirs:
        fd = theirs.fileno()
        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        options = ["--mem=8", f"--engine={engine}", f"--pcap={fifo}", f"--net=@{fd}"]
        done = ptender(*options, guest("frames"), pass_fds=[fd])
        assert done.returncode == 0, done
        thread.join()
    assert "SUCCESS" in done.stdout
    assert done.stderr == (
        "ptender: packets of network device 'service': they end here: write: Broken pipe; "
        "the guest goes on\n"
    )


@pytest.mark.usefixtures("any_cpu")
def test_tcpdump_reads_them_through_a_fifo(guest: Build, tmp_path: Path) -> None:
    if shutil.which("tcpdump") is None:
        pytest.skip("tcpdump is not installed")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with open(fifo, "rb", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as end:
        os.set_blocking(end.fileno(), True)
        with wire() as (_, fd):
            command = [str(PTENDER), "--mem=8", f"--pcap={fifo}", f"--net=@{fd}"]
            command.append(str(guest("frames")))
            assert subprocess.run(command, pass_fds=[fd], stdout=subprocess.DEVNULL).returncode == 0
        shown = subprocess.run(
            ["tcpdump", "-nn", "-e", "-r", "-"], stdin=end, capture_output=True, text=True
        )
    assert shown.returncode == 0, shown
    lines = [line for line in shown.stdout.splitlines() if " > " in line]
    assert "06:07:08:09:0a:0b > 00:01:02:03:04:05" in lines[0]
    assert "55:55:55:55:55:55 > 55:55:55:55:55:55" in lines[1]


def test_virtual_time_is_the_packets_time(guest: Build, tmp_path: Path) -> None:
    def run(*options: str) -> bytes:
        with wire() as (_, fd):
            net = f"--net=@{fd},mac=02:00:00:00:00:01"
            command = [str(PTENDER), "--mem=8", "--clock=virtual", *options, net]
            done = subprocess.run(
                [*command, str(guest("frames"))], pass_fds=[fd], capture_output=True, check=True
            )
            return done.stdout

    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    files = [tmp_path / name for name in ("first", "second")]
    outputs = [run(f"--pcap={file}") for file in files]
    assert outputs == [run()] * 2
    assert files[0].read_bytes() == files[1].read_bytes()
    assert times_ns(files[0].read_bytes())[0] // 10**9 == 1_767_225_600


@pytest.mark.usefixtures("any_cpu")
def test_of_a_program(guest: Build, tmp_path: Path) -> None:
    file = tmp_path / "packets.pcapng"
    with wire() as (_, fd):
        started = Guest(
            guest("frames"), mem_mib=8, net={"service": Descriptor(fd)}, pcap={"service": file}
        )
        assert started.run().status == 0
    assert packets(file.read_bytes()) == [(IN, ASKED, b""), (OUT, ANSWERED, b"")]


@pytest.mark.usefixtures("any_cpu")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "other={file}",
            "--pcap: Resource not declared in manifest: 'other' (it declares service)",
        ),
        ("{folder}/no/file", "Could not open packets: {folder}/no/file: No such file or directory"),
        ("{kernel}", "Could not open packets: {kernel}: it is the guest's kernel or disk"),
        ("/dev/full", "Could not open packets: /dev/full: No space left on device"),
        ("{fifo}", "Could not open packets: {fifo}: No such device or address (nobody reads it)"),
    ],
)
def test_what_is_wrong_is_one_line(guest: Build, tmp_path: Path, given: str, message: str) -> None:
    kernel, fifo = tmp_path / "frames.hvt", tmp_path / "fifo"
    kernel.write_bytes(guest("frames").read_bytes())
    os.mkfifo(fifo)
    places = {"file": tmp_path / "x", "folder": tmp_path, "kernel": kernel, "fifo": fifo}
    with wire() as (_, fd):
        command = [str(PTENDER), f"--pcap={given.format(**places)}", f"--net=@{fd}", str(kernel)]
        done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr == f"ptender: {message.format(**places)}\n"
