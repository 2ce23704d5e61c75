"""What a program may be and do around its guests: its signals, limits, forks and interruptions."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from pathlib import Path

import pytest

from tender import BlockMemory, Guest
from tender.embed import program as this_program
from tender.errors import UsageError
from tests.guest.conftest import PTENDER, Build
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.usefixtures("any_cpu")


def program(code: str, kernel: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A program of its own; `kernel` and `words` are its arguments."""
    command = [sys.executable, "-c", f"import os, signal, sys\nfrom tender import *\n{code}"]
    return subprocess.run(
        [*command, str(kernel), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture
def reserve(guest: Build) -> int:
    """The PID of the process that waits for the next guest."""
    Guest(guest("exit"), "0", mem_mib=8).run()
    pid = this_program.program_here().server.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    limit = time.monotonic() + PATIENCE_S
    while not (pids := [pid for pid in children.read_text().split() if not is_zombie(pid)]):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return int(pids[0])


def is_zombie(pid: str) -> bool:
    """A guest that has ended, and that the server has not reaped yet, or just has."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def test_a_deadline_in_a_month_and_one_of_no_end(guest: Build) -> None:
    """The kernel's own limit to a wait is 25 days."""
    for deadline in (30 * 86400, 1e300, float("inf")):
        with Guest(guest("loop"), mem_mib=8, deadline=deadline) as running:
            assert Guest(guest("exit"), "3", mem_mib=8).run().status == 3
            assert running.running


def test_nothing_of_a_guest_stays_until_its_deadline(guest: Build) -> None:
    disk = BlockMemory(1 << 20)
    kept = weakref.ref(disk)
    running = Guest(guest("disk"), mem_mib=8, block={"storage": disk}, deadline=3600)
    assert running.run().reason == "halted"
    del running, disk
    limit = time.monotonic() + PATIENCE_S
    while kept() is not None and time.monotonic() < limit:
        gc.collect()
        time.sleep(0.01)
    assert kept() is None


def test_limits_that_are_none(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        for wrong in (float("nan"), "5"):
            with pytest.raises(UsageError, match="timeout=.* is not a number of seconds"):
                running.wait(wrong)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="grace=.* is not a number of seconds"):
                running.stop(wrong)  # type: ignore[arg-type]
        assert running.running, "stop() with a wrong word has stopped nothing"
    with pytest.raises(UsageError, match="warn='x' is not a function"):
        Guest(guest("loop"), warn="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [SystemExit, KeyError])
def test_warn_may_raise(
    guest: Build, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """... anything: it is reported as a thread's is, and the guest and its end are as ever."""
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))
    warned = threading.Event()

    def warn(_: str) -> None:
        warned.set()
        raise error

    with Guest(guest("flood"), mem_mib=8, console_limit=100, warn=warn) as running:
        assert warned.wait(PATIENCE_S)
        assert running.running
    assert running.wait(PATIENCE_S).reason == "stopped"
    assert reported[0] is error


def test_a_killed_reserve_is_no_guests_end(reserve: int, guest: Build) -> None:
    pidfd = os.pidfd_open(reserve)
    os.kill(reserve, signal.SIGKILL)
    assert select.select([pidfd], [], [], PATIENCE_S)[0], "it has died"
    os.close(pidfd)
    assert Guest(guest("exit"), "3", mem_mib=8).run().status == 3
    with Guest(guest("loop"), mem_mib=8) as running:
        assert running.pid != reserve


def test_what_looks_ended_has_an_outcome(guest: Build) -> None:
    for number in range(20):
        running = Guest(guest("exit"), str(number), mem_mib=8).start()
        if number % 2:
            while running.running:
                pass
        else:
            while True:
                try:
                    running.wait(0)
                    break
                except TimeoutError:
                    pass
        assert running.outcome is not None
        assert running.outcome.status == number


def test_a_guest_that_was_described_before_a_fork(guest: Build) -> None:
    code = """
import select
guest = Guest(sys.argv[1], mem_mib=8)
if not os.fork():
    with guest:
        end = os.pidfd_open(guest.pid)
    print(guest.outcome.reason, guest.running, flush=True)
    print(select.select([end], [], [], 0)[0] == [end], flush=True)
    os._exit(0)
os.wait()
print(guest.running)
"""
    done = program(code, guest("loop"))
    assert (done.stdout, done.stderr) == ("stopped False\nTrue\nFalse\n", ""), done


def test_settings_of_the_program_that_an_exec_hands_on(guest: Build, tmp_path: Path) -> None:
    """SIGCHLD ignored, signals blocked; the umask of each moment."""
    code = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGSYS})
