"""The bench's stand-in for KVM_RUN: the calls that it makes are real, and replies are checked."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import standin
from bench.session import HELLO, Unavailable
from bench.standin import ROUNDS, Scenario
from bench.tenders import Tender
from tests.guest.conftest import PTENDER, Build

CALLS = 20
MADE = 200 + ROUNDS * CALLS  # with those that warm up
TENDER = Tender("ptender", (str(PTENDER), "--cpu=kvm", "--engine=python"), "python")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/kvm")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_every_call_is_made_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as file:
        command = TENDER.command_line(HELLO)
        figures = standin.run(
            command, Scenario("PUTS", 20, calls=CALLS), tmp_path, stdout=file.fileno()
        )
    assert figures.calls == CALLS
    assert len(figures.rounds_ns) == ROUNDS
    assert output.read_bytes() == (b"." * 19 + b"\n") * MADE


def test_the_clock(tmp_path: Path) -> None:
    assert standin.run(
        TENDER.command_line(HELLO), Scenario("WALLTIME", calls=CALLS), tmp_path
    ).calls


def test_a_disk_is_walked_over(tmp_path: Path, guest: Build) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(8192))
    for call, content in (("BLOCK_READ", bytes(8192)), ("BLOCK_WRITE", b"." * 4096 + bytes(4096))):
        scenario = Scenario(call, 512, span=4096, calls=CALLS)
        standin.run(TENDER.command_line(guest("disk"), disk=disk), scenario, tmp_path)
        assert disk.read_bytes() == content


@pytest.mark.parametrize("call", ["POLL", "NET_READ", "NET_WRITE"])
def test_a_quiet_wire(
    tmp_path: Path, guest: Build, wire: tuple[socket.socket, socket.socket], call: str
) -> None:
    ours, theirs = wire
    command = TENDER.command_line(guest("ping"), tap=f"@{theirs.fileno()}")
    standin.run(command, Scenario(call, 100, calls=CALLS), tmp_path, pass_fds=(theirs.fileno(),))
    if call == "NET_WRITE":
        assert len(ours.recv(2000)) == 100
    else:
        with pytest.raises(BlockingIOError):
            ours.recv(2000)


def test_a_wrong_reply_is_noticed(
    tmp_path: Path, guest: Build, wire: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = wire
    ours.send(b"a frame that nobody reads")
    command = TENDER.command_line(guest("ping"), tap=f"@{theirs.fileno()}")
    with pytest.raises(Unavailable, match=f"{ROUNDS * CALLS} wrong replies"):
        standin.run(command, Scenario("POLL", calls=CALLS), tmp_path, pass_fds=(theirs.fileno(),))
