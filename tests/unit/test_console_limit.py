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


class Limited:
    """A console with a limit of 5000 bytes per second."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.console = Console(rig.console.fd, rig.stop, rig.warnings.append, 5000)
        self.engine = rig.renew_engine()

    def __call__(self, text: bytes) -> bytes:
        """Print it; returns what came through."""
        self.rig.memory.view[DATA : DATA + len(text)] = text
        block = self.rig.put("PUTS", data_gpa=DATA, len=len(text))
        assert not self.engine.answer(NUMBERS["PUTS"], ARGS)  # one implementation: Python's
        self.rig.console.puts(self.rig.memory, block)
        try:
            return os.read(self.rig.output, 1 << 20)
        except BlockingIOError:
            return b""


@pytest.fixture
def limited(rig: Rig, clock: Clock) -> Limited:
    os.set_blocking(rig.output, False)
    return Limited(rig)


def test_whole_lines_are_dropped_counted_and_told(limited: Limited, clock: Clock) -> None:
    lines = [b"%04d " % number + b"x" * 94 + b"\n" for number in range(200)]
    assert limited(b"".join(lines[:40])) == b"".join(lines[:40])
    assert limited(b"".join(lines[40:90])) == b"".join(lines[40:50])
    assert limited(lines[90]) == b""
    console = limited.rig.console
    assert (console.counters.calls, console.counters.drops) == (3, 2)
    clock.now_ns += SECOND // 100  # 50 bytes: no line
    assert limited(lines[91]) == b""
    clock.now_ns += SECOND // 100
    assert limited(lines[92]) == lines[92]
    console.report_dropped()
    assert limited.rig.warnings == [
        "console: output beyond 5000 bytes per second is dropped (--console-limit); "
        "the guest goes on",
        "console: 4200 bytes of output were dropped (--console-limit)",
    ]


def test_a_line_that_comes_in_pieces_is_dropped_to_its_end(limited: Limited, clock: Clock) -> None:
    assert limited(b"begun ") == b"begun "
    assert limited(b"x" * 6000) == b"\n"  # which ends what was begun
    assert limited(b"more of it") == b""
    clock.now_ns += SECOND // 10
    assert limited(b"and more, the end\nthe next ") == b"the next "
    assert limited(b"line\n") == b"line\n"


def test_a_line_without_end_goes_on_after_a_second(limited: Limited, clock: Clock) -> None:
    assert limited(b"." * 5000) == b"." * 5000
    assert limited(b".") == b"\n"
    clock.now_ns += SECOND // 2
    assert limited(b".") == b""
    clock.now_ns += SECOND // 2
    assert limited(b".") == b"."


def test_no_output_is_lost_without_being_said(limited: Limited, clock: Clock) -> None:
    through = 0
    for number in range(400):
        clock.now_ns += SECOND // 50
        through += len(limited(b"x" * (number % 37) + b"\n" * (number % 3) + b"y" * (number * 7)))
    total = limited.rig.console.counters.bytes
    dropped = limited.rig.console.dropped_bytes
    assert total <= through + dropped <= total + 400  # with the ends of lines that were begun


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
