"""Guests that go on where another was saved: what a clone costs, and what a test suite saves.

The CPU time of a clone is up to its next instruction, without its process and its sandbox: the
steps are made in the bench's own process. A suite is pytest, start and end included.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from time import perf_counter_ns, process_time_ns

from bench import spt
from bench.results import REFERENCE, Result, Target
from bench.rows import Row
from bench.session import Session, Unavailable, check
from bench.tenders import MEM_MIB, environment, installed
from tender import Guest, accel
from tender.assemble import assemble
from tender.cleanup import Cleanup
from tender.config import Config
from tender.devices import open_inputs
from tender.embed.snapshots import Snapshot
from tender.stop import Stop

CLONES, QUICK_CLONES = 100, 10
TESTS, QUICK_TESTS = 50, 5
TARGETS_MS = {"soft": 1.0, "native": 1.0, "kvm": 5.0}  # of CPU time; native: beside the copy
FORGET = 5  # samples, of first uses
BOOT_STEPS, STEP_MS = 20, 5  # of the guest of the suite: what a boot takes

SUITE = """
import pytest

BOOTED = "count {steps} "

@pytest.fixture(scope="module")
def template(module_unikernel):
    guest = module_unikernel("{kernel}", "100000", "{step}", mem_mib=16, snapshots=True)
    return guest.ready(BOOTED)

@pytest.mark.parametrize("number", range({tests}))
def test_with_a_template(template, unikernel, number):
    template.clone().console.wait_for("count")

@pytest.mark.parametrize("number", range({tests}))
def test_booted(unikernel, number):
    unikernel("{kernel}", "100000", "{step}", mem_mib=16).console.wait_for(BOOTED)
