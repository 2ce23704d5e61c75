"""Guests that are saved and go on: `ptender snapshot` and `ptender --restore`, as operators have
them, in the sandbox."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest

from tender.cpu import native
from tender.observe import counters, guests
from tender.snapshot import file, helper
from tender.snapshot.file import Snapshot
from tests.guest.conftest import CPUS, PTENDER, Build, Run, missing
from tests.guest.ordinary import NOBODY, ordinary
from tests.needs import needs
from tests.waiting import children, state_of, wait_until, wait_until_asleep

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="snapshots of x86_64 guests")
MAC = "02:00:00:00:00:07"
HOST = b"\2\0\0\0\0\1"
ONE_LINE = r"ptender: [^\n]+\n"


class Running:
    """A guest that answers frames: `answer` of guest-bindings/tests, or what it goes on as."""

    def __init__(self, disk: Path, *words: object, mac: str | None = MAC) -> None:
        self.name = f"{os.getpid()}.{os.urandom(4).hex()}"
        self.wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(100)
        net = f"--net=@{theirs.fileno()}" + (f",mac={mac}" if mac else "")
        self.process = subprocess.Popen(
            [PTENDER, f"--name={self.name}", net, f"--block={disk}", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def wait_until_ready(self, *, asleep: bool = True) -> None:
        assert self.process.stdout
        while "ready" not in self.process.stdout.readline():
            assert self.process.poll() is None
        if asleep:
            wait_until_asleep(self.process.pid)

    def ask(self, *payload: int) -> tuple[int, int]:
        """How many frames it has got and their sum, with one of these bytes."""
        self.wire.send(b"\xff" * 6 + HOST + b"\x08\x00" + bytes(payload))
        answer = self.wire.recv(2048)
        assert answer[:12] == HOST + bytes.fromhex(MAC.replace(":", ""))
        count, total = struct.unpack_from("<2Q", answer, 14)
        return count, total

    def end(self) -> str:
        """Have it end; the first line that it prints then. What the tender says is in `said`."""
        self.wire.send(b"\xff" * 6 + HOST + b"\x88\x00")
        out, self.said = self.process.communicate(timeout=100)
        assert (self.process.returncode, "SUCCESS" in out) == (0, True), (out, self.said)
        return out.partition("\n")[0]


@pytest.fixture
def start(
    guest: Build, cpu: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Running]]:
    """Start a guest of this test, which has a disk of its own."""
    disks = tmp_path_factory.mktemp("disks")
    running: list[Running] = []

    def start(*words: object, kernel: bool = True, mac: str | None = MAC) -> Running:
        disk = disks / f"{len(running)}.img"
        disk.write_bytes(bytes(1 << 16))
        more = ["--mem=8", guest("answer")] if kernel else []
        running.append(Running(disk, *words, *more, mac=mac))
        return running[-1]

    yield start
    for each in running:
        each.process.kill()
        each.process.communicate()
        each.wire.close()


def runs(process: subprocess.Popen[str]) -> bool:
    """Wait until the guest runs; False: it has ended before."""

    def is_listed() -> bool:
        listed = [guest.pid for guest in guests.running() if guest.state == "running"]
        return process.pid in listed

    wait_until(lambda: process.poll() is not None or is_listed())
    return process.poll() is None


def restore(start: Callable[..., Running], file: Path, *words: object, **options: Any) -> Running:
    return start(f"--restore={file}", *words, kernel=False, **options)


def test_a_guest_goes_on_and_so_does_its_snapshot(
    start: Callable[..., Running], ptender: Run, tmp_path: Path, cpu: str
) -> None:
    file = tmp_path / "saved"
    first = start(f"--snapshots={tmp_path}")
    first.wait_until_ready()
    assert first.ask(1, 2) == (1, 3)
    done = ptender("snapshot", first.name, file)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{first.name}: saved: \d+K in {file}\n", done.stdout)
    assert first.ask(3) == (2, 6)
    assert first.end() == "2 frames, sum 6"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_blocks * 512 < 1 << 20
    assert os.listdir(tmp_path) == ["saved"]
    # From here on every CPU has the same guest.
    for number, other in enumerate(filterfalse(missing, CPUS)):
        clone = restore(start, file, f"--cpu={other}", *(["--clone"] if number else []), mac=None)
        assert clone.ask(5) == (2, 8), other
        assert clone.end() == "2 frames, sum 8", other


def header_field(name: str) -> tuple[int, str]:
    """Where a number of the file's header is, and its format."""
    return {
        "mark": (12, "<I"),
        "counter": (48, "<Q"),
        "hz": (56, "<Q"),
        "wall_ns": (104, "<Q"),
    }[name]


