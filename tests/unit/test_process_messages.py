"""What a program accepts from a guest's process that was taken over, and what it makes of it."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.embed import protocol
from tender.embed.process import TRANSITIONS, Process, State
from tender.embed.protocol import VIOLATION as VIOLATION_FORMAT
from tender.embed.protocol import VIOLATION_MAGIC, pack, pack_error
from tender.errors import GuestFault, HostError, TenderError
from tender.outcome import Counters, Outcome

ZEROS = [0] * len(Counters.__annotations__)
OUTCOME = {"reason": "halted", "status": 0, "signo": 0, "stats": [ZEROS, ZEROS, {}, {}]}
VIOLATION = b"\0SYS" + bytes(8)
STARTED = pack("started", [[], [], "", False, ""])
MESSAGES = [
    STARTED,
    VIOLATION,
    b"\0CPUinvalid opcode",
    pack("outcome", OUTCOME),
    pack("bug", ""),
    pack("bug", "\n"),
    pack("warning", "x"),
    pack("error", pack_error(HostError("x"))),
]


@pytest.fixture
def process() -> Process:
    """A process that has its job."""
    process = Process(lambda _: None, lambda: None)
    process._state = State.STARTING
    return process


@pytest.fixture
def signals(process: Process, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that it gets."""
    sent: list[int] = []
    monkeypatch.setattr(process, "_signal", sent.append)
    monkeypatch.setattr(process, "_call_later", lambda *_: None)
    return sent


def test_a_guest_starts_once(process: Process, signals: list[int]) -> None:
    process._take(STARTED)
    assert signals == []
    process._take(STARTED)
    assert signals == [signal.SIGKILL]
    outcome = process.outcome()
    assert outcome.reason == "host"
    assert "malformed message: 'started' in state RUNNING" in str(outcome.error)


@pytest.mark.parametrize(
    "name", ["web.7.123", "web.8.123", "../7.123", "web.7.", "web.7.1/2", "web.7"]
)
def test_only_its_own_counters_are_removed(process: Process, name: str) -> None:
    process._name, process.pid = "web", 7
    process._take(pack("started", [[], [], "", False, name]))
    assert process._counters == (name if name == "web.7.123" else "")


def test_nothing_counts_after_the_last_message(process: Process, signals: list[int]) -> None:
    process._take(STARTED)
    process._take(VIOLATION)
    process._take(pack("outcome", OUTCOME))
    assert signals == []
    process._status = signal.SIGSYS
    assert process.outcome().reason == "sandbox"


def test_a_deadline_of_one_that_has_reported(process: Process, signals: list[int]) -> None:
    process._take(pack("outcome", OUTCOME))
    process._pass_deadline()
    assert signals == [signal.SIGTERM]
    assert process.outcome().reason == "halted"


SPT_STARTED = pack("started", [[], [], "", True, ""])


@pytest.mark.parametrize(
    ("status", "reason", "code", "signo"),
    [
        (0, "halted", 0, 0),
        (7 << 8, "halted", 7, 0),
        (255 << 8, "halted", 255, 0),
        (signal.SIGSEGV, "fault", 1, signal.SIGSEGV),
        (signal.SIGILL, "fault", 1, signal.SIGILL),
        (signal.SIGSYS, "sandbox", 1, signal.SIGSYS),
        (signal.SIGTERM, "stopped", 1, signal.SIGTERM),
        (signal.SIGKILL, "killed", 1, signal.SIGKILL),
        (signal.SIGXCPU, "killed", 1, signal.SIGXCPU),
    ],
)
def test_the_end_of_an_spt_guest_is_that_of_its_process(
    process: Process, signals: list[int], status: int, reason: str, code: int, signo: int
) -> None:
    process._take(SPT_STARTED)
    process._status = status
    outcome = process.outcome()
    assert (outcome.reason, outcome.status, outcome.signo) == (reason, code, signo)


def test_the_words_of_an_spt_guest_are_checked(process: Process, signals: list[int]) -> None:
    process._take(SPT_STARTED)
    process._take(b"\0CPUpage fault (SIGSEGV)\n\x1b[2J\xff")
    process._status = signal.SIGSEGV
    assert (
        str(process.outcome().error) == "page fault (SIGSEGV)\\n\\x1b[2J\N{REPLACEMENT CHARACTER}"
    )
    assert signals == []


def test_words_that_are_too_long(process: Process, signals: list[int]) -> None:
    process._take(SPT_STARTED)
    process._take(b"\0CPU" + bytes(125))
    assert signals == [signal.SIGKILL]


@pytest.mark.parametrize("number", [-1, (1 << 31) - 1, -(1 << 31)])
def test_a_violation_with_a_number_that_no_call_has(
    process: Process, signals: list[int], number: int
) -> None:
    process._take(STARTED)
    process._take(VIOLATION_FORMAT.pack(VIOLATION_MAGIC, number, 0))
    process._status = signal.SIGSYS
    assert process.outcome().reason == "sandbox"


@pytest.mark.parametrize(
    "message",
    [
        pack("bug", "ValueError: x\n  file:1"),
        pack("error", pack_error(HostError("x", "read", 5))),
        pack("error", pack_error(GuestFault("x"))),
        b"garbage",
        b"",
    ],
)
def test_after_the_start_every_message_becomes_an_outcome(
    process: Process, signals: list[int], message: bytes
) -> None:
    process._take(STARTED)
    process._take(message)
    outcome = process.outcome()
    assert (outcome.reason, outcome.status) == ("host", 1)
    assert isinstance(outcome.error, TenderError)
    assert "\n" not in str(outcome.error)


def test_an_exception_of_the_parser_becomes_an_outcome(
    process: Process, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(_: bytes) -> None:
        raise OverflowError

    process._take(STARTED)
    monkeypatch.setattr(protocol, "parse", parse)
    process._take(VIOLATION)
    assert signals == [signal.SIGKILL]
    assert "malformed message: OverflowError" in str(process.outcome().error)


@pytest.mark.parametrize(
    ("path", "is_own"),
    [
        ("/cores/core.solo5-hvt.7", True),
        ("/cores/core.solo5-hvt.7.3", True),
        ("/cores/core.solo5-hvt.71", False),
        ("/cores/core.solo5-hvt.8", False),
        ("/cores/../core.solo5-hvt.7", False),
        ("/core.solo5-hvt.7", False),
        ("core.solo5-hvt.7", False),
    ],
)
def test_a_core_file_is_of_this_process(
    process: Process, signals: list[int], path: str, is_own: bool
) -> None:
    process.pid = 7
    process._core_folder = "/cores"
    process._take(pack("outcome", {**OUTCOME, "core": path}))
    assert process.outcome().core == (path if is_own else None)


def test_every_state_but_the_last_has_an_end() -> None:
    assert set(TRANSITIONS) == set(State)
    for state in (State.STARTING, State.RUNNING, State.REPORTED):
        assert TRANSITIONS[state]["exit"] is State.ENDED
    assert not TRANSITIONS[State.ENDED]


@given(st.lists(st.binary(max_size=40) | st.sampled_from(MESSAGES), max_size=6))
def test_any_messages_after_the_start_become_an_outcome(messages: list[bytes]) -> None:
    process = Process(lambda _: None, lambda: None)
    process._state = State.STARTING
    vars(process).update(_signal=lambda _: None, _call_later=lambda *_: None)
    process._take(STARTED)
    for message in messages:
        process._take(message)
    process._status = signal.SIGKILL
    assert isinstance(process.outcome(), Outcome)
