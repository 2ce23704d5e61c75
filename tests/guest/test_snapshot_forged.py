"""Forged snapshots: whatever a file says, its guest is refused in words, or runs and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender import machine
from tender.config import Config
from tender.errors import TenderError
from tender.outcome import Outcome
from tender.snapshot import file
from tender.stop import Stop
from tests.guest.conftest import PTENDER, Build
from tests.waiting import wait_until_asleep

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="snapshots of x86_64 guests")
TABLES = range(0x10000, 0x20000)  # of guest memory: page tables and boot info
INSTRUCTIONS = 20_000
PATIENCE_S = 0.1


@pytest.fixture(scope="module")
def saved(guest: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that sleeps, saved."""
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    folder = tmp_path_factory.mktemp("saved")
    words = [str(PTENDER), "--cpu=soft", "--mem=4", f"--snapshots={folder}", str(guest("sleep"))]
    with subprocess.Popen([*words, "600000"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        while b"heap" not in process.stdout.readline():
            assert process.poll() is None
        wait_until_asleep(process.pid)
        command = [str(PTENDER), "snapshot", str(process.pid), str(folder / "file"), "--stop"]
        subprocess.run(command, check=True)
    return folder / "file"


class Watchdog:
    """Stops a guest that waits for longer than its test."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._bark)
        self._thread.start()

    def _bark(self) -> None:
        self._done.wait(PATIENCE_S)
        while not self._done.wait(0.01):
            self.stop.request()

    def end(self) -> None:
        self._done.set()
        self._thread.join()


def run(path: Path) -> Outcome:
    console = os.open(os.devnull, os.O_WRONLY)
    watchdog = Watchdog()
    try:
        config = Config(
            str(path), restore=True, clone=True, cpu="soft", instructions=INSTRUCTIONS,
            console_fd=console,
        )  # fmt: skip
        return machine.run(config, watchdog.stop, lambda _: None)
    finally:
        watchdog.end()
        os.close(console)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_forged_file_is_more_than_a_guest(saved: Path, data: st.DataObject) -> None:
    fd = os.open(saved, os.O_RDONLY)
    snapshot, offset, _ = file.read(fd)
    os.close(fd)
    records = len(file.encode(snapshot))
    state = records - sum(16 + len(piece) for _, piece in snapshot.pieces) - len(snapshot.state)
    areas = [
        range(12, state),  # the header
        range(state, state + len(snapshot.state)),
        range(state + len(snapshot.state), records),  # the image's headers
        range(offset + TABLES.start, offset + TABLES.stop),
    ]
    forged = saved.with_name("forged")
    shutil.copy(saved, forged)
    with open(forged, "r+b") as target:
        for _ in range(data.draw(st.integers(1, 3))):
            area = data.draw(st.sampled_from(areas))
            target.seek(data.draw(st.integers(area.start, area.stop - 1)))
            target.write(bytes([data.draw(st.integers(0, 255))]))
    try:
        outcome = run(forged)
    except TenderError as error:
        assert "\n" not in str(error)
        return
    assert outcome.reason in ("halted", "stopped", "fault", "host"), outcome
    assert "internal error" not in str(outcome.error)


def test_the_file_itself_goes_on(saved: Path) -> None:
    copy = saved.with_name("copy")
    shutil.copy(saved, copy)
    outcome = run(copy)
    assert outcome.reason == "stopped"
