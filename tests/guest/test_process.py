"""A guest's process, its server and its program end at any moment, and nothing is left."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tender import BlockDescriptor, BlockFile, Descriptor, Guest, Outcome
from tender.embed import program as this_program
from tender.embed import server
from tender.errors import HostError, SandboxViolation, TenderError
from tests.descriptors import open_descriptors
from tests.guest.conftest import Build, Namespace, Run
from tests.needs import needs
from tests.waiting import PATIENCE_S, children, kill, marked, wait_until

pytestmark = pytest.mark.usefixtures("any_cpu")

MARK = "LC_PTENDER_TEST"  # an environment variable that a server keeps


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What all processes that begin in this test have in their environment; none is left of them.

    The server of this program begins anew, so that it has it.
    """
    end_server()
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    yield value
    end_server()
    wait_until(lambda: marked(MARK, value) == [os.getpid()] or not marked(MARK, value))


def end_server() -> None:
    this_program._at_exit()
    this_program._program = None


def is_gone(pid: int) -> bool:
    """Neither there nor a zombie."""
    return not os.path.exists(f"/proc/{pid}")


def server_pid() -> int:
    return this_program.program_here().server.pid


def wired(kernel: Path, **options: Any) -> tuple[Guest, socket.socket]:
    """A guest with a network device, and the program's end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    guest = Guest(kernel, mem_mib=8, net={"service": Descriptor(theirs.fileno())}, **options)
    guest.start()
    theirs.close()
    return guest, ours


# fmt: off
ARP = bytes.fromhex(
    "ffffffffffff" "020000000001" "0806" "0001080006040001"
    "020000000001" "0a000001" "000000000000" "0a000002"
)
# fmt: on


def answers(wire: socket.socket) -> bool:
    """Whether the guest says who has 10.0.0.2."""
    wire.send(ARP)
    while frame := wire.recv(2000):
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
            return True
    return False


# How a guest's process ends.


def test_a_guest_has_a_process_of_its_own(guest: Build, mark: str) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid != os.getpid()
        # A child that ends meanwhile can hide another: proc_tid_children(5).
        wait_until(lambda: running.pid in children(os.getpid()))
        assert running.outcome is None
        assert f"process {running.pid}" in repr(running)
        outcome = running.stop()
    assert (outcome.reason, outcome.signo, outcome.status) == ("stopped", 0, 0)
    assert running.outcome == outcome
    wait_until(lambda: running.pid is not None and is_gone(running.pid))


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV])
def test_somebody_kills_its_process(guest: Build, signo: int) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid
        os.kill(running.pid, signo)
        outcome = running.wait(timeout=PATIENCE_S)
        assert (outcome.reason, outcome.signo, outcome.error) == ("killed", signo, None)
    assert running.stop() == outcome


def test_somebody_asks_its_process_to_end(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid
        os.kill(running.pid, signal.SIGTERM)
        outcome = running.wait(timeout=PATIENCE_S)
    assert (outcome.reason, outcome.signo) == ("stopped", signal.SIGTERM)


def test_a_core_is_where_it_was_asked_for(guest: Build, mark: str, tmp_path: Path) -> None:
    outcome = Guest(guest("abort"), mem_mib=8, dumpcore=tmp_path).run()
    assert (outcome.status, outcome.reason) == (255, "halted")
    assert outcome.core is not None
    assert [str(tmp_path / name) for name in os.listdir(tmp_path)] == [outcome.core]
    for end in (Guest.kill, Guest.stop):
        end(Guest(guest("loop"), mem_mib=8, dumpcore=tmp_path).start())
    assert len(os.listdir(tmp_path)) == 1


def test_guests_are_in_namespaces_where_nothing_is(guest: Build) -> None:
    if os.geteuid() != 0:
        pytest.skip("/proc of a confined process is for root")
    needs("unshare", "--mount", "--net", "--ipc", "--uts")
    with Guest(guest("loop"), mem_mib=8) as first, Guest(guest("loop"), mem_mib=8) as second:
        for running in (first, second):
            proc = f"/proc/{running.pid}"
            assert os.listdir(f"{proc}/root") == []
            assert Path(f"{proc}/net/dev").read_text().count(":") <= 1  # lo, which is down
            for name in ("mnt", "net", "ipc", "uts"):
                assert os.readlink(f"{proc}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


def test_kill(guest: Build) -> None:
    running = Guest(guest("loop"), mem_mib=8)
    with pytest.raises(RuntimeError, match="not started"):
        running.kill()
    running.start()
    assert (running.kill().reason, running.kill().signo) == ("killed", signal.SIGKILL)
    with pytest.raises(RuntimeError, match="started already"):
        running.start()
    halted = Guest(guest("exit"), "3", mem_mib=8).start()
    halted.wait(timeout=PATIENCE_S)
    assert (halted.kill().reason, halted.kill().status) == ("halted", 3)


def test_a_process_that_does_not_respond_is_killed(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid
        os.kill(running.pid, signal.SIGSTOP)
        outcome = running.stop(grace=0.2)
    assert (outcome.reason, outcome.signo) == ("killed", signal.SIGKILL)


DEADLINES_S = (0.5, 5.0, 50.0)  # a busy machine may need a longer one to get that far


@pytest.mark.parametrize(("name", "words"), [("loop", []), ("sleep", ["100000"])])
def test_a_deadline(guest: Build, name: str, words: list[str]) -> None:
    for deadline_s in DEADLINES_S:
        running = Guest(guest(name), *words, mem_mib=8, deadline=deadline_s)
        outcome = running.run()
        assert (outcome.reason, outcome.status) == ("deadline", 1)
        if running.console.text:
            break
    assert outcome.stats.console.calls  # it could still say what its devices did


def test_a_deadline_of_a_process_that_does_not_respond(
    guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); started('')"
    running = hostile(monkeypatch, f"{deaf}; signal.pause()", guest("loop"), deadline=0.5)
    outcome = running.run()
    assert (outcome.reason, outcome.signo) == ("deadline", signal.SIGKILL)


def test_a_deadline_after_the_end(guest: Build) -> None:
    running = Guest(guest("exit"), "0", mem_mib=8, deadline=3600)
    assert running.run().reason == "halted"
    running._life.process._pass_deadline()
    assert running.wait().reason == "halted"


def test_many_threads_stop_one_guest(guest: Build) -> None:
    running = Guest(guest("loop"), mem_mib=8).start()
    ends: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda: ends.append(running.stop()), daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [end.reason for end in ends] == ["stopped"] * 8


def test_a_guest_that_is_stopped_or_killed_while_it_starts(guest: Build, mark: str) -> None:
    """From another thread, at moments that differ; the start returns, and there is an outcome."""
    seeded = random.Random(6)
    kernel = guest("loop")
    for number in range(30):
        running = Guest(kernel, mem_mib=8)
        starting = threading.Thread(target=running.start)
        starting.start()
        wait_until(lambda running=running: running.running)  # type: ignore[misc]
        time.sleep(seeded.random() * 0.03)
        outcome = running.kill() if number % 2 else running.stop()
        starting.join(PATIENCE_S)
        assert not starting.is_alive()
        assert outcome.reason == ("killed" if number % 2 else "stopped")


# Kill -9 of anything, at any moment.


def lock_is_free(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_child_that_is_killed_at_any_moment(guest: Build, mark: str, tmp_path: Path) -> None:
    """Also in the middle of its start: PIDs are looked for from outside."""
    seeded = random.Random(1)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    kernel = guest("block")
    Guest(kernel, mem_mib=8, block={"storage": BlockFile(str(image))}).run()
    reasons = set()
    for _ in range(50):
        known = {os.getpid(), server_pid()}
        running = Guest(kernel, mem_mib=8, block={"storage": BlockFile(str(image))})
        killer = threading.Timer(seeded.random() * 0.03, kill_others, [mark, known])
        killer.start()
        running.start()
        outcome = running.wait(timeout=PATIENCE_S)
        killer.join()
        reasons.add(outcome.reason)
        assert outcome.reason in ("killed", "halted")
        wait_until(lambda: lock_is_free(image))
    assert os.listdir(tmp_path) == ["disk.img"]


def kill_others(mark: str, known: set[int]) -> None:
    for pid in set(marked(MARK, mark)) - known:
        kill(pid)


def test_a_server_that_is_killed(guest: Build, mark: str) -> None:
    guests = [Guest(guest("loop"), mem_mib=8).start() for _ in range(3)]
    server = server_pid()
    os.kill(server, signal.SIGKILL)
    outcomes = [running.wait(timeout=PATIENCE_S) for running in guests]
    assert {(each.reason, each.signo) for each in outcomes} == {("killed", signal.SIGKILL)}
    assert Guest(guest("exit"), "4", mem_mib=8).run().status == 4
    assert server_pid() != server


def test_a_server_that_is_killed_at_any_moment(guest: Build, mark: str) -> None:
    seeded = random.Random(2)
    Guest(guest("exit"), "0", mem_mib=8).run()
    for _ in range(15):
        killer = threading.Timer(seeded.random() * 0.06, kill, [server_pid()])
        running = Guest(guest("exit"), "0", mem_mib=8)
        killer.start()
        running.start()
        assert running.wait(timeout=PATIENCE_S).reason in ("killed", "halted")
        killer.join()


PROGRAM = """
import os, sys, threading
from tender import BlockFile, Guest, Tap
kernel, holding, image, wired, tap = sys.argv[1:]
def again_and_again(kernel, **options):
    while True:
        with Guest(kernel, mem_mib=8, warn=lambda text: None, deadline=0.2, **options) as guest:
            guest.wait(timeout=60)
