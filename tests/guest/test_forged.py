"""Guests that forge argument blocks and ring entries: a result code, or that guest's own end.

The guest, guest-bindings/tests/forge.c, knows what each of its blocks is to come to, and checks the
answers itself. It runs as any guest does: by the command, in the sandbox.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import PTENDER, Build
from tests.waiting import PATIENCE_S

pytestmark = [
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest is about x86_64"),
    pytest.mark.timeout(600),
]

CALLS = ("WALLTIME", "PUTS", "POLL", "BLOCK_WRITE", "BLOCK_READ", "NET_WRITE", "NET_READ")
# Of each call: a sample on KVM, which may be an emulated one, with either engine.
BLOCKS = {"kvm": 1_000, "native": 10_000, "soft": 10_000}
RING_ENTRIES = 10_000
SAMPLES = 3  # of blocks that end their guest: each takes a guest of its own
WILD_S = 10  # for guests that may never end: they are stopped then
GROWTH_KB = 512
FAULT = re.compile(r"ptender: Invalid guest access: [^\n]+\n")


class Forger:
    """Runs the guest, with a disk, and a network on which frames wait."""

    def __init__(self, guest: Path, folder: Path, *options: str) -> None:
        self._disk = folder / "disk.img"
        self._disk.write_bytes(bytes(65536))
        self._guest = guest
        self._options = options
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        try:
            for size in range(14, 1519):
                self._ours.send(bytes(size))
        except BlockingIOError:
            pass  # as many as there is room for
        fd = self._theirs.fileno()
        options = [*self._options, "--mem=8", f"--block={self._disk}", f"--net=@{fd}"]
        return subprocess.Popen(
            [PTENDER, *options, self._guest, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd],
        )

    def run(self, *words: object, limit_s: float = PATIENCE_S) -> tuple[int, str, str]:
        """Run it to its end; a guest that goes on and on is stopped: its status is 1 then."""
        with self.start(*words) as process:
            try:
                output, errors = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                output, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output.decode(errors="replace"), errors.decode()


class Reader(threading.Thread):
    """Reads a console of any length, and keeps its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        assert process.stdout
        self._fd = process.stdout.fileno()
        self.seen: list[bytes] = []
        self.tail = b""
        self.start()

    def run(self) -> None:
        while part := os.read(self._fd, 1 << 20):
            self.tail = (self.tail + part)[-2000:]
            self.seen += [word for word in (b"a tenth\n", b"holding\n") if word in self.tail]

    def wait_for(self, word: bytes, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while word not in self.seen:
            assert process.poll() is None, (process.returncode, self.tail, process.stderr)
            assert time.monotonic() < deadline, self.tail
            time.sleep(0.005)


@pytest.fixture(params=["c", "python"])
def forger(
    request: pytest.FixtureRequest, guest: Build, tmp_path: Path, cpu: str
) -> Iterator[Forger]:
    if cpu == "soft" and request.param == "c":
        pytest.skip("guests on the software CPU are always answered by the Python handlers")
    value = Forger(guest("forge"), tmp_path, f"--engine={request.param}")
    yield value
    value.close()


@pytest.fixture
def ring_forger(guest: Build, tmp_path: Path, cpu: str) -> Iterator[Forger]:
    if cpu != "kvm":
        pytest.skip("only KVM offers a ring")
    value = Forger(guest("forge"), tmp_path, "--net-ring")
    yield value
    value.close()


def own_memory_kb(pid: int) -> int:
    """The tender's memory, the guest's included: that has touched all of its own at its start."""
    with open(f"/proc/{pid}/status") as status:
        found = re.search(r"^RssAnon:\s+(\d+) kB", status.read(), re.MULTILINE)
    assert found
    return int(found[1])


def run_and_measure(forger: Forger, *words: object) -> None:
    """The guest succeeds, and nine tenths of its calls take no memory that one tenth did not."""
    with forger.start(*words, "hold") as process:
        reader = Reader(process)
        reader.wait_for(b"a tenth\n", process)
        before = own_memory_kb(process.pid)
        reader.wait_for(b"holding\n", process)
        growth = own_memory_kb(process.pid) - before
        process.send_signal(signal.SIGTERM)
        reader.join()
        assert process.stderr
        errors = process.stderr.read().decode()
        status = process.wait(timeout=PATIENCE_S)
    assert b"SUCCESS" in reader.tail, (status, reader.tail)
    assert (status, errors) == (1, "ptender: Exiting on signal 15\n")
    assert growth < GROWTH_KB, f"{growth} KiB more"


@pytest.mark.parametrize("name", CALLS)
def test_ten_thousand_blocks_are_answered(forger: Forger, cpu: str, name: str) -> None:
    run_and_measure(forger, "calls", name, 1, BLOCKS[cpu])


@pytest.mark.parametrize("name", [*CALLS, "HALT"])
def test_a_block_that_ends_its_guest(forger: Forger, name: str) -> None:
    for nth in range(SAMPLES):
        status, output, errors = forger.run("end", name, 2 + nth, nth)
        assert status == 1, (nth, output, errors)
        assert FAULT.fullmatch(errors), (nth, errors)
        assert "FAILURE" not in output


@pytest.mark.parametrize("name", ["BLOCK_READ", "NET_READ", "POLL", "WALLTIME", "HALT"])
def test_a_guest_that_has_itself_overwritten(forger: Forger, name: str) -> None:
    """Its stack, its tables, its boot info: whatever becomes of it, it is the guest's end only."""
    for nth in range(SAMPLES):
        status, _, errors = forger.run("wild", name, 2 + nth, nth, limit_s=WILD_S)
        assert 0 <= status <= 255, (nth, status, errors)
        assert errors == "" or re.fullmatch(r"(ptender: [^\n]+\n){1,2}", errors), (nth, errors)


def test_forged_ring_entries(ring_forger: Forger) -> None:
    run_and_measure(ring_forger, "ring", 1, RING_ENTRIES)


@pytest.mark.parametrize("nth", range(SAMPLES))
def test_a_ring_entry_that_ends_its_guest(ring_forger: Forger, nth: int) -> None:
    status, output, errors = ring_forger.run("ring-end", nth, 1)
    assert status == 1, (output, errors)
    assert FAULT.fullmatch(errors), errors
    assert "ring" in errors


@pytest.mark.parametrize("nth", range(6))
def test_a_ring_that_is_overwritten(ring_forger: Forger, nth: int) -> None:
    status, _, errors = ring_forger.run("ring-wild", nth, nth, limit_s=WILD_S)
    assert status in (0, 1, 255), errors
    assert errors == "" or re.fullmatch(r"ptender: [^\n]+\n", errors), errors
