"""Which CPU a guest gets, what is said about it, and what only the software CPU can do."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tender import Guest, VirtualTime, accel
from tender.cpu import native
from tests.guest.conftest import PTENDER, Build, Run
from tests.guest.ordinary import ordinary
from tests.needs import needs
from tests.unit import elves
from tests.waiting import PATIENCE_S, wait_until_asleep

pytest.importorskip("unicorn", reason="the software CPU needs unicorn")

# What auto takes where there is no KVM in hardware.
INSTEAD = "soft" if native.missing() else "native"
TAKING = {
    "native": "taking the native CPU (to say nothing: --cpu=native)",
    "soft": "taking the software CPU (to say nothing: --cpu=soft)",
}
NO_NATIVE = "native.missing = lambda: 'there is none'"

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no access to /dev/kvm"
)


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, with no word from the environment about the CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "PTENDER_CPU"}
    settings = {"env": environment | options.pop("env", {}), "capture_output": True, "text": True}
    return subprocess.run([PTENDER, *map(str, words)], timeout=100, **(settings | options))


def command(
    change: str, *words: object, before: Sequence[object] = ()
) -> subprocess.CompletedProcess[str]:
    """The command, after a change of its modules."""
    code = (
        "import os, sys; from tender import accel; from tender.cpu import native, soft; "
        f"from tender.cli import main; {change}; os._exit(main.main(['ptender', *sys.argv[1:]]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PTENDER_CPU"}
    return subprocess.run(
        [*map(str, before), sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )


@pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "-")
@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ("--fsize=1000000", "8 MiB of guest memory exceed the limit of files (`ulimit -f`)"),
        ("--nproc=1", "another process exceeds the limit of processes (`ulimit -u`)"),
    ],
)
def test_a_limit_of_the_native_cpu(tmp_path: Path, limit: str, why: str) -> None:
    """`auto` goes on with another CPU and names it; who asks for this one gets one line."""
    change = "accel.KvmAccelerator = no_kvm"
    no_kvm = "def no_kvm(**_): raise accel.HostError('KVM: none')"
    for before in (["prlimit", limit], ["prlimit", limit, *ordinary(tmp_path / "user", [])]):
        done = command(f"exec({no_kvm!r}); {change}", "--mem=8", demo(), before=before)
        taken = f"ptender: KVM: none; native CPU: {why}; {TAKING['soft']}\n"
        assert (done.returncode, done.stderr) == (0, taken)
        done = command("pass", "--cpu=native", "--mem=8", demo(), before=before)
        assert (done.returncode, done.stderr) == (
            1,
            f"ptender: native CPU: {why}: use --cpu=soft\n",
        )


# Where there is no KVM, no device at all, no network and no root.

# The mounts and the network namespace take root; the guest runs as somebody else, who has no
# right to anything but the files of this user.
BARE = (
    "unshare --mount --net -- sh -c 'mount -t tmpfs -o mode=755 none /dev && "
    'exec unshare --user --map-user=1000 --map-group=1000 -- "$@"\' sh'
)


@pytest.fixture(scope="module")
def bare() -> list[str]:
    """The words before a command that leave it nothing but its files."""
    words = ["sh", "-c", f'exec {BARE} "$@"', "sh"]
    if os.geteuid() != 0:
        pytest.skip("an empty /dev and an empty network namespace need root")
    shown = subprocess.run(
        [*words, "sh", "-c", "id -u; ls /dev; cat /proc/net/dev; ls /dev/kvm"],
        capture_output=True,
        text=True,
    )
    if not shown.stdout.startswith("1000\n"):
        pytest.skip(f"no user namespaces here: {shown.stderr.strip()}")
    assert "No such file" in shown.stderr
    assert re.findall(r"^ *(\w+):", shown.stdout, re.MULTILINE) == ["lo"]
    return words


def run_bare(bare: list[str], *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PTENDER_CPU"}
    return subprocess.run(
        [*bare, str(PTENDER), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


def test_without_any_device_or_right(bare: list[str], guest: Build, tmp_path: Path) -> None:
    hello = run_bare(bare, "demo")
    assert hello.returncode == 0, hello
    assert "Hello" in hello.stdout
    line = "ptender: KVM: Could not open /dev/kvm: this machine offers no KVM [^\n]*; "
    line += re.escape(TAKING[INSTEAD] + "\n")
    assert re.fullmatch(line, hello.stderr), hello
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 4096))
    disk = run_bare(bare, "--cpu=soft", "--mem=8", "--block", image, guest("block"))
    assert (disk.returncode, disk.stderr) == (0, ""), disk
    assert "SUCCESS" in disk.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become a user with a limit")
def test_a_limit_to_processes_ends_the_guest_or_does_not_count(kvm: None, guest: Build) -> None:
    """From Linux 6.14 on, the first KVM_RUN starts a kernel thread, which the limit counts."""
    command = ["prlimit", "--nproc=1", str(PTENDER), "--cpu=kvm", "--mem=8", str(guest("exit"))]
    done = subprocess.run(command, capture_output=True, text=True)
    failed = (
        "ptender: KVM: cannot start a kernel thread for the guest: too many processes "
        "(raise `ulimit -u` or pids.max of the cgroup)\n"
    )
    assert (done.returncode, done.stderr) in ((0, ""), (1, failed)), done


def test_a_network_without_any_device_or_right(bare: list[str], guest: Build) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    words = ["--cpu=soft", "--mem=8", f"--net:service=@{theirs.fileno()}", "--", guest("ping")]
    command = [*bare, str(PTENDER), *map(str, words)]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
    ) as process:
        announced = ours.recv(2000)
        request = bytes.fromhex(
            "ffffffffffff 020000000001 0806 0001 0800 06 04 0001"
            "020000000001 0a000001 000000000000 0a000002"
        ).ljust(60, b"\0")
        ours.send(request)
        reply = ours.recv(2000)
        process.terminate()
    assert announced[12:14] == b"\x08\x06"
    assert reply[20:22] == b"\0\2"
    ours.close()
    theirs.close()


def test_kvm_that_is_asked_for_and_not_there(bare: list[str]) -> None:
    done = run_bare(bare, "--cpu=kvm", "/dev/../" + str(demo()))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"ptender: KVM: Could not open /dev/kvm: [^\n]*, or use --cpu={INSTEAD}\n", done.stderr
    ), done


def demo() -> Path:
    return Path(accel.__file__).with_name("guests") / "hello-x86_64.hvt"


def test_the_engine_is_missing(guest: Build) -> None:
    code = (
        "import sys; from tender.cli import main; from tender.cpu import soft; "
        "soft.library = lambda: '/nonexistent/libunicorn.so.2'; "
        f"sys.exit(main.main(['ptender', '--cpu=soft', '{demo()}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'ptender[soft]'" in done.stderr
    assert done.stderr.count("\n") == 1


@needs_kvm
def test_a_run_on_kvm_touches_no_engine() -> None:
    code = (
        "import os, sys; from tender.cli import main; "
        f"status = main.main(['ptender', '--cpu=kvm', '{demo()}']); "
        "loaded = {'unicorn', 'tender._soft', 'tender.cpu.soft', 'ctypes'} & set(sys.modules); "
        "os.write(2, str(loaded).encode()) if loaded else None; "
        "os._exit(status or len(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done


@needs_kvm
@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("EBUSY", "busy (does another hypervisor"),
        ("ENOMEM", "memory (the kernel has no memory"),
        ("EINVAL", "argument (does the machine above"),
    ],
)
@pytest.mark.parametrize("accelerator", ["auto", "kvm"])
def test_a_kvm_that_makes_no_machine(
    tmp_path: Path, error: str, hint: str, accelerator: str
) -> None:
    trace, strace = tmp_path / "trace", ["strace", "-P", "/dev/kvm", "-e", "trace=ioctl"]
    needs(*strace, "-o", str(trace))
    words = [f"--cpu={accelerator}", demo()]
    command("accel.emulated = lambda: False", *words, before=[*strace, "-o", trace])
    (number,) = [
        index
        for index, line in enumerate(trace.read_text().splitlines(), 1)
        if "KVM_CREATE_VM" in line
    ]
    inject = ["-e", f"inject=ioctl:error={error}:when={number}", "-o", "/dev/null"]
    done = command("accel.emulated = lambda: False", *words, before=[*strace, *inject])
    line = rf"ptender: KVM: ioctl \(CREATE_VM\) failed: [\w ]+{re.escape(hint)}[^\n]*"
    if accelerator == "kvm":
        assert done.returncode == 1, done
        assert re.fullmatch(f"{line}, or use --cpu={INSTEAD}\n", done.stderr), done
    else:
        assert (done.returncode, "Hello" in done.stdout) == (0, True), done
        assert re.fullmatch(f"{line}; {re.escape(TAKING[INSTEAD])}\n", done.stderr), done


def test_the_environment_says_what_auto_means() -> None:
    assert run(demo(), env={"PTENDER_CPU": "soft"}).stderr == ""
    done = run(demo(), env={"PTENDER_CPU": "hard"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "PTENDER_CPU='hard' is not auto, kvm, native or soft" in done.stderr


@needs_kvm
@pytest.mark.skipif(not accel.emulated(), reason="this machine's KVM runs guests in hardware")
def test_auto_prefers_others_to_a_kvm_that_emulates(guest: Build) -> None:
    done = run("--mem=8", guest("fp"))
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout
    line = r"ptender: KVM: this machine emulates [^;]*; " + re.escape(TAKING[INSTEAD] + "\n")
    assert re.fullmatch(line, done.stderr), done
    assert run(f"--cpu={INSTEAD}", "--mem=8", guest("fp")).stderr == ""


@pytest.mark.skipif(INSTEAD == "soft", reason="no native CPU")
def test_auto_says_why_it_is_neither_kvm_nor_native(guest: Build) -> None:
    done = command(f"{NO_NATIVE}; accel.emulated = lambda: True", "--mem=8", guest("exit"))
    assert done.returncode == 0, done
    line = "ptender: KVM: [^\n]*; native CPU: there is none; " + re.escape(TAKING["soft"] + "\n")
    assert re.fullmatch(line, done.stderr), done


@pytest.mark.parametrize("option", ["--clock=virtual", "--instructions=100000000"])
def test_auto_is_soft_in_silence_for_what_only_that_can_do(guest: Build, option: str) -> None:
    done = run(option, "--mem=8", guest("exit"))
    assert (done.returncode, done.stderr) == (0, "")
    done = run("--cpu=native", option, "--mem=8", guest("exit"))
    assert done.returncode == 2
    assert "is for the software CPU: use --cpu=soft" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_notice_on_the_cpu_is_for_a_guest_that_runs(bare: list[str], tmp_path: Path) -> None:
    done = run_bare(bare, "--mem=8", "--block", "/nonexistent.img", str(demo()))
    assert done.returncode == 1
    assert "taking the " not in done.stderr
    assert done.stderr.count("\n") == 1


# What KVM can't do.


@needs_kvm
@pytest.mark.skipif(not accel.emulated(), reason="this machine's KVM runs guests in hardware")
def test_an_instruction_that_kvm_cannot_emulate(guest: Build) -> None:
    """The guest ends, and the line says what would run it."""
    done = command("accel.emulated = lambda: False", "--mem=8", guest("fp"))
    assert done.returncode == 1
    assert re.fullmatch(
        r"ptender: KVM: internal error exit: [^\n]* \(--cpu=soft may run it\)\n", done.stderr
    ), done


# What the emulator needs.


def test_code_that_is_not_executed_costs_its_size(tmp_path: Path) -> None:
    """Bytes that look like WRMSR, all over an image."""

    def memory_of(code: bytes) -> int:
        kernel = tmp_path / "kernel.hvt"
        kernel.write_bytes(elves.image(code=code))
        process = subprocess.Popen(
            [PTENDER, "--cpu=soft", "--mem=32", kernel], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        assert "(HLT)" in process.stderr.read()
        process.stderr.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss

    size = 8 << 20
    more_kib = memory_of(b"\xf4" + b"\x0f\x30" * (size // 2)) - memory_of(b"\xf4")
    assert more_kib < 4 * size >> 10


def deny(what: str) -> str:
    """Python that takes it away from this process, for good."""
    return {
        "address space": "import resource; "
        "resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))",
        "W+X": "import ctypes; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0",
    }[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [("address space", "raise `ulimit -v`"), ("W+X", "writable and executable")],
)
def test_memory_that_the_emulator_cannot_have(guest: Build, what: str, message: str) -> None:
    done = command(deny(what), "--cpu=soft", "--mem=8", guest("exit"))
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"ptender: software CPU: it needs [^\n]*\n", done.stderr), done
    assert message in done.stderr


@pytest.mark.parametrize("what", ["address space", "W+X"])
def test_memory_that_a_programs_guest_cannot_have(guest: Build, what: str) -> None:
    code = (
        f"import sys; from tender import Guest; from tender.errors import HostError; {deny(what)}\n"
        "try: Guest(sys.argv[1], mem_mib=8, cpu='soft').run()\n"
        "except HostError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(guest("exit"))], capture_output=True, text=True
    )
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("software CPU: it needs ")


@needs_kvm
@pytest.mark.skipif(not accel.emulated(), reason="this machine's KVM runs guests in hardware")
@pytest.mark.parametrize("what", ["address space", "W+X"])
def test_auto_takes_kvm_where_the_emulator_has_no_memory(guest: Build, what: str) -> None:
    done = command(f"{NO_NATIVE}; {deny(what)}", "--cpu=auto", "--mem=8", guest("exit"))
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(INSTEAD == "soft", reason="no native CPU")
@pytest.mark.parametrize("what", ["address space", "W+X"])
def test_the_native_cpu_needs_no_such_memory(guest: Build, what: str) -> None:
    done = command(deny(what), "--cpu=native", "--mem=8", guest("exit"))
    if "AssertionError" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")


# Virtual time.


def test_a_sleep_in_virtual_time_takes_none(guest: Build) -> None:
    done = run("--cpu=soft", "--clock=virtual", "--mem=8", guest("sleep"), 3600_000)
    assert done.returncode == 0, done
    slept = re.search(r"slept (\d+) ns", done.stdout)
    assert slept
    assert int(slept[1]) >= 3600 * 10**9  # an hour, or this would have ended it


@pytest.mark.parametrize("name", ["time", "memory", "ssp", "tls"])
def test_two_virtual_runs_are_the_same(guest: Build, name: str) -> None:
    words = ("--clock=virtual,start=2030-01-01T00:00:00,tick=77", "--mem=8", guest(name))
    first, second = run(*words), run(*words)
    assert first.stdout == second.stdout
    assert first.returncode == second.returncode
    assert first.stderr == ""


def test_virtual_time_starts_where_it_is_told(tmp_path: Path) -> None:
    source = tmp_path / "now.c"
    source.write_text(
        "#include <solo5.h>\n#include <stdio.h>\n"
        "int solo5_app_main(const struct solo5_start_info *i) { (void)i;\n"
        '    printf("%lu\\n", solo5_clock_wall()); return 0; }\n'
    )
    image = tmp_path / "now.hvt"
    assert run("build", source, "-o", image).returncode == 0
    billion = ("2001-09-09T01:46:40", "2001-09-09T03:46:40+02:00", "1000000000")
    for start in (*billion, "0"):
        done = run(f"--clock=virtual,start={start},tick=1", image, "--solo5:quiet")
        expected = 10**18 if start in billion else 0
        assert 0 < int(done.stdout) - expected < 100, done


def test_virtual_time_and_frames(guest: Build) -> None:
    """A poll without an end waits for a frame; nothing is jumped over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    words = ["--clock=virtual", f"--net:service=@{theirs.fileno()}", "--", guest("ping")]
    with subprocess.Popen(
        [PTENDER, *map(str, words)], pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
    ) as process:
        ours.recv(2000)
        wait_until_asleep(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_S) == 1
    ours.close()
    theirs.close()


