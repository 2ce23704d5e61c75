"""The sandbox with real guests: every layer is in force, and no policy entry is unused."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tender import Guest
from tender.accel import KINDS
from tender.cli import commandline, policy
from tender.cli.policy import Shown
from tender.cpu import native
from tender.dataclass import replace
from tender.embed import program, server
from tender.errors import HostError, SandboxViolation
from tender.sandbox import seccomp
from tender.sandbox.fdtable import FDS_END, FdTable
from tender.sandbox.policy import Entry
from tender.spt.region import Overlay
from tests.guest import strace
from tests.guest.conftest import CPUS, PTENDER, ROOT, Build, Run, builder
from tests.needs import needs
from tests.waiting import (
    PATIENCE_S,
    children,
    unread,
    wait_until,
    wait_until_asleep,
    wait_until_blocked,
)

LAYERS = [
    "descriptors", "namespaces", "empty root", "user PID", "no capabilities",
    "no new privileges", "not dumpable", "Landlock", "limits", "seccomp",
]  # fmt: skip
ORDINARY = 12345  # a user that no file knows
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")


@pytest.fixture
def namespaces() -> None:
    """What all layers of the sandbox take: not to be had in a chroot, nor in most containers."""
    needs("unshare", "--mount", "--net", "--ipc", "--uts")
    needs("unshare", "--user")


def by_pid(text: str) -> str:
    """The layers as in LAYERS: with the user of a tender's own as `user PID`."""
    return re.sub(r"\buser 18[78][0-9]{7}\b", "user PID", text)


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    settings: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [str(PTENDER), *map(str, arguments)], text=True, **(settings | options)
    )


@pytest.fixture
def looping(cpu: str, guest: Build) -> Iterator[Callable[..., int]]:
    """Start a guest that never ends; the PID of its tender, after lockdown."""
    processes = []

    def run(*arguments: object, before: list[str] | None = None, **options: object) -> int:
        command = [*(before or []), str(PTENDER), *map(str, arguments), str(guest("loop"))]
        process = subprocess.Popen(  # type: ignore[call-overload]
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        processes.append(process)
        while "SUCCESS" not in (line := process.stdout.readline()) and "loop" not in line:
            assert line, "it has ended"
        return int(process.pid)

    yield run
    for each in processes:
        each.kill()
        each.communicate()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces_of(pid: int | str) -> dict[str, str]:
    folder = Path(f"/proc/{pid}/ns")
    return {name: os.readlink(folder / name) for name in ("mnt", "net", "ipc", "uts", "user")}


@as_root
@pytest.mark.usefixtures("namespaces")
def test_the_layers_of_root(looping: Callable[..., int], cpu: str) -> None:
    pid = looping("--mem=8", stdin=subprocess.DEVNULL)
    status = status_of(pid)
    assert set(status["Uid"].split() + status["Gid"].split()) == {str(0x70000000 + pid)}
    assert status["Groups"] == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.listdir(f"/proc/{pid}/root") == []
    mine, its = namespaces_of("self"), namespaces_of(pid)
    assert all(mine[name] != its[name] for name in ("mnt", "net", "ipc", "uts"))
    assert mine["user"] == its["user"], "root needs no user namespace"
    found = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
    assert found == (
        [1, 2, 11] if cpu == "soft" else [1, 2, 3, 11]
    )  # the vCPU, or the guest's process
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    assert re.search(rf"Max open files +{FDS_END} +{FDS_END} ", limits)
    assert "unlimited" not in re.search(r"Max address space.*", limits)[0]  # type: ignore[index]
    assert os.stat(f"/proc/{pid}/fd").st_uid == 0, "not dumpable: its files in /proc are root's"


@as_root
def test_another_user(looping: Callable[..., int]) -> None:
    status = status_of(looping("--mem=8", "--user=daemon"))
    assert status["Uid"].split()[0] == str(__import__("pwd").getpwnam("daemon").pw_uid)
    status = status_of(looping("--mem=8", "--user", "4321:8765"))
    assert (status["Uid"].split()[0], status["Gid"].split()[0]) == ("4321", "8765")


def ordinary() -> list[str]:
    """Run a command as an ordinary user who can still read the files of this checkout: by a
    capability that the sandbox has to drop."""
    options = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]
    options += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    needs(*options)
    return options


def ordinary_with(cpu: str, folder: Path) -> list[str]:
    """The same, with a /dev/kvm that anybody may open; `folder` is for a mount."""
    if cpu != "kvm":
        return ordinary()
    needs("unshare", "--mount")
    kvm = os.stat("/dev/kvm").st_rdev
    script = (
        f'mount -t tmpfs none "$1"; mknod -m 666 "$1/kvm" c {os.major(kvm)} {os.minor(kvm)}; '
        'mount --bind "$1/kvm" /dev/kvm; shift; exec "$@"'
    )
    return ["unshare", "--mount", "--", "sh", "-ec", script, "sh", str(folder), *ordinary()]


