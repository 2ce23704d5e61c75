"""`--console-limit`: what comes through, what is dropped, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.config import ENGINES
from tender.errors import UsageError
from tender.modules import console
from tender.modules.console import Allowance, Console
from tests.unit.rig import ARGS, DATA, NUMBERS, Rig
from tests.unit.test_options import parse

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 123

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(console, "monotonic_ns", value)
    return value


def test_one_second_is_saved_up_and_no_more(clock: Clock) -> None:
    allowance = Allowance(10_000)
    assert [allowance.take(n) for n in (9_000, 2_000, 1)] == [9_000, 1_000, 0]
    clock.now_ns += SECOND // 2
    assert [allowance.take(n) for n in (4_000, 4_000)] == [4_000, 1_000]
    clock.now_ns += 1000 * SECOND
    assert allowance.take(1 << 40) == 10_000


def test_a_low_rate_lets_a_banner_through_and_counts_every_nanosecond(clock: Clock) -> None:
    allowance = Allowance(3)
    assert allowance.take(1 << 40) == 4096
    taken = 0
    for _ in range(1000):  # steps in which less than a byte is earned
        clock.now_ns += SECOND // 100
        taken += allowance.take(1)
    assert taken == 30


@pytest.fixture(params=ENGINES)
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    value = Rig(tmp_path, request.param)
    yield value
    value.close()


def test_the_rest_is_dropped_counted_and_told_once(rig: Rig, clock: Clock) -> None:
    rig.console = Console(rig.console.fd, rig.stop, rig.warnings.append, 5000)
    text = bytes(index % 251 for index in range(3000))
    rig.memory.view[DATA : DATA + len(text)] = text
    engine = rig.renew_engine()
    for _ in range(4):
        block = rig.put("PUTS", data_gpa=DATA, len=len(text))
        assert not engine.answer(NUMBERS["PUTS"], ARGS)  # one implementation: Python's
        rig.console.puts(rig.memory, block)
    assert os.read(rig.output, 1 << 20) == text + text[:2000]
    assert (rig.console.counters.calls, rig.console.counters.drops) == (4, 3)
    assert rig.warnings == [
        "console: output beyond 5000 bytes per second is dropped (--console-limit); "
        "the guest goes on"
    ]
    clock.now_ns += SECOND
    rig.console.puts(rig.memory, block)
    assert os.read(rig.output, 1 << 20) == text


@pytest.mark.parametrize(
    ("text", "rate"),
    [("500", 500), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("2MiB", 2 << 20), ("7B", 7)],
)
def test_rates(text: str, rate: int) -> None:
    assert parse(f"--console-limit={text} k").console_limit == rate
    assert parse("k").console_limit is None


@pytest.mark.parametrize("text", ["0", "-5", "K", "x", "5X", "1.5M", "٣", "9" * 30])
def test_wrong_rates(text: str) -> None:
    with pytest.raises(UsageError, match="--console-limit: '.*' is not a rate: bytes per second"):
        parse(f"--console-limit={text} k")