def test_a_program_gives_virtual_time(guest: Build) -> None:
    null = os.open("/dev/null", os.O_WRONLY)
    outcome = Guest(
        guest("sleep"), "3600000", mem_mib=8, console=null, clock=VirtualTime(), cpu="soft"
    ).run()
    assert (outcome.reason, outcome.status) == ("halted", 0)
    os.close(null)


# A limit.


def test_a_guest_that_runs_away_is_ended(guest: Build) -> None:
    done = run("--instructions=300000", "--mem=8", guest("loop"))
    assert done.returncode == 1
    assert re.fullmatch(
        r"ptender: software CPU: [^\n]*--instructions[^\n]*rip=0x1[^\n]*\n", done.stderr
    )
    enough = run("--instructions=300000", "--mem=8", guest("exit"), 3)
    assert enough.returncode == 3


@pytest.mark.parametrize("word", ["--clock=virtual", "--instructions=5"])
def test_what_kvm_cannot_do_is_said(word: str) -> None:
    done = run("--cpu=kvm", word, demo())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{word.partition('=')[0]}" in done.stderr
    assert "use --cpu=soft" in done.stderr


# Instructions, inside the sandbox.


@pytest.mark.parametrize("clock", [[], ["--clock=virtual"]])
def test_all_that_cpuid_promises_works_inside_the_sandbox(guest: Build, clock: list[str]) -> None:
    done = run("--cpu=soft", *clock, "--mem=8", guest("instructions"))
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "SUCCESS" in done.stdout