loop, leave, folder = sys.argv[1:]
with Guest(loop, mem_mib=8) as first:
    for mask in (0o22, 0o277):
        os.umask(mask)
        print(Guest(leave, "3", mem_mib=8, trace=f"{folder}/{mask}").run().status)
    print(first.running, first.stop(grace=1000).reason)
print([oct(os.stat(f"{folder}/{mask}").st_mode & 0o777) for mask in (0o22, 0o277)])
"""
    done = program(code, guest("loop"), guest("exit"), tmp_path)
    assert done.stdout == "3\n3\nTrue stopped\n['0o600', '0o400']\n", done
    # The notice on the CPU, where there is one, comes once and not once per guest.
    assert done.stderr == "" or done.stderr.count("; taking the ") == 1


def test_a_command_whose_signals_are_blocked(guest: Build) -> None:
    code = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execv(sys.argv[1], sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(PTENDER), "--mem=8", str(guest("loop"))]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout
    while "loop" not in running.stdout.readline():
        assert running.poll() is None
    running.terminate()
    assert running.communicate(timeout=PATIENCE_S)[1] == "ptender: Exiting on signal 15\n"


def test_few_descriptors(guest: Build) -> None:
    """One line that says how many it takes."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
try:
    Guest(sys.argv[1], mem_mib=8).run()
except TenderError as error:
    print(error)
"""
    done = program(code, guest("exit"))
    wanted = (
        "the guest's process needs 129 descriptors and its limit is 100: raise it (ulimit -n)\n"
    )
    assert done.stdout == wanted, done


def test_children_of_the_program_have_nothing_of_its_guests(guest: Build) -> None:
    code = """
import subprocess
with Guest(sys.argv[1], mem_mib=8) as guest:
    subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False)
"""
    done = program(code, guest("loop"))
    assert " -> /dev/null" in done.stdout or " -> pipe:" in done.stdout, done
    assert not re.search(r"socket:|pidfd|memfd|/dev/kvm", done.stdout), done


def test_standard_error_may_be_closed(guest: Build) -> None:
    code = """
sys.stderr.close(); sys.stderr = None
outcome = Guest(sys.argv[1], mem_mib=8, console_limit=100, deadline=0.5).run()
print(outcome.reason)
"""
    done = program(code, guest("flood"))
    assert done.stdout == "deadline\n", done


def test_a_second_start_does_no_harm_to_the_first(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8) as running:
        for again in (running.start, running.run):
            with pytest.raises(RuntimeError, match="started already"):
                again()
        with pytest.raises(TimeoutError):
            running.wait(0.1)


# Ctrl-C on the main thread: the guest that was being started, or waited for, ends.


def test_ctrl_c_while_a_guest_starts(guest: Build) -> None:
    code = """
import threading
begun, go_on = threading.Event(), threading.Event()

class Slow(BlockMemory):
    def attach(self):
        begun.set()
        go_on.wait()
        return super().attach()

def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
slow = Slow(1 << 20)
guest = Guest(sys.argv[1], mem_mib=8, block={"storage": slow})
try:
    guest.start()
except KeyboardInterrupt:
    go_on.set()
    print(guest.wait(timeout=60).reason, guest.running)
slow.attach()  # it is free for the next
"""
    done = program(code, guest("hold"))
    assert done.stdout == "killed False\n", done


def test_ctrl_c_while_the_end_is_taken_in(guest: Build) -> None:
    """A guest's devices are given back all the same."""
    code = """
import threading
begun, go_on = threading.Event(), threading.Event()

def sink(data):
    if not begun.is_set():
        begun.set()
        go_on.wait()

def interrupt():
    begun.wait()
    os.kill(os.getpid(), signal.SIGINT)

disk = BlockMemory(1 << 20)
guest = Guest(sys.argv[1], mem_mib=8, block={"storage": disk}, console=sink).start()
try:
    threading.Thread(target=interrupt).start()
    guest.wait()
except KeyboardInterrupt:
    go_on.set()
    print(guest.wait(timeout=60).reason)
disk.attach()
"""
    done = program(code, guest("disk"))
    assert done.stdout == "halted\n", done