jobs = [(kernel, {}), (kernel, {}), (holding, {"block": {"storage": BlockFile(image)}})]
if tap:
    jobs.append((wired, {"net": {"service": Tap(tap, create=True)}}))
for kernel, options in jobs:
    threading.Thread(target=again_and_again, args=[kernel], kwargs=options).start()
print("begun", flush=True)
"""


def kill_programs(rounds: int, longest_s: float, *command: str) -> None:
    """Start a program and kill it, at moments that differ."""
    seeded = random.Random(3)
    for _ in range(rounds):
        program = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert program.stdout
        program.stdout.readline()
        time.sleep(seeded.random() * longest_s)
        assert program.poll() is None
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        program.stdout.close()


def test_a_program_that_is_killed_at_any_moment(guest: Build, mark: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    words = [str(guest("exit")), str(guest("hold")), str(image), "", ""]
    for _ in range(50):
        kill_programs(1, 0.4, sys.executable, "-c", PROGRAM, *words)
        wait_until(lambda: not set(marked(MARK, mark)) - {os.getpid()})
        wait_until(lambda: lock_is_free(image))  # who ends loses its environment first
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_killed_program_leaves_no_tap(
    guest: Build, namespace: Namespace, mark: str, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    words = [str(guest("exit")), str(guest("hold")), str(image), str(guest("ping")), "tap9"]
    kill_programs(6, 2.0, *namespace.enter, sys.executable, "-c", PROGRAM, *words)
    wait_until(lambda: not set(marked(MARK, mark)) - {os.getpid()})
    wait_until(lambda: "tap9" not in namespace.ip("link"))
    wait_until(lambda: lock_is_free(image))


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "os._exit(0)", "1 / 0", "guest.pid"])
def test_a_program_that_ends_with_guests_alive(guest: Build, mark: str, end: str) -> None:
    code = (
        "import os\nfrom tender import Guest\n"
        f"guest = Guest({str(guest('loop'))!r}, mem_mib=8).start()\n"
        f"others = [Guest({str(guest('loop'))!r}, mem_mib=8).start() for _ in range(3)]\n{end}"
    )
    subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S, stderr=subprocess.DEVNULL)
    wait_until(lambda: not set(marked(MARK, mark)) - {os.getpid()})


@pytest.mark.parametrize("wait", ["guest.wait()", "guest.console.wait_for('never', 100)"])
def test_ctrl_c(guest: Build, mark: str, wait: str) -> None:
    code = (
        "from tender import Guest\n"
        f"with Guest({str(guest('loop'))!r}, mem_mib=8) as guest:\n"
        f"    print(guest.pid, flush=True)\n    {wait}"
    )
    # As from a terminal: the whole group gets the signal.
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert program.stdout
    pid = int(program.stdout.readline())
    os.killpg(program.pid, signal.SIGINT)
    _, told = program.communicate(timeout=PATIENCE_S)
    assert told.splitlines()[-1] == "KeyboardInterrupt"
    assert "ptender:" not in told
    assert program.returncode == -signal.SIGINT
    wait_until(lambda: is_gone(pid))


def test_ctrl_c_does_not_reach_a_guest(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid
        assert os.getsid(running.pid) != os.getsid(0)
        os.kill(running.pid, signal.SIGINT)
        with pytest.raises(TimeoutError):
            running.wait(timeout=0.3)


# Many.


def test_fifty_guests_at_once_all_answer(guest: Build) -> None:
    kernel = guest("ping")
    found: list[tuple[Guest, socket.socket]] = []

    def start() -> None:
        for _ in range(10):
            found.append(wired(kernel))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({running.pid for running, _ in found}) == 50
    for _, wire in found:
        assert answers(wire)
    for running, wire in found:
        assert running.kill().reason == "killed"
        wire.close()


def test_a_guest_has_no_descriptor_of_another(guest: Build) -> None:
    """Without its sandbox, which would close them as well."""
    kernel = guest("sleep")
    options: Any = {"mem_mib": 8, "cpu": "soft", "sandbox": "off", "warn": lambda _: None}
    with ExitStack() as guests:
        *_, last = (guests.enter_context(Guest(kernel, "100000", **options)) for _ in range(4))
        folder = Path(f"/proc/{last.pid}/fd")
        assert not [each for each in folder.iterdir() if "pidfd" in os.readlink(each)]


def test_nothing_is_left_of_many_guests(guest: Build) -> None:
    def once() -> None:
        Guest(guest("exit"), "0", mem_mib=8).run()

    once()
    descriptors, threads = open_descriptors(), threading.active_count()
    for _ in range(20):
        once()
    wait_until(lambda: open_descriptors() <= descriptors)
    wait_until(lambda: threading.active_count() <= threads)


def test_a_program_without_room_for_more_descriptors(guest: Build, mark: str) -> None:
    code = f"""
