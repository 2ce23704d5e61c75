"""Running a tender with the stand-in for KVM_RUN (standin.c), and reading its result.

The rule here: a figure counts only if every reply was right and the tender ended with status 0.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.session import ROOT, Unavailable, check
from bench.tenders import environment

SOURCE = Path(__file__).with_name("standin.c")
ROUNDS = 31
_RESULT = struct.Struct(f"<5Q{ROUNDS}Q")  # struct result of standin.c

CALLS = {
    "WALLTIME": 1,
    "PUTS": 2,
    "POLL": 3,
    "BLOCK_WRITE": 4,
    "BLOCK_READ": 5,
    "NET_WRITE": 6,
    "NET_READ": 7,
    "HALT": 8,
}


@dataclass(frozen=True)
class Scenario:
    """Which call is made, over and over."""

    call: str
    length: int = 0  # bytes per call
    span: int = 0  # bytes of the block device
    round_ns: int = 1_000_000
    calls: int = 0  # per round; 0: as many as fit

    def environment(self, library: Path, result: Path) -> dict[str, str]:
        settings = {
            "STANDIN_RESULT": result,
            "STANDIN_CALL": CALLS[self.call],
            "STANDIN_LENGTH": self.length,
            "STANDIN_SPAN": self.span,
            "STANDIN_ROUND_NS": self.round_ns,
            "STANDIN_CALLS": self.calls,
            "LD_PRELOAD": library,
        }
        return environment() | {name: str(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Figures:
    """What one run found; times are those of one call in ns, the stand-in's own taken off."""

    calls: int  # per round
    rounds_ns: tuple[float, ...]
    own_ns: float

    @property
    def median_ns(self) -> float:
        return statistics.median(self.rounds_ns)


def build(folder: Path) -> Path:
    """Compile the stand-in, once per folder."""
    library = folder / "standin.so"
    if not library.exists():
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        check(["cc", *flags, f"-I{ROOT / 'abi'}", "-o", str(library), str(SOURCE)])
    return library


def new_result(folder: Path) -> Path:
    """An empty file for the stand-in to write to."""
    path = folder / "standin.result"
    path.write_bytes(bytes(_RESULT.size))
    return path


def read_result(path: Path) -> Figures:
    calls, rounds, wrong, own_ns, own_calls, *round_ns = _RESULT.unpack(path.read_bytes())
    if rounds != ROUNDS:
        raise Unavailable(f"the stand-in made {rounds} of {ROUNDS} rounds")
    if wrong:
        raise Unavailable(f"{wrong} wrong replies in {rounds} rounds of {calls} calls")
    own = own_ns / own_calls
    return Figures(calls, tuple(elapsed / calls - own for elapsed in round_ns), own)


def run(
    command: list[str],
    scenario: Scenario,
    folder: Path,
    *,
    stdout: int = subprocess.DEVNULL,
    pass_fds: tuple[int, ...] = (),
) -> Figures:
    """Run the tender's command with the stand-in, which is built and read in `folder`."""
    result = new_result(folder)
    done = subprocess.run(
        command,
        env=scenario.environment(build(folder), result),
        stdout=stdout,
        pass_fds=pass_fds,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    if done.returncode:
        raise Unavailable(f"{command[0]}: status {done.returncode}: {done.stderr.strip()}")
    return read_result(result)
