"""The messages between a program and the processes of its guests."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender import errors
from tender.backends import BlockFile, Descriptor, Tap
from tender.config import Config, VirtualTime
from tender.embed import protocol
from tender.embed.protocol import Job, Malformed
from tender.errors import ConfigError, GuestFault, HostError, TenderError
from tender.outcome import Counters, NetCounters, Outcome, Statistics

OUTCOME = Outcome(
    "fault",
    1,
    error=GuestFault("Invalid guest access: gpa=0x1, len=0x2", 1, 2, 5),
    trap={"rip": (1 << 64) - 1},
    core="/tmp/core.solo5-hvt.12.3",
    stats=Statistics(
        block={"storage": Counters(3, 1 << 63)},
        net={"service": NetCounters(Counters(drops=1), Counters(errors=2))},
    ),
)


def test_a_job_arrives_as_it_was_sent() -> None:
    config = Config(
        "/a/\udcff.hvt",
        ("--x=\u00e4", "\udc80"),
        net=(("service", Tap("tap0", create=True, addr=("10.0.0.1/24",), mac=b"\2\0\0\0\0\1")),),
        block=((None, BlockFile("disk.img", readonly=True)),),
        clock=VirtualTime(5),
    )
    job = Job(config, 7, (0, 2), 0o22)
    assert protocol.unpack_job(protocol.pack_job(job)) == job
    wrong: Any = object()
    with pytest.raises(ConfigError, match="can't be sent"):
        protocol.pack_job(Job(Config("k", net=((None, wrong),)), 1, ()))


@pytest.mark.parametrize(("letters", "count"), [(0, 1), (5000, 100), (2_000_000, 700)])
def test_any_number_of_descriptors(letters: int, count: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open("/dev/null") as null:
        config = Config("k", ("x" * letters,), net=((None, Descriptor(1)),))
        job = Job(config, count, (0,))
        protocol.send_job(ours, protocol.pack_job(job), [null.fileno()] * count)
        received = protocol.receive_job(theirs)
        assert received is not None
        got, descriptors = received
        assert got == job
        assert len(set(descriptors)) == count
        for fd in descriptors:
            os.close(fd)
        ours.close()
        assert protocol.receive_job(theirs) is None


def test_an_outcome_arrives_as_it_was_sent() -> None:
    kind, got = protocol.parse(protocol.pack_outcome(OUTCOME))
    assert kind == "outcome"
    assert got.error is not OUTCOME.error
    assert vars(got.error) == vars(OUTCOME.error)
    assert str(got.error) == str(OUTCOME.error)
    assert {**vars(got), "error": None} == {**vars(OUTCOME), "error": None}


def test_every_error_arrives_as_what_it_was() -> None:
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, TenderError):
            made = error(*["what is wrong"] * (3 if name == "InvalidValue" else 1))
            kind, got = protocol.parse(protocol.pack("error", protocol.pack_error(made)))
            assert kind == "error"
            assert isinstance(made, type(got)), name
    _, got = protocol.parse(protocol.pack("error", protocol.pack_error(HostError("x", "mmap", 12))))
    assert (str(got), got.syscall, got.errno) == ("x: Cannot allocate memory", "mmap", 12)


def test_what_is_shown_is_one_line_without_controls() -> None:
    _, text = protocol.parse(protocol.pack("warning", "a\nb\x1b[2Jc"))
    assert text == "a\\nb\\x1b[2Jc"


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "sandbox"},
        {"reason": None},
        {"status": "0"},
        {"status": True},
        {"status": 1 << 40},
        {"signo": -1},
        {"signo": 1000},
        {"error": {"type": "SystemExit", "text": ""}},
        {"error": {"type": "HostError", "text": 5}},
        {"error": {"type": "HostError", "text": "", "errno": "x"}},
        {"error": {"type": "HostError", "text": "", "errno": 1 << 31}},
        {"error": {"type": "HostError", "text": "", "errno": -1}},
        {"error": {"type": "GuestFault", "text": "", "gpa": 1 << 64}},
        {"error": {"type": "GuestFault", "text": "", "hypercall": 1 << 40}},
        {"error": {"type": "GuestFault", "text": "x" * 100_000}},
        {"trap": [1]},
        {"trap": {"rip": -1}},
        {"trap": {str(each): each for each in range(1000)}},
        {"core": "/etc/passwd"},
        {"core": "a\0core.solo5-hvt.1"},
        {"stats": None},
        {"stats": [[1.5] * 5, [0] * 5, {}, {}]},
        {"stats": [[0] * 5, [0] * 6, {}, {}]},
        {"stats": [[0] * 5, [0] * 5, {str(each): [0] * 5 for each in range(10_000)}, {}]},
        {"stats": [[0] * 5, [0] * 5, {}, {"x": [0] * 5}]},
    ],
)
def test_an_outcome_is_checked_field_by_field(change: dict[str, Any]) -> None:
    message = json.loads(protocol.pack_outcome(OUTCOME))
    message["outcome"].update(change)
    with pytest.raises(Malformed):
        protocol.parse(json.dumps(message).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"outcome": 1}',
        b'{"import": "os"}',
        b'{"warning": "a", "started": 1}',
        b'{"started": 2}',
        b'{"started": [[]]}',
        b'{"started": [["descriptors"], "none", "", false, ""]}',
        b'{"started": [["seccomp", 1], [], "", false, ""]}',
        b'{"started": [["seccomp"], [], 1, false, ""]}',
        b'{"started": [["seccomp"], [], "", 0, ""]}',
        b'{"started": [["seccomp"], [], "", false, 1]}',
        b'{"started": [[], %s, "", false, ""]}' % json.dumps(["a"] * 17).encode(),
        b"[" * 60_000,
        b'{"warning": ' + b"9" * 60_000 + b"}",
        b'{"warning": "' + b"x" * 70_000 + b'"}',
        b"\0",
        b"\0SYS" + bytes(7),
        b"\x80\x05N.",
    ],
)
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse(data)


def test_a_violation_names_a_system_call() -> None:
    record = protocol.VIOLATION.pack(protocol.VIOLATION_MAGIC, 41, 0xC000003E)
    assert protocol.parse(record) == ("violation", 41)
    # syscall(2) takes any number, and the library that names it an int.
    record = b"\0SYS" + b"\xff" * 4 + bytes(4)
    assert protocol.parse(record) == ("violation", -1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        protocol.parse(data)
    except Malformed:
        pass


@given(
    st.sampled_from(["outcome", "error", "warning", "bug", "started"]),
    json_values
    | st.fixed_dictionaries(
        {"reason": st.sampled_from(["halted", "stopped"]), "status": st.integers(0, 255)},
        optional=dict.fromkeys(("signo", "error", "trap", "core", "stats"), json_values),
    ),
)
def test_any_value_is_a_message_or_malformed(kind: str, value: object) -> None:
    try:
        protocol.parse(json.dumps({kind: value}).encode())
    except Malformed:
        pass