import resource
from tender import Guest
from tender.errors import HostError
kernel = {str(guest("sleep"))!r}
Guest(kernel, "100000", mem_mib=8).start().kill()
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, most))
for _ in range(5):
    guests = []
    try:
        while True:
            guests.append(Guest(kernel, "100000", mem_mib=8).start())
    except HostError as error:
        print(len(guests) > 3, "Too many open files (raise `ulimit -n`" in str(error))
    print({{each.kill().reason for each in guests}})
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=100, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "True True\n{'killed'}\n" * 5


def test_a_program_without_standard_descriptors(guest: Build, tmp_path: Path) -> None:
    code = f"""
import os
from tender import Guest
os.closerange(0, 3)
outcome = Guest({str(guest("exit"))!r}, "7", mem_mib=8, warn=lambda _: None).run()
os._exit(outcome.status)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=100)
    assert done.returncode == 7


# asyncio.


def test_asyncio(guest: Build) -> None:
    async def main() -> None:
        async with Guest(guest("loop"), mem_mib=8) as running:
            assert running.running
            with pytest.raises(TimeoutError):
                await running.wait_async(0.05)
            outcome = await running.stop_async()
        assert outcome.reason == "stopped"
        assert await running.wait_async() == outcome
        with pytest.raises(TenderError, match="Could not open"):
            await Guest("/nonexistent.hvt").start_async()

        guests = [Guest(guest("sleep"), "100", mem_mib=8) for _ in range(10)]
        await asyncio.gather(*(each.start_async() for each in guests))
        ends = await asyncio.gather(*(each.wait_async(60) for each in guests))
        assert {end.status for end in ends} == {0}

    asyncio.run(main())


def test_a_task_that_is_cancelled_leaves_no_guest(guest: Build, mark: str) -> None:
    async def main() -> None:
        for delay in (0.0, 0.005, 0.02, 0.2):
            running = Guest(guest("loop"), mem_mib=8)

            async def use(running: Guest = running) -> None:
                async with running:
                    await running.wait_async()

            task = asyncio.create_task(use())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if running.pid is not None:
                assert (await running.wait_async(60)).reason in ("killed", "stopped")

    asyncio.run(main())


# Forks of the program.


def in_fork(function: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_of_the_program_has_guests_of_its_own(guest: Build) -> None:
    kernel = guest("exit")
    with Guest(guest("loop"), mem_mib=8) as running:

        def child() -> None:
            with pytest.raises(RuntimeError, match="forked from"):
                running.stop()
            with pytest.raises(RuntimeError, match="forked from"):
                running.kill()
            running.__exit__(None)
            assert Guest(kernel, "5", mem_mib=8).run().status == 5
            this_program._at_exit()

        assert in_fork(child) == 0
        assert running.running
        assert running.stop().reason == "stopped"


# Where the program is.


def test_a_guest_has_the_namespaces_of_the_first_one(guest: Build, namespace: Namespace) -> None:
    """Its taps would be others than those that the program means."""
    Guest(guest("exit"), "0", mem_mib=8).run()
    errors: list[BaseException] = []

    def there() -> None:
        other = os.open(namespace.enter[1].removeprefix("--net="), os.O_RDONLY)
        setns(other)
        os.close(other)
        try:
            Guest(guest("exit"), "0", mem_mib=8).start()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=there)
    thread.start()
    thread.join(PATIENCE_S)
    (error,) = errors
    assert isinstance(error, HostError)
    assert "the namespaces of the program changed after its first guest" in str(error)
    assert Guest(guest("exit"), "3", mem_mib=8).run().status == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become somebody else")
def test_a_guest_has_the_credentials_of_the_first_one(guest: Build) -> None:
    code = f"""