def change(path: Path, name: str, by: int) -> None:
    """Add to a number of the header."""
    offset, form = header_field(name)
    with open(path, "r+b") as file:
        file.seek(offset)
        (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
        file.seek(offset)
        file.write(struct.pack(form, value + by))


def test_a_guest_moves_twice(
    start: Callable[..., Running], ptender: Run, tmp_path: Path, cpu: str
) -> None:
    """It is saved again with pages that it has not used since, and refused a second life."""
    first, second = tmp_path / "first", tmp_path / "second"
    guest = start(f"--snapshots={tmp_path}")
    guest.wait_until_ready()
    assert guest.ask(1) == (1, 1)
    done = ptender("snapshot", guest.process.pid, first, "--stop")
    assert (done.returncode, "saved, and ended" in done.stdout) == (0, True), done
    _, said = guest.process.communicate(timeout=100)
    assert (guest.process.returncode, said) == (0, "ptender: the guest was saved, and ends here\n")
    moved = restore(start, first, f"--snapshots={tmp_path}", f"--dumpcore={tmp_path}")
    assert runs(moved.process)
    done = ptender("snapshot", moved.name, second, "--stop")
    assert done.returncode == 0, done
    assert second.stat().st_blocks >= first.stat().st_blocks - 8
    again = restore(start, second)
    assert again.ask(2, 3) == (2, 6)
    assert again.end() == "2 frames, sum 6"
    for used in (first, second):
        done = ptender(f"--restore={used}")
        assert done.returncode == 1
        assert re.fullmatch(ONE_LINE, done.stderr)
        assert "restored before" in done.stderr
        assert "--clone" in done.stderr


def sleeper(guest: Build, ptender: Run, folder: Path, ms: int) -> Path:
    """The snapshot of a guest that sleeps so long in all."""
    file = folder / f"sleeper{ms}"
    kernel, name = str(guest("sleep")), f"sleeper.{os.getpid()}"
    words = [str(PTENDER), "--mem=4", f"--snapshots={folder}", f"--name={name}", kernel, str(ms)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while "heap" not in process.stdout.readline():
            assert process.poll() is None
        wait_until_asleep(process.pid)
        done = ptender("snapshot", process.pid, file, "--stop")
        assert done.returncode == 0, done
    return file


HOUR_NS, SLEEP_MS = 3600 * 10**9, 3_000_000


def resume(ptender: Run, file: Path, *words: object) -> float | str:
    """Let a sleeper go on: for how long it has slept, or that time is the machine's own here."""
    command = [str(PTENDER), "--clone", f"--restore={file}", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        for line in iter(process.stderr.readline, b""):
            if b"can't set the guest's counter" in line:
                process.kill()
                return line.decode()
        done = re.search(rb"slept (\d+) ns", process.stdout.read())
    assert done
    return int(done[1]) / 1e9


def saved_again(ptender: Run, path: Path) -> Snapshot | str:
    """What is saved of a sleeper that has just gone on; or why it has not."""
    again = path.with_name("again")
    command = [str(PTENDER), f"--snapshots={path.parent}", f"--restore={path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if not runs(process):
            return process.communicate()[1]
        done = ptender("snapshot", process.pid, again, "--stop")
        assert done.returncode == 0, done
    return read(again)


def read(path: Path) -> Snapshot:
    with open(path, "rb") as opened:
        return file.read(opened.fileno())[0]


def test_time_stands_still(guest: Build, ptender: Run, tmp_path: Path, cpu: str) -> None:
    """A guest that has nearly an hour to sleep still has it, whatever has passed since."""
    path = sleeper(guest, ptender, tmp_path, SLEEP_MS)
    change(path, "wall_ns", -HOUR_NS)
    again = saved_again(ptender, path)
    assert isinstance(again, Snapshot), again
    assert again.poll
    before = read(path).poll
    assert before
    assert 0 < again.poll.left_ns <= before.left_ns <= SLEEP_MS * 10**6


def test_time_goes_on(guest: Build, ptender: Run, tmp_path: Path, cpu: str) -> None:
    """A deadline that has passed while the guest was saved."""
    file = sleeper(guest, ptender, tmp_path, SLEEP_MS)
    change(file, "wall_ns", -HOUR_NS)
    slept = resume(ptender, file, "--clock-resume=catch-up")
    assert isinstance(slept, str) or 3600 <= slept < 7200
    if isinstance(slept, str):
        assert cpu != "soft"
        assert re.fullmatch(ONE_LINE, slept)


def test_time_never_goes_back(guest: Build, ptender: Run, tmp_path: Path, cpu: str) -> None:
    path = sleeper(guest, ptender, tmp_path, SLEEP_MS)
    change(path, "counter", 1 << 61)
    again = saved_again(ptender, path)
    if isinstance(again, Snapshot):
        assert read(path).counter <= again.counter
    else:
        assert cpu == "kvm"
        assert re.fullmatch(ONE_LINE, again)
        assert "time would go back: use --cpu=soft" in again


def test_a_frequency_is_the_guests_for_good(
    guest: Build, ptender: Run, tmp_path: Path, cpu: str
) -> None:
    path = sleeper(guest, ptender, tmp_path, SLEEP_MS)
    change(path, "hz", 10**8)
    again = saved_again(ptender, path)
    if isinstance(again, Snapshot):
        assert again.hz == read(path).hz
    else:
        assert cpu == "kvm"
        assert re.fullmatch(ONE_LINE, again)
        assert "the guest counts time in" in again


def test_virtual_time_goes_on_where_it_stood(
    start: Callable[..., Running], cpu: str, tmp_path: Path
) -> None:
    if cpu != "soft":
        pytest.skip("time is virtual on the software CPU")
    file = tmp_path / "saved"
    first = start(f"--snapshots={tmp_path}", "--clock=virtual")
    first.wait_until_ready(asleep=False)
    assert first.ask(1) == (1, 1)
    subprocess.run([PTENDER, "snapshot", first.name, file, "--stop"], check=True)
    refusal = subprocess.run(
        [PTENDER, f"--restore={file}", "--clock-resume=catch-up"], capture_output=True, text=True
    )
    assert refusal.returncode
    again = restore(start, file)
    assert again.ask(2) == (2, 3)
    assert again.end() == "2 frames, sum 3"


# Words, and what is said of them; {saved} is a snapshot of `answer`, {answer} that guest.
REFUSALS = [
    ("--restore={saved}", "All declared devices must be attached; missing: 'service'"),
    ("--restore={saved} {net},mac=02:00:00:00:00:08 {disk}", "'service': the guest was saved with"),
    ("--restore={saved} {net},mtu=9000 {disk}", "an MTU of 1500, and this device has 9000"),
    ("--restore={saved} {net} {small}", "'storage': the guest was saved with a size of 65536, and"),
    ("--restore={saved} {net} {disk},sector-size=4096", "a sector size of 512, and this device"),
    ("--restore={saved} {net} other={disk}", "other"),
    ("--restore={saved} {answer}", "the snapshot has kernel and arguments"),
    ("--restore={saved} --mem=64", "--mem: the snapshot has this"),
    ("--restore={saved} --clock=virtual", "--clock: the snapshot has this"),
    ("--restore={answer}", "it is not a snapshot of ptender's"),
    ("--restore=/nonexistent", "/nonexistent: Could not open: No such file or directory"),
    ("--restore=/dev/null", "not a regular file"),
    ("--clone {answer}", "--clone: this goes with --restore"),
    ("--clock-resume=catch-up {answer}", "--clock-resume: this goes with --restore"),
    ("--clock-resume=never --restore={saved}", "'never' is not continue or catch-up"),
    ("--snapshots=/nonexistent {net} {disk} {answer}", "cannot make a file there: No such file"),
    ("snapshot nobody {folder}/new", "no guest 'nobody' runs"),
    ("snapshot {name} {saved}", "it exists already: name a new file"),
    ("snapshot {name} /nonexistent/new", "/nonexistent/new: cannot make it: No such file"),
    ("snapshot {name} {folder}/new --timeout=-1", "--timeout"),
]


def test_what_is_refused_is_refused_in_words(
    guest: Build, cpu: str, start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start(f"--snapshots={tmp_path}")
    running.wait_until_ready()
    saved, disk, small = (tmp_path / name for name in ("saved", "disk.img", "small.img"))
    disk.write_bytes(bytes(1 << 16))
    subprocess.run([PTENDER, "snapshot", running.name, saved], check=True)
    small.write_bytes(bytes(4096))
    _, end = pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = {
        "saved": saved,
        "answer": guest("answer"),
        "net": f"--net=@{end.fileno()}",
        "disk": f"--block={disk},ro",
        "small": f"--block={small},ro",
        "folder": tmp_path,
        "name": running.name,
    }
    for line, expected in REFUSALS:
        words = line.format(**names).split()
        done = subprocess.run(
            [PTENDER, *words], capture_output=True, text=True, pass_fds=[end.fileno()], timeout=100
        )
        assert done.returncode in (1, 2), (line, done)
        assert expected in done.stderr, line
        assert re.fullmatch(ONE_LINE, done.stderr), line
        assert not (tmp_path / "new").exists()
    for each in pair:
        each.close()
    assert running.ask(4) == (1, 4)
    # What was refused is not used up.
    running.process.kill()
    assert restore(start, saved).ask(1) == (1, 1)


def test_a_guest_that_makes_no_hypercall_is_not_saved(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    name = f"loop.{os.getpid()}"
    kernel = str(guest("loop"))
    words = [str(PTENDER), "--mem=4", f"--name={name}", f"--snapshots={tmp_path}", kernel]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        while b"looping" not in process.stdout.readline():
            assert process.poll() is None
        done = ptender("snapshot", name, tmp_path / "new", "--timeout=0.2")
        assert done.returncode == 1
        assert done.stderr == (
            f"ptender: {name}: it made no hypercall within 0.2 s, so it is not saved\n"
        )
        assert os.listdir(tmp_path) == []
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
        assert said == b"ptender: Exiting on signal 15\n"


def test_a_guest_that_did_not_say_so_is_not_saved(
    start: Callable[..., Running], ptender: Run, cpu: str, tmp_path: Path
) -> None:
    running = start()
    running.wait_until_ready()
    done = ptender("snapshot", running.name, tmp_path / "new")
    assert done.returncode == 1
    assert done.stderr == (
        f"ptender: {running.name}: it can't be saved: start it with --snapshots DIR\n"
    )
    assert running.ask(1) == (1, 1)


def test_requests_that_are_given_up_or_come_at_once(
    start: Callable[..., Running], ptender: Run, cpu: str, tmp_path: Path
) -> None:
    running = start(f"--snapshots={tmp_path}")
    running.wait_until_ready()
    path = helper.socket_path(counters.folder(), running.process.pid)
    for message in (b"save", b"stop", b"nonsense", b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as command:
            command.connect(path)
            command.send(message)
    both = [
        subprocess.Popen(
            [PTENDER, "snapshot", running.name, tmp_path / name], stdout=subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    for each in both:
        each.communicate(timeout=100)
        assert each.returncode == 0
    assert running.ask(7) == (1, 7)
    for name in ("a", "b"):
        again = restore(start, tmp_path / name)
        assert again.ask(8) == (1, 8)
        again.end()
    assert running.end() == "1 frames, sum 7"


def test_nothing_is_left_of_a_tender_that_is_killed(
    start: Callable[..., Running], cpu: str, tmp_path: Path
) -> None:
    running = start(f"--snapshots={tmp_path}")
    running.wait_until_ready()
    path = Path(helper.socket_path(counters.folder(), running.process.pid))
    assert path.exists()
    assert path.stat().st_mode & 0o077 == 0
    before = children(running.process.pid)
    running.process.kill()
    running.process.communicate()
    wait_until(lambda: not path.exists())
    wait_until(lambda: not any(state_of(each) for each in before))
    assert os.listdir(tmp_path) == []


def test_a_file_that_shrinks_under_a_guest_is_that_guests_end(
    start: Callable[..., Running], ptender: Run, cpu: str, tmp_path: Path
) -> None:
    file = tmp_path / "saved"
    first = start(f"--snapshots={tmp_path}")
    first.wait_until_ready()
    assert ptender("snapshot", first.name, file).returncode == 0
    second = restore(start, file)
    assert second.ask(1) == (1, 1)
    os.truncate(file, 4096)
    second.wire.send(b"\xff" * 6 + HOST + b"\x88\x00")
    _, said = second.process.communicate(timeout=100)
    assert "Traceback" not in said
    assert "internal error" not in said
    if cpu == "native":  # which has its own copy
        assert second.process.returncode == 0
    assert first.ask(1) == (1, 1)
    done = ptender(f"--restore={file}", "--clone")
    assert "the snapshot is damaged: it is truncated" in done.stderr


def test_a_file_that_is_read_only_is_restored_with_a_warning(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    file = sleeper(guest, ptender, tmp_path, 1000)
    needs("unshare", "--mount", "--")
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$0" --restore "$1"'
    command = ["unshare", "--mount", "--", "sh", "-c", script, str(PTENDER), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done
    assert f"{file}: read-only: that it was restored can't be noted there" in done.stderr
    assert ptender(f"--restore={file}").returncode == 0


def test_an_ordinary_user_saves_and_restores(guest: Build, home: Path) -> None:
    kernel = Path(shutil.copy(guest("sleep"), home))
    if os.geteuid() == 0:
        for each in (home, kernel):
            os.chown(each, int(NOBODY), int(NOBODY))
    script = f"""
    export XDG_RUNTIME_DIR={home} PTENDER_CPU={"soft" if native.missing() else "native"}
    {PTENDER} --mem=4 --name=mine --snapshots={home} {kernel} 2000 >{home}/out &
    until [ -e {home}/ptender/$!.snapshot ]; do kill -0 $! || exit 9; sleep 0.05; done
    {PTENDER} snapshot mine {home}/saved --stop && wait $! && {PTENDER} --restore {home}/saved
    """
    command = ordinary(home.parent / "mount", ["sh", "-c", script])
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done
    assert "slept" in done.stdout
    assert (home / "saved").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not shutil.which("gdb"), reason="no gdb")
def test_a_debugger_comes_first(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path, home: Path
) -> None:
    """The guest is shown where it waits, and goes on waiting when the debugger lets it."""
    file, link = sleeper(guest, ptender, tmp_path, 2000), home / "gdb"
    kernel = guest("sleep")
    commands = [f"target remote {link}", "break solo5_exit", "continue", "bt 1", "kill"]
    with subprocess.Popen([PTENDER, "--restore", file, f"--gdb={link}"]) as process:
        wait_until(lambda: link.exists() or process.poll() is not None)
        words = [word for command in commands for word in ("-ex", command)]
        done = subprocess.run(
            ["gdb", "-nx", "-batch", *words, str(kernel)],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        process.wait(100)
    assert "Breakpoint 1, 0x" in done.stdout, done
    assert "in solo5_exit ()" in done.stdout, done


@pytest.mark.skipif(not shutil.which("gdb"), reason="no gdb")
def test_a_guest_is_saved_while_it_is_debugged(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path, home: Path
) -> None:
    """The saved guest does not have its breakpoints."""
    path, link, kernel = tmp_path / "saved", home / "gdb", str(guest("sleep"))
    command = [str(PTENDER), "--mem=4", f"--snapshots={tmp_path}", f"--gdb={link}", kernel]
    commands = [f"target remote {link}", "break solo5_exit", "continue"]
    with subprocess.Popen([*command, str(SLEEP_MS)], stdout=subprocess.PIPE) as process:
        wait_until(lambda: link.exists() or process.poll() is not None)
        words = [word for each in commands for word in ("-ex", each)]
        with subprocess.Popen(
            ["gdb", "-nx", "-batch", *words, kernel], stdout=subprocess.PIPE, text=True
        ) as gdb:
            assert process.stdout
            while b"heap" not in process.stdout.readline():
                assert process.poll() is None
            done = ptender("snapshot", process.pid, path, "--stop")
            assert done.returncode == 0, done
            shown, _ = gdb.communicate(timeout=100)
    assert "Breakpoint 1 at" in shown
    with path.open("rb") as saved, open(kernel, "rb") as image:
        snapshot, start, _ = file.read(saved.fileno())
        for segment in snapshot.image().segments:
            if segment.executable:
                code = os.pread(image.fileno(), segment.filesz, segment.offset)
                assert os.pread(saved.fileno(), segment.filesz, start + segment.vaddr) == code


def test_no_hypercall_is_made_twice_or_not_at_all(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    """A guest that never waits is saved behind a line that it has printed."""
    path, output = tmp_path / "saved", tmp_path / "output"
    command = [str(PTENDER), "--mem=4", f"--snapshots={tmp_path}", str(guest("flood"))]
    with output.open("w") as console, subprocess.Popen(command, stdout=console) as process:
        wait_until(lambda: "flood 100\n" in output.read_text())
        done = ptender("snapshot", process.pid, path, "--stop")
        assert (done.returncode, process.wait(100)) == (0, 0), done
    before = output.read_text()
    for other in filterfalse(missing, CPUS):
        command = [str(PTENDER), "--clone", f"--cpu={other}", f"--restore={path}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            after = "".join(process.stdout.readline() for _ in range(3))
            process.kill()
        numbers = [int(number) for number in re.findall(r"flood (\d+)\n", before + after)]
        assert numbers == list(range(len(numbers))), (other, numbers[-5:])