def test_random_numbers_come_from_the_start_of_virtual_time(guest: Build) -> None:
    def numbers(*words: str) -> list[str]:
        done = run("--cpu=soft", *words, "--mem=8", guest("instructions"), "numbers")
        found = re.findall("^[0-9a-f ]+$", done.stdout, re.MULTILINE)
        assert len(found) == 100, done
        return found

    virtual = [numbers(f"--clock=virtual,start={start}") for start in (7, 7, 8)]
    assert virtual[0] == virtual[1] != virtual[2]
    assert numbers() != numbers()


# What is better than on KVM.


def test_a_jump_into_data_is_a_fault(tmp_path: Path) -> None:
    source = tmp_path / "jump.c"
    source.write_text(
        "#include <solo5.h>\nstatic unsigned char code[1] = {0xc3};\n"
        "int solo5_app_main(const struct solo5_start_info *i) { (void)i;\n"
        "    void (*volatile go)(void) = (void (*)(void))code; go(); return 0; }\n"
    )
    image = tmp_path / "jump.hvt"
    assert run("build", source, "-o", image).returncode == 0
    done = run("--cpu=soft", "--mem=8", image)
    assert done.returncode == 255, done
    assert re.search(
        r"^Solo5: trap #PF: error=0x11 rip=(0x1[0-9a-f]+) .*cr2=\1$", done.stdout, re.M
    )