@as_root
@pytest.mark.usefixtures("namespaces")
def test_the_layers_of_an_ordinary_user(
    looping: Callable[..., int], cpu: str, tmp_path: Path
) -> None:
    pid = looping("--sandbox=require", "--mem=8", before=ordinary_with(cpu, tmp_path))
    status = status_of(pid)
    assert set(status["Uid"].split()) == {str(ORDINARY)}
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.listdir(f"/proc/{pid}/root") == []
    mine, its = namespaces_of("self"), namespaces_of(pid)
    assert all(mine[name] != its[name] for name in mine)


@as_root
def test_the_guests_descriptors_and_no_others(
    looping: Callable[..., int], guest: Build, cpu: str, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    stray = os.open("/dev/zero", os.O_RDONLY)
    process = start(
        "--mem=8", f"--net=@{theirs.fileno()}", "-v", guest("ping"),
        pass_fds=[theirs.fileno(), stray],
    )  # fmt: skip
    try:
        assert process.stdout
        while "listening" not in process.stdout.readline():
            assert process.poll() is None
        found = sorted(map(int, os.listdir(f"/proc/{process.pid}/fd")))
        assert found == ([1, 2, 11, 17] if cpu == "soft" else [1, 2, 3, 11, 17])
    finally:
        process.terminate()
        process.communicate()
        os.close(stray)
        ours.close()
        theirs.close()


@as_root
@pytest.mark.usefixtures("namespaces")
def test_verbose_names_every_layer(ptender: Run, guest: Build) -> None:
    done = ptender("-v", "--mem=8", guest("exit"))
    assert f"ptender: sandbox: {', '.join(LAYERS)}\n" in by_pid(done.stderr)
    assert "sandbox" not in ptender("--mem=8", guest("exit")).stderr


def test_off_warns_every_time(ptender: Run, guest: Build) -> None:
    for _ in range(2):
        done = ptender("--sandbox=off", "--mem=8", guest("exit"))
        assert done.returncode == 0
        assert done.stderr == (
            "ptender: sandbox: off: a guest that takes over the tender has all of its rights\n"
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sandbox=maybe"], "--sandbox: 'maybe' is not on, require or off"),
        (["--user=nosuchuser"], "--user=nosuchuser: there is no user 'nosuchuser'"),
        (["--user=1000:nosuch"], "--user=1000:nosuch: there is no group 'nosuch'"),
        (["--user=root"], "--user=root: name an unprivileged user and group, not root's"),
        (["--user=0:5"], "not root's"),
        (["--user=5:0"], "not root's"),
        (["--user=99999999999"], "--user=99999999999: name an unprivileged user"),
        ([f"--user={'9' * 5000}"], "ptender: --user=9999"),
        (["--user="], "has an empty value"),
        (["--user=5", "--sandbox=off"], "no effect with --sandbox=off"),
    ],
)
@as_root
def test_wrong_options(ptender: Run, guest: Build, arguments: list[str], text: str) -> None:
    done = ptender(*arguments, guest("exit"))
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@as_root
def test_only_root_can_change_the_user(ptender: Run, guest: Build) -> None:
    command = [*ordinary(), str(PTENDER), "--user=4321", "--cpu=soft", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "ptender: --user=4321: only root can change the user\n",
    )


