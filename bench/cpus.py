"""Instructions per second, and times of a store, a random number and a hypercall: each CPU.

CPU time is measured, because others may use the machine; of the native CPU, whose two processes
take turns, the time that passes. The time of a start is subtracted: the guest runs with little and
with much to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.results import Result, Target
from bench.rows import Row
from bench.session import Session, Unavailable
from tender import accel, machine
from tender.config import Config
from tender.errors import TenderError
from tender.stop import Stop

ROUNDS = 5
NATIVE_CALL_US, NATIVE_CALL_1_US = 6, 15  # with two CPUs, and with one
SOURCE = """\
#include <solo5.h>

static unsigned long sink, cells[4096];

static unsigned long number(const char *text)
{
    unsigned long value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (unsigned long)(*text++ - '0');
    return value;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    unsigned long count = number(info->cmdline + 2);

    if (info->cmdline[0] == 'l') /* ten instructions a turn, each with a result that is used */
        __asm__ volatile("1: mov %%rax, %%rdx; shl $13, %%rdx; xor %%rdx, %%rax\\n"
                         "mov %%rax, %%rdx; shr $7, %%rdx; xor %%rdx, %%rax\\n"
                         "add %0, %%rax; mov %%rax, (%1); dec %0; jnz 1b"
                         : "+r"(count) : "r"(&sink) : "rax", "rdx", "cc", "memory");
    else if (info->cmdline[0] == 'm') /* eight instructions, two of them loads, one a store */
        __asm__ volatile("xor %%ecx, %%ecx\\n"
                         "1: mov (%1,%%rcx,8), %%rax; add 8(%1,%%rcx,8), %%rax\\n"
                         "mov %%rax, (%1,%%rcx,8); add $1, %%ecx; and $0x7ff, %%ecx\\n"
                         "lea 1(%%rax), %%rdx; dec %0; jnz 1b"
                         : "+r"(count) : "r"(cells) : "rax", "rcx", "rdx", "cc", "memory");
    else if (info->cmdline[0] == 's') /* eight stores */
        __asm__ volatile("1: mov %0, (%1); mov %0, 8(%1); mov %0, 16(%1); mov %0, 24(%1)\\n"
                         "mov %0, 32(%1); mov %0, 40(%1); mov %0, 48(%1); mov %0, 56(%1)\\n"
                         "dec %0; jnz 1b" : "+r"(count) : "r"(cells) : "cc", "memory");
    else if (info->cmdline[0] == 'r')
        __asm__ volatile("1: rdrand %%rax; dec %0; jnz 1b" : "+r"(count) : : "rax", "cc");
    else
        while (count--)
            solo5_clock_wall();
    return 0;
}
"""


@dataclass(frozen=True)
class Loop:
    """What the guest does over and over; `few` turns for a CPU that is emulated."""

    name: str
    unit: str
    letter: str
    many: int
    few: int
    value: Callable[[float], float]  # of the seconds of a turn
    target: float
    more_is_better: bool = False


LOOPS = (
    Loop("cpu-rate", "M/s", "l", 50_000_000, 200_000, lambda turn: 10 / turn / 1e6, 200, True),
    Loop("cpu-memory", "M/s", "m", 20_000_000, 200_000, lambda turn: 8 / turn / 1e6, 250, True),
    Loop("cpu-store", "ns", "s", 5_000_000, 50_000, lambda turn: turn / 8 * 1e9, 16),
    Loop("cpu-random", "ns", "r", 1_000_000, 100_000, lambda turn: turn * 1e9, 200),
    Loop("cpu-call", "us", "c", 300_000, 3_000, lambda turn: turn * 1e6, 2),
)


def build(folder: Path) -> Path:
    source, kernel = folder / "bench.c", folder / "bench.hvt"
    source.write_text(SOURCE)
    ptender = Path(sys.executable).with_name("ptender")
    subprocess.run([ptender, "build", source, "-o", kernel], check=True)
    return kernel


def seconds(kernel: Path, cpu: str, letter: str, count: int, console: int) -> float:
    # In this process, whose CPU time is taken.
    config = Config(
        str(kernel), (letter, str(count)), mem_bytes=8 << 20, console_fd=console, cpu=cpu
    )
    now = time.perf_counter if cpu == "native" else time.process_time
    start = now()
    outcome = machine.run(config, Stop(), lambda _: None)
    if outcome.reason != "halted" or outcome.status:
        raise SystemExit(f"{cpu}: the guest did not end well: {outcome}")
    return now() - start


def per_turn(kernel: Path, cpu: str, loop: Loop, console: int) -> float:
    """Seconds per turn; a KVM that is slow gets less to do."""
    slow = cpu == "kvm" and seconds(kernel, cpu, loop.letter, loop.few, console) >= 0.05
    count = loop.few if slow else loop.many
    none = seconds(kernel, cpu, loop.letter, 1, console)
    return max(seconds(kernel, cpu, loop.letter, count, console) - none, 1e-9) / count


def _native_target(loop: Loop, names: dict[str, str]) -> dict[str, Target]:
    is_call = loop.name == "cpu-call" and "native" in names
    return {names["native"]: Target(value=NATIVE_CALL_US)} if is_call else {}


def measure(session: Session) -> list[Result]:
    """All loops, of each CPU, for the table; a call on the native one with a single CPU, too."""
    kernel = build(session.folder)
    cpus = ("soft", "native", "kvm") if accel.native_usable() else ("soft", "kvm")
    names = {cpu: f"ptender --cpu={cpu}" for cpu in cpus}
    single: list[float] = []
    samples = {loop: {name: list[float]() for name in names.values()} for loop in LOOPS}
    with open("/dev/null", "wb") as null:
        for _ in range(2 if session.quick else ROUNDS):
            for loop in LOOPS:
                for cpu, name in names.items():
                    try:
                        turn = per_turn(kernel, cpu, loop, null.fileno())
                    except TenderError as error:
                        raise Unavailable(str(error)) from None
                    samples[loop][name].append(loop.value(turn))
            if "native" in names:
                single.append(_on_one_cpu(kernel, null.fileno()))
    found = [
        Result(
            loop.name,
            loop.unit,
            samples[loop],
            {names["soft"]: Target(value=loop.target)} | _native_target(loop, names),
            more_is_better=loop.more_is_better,
        )
        for loop in LOOPS
    ]
    if single:
        target = {names["native"]: Target(value=NATIVE_CALL_1_US)}
        found.append(Result("cpu-call-1", "us", {names["native"]: single}, target))
    return found


def _on_one_cpu(kernel: Path, console: int) -> float:
    """A call on the native CPU, in us, where tender and guest have one CPU of the machine."""
    (call,) = (loop for loop in LOOPS if loop.name == "cpu-call")
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        return call.value(per_turn(kernel, "native", call, console))
    finally:
        os.sched_setaffinity(0, cpus)


ROWS = [Row("cpu", "rates and times of instructions, and of a WALLTIME, of each CPU", measure)]