def test_an_instruction_beyond_the_engine(tmp_path: Path) -> None:
    source = tmp_path / "avx.c"
    source.write_text(
        "#include <solo5.h>\n"
        "int solo5_app_main(const struct solo5_start_info *i) { (void)i;\n"
        '    __asm__ volatile("vpaddb %ymm0, %ymm0, %ymm0"); return 0; }\n'
    )
    image = tmp_path / "avx.hvt"
    assert run("build", source, "-o", image).returncode == 0
    done = run("--cpu=soft", "--mem=8", image)
    assert done.returncode == 1
    assert re.search(
        r"can't do this instruction, rip=0x1[0-9a-f]+, instruction=c5 fd fc c0", done.stderr
    )


@pytest.mark.parametrize("word", ["nothing", "KVM"])
def test_words_that_name_no_cpu(word: str) -> None:
    done = run(f"--cpu={word}", demo())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{word}' is not auto, kvm, native or soft" in done.stderr


def test_a_library_of_the_software_cpu_that_cannot_be_loaded(guest: Build) -> None:
    done = command("soft.library = lambda: '/nonexistent'", "--cpu=soft", guest("exit"), "0")
    assert done.returncode == 1
    assert re.fullmatch(r"ptender: [^\n]*pip install[^\n]*\n", done.stderr), done


def test_the_fixture_knows_each(ptender: Run, cpu: str) -> None:
    assert ptender("-v", "--mem=8", demo()).returncode == 0
    assert os.environ["PTENDER_CPU"] == cpu