def without_namespaces() -> list[str]:
    """A machine where nobody gets a namespace: a limit of 0 in a user namespace of its own."""
    code = (
        "for name in mnt net ipc uts cgroup user; do "
        'echo 0 > /proc/sys/user/max_${name}_namespaces; done; exec "$@"'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", code, "sh"]
    needs(*command)
    return command


@as_root
def test_a_missing_layer_is_reported_or_an_error(guest: Build, kvm: None) -> None:
    command = [*without_namespaces(), str(PTENDER), "-v", "--mem=8", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "ptender: sandbox: no namespaces: No space left on device\n" in done.stderr
    assert "ptender: sandbox: no empty root: it needs the namespaces\n" in done.stderr
    assert "bounding set" not in done.stderr, "root of its user namespace can empty it"
    command.insert(-1, "--sandbox=require")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "ptender: sandbox: no namespaces: No space left on device (--sandbox=require)\n"
    )


@as_root
@pytest.mark.usefixtures("namespaces")
def test_a_program_gets_the_missing_layers(guest: Build, kvm: None) -> None:
    """The same texts as the command's; on this machine no layer is missing."""
    code = (
        "import sys; from tender import Guest\n"
        "with Guest(sys.argv[1], mem_mib=8) as guest:\n"
        "    print(*guest.layers, sep='; '); print(*guest.missing_layers, sep='; ')\n"
    )
    program = [sys.executable, "-c", code, str(guest("loop"))]
    done = subprocess.run(program, capture_output=True, text=True)
    assert by_pid(done.stdout) == f"{'; '.join(LAYERS)}\n\n", done
    done = subprocess.run([*without_namespaces(), *program], capture_output=True, text=True)
    there, missing = done.stdout.splitlines()
    assert "namespaces" not in there
    assert "empty root" not in there
    assert "seccomp" in there
    assert missing.split("; ")[:2] == [
        "namespaces: No space left on device",
        "empty root: it needs the namespaces",
    ]


@as_root
@pytest.mark.usefixtures("namespaces")
def test_a_bounding_set_that_stays_is_reported_or_an_error(guest: Build, cpu: str) -> None:
    lost = ["setpriv", "--bounding-set=-setpcap", "--inh-caps=-setpcap"]
    command = [*lost, str(PTENDER), "-v", "--mem=8", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done
    missing = "ptender: sandbox: no empty bounding set: Operation not permitted"
    assert f"{missing}\n" in done.stderr
    assert f"ptender: sandbox: {', '.join(LAYERS)}\n" in by_pid(done.stderr)
    command.insert(-1, "--sandbox=require")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"{missing} (--sandbox=require)\n")
    empty = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [*empty, str(PTENDER), "-v", "--cpu=soft", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "sandbox: no namespaces: " in done.stderr
    assert "bounding set" not in done.stderr, "it was empty before"


@as_root
def test_a_tender_that_stays_root_says_so(guest: Build) -> None:
    lost = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [*lost, str(PTENDER), "--cpu=soft", "--mem=8", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, by_pid(done.stderr)) == (
        0,
        "ptender: sandbox: no user PID: Operation not permitted: the tender stays root, without "
        "capabilities; start it as an ordinary user\n",
    )


@as_root
def test_two_tenders_of_root_cannot_signal_each_other(looping: Callable[..., int]) -> None:
    first, second = looping("--mem=8"), looping("--mem=8")
    uid = status_of(first)["Uid"].split()[0]
    code = f"import os; os.setuid({uid}); os.kill({first}, 0); os.kill({second}, 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PermissionError" in done.stderr
    code = f"import os; os.setuid({uid}); os.kill({first}, 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@as_root
def test_a_user_that_is_not_mapped(guest: Build) -> None:
    """Root of a user namespace as containers have it: 65536 ids."""
    command = [str(PTENDER), "-v", "--cpu=soft", "--mem=8", str(guest("exit"))]
    code = (
        "import os, sys; made, report = os.pipe(); go, hold = os.pipe()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    __import__('ctypes').CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER\n"
        "    os.write(report, b'!'); os.read(go, 1); os.setgid(0); os.setuid(0)\n"
        "    os.execv(sys.argv[1], sys.argv[1:])\n"
        "os.read(made, 1)\n"
        "for kind in 'uid', 'gid':\n"
        "    with open(f'/proc/{pid}/{kind}_map', 'w') as map: map.write('0 0 65536')\n"
        "os.write(hold, b'!')\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert by_pid(done.stderr).startswith(
        "ptender: sandbox: this user namespace does not map user PID: the tender becomes 65534, "
        "as others may (--user=UID names another)\n"
    )
    assert "empty root, user 65534, no capabilities" in done.stderr


@as_root
def test_without_proc(guest: Build) -> None:
    command = ["unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh"]
    needs(*command)
    command += [str(PTENDER), "-v", "--cpu=soft"]
    done = subprocess.run([*command, str(guest("exit"))], capture_output=True, text=True)
    assert done.returncode == 0, done
    missing = "sandbox: no limit to memory: /proc: No such file or directory"
    assert f"ptender: {missing}\n" in done.stderr
    command += ["--sandbox=require", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ptender: {missing} (--sandbox=require)\n"


@as_root
@pytest.mark.usefixtures("namespaces")
def test_limits_that_are_lower_stay(looping: Callable[..., int], cpu: str, tmp_path: Path) -> None:
    """An ordinary user may not raise them again, and need not: the others are taken."""
    before = ["prlimit", "--fsize=16777216", "--core=0", *ordinary_with(cpu, tmp_path)]
    pid = looping("--mem=8", "--sandbox=require", before=before)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max file size +(0|16777216) ", limits), limits
    for name in ("Max core file size", "Max msgqueue size"):
        assert re.search(rf"{name} +0 +0 ", limits), limits
    assert re.search(rf"Max open files +{FDS_END} +{FDS_END} ", limits), limits


def test_room_for_descriptors(guest: Build) -> None:
    command = ["prlimit", "--nofile=64", str(PTENDER), "--cpu=soft", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"ptender: sandbox: descriptors: [0-9]+ are needed, "
        r"but the limit is 64 \(ulimit -n\)\n",
        done.stderr,
    ), done


def test_without_the_library(guest: Build) -> None:
    code = (
        "import os; from tender.cli import main; from tender.sandbox import seccomp; "
        "seccomp.LIBRARY = b'libnothing.so.9'; "
        f"os._exit(main.main(['ptender', *{{}}, {str(guest('exit'))!r}]))"
    )
    run = [sys.executable, "-c"]
    done = subprocess.run([*run, code.format("[]")], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"ptender: sandbox: no libseccomp \(.*\): apt install libseccomp2 "
        r"\(or use --sandbox=off\)\n",
        done.stderr,
    ), done
    off = code.format("['--sandbox=off', '--cpu=soft']")
    assert subprocess.run([*run, off], capture_output=True, text=True).returncode == 0


def denied(call: str, argument: object, error: int, *command: object) -> list[str]:
    """A command that runs without a system call, as in some containers."""
    words = [call, argument, error, *command]
    return [sys.executable, "-m", "tests.guest.denied", *map(str, words)]


@pytest.mark.parametrize(("argument", "error"), [(2, errno.EINVAL), ("-", errno.EPERM)])
def test_without_seccomp(guest: Build, argument: object, error: int) -> None:
    """gVisor has no SECCOMP_GET_ACTION_AVAIL (2)."""
    command = denied("seccomp", argument, error, PTENDER, "--cpu=soft", guest("exit"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr == (
        "ptender: sandbox: no seccomp: seccomp(2) does not offer SECCOMP_RET_KILL_PROCESS here "
        "(--sandbox=off does without)\n"
    )


def test_a_program_without_pidfd_open(guest: Build) -> None:
    code = "import sys, tender\ntry: tender.Guest(sys.argv[1]).run()\n"
    code += "except tender.errors.HostError as error: print(error)\n"
    command = denied("pidfd_open", "-", errno.EPERM, sys.executable, "-c", code, guest("exit"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == (
        "cannot start a process for the guest: pidfd_open(2) must be allowed (Linux 5.3): "
        "Operation not permitted\n"
    ), done


@as_root
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_without_close_range(looping: Callable[..., int], cpu: str, error: int) -> None:
    stray = os.open("/dev/zero", os.O_RDONLY)
    before = denied("close_range", "-", error)
    pid = looping("--mem=8", "--cpu=soft", before=before, cwd=ROOT, pass_fds=[stray])
    os.close(stray)
    assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [1, 2, 11]


def test_a_taken_over_tender_ends(guest: Build, cpu: str) -> None:
    """A handler that opens a file stands for a guest that took its tender over."""
    code = (
        "import os; from tender.cli import main; from tender.modules import console; "
        "console.Console.puts = lambda *_: os.open('/', os.O_RDONLY); "
        f"os._exit(main.main(['ptender', '--engine=python', '--mem=8', {str(guest('exit'))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSYS, done


def test_a_bug_of_ours_after_lockdown_is_reported(guest: Build, cpu: str) -> None:
    code = (
        "import os; from tender.cli import main; from tender.modules import console; "
        "console.Console.puts = lambda *_: 1 // 0; "
        f"os._exit(main.main(['ptender', '--engine=python', '--mem=8', {str(guest('exit'))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done
    assert "ptender: ZeroDivisionError: integer division or modulo by zero\n" in done.stderr
    assert "tender/loop.py:" in done.stderr
    assert done.stderr.endswith("internal error (ZeroDivisionError): this is a bug in ptender\n")


def test_the_tenders_own_memory_may_grow(guest: Build, cpu: str) -> None:
    """... and does so without calls that no entry allows: a list of some megabytes."""
    code = growing(["--engine=python", "--mem=8", str(guest("exit"))])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done


def growing(line: list[str]) -> str:
    return (
        "import os; from tender.cli import main; from tender.modules import console; "
        "console.Console.puts = lambda *_: [each for each in range(400_000)].clear(); "
        f"os._exit(main.main(['ptender', *{line!r}]))"
    )


@pytest.mark.parametrize("log", ["a pipe", "a file"])
def test_a_disk_gets_no_longer(guest: Build, cpu: str, tmp_path: Path, log: str) -> None:
    """A tender that writes beyond its guest's disk stands for one that was taken over."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    code = (
        "import os, sys; from tender.cli import main; from tender.modules import console; "
        "from tender.host import block; "
        "devices = []; before = block.attach; "
        "block.attach = lambda *a: devices.append(before(*a)) or devices[0]; "
        "console.Console.puts = lambda *_: os.pwrite(devices[0].fd, b'x', int(sys.argv[1])); "
        "os._exit(main.main(['ptender', '--engine=python', '--mem=8', "
        f"{f'--block={image}'!r}, {str(guest('disk'))!r}]))"
    )
    with open(tmp_path / "log", "w") as file:
        output = subprocess.PIPE if log == "a pipe" else file
        for offset in (1 << 20, 1 << 40, (1 << 63) - 1):
            command = [sys.executable, "-c", code, str(offset)]
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE)
            assert done.returncode == -signal.SIGSYS, done
    assert image.stat().st_size == 1 << 20


def test_a_disk_is_written_to_its_last_byte(guest: Build, cpu: str, tmp_path: Path) -> None:
    """... and where no log is a file, not even a call that begins inside makes it longer."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    code = (
        "import os; from tender.cli import main; from tender.modules import console; "
        "from tender.host import block; "
        "devices = []; before = block.attach; "
        "block.attach = lambda *a: devices.append(before(*a)) or devices[0]; "
        "console.Console.puts = lambda *_: os.pwrite(devices[0].fd, b'xy', (1 << 20) - 1); "
        "os._exit(main.main(['ptender', '--engine=python', '--mem=8', "
        f"{f'--block={image}'!r}, {str(guest('disk'))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert image.stat().st_size == 1 << 20
    assert image.read_bytes().endswith(b"x")


# The server warms up with this as well, without a sandbox: nothing that does harm there.
TAKEN_OVER = """
import sys; sys.path[:] = {{path!r}}
import os
from tender import accel
from tender.embed import forkserver
from tender.modules import console
accel.uses_engine = lambda *_: False
console.Console.puts = lambda *_: {what}
forkserver.main({{fds}})
"""


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("os.open('/', os.O_RDONLY)", "openat"),
        ("os.kill(0, 0)", "kill"),
        ("os.read(1, 5)", "read"),
        ("os.write(2, b'forged')", "write"),
        ("os.listdir()", "openat"),
    ],
)
def test_a_program_gets_the_call_of_a_violation(
    guest: Build, cpu: str, monkeypatch: pytest.MonkeyPatch, what: str, name: str
) -> None:
    monkeypatch.setattr(server, "CODE", TAKEN_OVER.format(what=what))
    with fresh_server(monkeypatch):
        outcome = Guest(guest("exit"), mem_mib=8).run()
    assert (outcome.reason, outcome.signo) == ("sandbox", signal.SIGSYS), outcome
    assert isinstance(outcome.error, SandboxViolation)
    assert re.search(rf"\b{name}\b", str(outcome.error)), outcome.error


def test_a_bug_of_ours_is_an_outcome(
    guest: Build, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(server, "CODE", TAKEN_OVER.format(what="1 // 0"))
    with fresh_server(monkeypatch):
        outcome = Guest(guest("exit"), mem_mib=8, warn=warnings.append).run()
    assert (outcome.reason, outcome.status) == ("host", 1), outcome
    assert isinstance(outcome.error, HostError)
    assert warnings[0].startswith("ZeroDivisionError: ")


@contextmanager
def fresh_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of its own for one test: the program's, if any, is left alone."""
    with monkeypatch.context() as patch:
        patch.setattr(program, "_program", None)
        yield
        own = program._program
        if own is not None:
            own.close()


# `ptender policy` shows what a run has.


def shown(*line: object) -> Shown:
    config = commandline.parse([str(word) for word in line]).config
    assert config is not None
    return policy.show(config)


def ptender_policy(*line: object) -> str:
    done = subprocess.run([str(PTENDER), "policy", *map(str, line)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_policy_as_text(guest: Build, cpu: str) -> None:
    text = ptender_policy("--net", "tap7", guest("ping"))
    assert "17  @net                    network device 'service': tap7\n" in text
    assert ("ioctl(@vcpu, KVM_RUN)" in text) == (cpu == "kvm")
    assert ("write and execute" in text) == (cpu == "soft")
    assert "pwrite64" not in text
    assert text == ptender_policy(guest("ping"), "--net=tap7")  # the kernel may come first
    assert max(len(line) for line in text.splitlines()) < 100


def test_policy_for_a_read_only_disk(guest: Build, cpu: str) -> None:
    text = ptender_policy("--block", "nowhere.img,ro", guest("block"))
    assert "block device 'storage': nowhere.img, read-only\n" in text
    assert "pread64(@block)" in text
    assert "pwrite64" not in text
    text = ptender_policy("--block", "nowhere.img", guest("block"))
    assert "pwrite64(@block-writable, _, <=0x100000, <SIZE)" in text


def test_policy_for_programs(guest: Build, cpu: str) -> None:
    facts = json.loads(ptender_policy("--json", guest("exit")))
    assert facts["cpu"] == cpu
    assert {"number": 2, "names": ["stderr"], "is": policy.MEANINGS["stderr"]} in facts[
        "descriptors"
    ]
    assert all(call["reason"] for call in facts["calls"])
    compiled = b"".join(
        code.to_bytes(2, "little") + bytes([jt, jf]) + k.to_bytes(4, "little")
        for code, jt, jf, k in facts["bpf"]
    )
    assert compiled == seccomp.compile(shown(guest("exit")).main)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ([], "Missing KERNEL operand"),
        (["--sandbox=off", "{exit}"], "--sandbox=off: there is no policy without the sandbox"),
        (["{ping}"], "All declared devices must be attached"),
        (["/nonexistent"], "/nonexistent"),
        (["--nonsense", "{exit}"], "Invalid option: `--nonsense'"),
    ],
)
def test_policy_of_nothing(guest: Build, line: list[str], text: str) -> None:
    names = {name: str(guest(name)) for name in ("exit", "ping")}
    command = [str(PTENDER), "policy", *(word.format(**names) for word in line)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_filter_that_is_shown_is_the_one_that_is_installed(
    guest: Build, cpu: str, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    code = (
        "import sys; from tender.cli import main; from tender.sandbox import seccomp; "
        "seccomp.install = lambda compiled: sys.stderr.write(compiled.hex() + '\\n'); "
        "main.main(['ptender', *sys.argv[1:]])"
    )
    line = ["--mem=8", f"--dumpcore={tmp_path}", f"--trace={tmp_path}/trace"]
    line += [f"--report={tmp_path}/report", f"--snapshots={tmp_path}"]
    line += ["--block", str(image), str(guest("block"))]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
    raw = subprocess.run([str(PTENDER), "policy", "--bpf", *line], capture_output=True)
    assert done.stderr.split("\n")[0] == raw.stdout.hex(), (done, raw)


def test_a_filter_is_not_written_to_a_terminal(guest: Build) -> None:
    ours, terminal = pty.openpty()
    command = [str(PTENDER), "policy", "--bpf", str(guest("exit"))]
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True)
    os.close(terminal)
    os.close(ours)
    assert (done.returncode, done.stderr) == (
        2,
        "ptender: --bpf: output is binary; add | scmp_bpf_disasm, or > FILE\n",
    )


# Every entry is used, and nothing is asked for that is in no entry.


class Suite:
    """Runs guests under strace, and keeps which entries they have used."""

    def __init__(self, folder: Path, guest: Build) -> None:
        self.folder, self.guest = folder, guest
        self.used: set[Entry] = set()
        self._done: set[tuple[str, str]] = set()

    def once(self, name: str, cpu: str) -> None:
        """A scenario, if it has not been run yet."""
        if (name, cpu) not in self._done:
            SCENARIOS[name](self, cpu)
            self._done.add((name, cpu))

    def take(self, shown: Shown, threads: dict[str, list[strace.Call]]) -> None:
        # A native guest's process has a filter of its own; a fork server runs one to warm up.
        own = {"futex", "rt_sigreturn"}
        threads = {
            thread: calls
            for thread, calls in threads.items()
            if not {name for name, _ in calls} <= own
        }
        found, strange = strace.used(shown, threads)
        assert threads, "no thread entered the sandbox"
        if "epoll" in shown.table.fixed:
            strange = [each for each in strange if not is_answered(*each)]
        assert not strange, "calls that are in no entry, and went on all the same"
        self.used |= found

    def run(
        self,
        *line: object,
        status: int = 0,
        until: strace.Until | None = None,
        labels: tuple[str, ...] = (),
        **how: object,
    ) -> None:
        """A command to its end; with `until`, to the signal that it gets once that has returned.

        `labels` are of descriptors that the environment asks for.
        """
        done, threads = strace.traced(self.folder, [str(PTENDER), *map(str, line)], until, **how)
        assert done.returncode == status, done
        self.take(with_labels(shown(*line), labels), threads)

    def program(self, cpu: str, kinds: tuple[str, ...], source: str, sync: bool = False) -> None:
        """A program whose guests have a device of each of these kinds, or of one of them."""
        names = ("block", "disk", "ping", "sleep")
        file = self.folder / "program.py"
        file.write_text(source.format(cpu=cpu, **{name: str(self.guest(name)) for name in names}))
        there = {**os.environ, "PYTHONPATH": str(ROOT)}  # it waits as the tests do
        done, threads = strace.traced(self.folder, [sys.executable, str(file)], env=there)
        assert done.returncode == 0, done
        single = ["console", "report", *KINDS[cpu].labels]
        single += ["sync"] if sync else []
        table = FdTable(cpu, tuple(single), {1: kinds}, {})
        self.take(Shown(table, {}, seccomp.build(table.policies(), table), []), threads)


def with_labels(expected: Shown, labels: tuple[str, ...]) -> Shown:
    """The same with descriptors of these labels."""
    table = replace(expected.table, fixed=(*expected.table.fixed, *labels))
    return replace(expected, table=table, main=seccomp.build(table.policies(), table))


DISK = """
from tender import Guest

class Disk:
    capacity = 1 << 20
    def __init__(self): self.data = bytearray(self.capacity)
    def read(self, offset, length): return bytes(self.data[offset : offset + length])
    def write(self, offset, data): self.data[offset : offset + len(data)] = data

guest = Guest({disk!r}, mem_mib=8, cpu={cpu!r}, block={{"storage": Disk()}})
assert guest.run().status == 0
"""

IDLE = """
from tender import Guest
assert Guest({sleep!r}, "2000", mem_mib=8, cpu={cpu!r}).run().status == 0
"""

VIRTUAL = """
from tender import Guest, VirtualTime
from tender.testing import Switch
switch = Switch(virtual=True)
with Guest({ping!r}, mem_mib=8, cpu="soft", clock=VirtualTime(), net={{"service": switch.port()}}):
    assert switch.host("10.0.0.1/24").ping("10.0.0.2", count=3).received == 3
"""


def is_answered(name: str, arguments: tuple[int, ...]) -> bool:
    """Whether an spt guest's handler answers this call, which the filter traps."""
    return name == "exit_group" or (bool(arguments) and arguments[0] in OVERLAY_FDS)


OVERLAY_FDS = range(Overlay.guest_fd(0), Overlay.guest_fd(64))
CLOCK = "the clock of this machine is in the vDSO (as on all but the oldest)"
UNSEEN = {"clock_gettime": CLOCK}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, guest: Build) -> Suite:
    return Suite(tmp_path_factory.mktemp("strace"), guest)


@contextmanager
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    with ours, theirs:
        yield ours, theirs


def arp_request() -> bytes:
    me = bytes.fromhex("020000000001")
    ask = bytes.fromhex("0001080006040001") + me + bytes([10, 0, 0, 1]) + bytes(6)
    return b"\xff" * 6 + me + bytes.fromhex("0806") + ask + bytes([10, 0, 0, 2])


def the_usual_ends(suite: Suite, cpu: str) -> None:
    suite.run("-v", "--mem=8", suite.guest("exit"))
    suite.run("--mem=8", suite.guest("hlt"), status=1)
    suite.run("--mem=8", suite.guest("sleep"))
    suite.run("--mem=8", suite.guest("loop"), status=1, until=strace.says("looping"))
    if cpu == "soft":
        suite.run("--mem=8", suite.guest("instructions"))  # RDRAND
        disk, record = suite.folder / "small.img", f"--record={suite.folder}/record"
        disk.write_bytes(bytes(1 << 16))
        suite.run(record, "--mem=8", f"--block={disk}", suite.guest("disk"))
        suite.run(f"--replay={suite.folder}/record")


def much_memory(suite: Suite, cpu: str) -> None:
    """A long list stands for whatever may make Python's own memory grow."""
    line = ["--engine=python", "--mem=8", str(suite.guest("exit"))]
    done, threads = strace.traced(suite.folder, [sys.executable, "-c", growing(line)])
    assert done.returncode == 0, done
    suite.take(shown(*line), threads)


def exceptions(suite: Suite, cpu: str) -> None:
    for name in ("zeropage", "notls"):
        suite.run("--mem=8", suite.guest(name), status=255)


def disks(suite: Suite, cpu: str) -> None:
    image = suite.folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    for engine in ("c", "python"):
        disk = ["--mem=8", f"--engine={engine}"]
        suite.run(*disk, f"--block={image}", suite.guest("disk"))
        suite.run(*disk, f"--block={image},overlay", suite.guest("disk"))
        suite.run(*disk, f"--block={image},sync=fsync", suite.guest("disk"))
        slow = [f"--block={image}", "--block-rate=200ops,burst=1ops"]
        suite.run(*disk, *slow, suite.guest("disk"))
        overlay = f"--block={image},overlay={suite.folder}/overlay-{engine}-{cpu},sync=fsync"
        suite.run(*disk, overlay, suite.guest("disk"))


def ping_once(suite: Suite, *options: str) -> None:
    with wire() as (ours, theirs):

        def answered(process: subprocess.Popen[str]) -> None:
            frames = [ours.recv(2000) for _ in range(2)]
            assert all(frame[12:14] == b"\x08\x06" for frame in frames), "announced, and answered"
            ours.close()
            assert process.stderr
            assert any("disconnected" in line for line in process.stderr)

        ours.send(arp_request())
        line = [*options, "--mem=8", f"--net=@{theirs.fileno()}", suite.guest("ping")]
        suite.run(*line, status=1, until=answered, pass_fds=[theirs.fileno()])


def networks(suite: Suite, cpu: str) -> None:
    for engine in ("c", "python"):
        ping_once(suite, f"--engine={engine}", f"--pcap={suite.folder}/packets")


def cores_and_traces(suite: Suite, cpu: str) -> None:
    core = [f"--dumpcore={suite.folder}", "--mem=8", suite.guest("dumpcore")]
    suite.run(*core, status=255)
    files = f"--trace={suite.folder}/trace", f"--report={suite.folder}/report"
    suite.run(*files, "--mem=8", suite.guest("exit"))
    assert any(path.name.startswith("core.") for path in suite.folder.iterdir())


def a_wait_that_was_stopped(suite: Suite, cpu: str) -> None:
    """SIGSTOP and SIGCONT while the tender waits for room on its console."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stopped(process: subprocess.Popen[str]) -> None:
        os.close(writer)
        wait_until(lambda: unread(reader))  # before, strace tries things out
        tender = children(process.pid)[0]
        wait_until_blocked(tender, reader)
        os.kill(tender, signal.SIGSTOP)
        wait_until(lambda: "stopped by SIGSTOP" in (suite.folder / "strace").read_text())
        os.kill(tender, signal.SIGCONT)
        wait_until_asleep(tender)

    suite.run("--mem=8", suite.guest("flood"), status=1, until=stopped, stdout=writer)
    os.close(reader)


def the_ring(suite: Suite, cpu: str) -> None:
    if cpu == "kvm":  # the software CPU offers none
        ping_once(suite, "--net-ring", f"--pcap={suite.folder}/packets")
        with wire() as (_, theirs):
            line = ["--net-ring", "--mem=8", f"--net=@{theirs.fileno()}"]
            forged = [*line, suite.guest("ringforge"), "index"]
            suite.run(*forged, status=1, pass_fds=[theirs.fileno()])


def a_program(suite: Suite, cpu: str) -> None:
    suite.program(cpu, ("block-remote",), DISK)
    suite.program(cpu, (), IDLE)
    if cpu == "soft":
        suite.program(cpu, ("net",), VIRTUAL, sync=True)


def a_debugger(suite: Suite, cpu: str) -> None:
    path = suite.folder / "gdb.sock"

    def debugged(process: subprocess.Popen[str]) -> None:
        assert process.stderr
        assert any("waiting for a debugger" in line for line in process.stderr)
        with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as second:
            sock.connect(str(path))
            for asked in (b"$g#67", b"$P0=0000000000000000#bd", b"$vCont;c#a8"):
                sock.sendall(asked)
            second.connect(str(path))
            assert second.recv(1) == b""
            assert process.stdout
            assert any("looping" in line for line in process.stdout)
            answers = b""
            for asked in (b"\x03", b"$vCont;c#a8\x03"):  # when it has printed, and in its loop
                sock.sendall(asked)
                before = answers.count(b"$T02")
                while answers.count(b"$T02") == before:
                    answers += sock.recv(10000)
            assert b"$OK#" in answers

    suite.run("--mem=8", f"--gdb={path}", suite.guest("loop"), status=1, until=debugged)
    (suite.folder / "packets").write_bytes(b"$?#3f$D#44")
    with open(suite.folder / "packets") as packets:
        suite.run("--mem=8", "--gdb=-", suite.guest("exit"), stdin=packets)


def a_service(suite: Suite, cpu: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(suite.folder / f"manager-{cpu}"))
        there = {**os.environ, "NOTIFY_SOCKET": str(manager.getsockname())}
        suite.run("--mem=8", suite.guest("exit"), labels=("notify",), env=there)


def an_spt_guest(suite: Suite, cpu: str) -> None:
    if cpu != "native":  # it runs on none of them
        return
    guest = builder(suite.folder / "spt", "--target=spt")
    image = suite.folder / "spt.img"
    image.write_bytes(bytes(1 << 20))
    suite.run("--mem=8", f"--block={image}", guest("disk"))
    suite.run("--mem=8", f"--report={suite.folder}/spt-report", guest("time"))
    suite.run("--mem=8", guest("tls"))
    suite.run("--mem=8", f"--block={image},overlay", guest("disk"))
    exception = ["--mem=8", guest("exception")]
    suite.run(*exception, status=-signal.SIGILL)
    core = f"--dumpcore={suite.folder}"
    suite.run(core, *exception, status=-signal.SIGILL)
    suite.run(core, "--mem=8", guest("exit"), "42", status=42)
    source = f"from tender import Guest\nGuest({str(guest('exception'))!r}, mem_mib=8).run()\n"
    _, threads = strace.traced(suite.folder, [sys.executable, "-c", source])
    suite.take(with_labels(shown(*exception), ("report",)), threads)
    with wire() as (ours, theirs):

        def answered(process: subprocess.Popen[str]) -> None:
            assert all(ours.recv(2000)[12:14] == b"\x08\x06" for _ in range(2))

        ours.send(arp_request())
        line = ["--mem=8", f"--net=@{theirs.fileno()}", guest("ping")]
        suite.run(*line, status=-signal.SIGTERM, until=answered, pass_fds=[theirs.fileno()])


def a_saved_guest(suite: Suite, cpu: str) -> None:
    saved = suite.folder / f"saved-{cpu}"

    def save(process: subprocess.Popen[str]) -> None:
        assert process.stdout
        assert process.stdout.readline()  # what the guest says of itself comes after its start
        tender = children(process.pid)[0]
        wait_until_asleep(tender)
        subprocess.run([PTENDER, "snapshot", str(tender), saved], check=True, capture_output=True)

    line = ["--mem=8", f"--snapshots={suite.folder}", suite.guest("sleep"), "3600000"]
    suite.run(*line, status=1, until=save)


SCENARIOS = {
    function.__name__: function
    for function in (
        the_usual_ends, much_memory, exceptions, disks, networks, cores_and_traces,
        a_wait_that_was_stopped, the_ring, a_program, a_debugger,
        a_service, an_spt_guest, a_saved_guest,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_call_is_in_no_entry(suite: Suite, cpu: str, name: str) -> None:
    suite.once(name, cpu)


def test_every_entry_was_used(
    suite: Suite, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that none of the scenarios has used is one too many."""
    if native.missing():
        pytest.skip(native.missing())
    if request.config.getoption("--cpu") != "all" or not os.access("/dev/kvm", os.W_OK):
        pytest.skip("it takes all CPUs")
    for cpu in CPUS:
        monkeypatch.setenv("PTENDER_CPU", cpu)
        for name in SCENARIOS:
            suite.once(name, cpu)
    files = sorted(path.stem for path in (ROOT / "seccomp").glob("*.policy"))
    idle = [
        f"{name}: {entry}"
        for name in files
        for entry in seccomp.entries(name)
        if entry not in suite.used and entry.call not in UNSEEN
    ]
    assert not idle
    print(f"not seen here: {UNSEEN}")