"""


def _cpus() -> list[str]:
    found = ["kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else []
    found += ["native"] if accel.native_usable() else []
    return [*found, *(["soft"] if accel.soft_usable() else [])]


def _saved(session: Session, cpu: str) -> Snapshot:
    options = {"mem_mib": MEM_MIB, "cpu": cpu, "snapshots": True}
    with Guest(session.guest("count"), "100000", "1", **options) as guest:  # type: ignore[arg-type]
        guest.console.wait_for("count 3 ")
        return guest.snapshot(stop=True)


def clone_ms(snapshot: Snapshot, cpu: str, console_fd: int) -> float:
    """CPU time until a clone is about to run."""
    fd = os.dup(snapshot.fd)
    begin = process_time_ns()
    with Cleanup() as cleanup:
        config = Config(
            "clone", kernel_fd=fd, restore=True, clone=True, console_fd=console_fd, cpu=cpu
        )
        inputs = open_inputs(config, cleanup)
        machine = assemble(inputs, Stop(), lambda _: None, cleanup)
        machine.vcpu.start(b"")
        elapsed_ns = process_time_ns() - begin
        machine.vcpu.end()
    return elapsed_ns / 1e6


def measure_clone(session: Session) -> list[Result]:
    count = QUICK_CLONES if session.quick else CLONES
    null = os.open("/dev/null", os.O_WRONLY)
    try:
        samples = {}
        for cpu in _cpus():
            snapshot = _saved(session, cpu)
            times = [clone_ms(snapshot, cpu, null) for _ in range(FORGET + count)]
            samples[cpu] = times[FORGET:]
    finally:
        os.close(null)
    targets = {cpu: Target(value=TARGETS_MS[cpu]) for cpu in samples}
    return [Result("clone", "ms", samples, targets, note="CPU time; its process and sandbox apart")]


def output_ms(command: list[str], text: bytes) -> float:
    """The time from starting a command until its guest has printed `text`."""
    ours, theirs = os.pipe()
    actions = [
        (os.POSIX_SPAWN_DUP2, theirs, 1),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_CLOSE, ours),
    ]
    begin = perf_counter_ns()
    pid = os.posix_spawn(command[0], command, environment(), file_actions=actions)
    os.close(theirs)
    output = chunk = os.read(ours, 1 << 16)
    while chunk and text not in output:
        chunk = os.read(ours, 1 << 16)
        output += chunk
    elapsed_ns = perf_counter_ns() - begin
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ours)
    if not chunk:
        raise Unavailable(f"{' '.join(command)}: no output")
    return elapsed_ns / 1e6


def measure_restore(session: Session) -> list[Result]:
    """The command, beside those that boot the same guest; to what it prints then."""
    steps = ["100000", str(STEP_MS)]
    booted = f"count {BOOT_STEPS} ".encode()
    commands = {}
    if os.environ.get("SOLO5_HVT"):
        kernel = session.guest("count")
        commands[REFERENCE] = [os.environ["SOLO5_HVT"], f"--mem={MEM_MIB}", str(kernel), *steps]
    if os.environ.get("SOLO5_SPT"):
        kernel = spt.image(session, "count")
        commands[spt.REFERENCE] = [os.environ["SOLO5_SPT"], f"--mem={MEM_MIB}", str(kernel), *steps]
    texts = dict.fromkeys(commands, booted)
    for cpu in _cpus():
        file = session.folder / f"{cpu}.snapshot"
        snapshot = _saved(session, cpu)
        snapshot.save(file)
        snapshot.close()
        name = f"restore {cpu}"
        commands[name] = [str(installed()), "--clone", f"--cpu={cpu}", f"--restore={file}"]
        texts[name] = b"count"
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(FORGET + session.pairs):
        for name, command in commands.items():
            samples[name].append(output_ms(command, texts[name]))
    samples = {name: times[FORGET:] for name, times in samples.items()}
    targets = {name: Target(ratio=1.0) for name in samples if name.startswith("restore")}
    note = f"a guest that boots in {BOOT_STEPS * STEP_MS} ms: booted, or restored, to its next line"
    return [Result("restore", "ms", samples, targets, note=note)]


def measure_fork(session: Session) -> list[Result]:
    count = QUICK_CLONES if session.quick else CLONES
    samples: dict[str, list[float]] = {}
    for cpu in _cpus():
        samples[cpu] = times = []
        for clone in _forks(session, cpu, count):
            begin = perf_counter_ns()
            clone.start()
            clone.console.wait_for("count")
            times.append((perf_counter_ns() - begin) / 1e6)
            clone.kill()
    return [Result("fork", "ms", samples, note=f"{count} clones: start to first output")]


def _forks(session: Session, cpu: str, count: int) -> list[Guest]:
    snapshot = _saved(session, cpu)
    return [
        Guest.restore(snapshot, clone=True, cpu=cpu, warn=lambda _: None)  # type: ignore[arg-type]
        for _ in range(count)
    ]


def measure_suite(session: Session) -> list[Result]:
    tests = QUICK_TESTS if session.quick else TESTS
    file = session.folder / "test_suite.py"
    file.write_text(
        SUITE.format(kernel=session.guest("count"), steps=BOOT_STEPS, step=STEP_MS, tests=tests)
    )
    samples: dict[str, list[float]] = {"template": [], "boot": []}
    for _ in range(session.pairs):
        samples["template"].append(_suite_ms(file, "test_with_a_template"))
        samples["boot"].append(_suite_ms(file, "test_booted"))
    note = f"{tests} tests of a guest that boots in {BOOT_STEPS * STEP_MS} ms"
    return [Result("suite", "ms", samples, reference="boot", note=note)]


def _suite_ms(file: Path, test: str) -> float:
    begin = perf_counter_ns()
    command = [sys.executable, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    check([*command, "-k", test, str(file)])
    return (perf_counter_ns() - begin) / 1e6


ROWS = [
    Row("restore", "a saved guest, restored by the command, to its first output", measure_restore),
    Row("clone", "a clone of a saved guest: to its next instruction", measure_clone),
    Row("fork", "100 clones of a saved guest, one after the other", measure_fork),
    Row("suite", "50 tests with and without a template", measure_suite),
]
