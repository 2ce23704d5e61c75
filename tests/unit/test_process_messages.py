"""What a program takes from a guest's process that was taken over: no flood, and its deadline."""

from __future__ import annotations

import signal

import pytest

from tender.embed.process import Process
from tender.embed.protocol import pack

OUTCOME = {"reason": "halted", "status": 0, "signo": 0, "stats": [[0] * 4, [0] * 4, {}, {}]}
VIOLATION = b"\0SYS" + bytes(8)


@pytest.fixture
def process() -> Process:
    return Process(lambda _: None, lambda: None)


@pytest.mark.parametrize("message", [pack("started", [[], []]), VIOLATION])
def test_what_is_said_once(process: Process, message: bytes) -> None:
    process._take(message)
    assert process._signals == []
    process._take(message)
    assert process._signals == [signal.SIGKILL]
    assert "once more" in str(process.outcome().error)


def test_a_deadline_for_one_that_told_of_its_end(process: Process) -> None:
    process._take(pack("outcome", OUTCOME))
    process._deadline()
    assert process._signals == [signal.SIGTERM]
    assert process.outcome().reason == "halted"
