"""The command as operators use it: words, statuses, signals, and what is left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import BINDINGS, PTENDER, ROOT, Build, Run
from tests.needs import needs
from tests.waiting import (
    PATIENCE_S,
    state_of,
    wait_until,
    wait_until_asleep,
    wait_until_blocked,
)

ONE_LINE = r"(ptender|solo5-hvt[.2]*): [^\n]+\n"


def test_version_is_what_albatross_looks_for(ptender: Run) -> None:
    done = ptender("--version")
    assert done.returncode == 0
    assert "ABI version 2" in (done.stdout + done.stderr).splitlines()


def test_the_stand_in_speaks_as_the_original(ptender: Run) -> None:
    stand_in = PTENDER.with_name("solo5-hvt.2")
    done = subprocess.run([stand_in, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "ABI version 2" in done.stderr.splitlines()
    done = subprocess.run([stand_in, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    done = subprocess.run([stand_in, "--nonsense", "k"], capture_output=True, text=True)
    assert done.returncode == 1
    assert ptender("--help").returncode == 0
    # There, `inspect` is the name of a kernel as any other.
    done = subprocess.run([stand_in, "inspect"], capture_output=True, text=True, cwd="/")
    assert "inspect: Could not open" in done.stderr


def test_the_demo_needs_nothing(ptender: Run) -> None:
    done = ptender("demo", "to", "you")
    assert done.returncode == 0, done
    assert "to you" in done.stdout


def test_the_command_is_a_module_of_python(tmp_path: Path) -> None:
    python = str(PTENDER.with_name("python"))
    for words in (["demo", "--help"], ["--version"], ["--nte"]):
        ran = [
            subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            for command in ([str(PTENDER), *words], [python, "-m", "tender", *words])
        ]
        assert ran[0].returncode == ran[1].returncode
        assert (ran[0].stdout, ran[0].stderr) == (ran[1].stdout, ran[1].stderr)


def test_a_copy_of_the_launcher_says_what_to_do(tmp_path: Path) -> None:
    """It starts another Python, which has no such package."""
    copy = tmp_path / "ptender"
    shutil.copy(PTENDER, copy)
    python = tmp_path / "empty" / "bin" / "python3"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    environment = {**os.environ, "PATH": f"{python.parent}:/usr/bin:/bin"}
    done = subprocess.run([copy, "demo"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(
        "ptender: No module named 'tender'.*does not have the package.*\n", done.stderr
    )


def test_a_python_that_this_user_may_not_run_is_named(tmp_path: Path) -> None:
    """As where root made the environment with a Python in its own folder."""
    shutil.copy(PTENDER, tmp_path / "ptender")
    (tmp_path / "python3").symlink_to("/dev/null/bin/python3")
    done = subprocess.run([tmp_path / "ptender", "demo"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    assert f"ptender: {tmp_path}/python3 is /dev/null/bin/python3, which is not " in done.stderr


def test_arguments_that_leave_no_room_for_pythons_own() -> None:
    """The kernel's limit is just above what the command itself could be started with."""
    for size in range(os.sysconf("SC_ARG_MAX"), 0, -1000):
        words = ["x" * 100_000] * (size // 100_000) + ["x" * (size % 100_000)]
        try:
            done = subprocess.run([PTENDER, *words], env={}, capture_output=True, text=True)
            break
        except OSError as error:
            assert error.errno == errno.E2BIG
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"ptender: cannot execute {PTENDER.with_name('python3')}: the arguments and the "
        "environment are too long\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can unmount")