import os
from tender import Guest
from tender.errors import HostError
kernel = {str(guest("exit"))!r}
print(Guest(kernel, "3", mem_mib=8).run().status, flush=True)
os.setgroups([12345])
try:
    Guest(kernel, "3", mem_mib=8).run()
except HostError as error:
    print(error, flush=True)
if not os.fork():
    print(Guest(kernel, "4", mem_mib=8).run().status, flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    first, error, second = done.stdout.splitlines()
    assert (first, second) == ("3", "4"), done
    assert "the credentials of the program changed after its first guest" in error
    assert error.endswith("change them before, or fork the program")


def test_a_guest_has_the_cpus_of_the_thread_that_starts_it(guest: Build) -> None:
    before = os.sched_getaffinity(0)
    for cpu in before:
        os.sched_setaffinity(0, {cpu})
        try:
            with Guest(guest("loop"), mem_mib=8) as running:
                assert running.pid
                assert os.sched_getaffinity(running.pid) == {cpu}
        finally:
            os.sched_setaffinity(0, before)


def setns(fd: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())


def test_paths_are_relative_to_where_the_program_is(
    guest: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Guest(guest("exit"), "0", mem_mib=8).run()  # the server is somewhere else
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel.hvt").write_bytes(guest("block").read_bytes())
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    block = {"storage": BlockFile("disk.img")}
    assert Guest("kernel.hvt", mem_mib=8, block=block).run().status == 0


# What an error of the command tells the user to type, and of a program.
ARGUMENTS = {
    "--mem=6": "mem_mib=6",
    "--block storage=FILE": 'block={"storage": BlockFile("disk.img")}',
}


def test_errors_are_those_of_the_command(guest: Build, ptender: Run, tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    block = guest("block")
    cases: list[tuple[list[object], dict[str, Any], list[object]]] = [
        (["/nonexistent.hvt"], {}, ["/nonexistent.hvt"]),
        ([odd], {}, [odd]),
        ([block], {}, [block]),
        ([block], {"block": {"storage": BlockFile("/nonexistent")}},
         ["--block", "storage=/nonexistent", block]),
        ([block], {"block": {"storage": BlockFile(str(odd))}},
         ["--block", f"storage={odd}", block]),
        ([block], {"block": {"nope": BlockFile(str(odd))}}, ["--block", f"nope={odd}", block]),
        ([guest("big")], {"mem_mib": 2}, ["--mem=2", guest("big")]),
        ([guest("exit"), "x" * 9000], {}, [guest("exit"), "x" * 9000]),
        ([guest("exit")], {"dumpcore": "/nonexistent"},
         ["--dumpcore=/nonexistent", guest("exit")]),
    ]  # fmt: skip
    for words, options, command in cases:
        with pytest.raises(TenderError) as caught:
            Guest(*words, **options).start()  # type: ignore[arg-type]
        done = ptender(*command)
        text = done.stderr.splitlines()[-1]
        for option, argument in ARGUMENTS.items():
            text = text.replace(option, argument)
        assert text == f"ptender: {caught.value}"
        assert done.returncode == caught.value.exit_status


def test_a_locked_image_names_its_holder(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    block = {"storage": BlockFile(str(image))}
    held = Guest(guest("hold"), mem_mib=8, block=block)
    with held, pytest.raises(TenderError, match="locked by process"):
        Guest(guest("hold"), mem_mib=8, block=block).start()


# A child that a guest has taken over.

HOSTILE = """
import sys; sys.path[:] = {{path!r}}
import json, os, signal
from tender import machine
from tender.embed import forkserver, protocol

def hostile(config, stop, warn, sandbox=None, started=None, created=None, publish=None):
    if sandbox is None:  # it warms up
        return
    send = lambda data: os.write(sandbox.report_fd, data)
    {what}

machine.run = hostile
forkserver.main({{fds}})
"""


def hostile(
    monkeypatch: pytest.MonkeyPatch, what: str, kernel: Path, deadline: float | None = None
) -> Guest:
    """A guest whose process does `what` in its place."""
    monkeypatch.setattr(
        server, "CODE", HOSTILE.format(what=what.replace("{", "{{").replace("}", "}}"))
    )
    return Guest(kernel, mem_mib=8, dumpcore="/tmp", warn=lambda _: None, deadline=deadline)


@pytest.mark.parametrize(
    "what",
    [
        "send(b'garbage'); signal.pause()",
        "send(b'\\0' * 4); signal.pause()",
        "send(b'[' * 60000); signal.pause()",
        "send(b'x' * 70000); signal.pause()",
        "started(''); send(b'{\"outcome\": 5}'); signal.pause()",
        "started(''); send(b'\\x80\\x04N.'); signal.pause()",
        'started(""); send(b\'{"outcome": {"reason": "halted", "status": 99999999999}}\')',
        'started(""); [send(b\'{"warning": "x"}\') for _ in range(10000)]',
    ],
)
def test_garbage_ends_a_guest_and_not_the_program(
    guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    running = hostile(monkeypatch, what, guest("exit")).start()
    outcome = running.wait(timeout=PATIENCE_S)
    assert (outcome.reason, outcome.status) == ("host", 1)
    assert isinstance(outcome.error, HostError)
    assert "was killed" in str(outcome.error)
    monkeypatch.undo()


def test_lies_of_a_guest_stay_within_their_limits(
    guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.dumps({
        "outcome": {
            "reason": "halted", "status": 0, "signo": 0, "error": None, "trap": None,
            "core": "/etc/core.solo5-hvt.1",
            "stats": [[0] * 5, [0] * 5, {"\\u001b[2J": [1, 0, 0, 0, 0]}, {}],
        }
    }).encode()  # fmt: skip
    running = hostile(monkeypatch, f"started(''); send({told!r}); os._exit(3)", guest("exit"))
    outcome = running.run()
    assert (outcome.reason, outcome.core) == ("halted", None)
    assert "\x1b" not in "".join(outcome.stats.block)


def test_a_process_that_exits_without_a_report(
    guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = hostile(monkeypatch, "os._exit(3)", guest("exit")).run()
    assert (outcome.reason, str(outcome.error)) == (
        "host", "the guest's process exited without a report (exit status 3)",
    )  # fmt: skip


@pytest.mark.parametrize("speaks", [True, False])
def test_a_sandbox_violation_has_its_system_call(
    guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch, speaks: bool
) -> None:
    record = "send(protocol.VIOLATION.pack(protocol.VIOLATION_MAGIC, 41, 0))" if speaks else "0"
    what = f"started(''); {record}; os.kill(os.getpid(), signal.SIGSYS)"
    outcome = hostile(monkeypatch, what, guest("exit")).run()
    assert (outcome.reason, outcome.signo) == ("sandbox", signal.SIGSYS)
    assert isinstance(outcome.error, SandboxViolation)
    assert outcome.error.number == (41 if speaks else None)


def test_a_bug_shows_where_it_is(guest: Build, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        hostile(monkeypatch, "1 / 0", guest("exit")).start()


def test_a_pidfd_outlives_its_process(guest: Build) -> None:
    """What is signalled after the end is nobody else's process."""
    running = Guest(guest("loop"), mem_mib=8).start()
    assert running.pid
    pidfd = os.pidfd_open(running.pid)
    running.kill()
    assert running.stop().reason == "killed"
    assert select.select([pidfd], [], [], PATIENCE_S)[0]
    os.close(pidfd)


# Processes that are executed.


def addresses_of(pid: int | None) -> set[str]:
    """Where the first bytes of libraries are, and the stack, and what heap came after a fork."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    maps = [line.split(maxsplit=5) for line in lines if line.count("/") or "[" in line]
    wanted = ("/libc.so.6", "_native.abi3.so", "[heap]", "[stack]")
    return {each[0].partition("-")[0] for each in maps if each[5].endswith(wanted)}


def test_a_fresh_guest_shares_no_address_with_others(guest: Build) -> None:
    """Without the sandbox, in which only root can look at a process's addresses."""

    def make(**options: Any) -> Guest:
        return Guest(
            guest("loop"), mem_mib=8, sandbox="off", warn=lambda _: None, **options
        ).start()

    guests = [make(), make(), make(fresh=True), make(fresh=True)]
    forked, other, *fresh = [addresses_of(each.pid) for each in guests]
    assert len(forked) > 8
    assert forked == other
    assert not fresh[0] & fresh[1]
    assert not (fresh[0] | fresh[1]) & forked
    assert [each.stop().reason for each in guests] == ["stopped"] * 4


def test_a_fresh_guest_is_a_guest_like_any_other(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    with open(image, "r+b") as file:
        storage = BlockDescriptor(file.fileno())
        running = Guest(guest("block"), mem_mib=8, block={"storage": storage}, fresh=True)
        assert running.run().status == 0
    assert "SUCCESS" in running.console.text
    assert "seccomp" in running.layers
    with Guest(guest("loop"), mem_mib=8, fresh=True) as running:
        running.console.wait_for("looping", 60)
        assert running.pid
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait(60).reason == "killed"
    with pytest.raises(TenderError, match="no-such-file"):
        Guest("no-such-file", fresh=True).start()
