"""`--gdb`: real gdb and real lldb, in batch mode, on guests in the sandbox."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tender import Guest
from tender.cpu import soft
from tender.errors import UsageError
from tests.guest.conftest import PTENDER, Build, builder, shared_folder
from tests.guest.test_usernet import free_port
from tests.waiting import wait_until, wait_until_asleep

Gdb = Callable[..., str]


@pytest.fixture(scope="session")
def debug_guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a guest with debug information."""
    kept = os.environ.get("PTENDER_TEST_GUESTS")  # see conftest.guest
    folder = Path(kept, "debug") if kept else shared_folder(tmp_path_factory, "debug-guests")
    return builder(folder, "-g", "-O", "1")


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture
def breakpoints(cpu: str) -> None:
    """What a test needs that stops a guest anywhere."""
    if cpu == "kvm" and os.environ.get("AMDV"):
        pytest.skip("QEMU's emulation of AMD-V reports neither int3 nor debug registers")


def gdb_command(*commands: str, program: str = "gdb") -> list[str]:
    words = [needs(program), "-nx", "-batch"]
    for command in ("set width 0", "set confirm off", *commands):
        words += ["-ex", command]
    return words


def gdb(*commands: str, program: str = "gdb") -> str:
    done = subprocess.run(
        gdb_command(*commands, program=program),
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout + done.stderr


class Tender:
    """A tender that waits for a debugger at a Unix socket, which is gone with it."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.path = folder / "gdb.sock"
        self.process = subprocess.Popen(
            [PTENDER, "--mem=8", f"--gdb={self.path}", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.process.stdout
        self.first = self.process.stdout.readline()
        self.remote = f"target remote {self.path}"

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        sock.settimeout(100)
        return sock

    def end(self) -> tuple[int, str]:
        """The status and the rest of the output of one that ends by itself."""
        output, _ = self.process.communicate(timeout=100)
        return self.process.returncode, output


@pytest.fixture
def tender(cpu: str, tmp_path: Path) -> Iterator[Callable[..., Tender]]:
    tenders: list[Tender] = []

    def start(*words: object) -> Tender:
        tenders.append(Tender(tmp_path, *words))
        return tenders[-1]

    yield start
    for each in tenders:
        each.process.terminate()
        each.process.communicate(timeout=100)


@pytest.mark.usefixtures("breakpoints")
def test_a_session_over_a_pipe(cpu: str, debug_guest: Build) -> None:
    image = debug_guest("debug")
    text = gdb(
        f"target remote | {PTENDER} --mem=8 --gdb=- {image}",
        "info registers pc",
        "break add_up",
        "continue",
        "backtrace",
        "continue",
        "print by",
        "print counter",
        "finish",
        "print counter",
        "set var counter = 100",
        "delete",
        "stepi",
        "monitor stats",
        "print $xmm3.uint128",
        "print $fctrl",
        "set var $xmm3.uint128 = 7",
        "maintenance flush register-cache",
        "print $xmm3.uint128",
        "continue",
        "print 1",
    )  # no file is named: the tender tells
    assert re.search(r"pc +0x100000 +0x100000 <_start>", text), text
    assert "#1  0x" in text
    assert "in solo5_app_main (info=" in text
    assert "in _start ()" in text
    assert [line for line in text.splitlines() if re.match(r"\$\d+ = ", line)] == [
        "$1 = 2", "$2 = 1", "$3 = 3", "$4 = 0", "$5 = 895", "$6 = 7",
        "$7 = 1",
    ]  # fmt: skip
    assert "console: 2 calls" in text
    assert "hello" in text  # the console is standard error
    assert "[Inferior 1 (Remote target) exited with code 0153]" in text  # 107


@pytest.mark.usefixtures("breakpoints")
def test_a_port_of_this_machine_only(cpu: str, debug_guest: Build) -> None:
    port = free_port()
    image = debug_guest("debug")
    with subprocess.Popen(
        [PTENDER, "--mem=8", "--gdb", f"--gdb-port={port}", image],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        command = f"gdb {image} -ex 'target remote :{port}'"
        assert process.stderr.readline() == f"ptender: waiting for a debugger: {command}\n"
        table = Path("/proc/net/tcp").read_text()
        assert re.search(rf"\d: 0100007F:{port:04X} 00000000:0000 0A", table)
        second = subprocess.run([PTENDER, f"--gdb={port}", image], capture_output=True, text=True)
        assert second.returncode == 1
        assert f"gdb: cannot listen on port {port}: Address already in use" in second.stderr
        text = gdb(f"target remote :{port}", "break hypercalls", "continue", "kill")
        assert "Breakpoint 1, hypercalls ()" in text
        assert process.wait(timeout=100) == 1


@pytest.mark.parametrize("call", ["solo5_clock_wall", "solo5_console_write"])
def test_a_step_over_a_hypercall_is_one_instruction(
    debug_guest: Build, tender: Callable[..., Tender], call: str
) -> None:
    guest = tender(debug_guest("debug"))
    text = gdb(
        guest.remote,
        f"set $pc = {call}",
        "set $rdi = 0x100000",
        "set $rsi = 1",
        *["stepi", "x/2i $pc"] * 20,
        "kill",
    )
    lines = re.findall(r"^(=>)? +(0x[0-9a-f]+).*:\t(.*)$", text, re.M)
    here, behind = next(
        (index, lines[index + 1][1])
        for index, (arrow, _, instruction) in enumerate(lines)
        if arrow and instruction.startswith("out ")
    )
    assert lines[here + 2][1] == behind, text
    assert guest.end()[0] == 1


@pytest.mark.usefixtures("breakpoints")
def test_watchpoints(debug_guest: Build, tender: Callable[..., Tender], cpu: str) -> None:
    guest = tender(debug_guest("debug"))
    text = gdb(
        guest.remote,
        "watch counter", "continue", "continue", "delete",
        "rwatch counter", "continue", "delete",
        "awatch counter", "continue", "backtrace 1", "delete",
        "continue",
    )  # fmt: skip
    if cpu != "soft":
        assert "Could not insert hardware watchpoint" in text
        return
    assert "Old value = 0\nNew value = 1" in text
    assert "Old value = 1\nNew value = 3" in text
    assert "Hardware read watchpoint 2: counter\n\nValue = 3" in text
    assert "Hardware access (read/write) watchpoint 3: counter" in text
    assert "exited with code 012" in text
    assert guest.end()[0] == 10


@pytest.mark.usefixtures("breakpoints")
def test_any_number_of_breakpoints(debug_guest: Build, tender: Callable[..., Tender]) -> None:
    guest = tender(debug_guest("debug"))
    places = ("solo5_app_main", "add_up", "hypercalls", "solo5_clock_wall", "solo5_yield")
    text = gdb(
        guest.remote,
        *(f"break {place}" for place in (*places, "solo5_exit", "*0x10000c")),
        *["continue"] * 10,
    )
    hits = re.findall(r"^Breakpoint \d+, .*?(\w+) \(", text, re.M)
    assert hits == ["solo5_app_main", *["add_up"] * 4, *places[2:], "solo5_exit"]
    assert guest.end()[0] == 10


def test_ctrl_c_in_a_loop_and_in_poll(guest: Build, tender: Callable[..., Tender]) -> None:
    for name, words in (("loop", ()), ("sleep", ("1000000",))):
        each = tender(guest(name), *words)
        sock = each.connect()
        send(sock, b"QStartNoAckMode")
        assert receive(sock, acknowledged=True) == b"OK"
        sock.sendall(b"+" + packet(b"vCont;c"))
        output = each.process.stdout
        assert output
        while name == "loop" and output.readline() != "looping\n":
            pass
        if name == "sleep":
            wait_until_asleep(each.process.pid)
        sock.sendall(b"\x03")
        assert receive(sock).startswith(b"T02thread:1;")
        before = ask(sock, b"g")
        assert before == ask(sock, b"g")  # it stands
        sock.sendall(packet(b"vCont;s:1"))
        if name == "sleep":  # it sleeps on
            sock.sendall(b"\x03")
        assert receive(sock)[:3] == (b"T02" if name == "sleep" else b"T05")
        sock.sendall(packet(b"k"))
        status, rest = each.end()
        assert status == 1
        assert "Exiting on signal 9" in rest


def packet(data: bytes) -> bytes:
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


def send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(packet(data))


def receive(sock: socket.socket, *, acknowledged: bool = False) -> bytes:
    """The data of the next packet; b"" for one that is cut."""
    data = b""
    while not (b"#" in data and len(data.partition(b"#")[2]) == 2):
        more = sock.recv(1)
        if not more:
            return b""
        data += more if data or more == b"$" else b""
    return data[1 : data.index(b"#")]


def ask(sock: socket.socket, data: bytes) -> bytes:
    send(sock, data)
    return receive(sock)


def test_the_end_of_a_guest(debug_guest: Build, tender: Callable[..., Tender]) -> None:
    image = debug_guest("debug")
    aborted = tender(image, "a")
    text = gdb(aborted.remote, "continue", "backtrace", "continue")
    assert "Program received signal SIGABRT" in text
    assert "solo5_app_main" in text
    assert "exited with code 0377" in text
    assert aborted.end()[0] == 255
    faulty = tender(image, "f")
    text = gdb(
        faulty.remote, "continue", "info line", "print counter", "set var $rbx = 1", "continue"
    )
    assert "ptender: host/guest translation fault: rip=0x100" in text
    assert "Program received signal SIGSEGV" in text
    assert "$1 = 10" in text
    assert "the guest has ended" in text
    assert "terminated with signal SIGSEGV" in text
    assert faulty.end()[0] == 1


def test_a_debugger_that_leaves_or_vanishes(
    debug_guest: Build, guest: Build, tender: Callable[..., Tender]
) -> None:
    left = tender(debug_guest("debug"))
    text = gdb(left.remote, "stepi", "detach")
    assert "0x0000000000100005 in _start" in text or "_start ()" in text
    assert left.end()[0] == 10
    vanished = tender(debug_guest("debug"))
    with vanished.connect() as sock:
        assert ask(sock, b"Z0,101000,1") == b"OK"
        sock.sendall(b"$m100000,4#")  # in the middle of a packet
    assert vanished.end()[0] == 10
    wait_until(lambda: not vanished.path.exists())  # a process removes it that outlives the tender


def test_two_at_once_and_a_later_one(guest: Build, tender: Callable[..., Tender]) -> None:
    each = tender(guest("loop"))
    with each.connect() as first:
        assert ask(first, b"?") == b"T05thread:1;"
        assert ask(first, b"qAttached") == b"0"
        with each.connect() as second:
            assert second.recv(1) == b""  # turned away
        assert ask(first, b"D") == b"OK"
    with each.connect() as later:
        assert ask(later, b"?") == b"T05thread:1;"
        assert ask(later, b"qAttached") == b"1"
        assert ask(later, b"m100000,2") != b"E14"
        send(later, b"vKill;1")
        assert receive(later) == b"OK"
    assert each.end()[0] == 1


def test_virtual_time_stands_with_the_guest(
    any_cpu: str, debug_guest: Build, tmp_path: Path
) -> None:
    words = ["--mem=8", "--cpu=soft", "--clock=virtual", f"--trace={tmp_path / 'trace'}"]
    image = debug_guest("debug")
    subprocess.run([PTENDER, *words, image], stdout=subprocess.DEVNULL, check=False)
    alone = (tmp_path / "trace").read_text()
    stops = ["break hypercalls", "continue", "info registers", "next", "set $rbx=$rbx", "continue"]
    gdb(f"target remote | {PTENDER} {' '.join(words)} --gdb=- {image}", *stops)
    assert (tmp_path / "trace").read_text() == alone


def test_the_socket_is_the_users_own_and_gone_at_the_end(
    cpu: str, guest: Build, tmp_path: Path
) -> None:
    for signo in (signal.SIGTERM, signal.SIGKILL):
        each = Tender(tmp_path, guest("loop"))
        assert each.path.stat().st_mode & 0o777 == 0o600
        each.process.send_signal(signo)
        each.process.communicate(timeout=100)
        wait_until_gone(each.path)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "gdb.sock"))
    stale.close()
    again = Tender(tmp_path, guest("loop"))
    assert "waiting for a debugger" in again.first
    again.process.terminate()
    again.end()


def wait_until_gone(path: Path) -> None:
    wait_until(lambda: not path.exists())


@pytest.mark.usefixtures("breakpoints")
def test_lldb(debug_guest: Build, cpu: str) -> None:
    lldb = needs("lldb")
    port = free_port()
    image = debug_guest("debug")
    with subprocess.Popen(
        [PTENDER, "--mem=8", f"--gdb={port}", image], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        process.stderr.readline()
        commands = [
            f"gdb-remote {port}", "breakpoint set -n add_up", "continue", "bt",
            "frame variable by", "register read rip", "thread step-out", "process kill",
        ]  # fmt: skip
        words = [word for command in commands for word in ("-o", command)]
        done = subprocess.run(
            [lldb, "-x", "-b", *words, str(image)], capture_output=True, text=True, timeout=100
        )
        assert "stop reason = breakpoint 1.1" in done.stdout, done
        assert "(int) by = 1" in done.stdout
        assert "solo5_app_main" in done.stdout
        process.wait(timeout=100)


def test_a_guest_of_another_machine(any_cpu: str, tmp_path: Path) -> None:
    if not soft.installed():
        pytest.skip("the Unicorn emulator is not installed")
    if not (shutil.which("aarch64-linux-gnu-gcc") or shutil.which("clang")):
        pytest.skip("no compiler for aarch64")
    image = builder(tmp_path, "--target=aarch64", "-g", "-O", "1")("debug")
    text = gdb(
        f"target remote | {PTENDER} --mem=8 --cpu=soft --gdb=- {image}",
        "break add_up", "continue", "backtrace", "stepi", "print $cpsr != 0", "delete",
        "watch counter", "continue", "continue", "delete",
        "set var counter = 7", "set $x20 = $x20", "print $v0.d.u[0]", "continue",
        program="gdb-multiarch",
    )  # fmt: skip
    assert re.search(r"#1 .* in solo5_app_main \(info=", text), text
    assert "Old value = 0\nNew value = 1" in text
    assert "Old value = 1\nNew value = 3" in text
    assert "exited with code 016" in text  # 7 and 3 and 4


def test_the_command_for_it_is_one_to_copy(any_cpu: str, tmp_path: Path) -> None:
    if not soft.installed():
        pytest.skip("the Unicorn emulator is not installed")
    if not (shutil.which("aarch64-linux-gnu-gcc") or shutil.which("clang")):
        pytest.skip("no compiler for aarch64")
    image = builder(tmp_path / "my guests", "--target=aarch64")("exit")
    words = [str(PTENDER), "--mem=8", "--cpu=soft", f"--gdb={tmp_path}/gdb", str(image)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        process.terminate()
    gdb = "gdb" if os.uname().machine == "aarch64" else "gdb-multiarch"
    assert said.endswith(f": {gdb} '{image}' -ex 'target remote {tmp_path}/gdb'\n")


def test_a_guest_of_a_program(cpu: str, debug_guest: Build, tmp_path: Path) -> None:
    guest = Guest(debug_guest("debug"), mem_mib=8, warn=lambda _: None)
    command = guest.debug(str(tmp_path / "gdb.sock"))
    with guest:
        with pytest.raises(RuntimeError):
            guest.debug()
        assert command == f"gdb {debug_guest('debug')} -ex 'target remote {tmp_path}/gdb.sock'"
        text = gdb(f"target remote {tmp_path}/gdb.sock", "stepi", "print counter", "detach")
        assert "$1 = 0" in text
        assert guest.wait().status == 10
    stopped = Guest(debug_guest("debug"), mem_mib=8, warn=lambda _: None)
    stopped.debug(str(tmp_path / "gdb.sock"))
    with stopped:
        assert stopped.stop().reason == "stopped"
    with pytest.raises(UsageError, match="at='-' is not a port number"):
        Guest(debug_guest("debug")).debug("-")


def test_a_guest_of_a_test(any_cpu: str, debug_guest: Build, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test(unikernel):\n"
        f"    for _ in range(2):\n"
        f"        assert unikernel({str(debug_guest('debug'))!r}).wait().status == 10\n"
    )
    path = tmp_path / "socket"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tender.testing.plugin",
        "-p",
        "no:cacheprovider",
    ]
    with subprocess.Popen(
        [*words, f"--ptender-gdb={path}", tmp_path / "test_it.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
    ) as run:
        for each in (path, Path(f"{path}.1")):
            wait_until(each.exists)
            assert "0x100000" in gdb(f"target remote {each}", "info registers pc", "detach")
        output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    assert f"a guest waits for a debugger: gdb {debug_guest('debug')} -ex" in output