def test_the_launcher_finds_its_python_without_proc() -> None:
    needs("unshare", "--mount")
    script = 'umount --lazy /proc; cd "$1"; exec "$2" -c "$3"'
    code = "import os; os.execv('ptender', ['ptender', '--version'])"
    words = ["sh", "-ec", script, "sh", str(PTENDER.parent), sys.executable, code]
    done = subprocess.run(["unshare", "--mount", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    """With the user's own packages, which a Python of its own has not (pip install --user)."""
    for name in ("mmap", "struct", "site", "tender"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')")
    words = ["-E", "-c", (ROOT / "bin/start.py").read_text(), "ptender", "--version"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_that_is_compiled_of_older_sources_says_what_to_do() -> None:
    """As after a git pull."""
    missing = "cffi library 'tender._native' has no function named 'new'"
    code = (
        "from tender.cli import main\n"
        f'def lacks(): raise AttributeError("{missing}")\n'
        "main.main = lacks; main.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"ptender: {missing}: it is compiled of older sources; run ./quickstart once more\n"
    )


def test_the_policy_of_the_demo(ptender: Run) -> None:
    done = ptender("policy", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "console" in done.stdout


def test_an_option_after_the_kernel_is_named_where_it_is_missed(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    """It is the guest's, which may have options of the same name."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    done = ptender("--mem=8", guest("block"), f"--block={image}")
    assert done.returncode == 1
    assert done.stderr.endswith(
        ": add --block storage=FILE "
        "(--block comes after the kernel, so it is the guest's: put it before)\n"
    )
    assert ptender("--mem=8", guest("exit"), "7", "--mem=4").returncode == 7


def test_the_demo_has_its_own_help(ptender: Run) -> None:
    for word in ("--help", "-h"):
        done = ptender("demo", word)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: ptender [OPTIONS] demo [ARGS]\n")
        assert "Hello from a guest" not in done.stdout


def test_a_kernel_may_have_the_name_of_a_command(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    """It has a path then: the word alone is the command, whatever files there are."""
    for name in ("help", "run", "version", "demo"):
        (tmp_path / name).write_bytes(guest("exit").read_bytes())
        assert ptender("--mem=8", f"./{name}", "7", cwd=tmp_path).returncode == 7
    for name in ("help", "version"):
        assert ptender(name, cwd=tmp_path).stdout == ptender(f"--{name}").stdout
    assert "Hello from a guest" in ptender("--mem=8", "demo", "7", cwd=tmp_path).stdout
    done = subprocess.run(
        [PTENDER.with_name("solo5-hvt.2"), "help"], capture_output=True, text=True
    )
    assert "help: Could not open" in done.stderr


def test_help_of_the_tools(ptender: Run) -> None:
    assert "FILE" in ptender("inspect", "--help").stdout.splitlines()[0]


def test_json_of_a_policy_may_be_asked_for_after_the_kernel(ptender: Run, guest: Build) -> None:
    for words in ([guest("ping"), "--json", "--net=t"], ["--net=t", guest("ping"), "--json"]):
        assert json.loads(ptender("policy", *words).stdout)["descriptors"]


@pytest.mark.parametrize("width", [72, 80])
def test_a_policy_fits_the_terminal(guest: Build, width: int) -> None:
    """What does not fit goes on below, and not in the first column."""
    words = [str(PTENDER), "policy", "--cpu=kvm", "--block", "d.img", str(guest("block"))]
    plain = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = on_a_terminal(words, width).splitlines()
    assert max(map(len, lines)) <= width < max(map(len, plain.splitlines()))
    assert " ".join(lines).split() == plain.split()
    headings = [line for line in lines if line[:1].strip()]
    assert headings == [line for line in plain.splitlines() if line[:1].strip()]


def on_a_terminal(words: list[str], columns: int) -> str:
    ours, theirs = os.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(words, stdout=theirs, env=plain) as process:
        os.close(theirs)
        output = b""
        try:
            while part := os.read(ours, 4096):
                output += part
        except OSError:  # the terminal's other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return output.decode()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "Missing KERNEL operand"),
        (["--nte", "tap0", "k"], 2, "did you mean --net"),
        (["--nte", "--net:a=tap0", "k"], 1, "Invalid option"),
        (["--mem=x", "k"], 2, "--mem: 'x' is not a size"),
        (["--mem=5000", "k"], 2, "--mem: '5000' is not a size of at most 4096 MiB"),
        (["/nonexistent/k.hvt"], 1, "/nonexistent/k.hvt: Could not open: No such file"),
        (["/"], 1, "/: not a regular file"),
        (["/dev/null"], 1, "/dev/null: not a regular file"),
        ([__file__], 1, "not an ELF executable"),
        (["/bin/true"], 1, "not a static executable"),
        (["inspect", "/nonexistent"], 1, "/nonexistent: Could not open"),
        (["inspect", "--jso", "/nonexistent"], 2, "unrecognized arguments: --jso; see ptender ins"),
        (["build", "x.c", "-o", "x.hvt", "--manif", "x"], 2, "unrecognized arguments: --manif x"),
        (["policy", "--bfp", "k.hvt"], 2, "see ptender policy --help (did you mean --bpf?)"),
        (["run", "k.hvt"], 2, "there is no command `run': type ptender [OPTIONS] KERNEL [ARGS]"),
    ],
)
def test_wrong_words_and_files(ptender: Run, words: list[str], status: int, message: str) -> None:
    done = ptender(*words)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert re.fullmatch(ONE_LINE, done.stderr), done


def test_devices_that_are_not_declared_or_not_attached(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    cases: list[tuple[list[object], str]] = [
        ([guest("block")], "All declared devices must be attached; missing: 'storage'"),
        ([f"--block:disk={image}", guest("block")], "Resource not declared in manifest: 'disk'"),
        (["--net:storage=tap0", guest("block")], "Resource not declared in manifest"),
        (["--block", image, guest("maxdevices")], "several block devices"),
        (["--block", image, guest("exit")], "declares no block device"),
        (["--block", image, "--block", image, guest("block")], "every block device"),
        (["--dumpcore=/nonexistent", guest("exit")], "--dumpcore=/nonexistent: cannot open dir"),
    ]
    for words, message in cases:
        done = ptender(*words)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert message in done.stderr
        assert re.fullmatch(ONE_LINE, done.stderr), done


def test_memory_is_rounded_down_with_a_warning(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=9", guest("memory"))
    assert done.returncode == 0
    assert done.stderr == f"ptender: adjusting memory to {8 << 20} bytes\n"


def test_an_image_that_does_not_fit_says_how_much_it_needs(ptender: Run, guest: Build) -> None:
    image = guest("big")
    done = ptender("--mem=2", image)
    assert done.returncode == 1
    wanted = re.search(r"does not fit into 2 MiB .* give it more: --mem=(\d+)", done.stderr)
    assert wanted, done
    assert ptender(f"--mem={wanted[1]}", image).returncode == 0


def test_inspect(ptender: Run, guest: Build) -> None:
    done = ptender("inspect", guest("badhandle"))
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    for text in ("hvt, ABI version 2, x86_64", "BLOCK_BASIC  storage", "NET_BASIC    service"):
        assert text in done.stdout
    facts = json.loads(ptender("inspect", "--json", guest("badhandle")).stdout)
    assert facts["target"] == "hvt"
    assert [device["handle"] for device in facts["devices"]] == [1, 2]
    assert {segment["protection"] for segment in facts["segments"]} == {"r-x", "r--", "rw-"}
    assert ptender(f"--mem={facts['memory_min'] >> 20}", guest("exit")).returncode == 0


def test_verbose_tells_what_the_devices_did(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    done = ptender("-v", "--mem=8", "--block", image, guest("block"))
    assert "ptender: guest halted, status 0\n" in done.stderr
    assert re.search(r"block:storage: \d+ calls, \d+ bytes", done.stderr)


# The end, by a signal.


class Started(subprocess.Popen[str]):
    """A command that does not outlive its `with` block, whatever fails in it."""

    def __exit__(self, *error: Any) -> None:
        if self.poll() is None:
            self.kill()
        super().__exit__(*error)


def start(*words: object) -> Started:
    return Started(
        [str(PTENDER), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended without {text!r}: {process.communicate()}")


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "words", "says"), [("loop", [], "looping"), ("sleep", ["100000"], "heap")]
)
def test_a_signal_ends_any_guest(
    guest: Build, number: signal.Signals, name: str, words: list[str], says: str
) -> None:
    with start("--mem=8", guest(name), *words) as process:
        read_until(process, says)
        if name == "sleep":
            wait_until_asleep(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == f"ptender: Exiting on signal {int(number)}\n"


@pytest.mark.usefixtures("cpu")
def test_a_signal_ends_a_guest_whose_output_nobody_takes(guest: Build) -> None:
    with start("--mem=8", guest("flood")) as process:
        assert process.stdout
        wait_until_blocked(process.pid, process.stdout.fileno())
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == "ptender: Exiting on signal 15\n"


@pytest.mark.usefixtures("cpu")
def test_a_signal_at_any_moment_ends_the_command(guest: Build) -> None:
    """From the interpreter's first steps on: it never hangs and never prints a traceback."""
    for step in range(40):
        with start("--mem=8", guest("loop")) as process:
            time.sleep(step * 0.005)
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (1, -signal.SIGTERM)
        assert errors in ("", "ptender: Exiting on signal 15\n")


@pytest.mark.usefixtures("cpu")
def test_a_console_that_is_closed_ends_the_guest(guest: Build) -> None:
    with start("--mem=8", guest("flood")) as process:
        read_until(process, "flood 3")
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert "nobody reads it any more" in process.stderr.read()
    assert process.returncode == 1


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_lock_is_gone_however_its_holder_ended(
    ptender: Run, guest: Build, tmp_path: Path, number: signal.Signals
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    with start("--mem=8", "--block", image, guest("hold")) as process:
        read_until(process, "held")
        second = ptender("--mem=8", "--block", image, guest("block"))
        assert second.returncode == 1
        command = f"ptender --mem=8 --block {image} "
        assert f"locked by process {process.pid} ({command}" in second.stderr
        assert re.fullmatch(ONE_LINE, second.stderr)
        process.send_signal(number)
        process.communicate()
    assert ptender("--mem=8", "--block", image, guest("block")).returncode == 0


@pytest.mark.usefixtures("cpu")
def test_a_long_command_that_holds_a_lock_is_shortened(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    with start("--mem=8", "--block", image, guest("hold"), *(["word"] * 900)) as process:
        read_until(process, "held")
        second = ptender("--mem=8", "--block", image, guest("block"))
        process.terminate()
        process.communicate()
    assert re.search(r"locked by process \d+ \(ptender --mem=8 .{60,160}\.\.\.\)\n$", second.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Neither its folder nor the compiler, here one that waits while it compiles."""
    compiler, source = tmp_path / "cc", tmp_path / "guest.c"
    source.write_text("int nothing;\n")
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -c "*) sleep 1000 & echo $! $$; wait ;; *) exec gcc "$@" ;; esac\n'
    )
    compiler.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))
    words = ("build", "--cc", compiler, source, "-o", tmp_path / "out.hvt")
    with start(*words) as process:
        assert process.stdout
        compilers = process.stdout.readline().split()
        assert len(compilers) == 2
        assert sorted(tmp_path.rglob("*")) != before
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)  # at the end of all who have its output
    assert (process.returncode, errors) == (1, f"ptender: Exiting on signal {int(number)}\n")
    assert sorted(tmp_path.rglob("*")) == before
    # A process closes its output before it has ended.
    wait_until(lambda: all(state_of(int(pid)) in ("", "Z") for pid in compilers))


def on_a_full_disk(words: str) -> subprocess.CompletedProcess[str]:
    """The command where /mnt has room for 16 KiB; its status and what is there, on stdout."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    needs("unshare", "--mount")
    script = f"mount -t tmpfs -o size=16k tmpfs /mnt && {PTENDER} {words}; echo $?; ls -A /mnt"
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True
    )


def test_a_build_on_a_full_disk_is_one(tmp_path: Path) -> None:
    (tmp_path / "guest.c").write_text(
        "#include <solo5.h>\nstatic const char much[300000] = {1};\n"
        "int solo5_app_main(const struct solo5_start_info *i) { return much[i->heap_size]; }\n"
    )
    done = on_a_full_disk(f"build {tmp_path}/guest.c -o /mnt/guest.hvt")
    assert done.stdout == "1\n", done
    (line,) = done.stderr.splitlines()  # and nothing of the assembler's
    assert "guest.c failed: No space left on device: in the output's folder or in " in line


def test_a_build_under_nohup_goes_on(tmp_path: Path) -> None:
    (tmp_path / "guest.c").write_text(
        "#include <solo5.h>\n"
        "int solo5_app_main(const struct solo5_start_info *info) { return info->cmdline[0]; }\n"
    )
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nkill -HUP $PPID; exec gcc "$@"\n')
    compiler.chmod(0o755)
    words = ["nohup", str(PTENDER), "build", "--cc", "./cc", "guest.c", "-o", "out.hvt"]
    assert subprocess.run(words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.hvt").exists()


# Output, as scripts see it.


def test_standard_input_is_never_read_and_may_be_anything(guest: Build, ptender: Run) -> None:
    writer = os.open("/dev/null", os.O_WRONLY)
    done = subprocess.run([PTENDER, "--mem=8", guest("exit"), "3"], stdin=writer, stdout=writer)
    os.close(writer)
    assert done.returncode == 3
    closed = f"exec {PTENDER} --mem=8 {guest('exit')} 3 0<&- 1>&- 2>&-"
    assert subprocess.run(["sh", "-c", closed]).returncode == 3


def test_a_full_disk_under_the_console_does_not_end_the_guest(guest: Build, cpu: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PTENDER, "--mem=8", guest("exit"), "3"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "console: output lost" in done.stderr


# Core files.


@pytest.mark.parametrize("words", [[], ["trap"]])
def test_gdb_opens_a_core(ptender: Run, guest: Build, tmp_path: Path, words: list[str]) -> None:
    kernel = guest("dumpcore")
    done = ptender("--mem=64", f"--dumpcore={tmp_path}", kernel, *words)
    assert done.returncode == 255
    name = re.search(r"core\.solo5-hvt\.[0-9]+$", done.stderr.strip())
    assert name, done
    core = tmp_path / name[0]
    assert [path.name for path in tmp_path.iterdir()] == [core.name]
    assert core.stat().st_size > 64 << 20
    assert core.stat().st_blocks * 512 < 4 << 20
    marker = re.search(r"core_marker (0x[0-9a-f]+)", done.stdout)
    assert marker, done
    shown = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", f"x/2gx {marker[1]}", "-ex", "info registers", "-c"]
        + [str(core), str(kernel)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "0xc0deface00000001" in shown
    assert "0xc0deface00000002" in shown
    if words:
        trap = re.search(r"rip=(0x[0-9a-f]+)", done.stdout)
        assert trap
        assert re.search(rf"rip +{trap[1]}", shown), shown
        assert re.search(r"rbx +0x22222222 ", shown), shown
        assert re.search(r"r12 +0x33333333 ", shown), shown


def test_gdb_finds_the_callers_of_code_that_is_not_optimised(ptender: Run, tmp_path: Path) -> None:
    """They hang on RBP, which must be the one of the exception."""
    source = tmp_path / "broken.c"
    source.write_text(
        "#include <solo5.h>\n"
        "static void inner(volatile int *at) { *at = 1; }\n"
        "static void outer(unsigned long at) { inner((int *)at); }\n"
        "int solo5_app_main(const struct solo5_start_info *i) { (void)i; outer(8); return 0; }\n"
    )
    kernel = tmp_path / "broken.hvt"
    assert ptender("build", "--cflag=-O0", "--cflag=-g", source, "-o", kernel).returncode == 0
    cores = tmp_path / "cores"
    cores.mkdir()
    assert ptender("--mem=8", f"--dumpcore={cores}", kernel).returncode == 255
    (core,) = cores.iterdir()
    gdb = ["gdb", "-nx", "-batch", "-ex", "bt", "-c", str(core), str(kernel)]
    shown = subprocess.run(gdb, capture_output=True, text=True, check=True).stdout
    assert re.search(r"#0 .*inner .*#1 .*outer \(at=8\).*#2 .*solo5_app_main ", shown, re.S), shown


def test_no_core_without_an_abort(ptender: Run, guest: Build, tmp_path: Path) -> None:
    assert ptender("--mem=8", f"--dumpcore={tmp_path}", guest("exit"), "254").returncode == 254
    assert list(tmp_path.iterdir()) == []


def test_a_core_that_does_not_fit_leaves_nothing(ptender: Run, guest: Build, cpu: str) -> None:
    done = on_a_full_disk(f"--mem=64 --dumpcore=/mnt {guest('dumpcore')} >/dev/null")
    assert done.stdout == "255\n", done
    assert "dumpcore: /mnt: No space left on device" in done.stderr


def test_closed_descriptors_are_not_taken_for_the_console(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * 512))
    command = f"exec {PTENDER} --mem=8 --block {image} {guest('disk')} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert image.stat().st_size == 8 * 512
    assert b"Solo5" not in image.read_bytes()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("build -v {T}/exit.c -o {out} 2>&-", 0, ""),
        ("build -v {T}/exit.c -o {out} 2>/dev/full", 0, ""),
        ("build {T}/none.c -o {out} 2>/dev/full", 1, ""),
        ("build --help >&-", 0, ""),
        ("--version <&- >&-", 0, ""),
        ("build --help >/dev/full", 1, "ptender: standard output: No space left on device\n"),
        ("ps --help >/dev/full", 1, "ptender: standard output: No space left on device\n"),
        ("ps --json >/dev/full", 1, "ptender: standard output: No space left on device\n"),
    ],
)
def test_a_tool_whose_output_nobody_takes(
    tmp_path: Path, words: str, status: int, message: str
) -> None:
    words = words.format(T=BINDINGS / "tests", out=tmp_path / "out")
    command = ["sh", "-c", f"{PTENDER} {words}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", message)
    assert (tmp_path / "out").exists() == ("build" in words and "exit" in words)


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_at_the_start(guest: Build, number: signal.Signals) -> None:
    """As by a script's `&`, which has SIGINT ignored; solo5-hvt handles it all the same."""
    command = ["sh", "-c", f'trap "" {int(number)}; exec "$@"', "sh", PTENDER, "--mem=8"]
    with subprocess.Popen(
        [*map(str, command), str(guest("loop"))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        read_until(process, "looping")
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (1, f"ptender: Exiting on signal {int(number)}\n")


def test_ctrl_c_at_any_moment_of_a_start(tmp_path: Path) -> None:
    """At each system call that CPython makes while it has a handler of its own, and at some of the
    others: none is lost, nothing is printed, and the status is the signal's."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt install strace")
    log, command = tmp_path / "strace", [str(PTENDER), "--version"]
    subprocess.run(["strace", "-qq", "-o", log, *command], check=True, capture_output=True)
    calls = [line.partition("(")[0] for line in log.read_text().splitlines()]
    handlers = [at for at, line in enumerate(log.read_text().splitlines()) if "SIGINT, {" in line]
    default = handlers[-1]  # where Ctrl-C ends the process from here on
    for at in sorted({*range(default - 60, default + 10, 2), *range(0, len(calls) - 1, 40)}):
        count = calls[: at + 1].count(calls[at])
        inject = f"inject={calls[at]}:signal=SIGINT:when={count}"
        words = ["strace", "-qq", "-o", "/dev/null", "-e", inject, *command]
        done = subprocess.run(words, capture_output=True, text=True)
        is_said = calls[at] == "write"  # the signal comes behind the call
        ended = done.returncode == -signal.SIGINT and (is_said or not done.stdout)
        assert ended, (at, calls[at], done)
        assert done.stderr == ""


@pytest.mark.usefixtures("kvm")
def test_a_signal_is_not_lost_before_the_guest_runs(guest: Build) -> None:
    code = (
        "import os, sys; from tender import stop; from tender.cli.main import main\n"
        "class Late(stop.Stop):\n"
        "    def __init__(self):\n"
        "        super().__init__(); os.kill(os.getpid(), 15)\n"
        "stop.Stop = Late\n"
        f"sys.exit(main(['ptender', '--mem=8', {str(guest('loop'))!r}]))"
    )
    python = PTENDER.with_name("python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "ptender: Exiting on signal 15\n")


@pytest.mark.usefixtures("kvm")
def test_a_signal_ends_a_guest_whose_messages_nobody_takes(guest: Build) -> None:
    """As albatross has it: all three descriptors are one pipe, here a full one."""
    reader, writer = os.pipe()
    with subprocess.Popen(
        [PTENDER, "--mem=8", guest("flood")], stdin=writer, stdout=writer, stderr=writer
    ) as process:
        wait_until_blocked(process.pid, reader)
        process.terminate()
        assert process.wait(timeout=PATIENCE_S) == 1
    os.close(reader)
    os.close(writer)


def test_control_characters_are_shown_not_sent(ptender: Run) -> None:
    done = ptender("/nonexistent/a\nb\x1b[31m")
    assert done.stderr == (
        "ptender: /nonexistent/a\\nb\\x1b[31m: Could not open: No such file or directory\n"
    )


def test_output_that_cannot_be_written_is_an_error(guest: Build, kvm: None) -> None:
    for words in (["--help"], ["--version"], ["inspect", guest("exit")]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([PTENDER, *words], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "ptender: standard output: No space left on device\n"


def test_an_image_that_nobody_may_read_still_has_a_core(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    data = bytearray(guest("dumpcore").read_bytes())
    headers = range(64, 64 + 56 * int.from_bytes(data[56:58], "little"), 56)
    for at in headers:
        kind, flags = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (0, 4))
        if kind == 1 and flags == 4:  # the read-only segment, for nobody
            data[at + 4] = 0
    kernel = tmp_path / "k.hvt"
    kernel.write_bytes(data)
    (tmp_path / "cores").mkdir()
    done = ptender("--mem=8", f"--dumpcore={tmp_path}/cores", kernel)
    # The guest's own text lies there: to print it is what ends it, or nothing is printed.
    assert done.returncode in (1, 255), done
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "cores").iterdir())) == (done.returncode == 255)


@pytest.mark.usefixtures("kvm")
def test_a_signal_while_a_core_is_written_leaves_no_file(guest: Build, tmp_path: Path) -> None:
    source = tmp_path / "big.c"
    source.write_text(
        "#include <solo5.h>\n"
        "int solo5_app_main(const struct solo5_start_info *i) {\n"
        "    char *heap = (char *)i->heap_start;\n"
        "    for (size_t at = 0; at < i->heap_size - 65536; at += 8192) heap[at] = 1;\n"
        "    solo5_abort(); }\n"
    )
    kernel, cores = tmp_path / "big.hvt", tmp_path / "cores"
    subprocess.run([PTENDER, "build", source, "-o", kernel], check=True)
    cores.mkdir()
    with start("--mem=512", f"--dumpcore={cores}", kernel) as process:
        read_until(process, "solo5_abort")
        process.terminate()
        _, errors = process.communicate(timeout=60)
    if process.returncode == 1:
        assert errors == "ptender: Exiting on signal 15\n"
        assert list(cores.iterdir()) == []
    else:  # it was quicker than the signal
        assert process.returncode == 255
        assert len(list(cores.iterdir())) == 1


@pytest.mark.parametrize("more", [[], ["--engine=python"]])
def test_a_limit_bounds_what_a_guest_prints(
    guest: Build, tmp_path: Path, cpu: str, more: list[str]
) -> None:
    rate, begin = 4096, time.monotonic()
    words = [PTENDER, "-v", "--mem=8", *more, "--console-limit", str(rate), guest("flood")]
    log, errors = tmp_path / "log", tmp_path / "errors"
    with (
        log.open("wb") as output,
        errors.open("wb") as messages,
        subprocess.Popen([*map(str, words)], stdout=output, stderr=messages) as process,
    ):
        wait_until(lambda: "is dropped" in errors.read_text())
        process.terminate()
        assert process.wait(timeout=PATIENCE_S) == 1
    size = log.stat().st_size
    assert rate - 100 <= size <= rate * (1 + time.monotonic() - begin)
    assert re.fullmatch(rb"Solo5: .*\nSolo5: .*\n(flood \d+\n)+", log.read_bytes())
    said = errors.read_text()
    (dropped,) = re.findall(
        r"console: (\d+) bytes of output were dropped \(--console-limit\)", said
    )
    assert f" {size + int(dropped)} bytes, " in said
    assert said.count("output beyond 4096 bytes per second is dropped") == 1
    assert re.search(r"console: \d+ calls, \d+ bytes, \d+ drops", said)


def test_virtual_time_does_not_lift_the_limit(guest: Build, tmp_path: Path) -> None:
    """It is the host's disk that is protected: a guest can make years pass in a second."""
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    words = ["--cpu=soft", "--clock=virtual,tick=1000000000", "--console-limit=1000", "--mem=8"]
    begin = time.monotonic()
    done = subprocess.run(
        [PTENDER, *words, "--instructions=3000000", guest("flood")], capture_output=True
    )
    assert done.returncode == 1
    assert len(done.stdout) <= 4096 + 1000 * (time.monotonic() - begin)


# A process that is stopped.


@pytest.mark.parametrize("more", [[], ["--engine=python"]])
def test_a_stop_of_the_process_does_not_make_a_guest_sleep_longer(
    guest: Build, cpu: str, more: list[str]
) -> None:
    with start("--mem=8", *more, guest("sleep"), "2000") as process:
        read_until(process, "heap")
        wait_until_asleep(process.pid)  # in POLL
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        begin = time.monotonic_ns()
        time.sleep(2)
        stopped_ns = time.monotonic_ns() - begin
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    slept = re.search(r"slept (\d+) ns", output)
    assert slept
    assert int(slept[1]) < 2_000_000_000 + stopped_ns
