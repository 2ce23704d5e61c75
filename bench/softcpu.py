"""Instructions per second and microseconds per hypercall: the software CPU beside KVM.

CPU time of this process is measured, because others may use the machine. The time of a start is
subtracted: the guest runs with little and with much to do.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench.results import Result, Target
from bench.rows import Row
from bench.session import Session, Unavailable
from tender import machine
from tender.config import Config
from tender.errors import TenderError
from tender.stop import Stop

ROUNDS = 5
SOURCE = """\
#include <solo5.h>

static unsigned long sink;

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
    else
        while (count--)
            solo5_clock_wall();
    return 0;
}
"""
PER_TURN = 10
RATE_MIN, CALL_MAX = 200.0, 2.0  # million instructions per second, us per hypercall
# What is run: letter, turns of the long run on a CPU in software, and on one that is emulated.
LOOP = ("l", 50_000_000, 200_000)
CALLS = ("c", 300_000, 3_000)


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
    start = time.process_time()
    outcome = machine.run(config, Stop(), lambda _: None)
    if outcome.reason != "halted" or outcome.status:
        raise SystemExit(f"{cpu}: the guest did not end well: {outcome}")
    return time.process_time() - start


def per_turn(kernel: Path, cpu: str, what: tuple[str, int, int], console: int) -> float:
    """Seconds per turn; a KVM that is slow gets less to do."""
    letter, many, few = what
    count = many if cpu == "soft" or seconds(kernel, cpu, letter, few, console) < 0.05 else few
    none = seconds(kernel, cpu, letter, 1, console)
    return max(seconds(kernel, cpu, letter, count, console) - none, 1e-9) / count


def figures(kernel: Path, cpu: str, console: int) -> dict[str, float]:
    turn = per_turn(kernel, cpu, LOOP, console)
    call = per_turn(kernel, cpu, CALLS, console)
    return {"instructions_per_s": PER_TURN / turn, "us_per_hypercall": call * 1e6}


def measure(session: Session) -> list[Result]:
    """Both figures, of the software CPU and of KVM, for the table."""
    kernel = build(session.folder)
    names = {"soft": "ptender --cpu=soft", "kvm": "ptender --cpu=kvm"}
    rates: dict[str, list[float]] = {name: [] for name in names.values()}
    calls: dict[str, list[float]] = {name: [] for name in names.values()}
    with open("/dev/null", "wb") as null:
        for _ in range(2 if session.quick else ROUNDS):
            for cpu, name in names.items():
                try:
                    each = figures(kernel, cpu, null.fileno())
                except TenderError as error:
                    raise Unavailable(str(error)) from None
                rates[name].append(each["instructions_per_s"] / 1e6)
                calls[name].append(each["us_per_hypercall"])
    soft = names["soft"]
    return [
        Result("cpu-rate", "M/s", rates, {soft: Target(value=RATE_MIN)}, more_is_better=True),
        Result("cpu-call", "us", calls, {soft: Target(value=CALL_MAX)}),
    ]


ROWS = [Row("cpu", "instruction rate and time of a WALLTIME, of each CPU", measure)]