def test_a_signal_handler_may_stop_a_guest(guest: Build) -> None:
    """... whatever the program is doing with it: starting, waiting, ending it."""
    code = """
import threading
reasons = []

def handler(*_):
    reasons.append(guest.stop().reason)

signal.signal(signal.SIGTERM, handler)
for moment in ("start", "wait", "stop"):
    class Disk(BlockMemory):
        def attach(self):
            if moment == "start":
                os.kill(os.getpid(), signal.SIGTERM)
            return super().attach()

        def detach(self):
            super().detach()
            if moment == "stop":
                os.kill(os.getpid(), signal.SIGTERM)

    guest = Guest(sys.argv[1], mem_mib=8, block={"storage": Disk(1 << 20)})
    guest.start()
    if moment == "wait":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        guest.wait()
    guest.stop()
print(reasons)
"""
    done = program(code, guest("hold"))
    assert done.stdout == "['stopped', 'stopped', 'stopped']\n", done


EMBEDDING = r"""
#include <Python.h>
int main(int argc, char **argv)
{
    (void)argc;
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    PyConfig_SetBytesString(&config, &config.executable, argv[0]);
    Py_InitializeFromConfig(&config);
    return PyRun_SimpleString(CODE);
}
"""


def test_a_program_that_embeds_python_does_not_start_itself_without_end(
    guest: Build, tmp_path: Path
) -> None:
    include, library = sysconfig.get_path("include"), sysconfig.get_config_var("LIBDIR")
    if not Path(include, "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    starts = tmp_path / "starts"
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; open({str(starts)!r}, 'a').write('x')\n"
        f"from tender import Guest\n"
        f"print(Guest({str(guest('exit'))!r}, '3').run().status, flush=True)\n"
    )
    source, binary = tmp_path / "program.c", tmp_path / "program"
    source.write_text(f"#define CODE {json.dumps(code)}\n{EMBEDDING}")
    version = f"-lpython{sysconfig.get_config_var('LDVERSION')}"
    build = ["cc", str(source), f"-I{include}", f"-L{library}", version, "-o", str(binary)]
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip("libpython is not installed")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [binary], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "HostError" in line]
    assert "name one in PTENDER_PYTHON" in errors[-1]
    assert starts.read_text() == "xx"  # itself, and once as the server
    environment["PTENDER_PYTHON"] = sys.executable
    done = subprocess.run(
        [binary], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
    )
    assert (done.stdout, done.returncode) == ("3\n", 0)


def test_an_interpreter_that_is_none(guest: Build) -> None:
    code = "os.environ['PTENDER_PYTHON'] = '/bin/true'\nGuest(sys.argv[1]).run()"
    done = program(code, guest("exit"))
    assert "HostError: cannot start a process for the guest" in done.stderr
    assert "/bin/true has exited: name one in PTENDER_PYTHON" in done.stderr


def test_descriptors_that_run_out(guest: Build) -> None:
    """An error in one line with the remedy, wherever it happens, and nothing is left open."""
    code = """if True:
        import gc, os, resource, sys, time
        from tender import BlockMemory, Guest
        from tender.errors import TenderError
        def make():
            return Guest(sys.argv[1], mem_mib=8, block={"storage": BlockMemory(1 << 16)})
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        def limit(most):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        def opened():
            gc.collect()
            limit(hard)
            return len(os.listdir("/proc/self/fd"))
        for more in range(20):
            limit(opened() + more)
            try:
                with make():
                    break
            except TenderError as error:
                print(error)
        guests = []
        before = opened()
        limit(before + 10)
        try:
            while True:
                guests.append(make().start())
        except TenderError as error:
            print(error)
        assert guests
        for each in guests:
            each.kill()
            each.wait()
        guests.clear()
        del each
        while opened() > before:  # a thread closes the last ones; or this ends at its timeout
            time.sleep(0.01)
        with make() as last:
            last.console.wait_for("held")
        print("goes on")
    """
    command = [sys.executable, "-c", code, str(guest("hold"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), done
    *errors, last = done.stdout.splitlines()
    assert last == "goes on"
    assert len(errors) > 3
    for error in errors:
        assert re.search(r": Too many open files \(raise `ulimit -n`, RLIMIT_NOFILE\)$", error)


def test_another_tender_in_the_path(guest: Build, tmp_path: Path) -> None:
    (tmp_path / "tender").mkdir()
    (tmp_path / "tender" / "__init__.py").write_text("raise ImportError('another one')")
    code = "sys.path.insert(0, sys.argv[2])\nprint(Guest(sys.argv[1], '3').run().status)"
    done = program(code, guest("exit"), tmp_path)
    assert (done.stdout, done.stderr) == ("3\n", "")
