"""Guests for Solo5's spt target that a program starts."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tender import BlockFile, BlockMemory, Guest, UserNet
from tender.errors import GuestFault, SandboxViolation, TenderError
from tender.testing import Switch
from tests.guest.conftest import Build, builder, shared_folder
from tests.waiting import PATIENCE_S, wait_until_asleep

pytest_plugins = "pytester"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="spt guests run on x86_64")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(shared_folder(tmp_path_factory, "spt"), "--target=spt")


def made(kernel: Path, *args: str, **options: Any) -> Guest:
    return Guest(kernel, *args, mem_mib=4, **options)


def test_an_outcome_and_the_console(guest: Build) -> None:
    for status in (0, 7, 255):
        with made(guest("exit"), str(status)) as running:
            outcome = running.wait(PATIENCE_S)
            assert (outcome.reason, outcome.status, outcome.signo) == ("halted", status, 0)
            assert "spt ABI 2, 4 MiB" in running.console.text


def test_a_cpu_exception_is_a_fault_in_words(guest: Build) -> None:
    with made(guest("exception"), "gp") as running:
        outcome = running.wait(PATIENCE_S)
    assert (outcome.reason, outcome.status, outcome.signo) == ("fault", 1, signal.SIGSEGV)
    assert isinstance(outcome.error, GuestFault)
    assert str(outcome.error).startswith("general protection fault (SIGSEGV), rip=0x10")


def test_a_forbidden_call_is_named(guest: Build) -> None:
    with made(guest("syscall"), "39", block={"storage": BlockMemory(4096)}) as running:
        outcome = running.wait(PATIENCE_S)
    assert outcome.reason == "sandbox"
    assert isinstance(outcome.error, SandboxViolation)
    assert (outcome.error.syscall, outcome.error.number) == ("getpid", 39)


def test_stop_kill_and_deadline(guest: Build) -> None:
    with made(guest("loop")) as running:
        outcome = running.stop()
        assert (outcome.reason, outcome.status) == ("stopped", 0)
    with made(guest("loop")) as running:
        running.kill()
        assert running.wait(PATIENCE_S).reason == "killed"
    with made(guest("loop"), deadline=0.01) as running:
        assert running.wait(PATIENCE_S).reason == "deadline"


def test_a_signal_of_somebody_else(guest: Build) -> None:
    with made(guest("sleep"), "100000") as running:
        pid = running.pid
        assert pid is not None
        wait_until_asleep(pid)
        os.kill(pid, signal.SIGTERM)
        outcome = running.wait(PATIENCE_S)
    assert (outcome.reason, outcome.signo) == ("stopped", signal.SIGTERM)


def test_disks(guest: Build, tmp_path: Path) -> None:
    with made(guest("block"), block={"storage": BlockMemory(1 << 16)}) as running:
        assert running.wait(PATIENCE_S).status == 0, running.console.text
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    with made(guest("readonlyblock"), block={"ro": BlockFile(image, readonly=True)}) as running:
        assert running.wait(PATIENCE_S).status == 0, running.console.text
    assert image.read_bytes() == bytes(1 << 16)


def test_an_overlay(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    with made(guest("block"), block={"storage": BlockFile(image, overlay=True)}) as running:
        assert running.wait(PATIENCE_S).status == 0, running.console.text
    assert image.read_bytes() == bytes(1 << 16)


def test_core_files(guest: Build, tmp_path: Path) -> None:
    for name, reason in (("abort", "halted"), ("exception", "fault")):
        with made(guest(name), dumpcore=tmp_path) as running:
            outcome = running.wait(PATIENCE_S)
            assert outcome.reason == reason
            assert outcome.core == f"{tmp_path}/core.solo5-spt.{running.pid}"
            assert Path(outcome.core).stat().st_size == 4096 + (4 << 20)


def test_a_port_of_a_switch(guest: Build) -> None:
    with Switch() as switch, made(guest("ping"), net={"service": switch.port()}) as running:
        host = switch.host("10.0.0.1/24")
        assert host.ping("10.0.0.2", count=20).received == 20
        assert running.stop().status == 0


def test_a_network_device_in_python(guest: Build) -> None:
    frames: list[bytes] = []
    heard = threading.Event()

    class Device:
        def send(self, frame: bytes) -> None:
            frames.append(frame)
            heard.set()

    words = ("--ipv4=10.0.0.2/24", "--peer=10.0.0.3", "--count=1")
    with made(guest("talk"), *words, net={"service": Device()}) as running:
        assert running.wait(PATIENCE_S).status == 0, running.console.text
    assert heard.wait(PATIENCE_S)
    assert any(frame[12:14] == b"\x08\x00" for frame in frames)


@pytest.mark.skipif(not shutil.which("passt"), reason="needs passt")
def test_a_network_through_passt(guest: Build) -> None:
    net = UserNet(forward={0: 80})
    with made(guest("web"), net={"service": net}) as running:
        running.console.wait_for("listening", PATIENCE_S)
        with urlopen(f"http://127.0.0.1:{running.ports[80]}/", timeout=PATIENCE_S) as page:
            assert b"request 1." in page.read()


class _Disk:
    size = 4096

    def read(self, offset: int, length: int) -> bytes:
        return bytes(offset % 2 for _ in range(length))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hello", {"trace": "t"}, "trace: an spt guest can't have it"),
        ("hello", {"snapshots": True}, "snapshots: an spt guest can't have it"),
        ("hello", {"cpu": "soft"}, "cpu='soft': an spt guest runs as a process"),
        ("hello", {"sandbox": "off"}, "sandbox='off' is not for an spt guest"),
        ("block", {"block": {"storage": _Disk()}}, "device 'storage': .*that a program serves"),
    ],
)
def test_what_is_refused(guest: Build, name: str, options: Any, message: str) -> None:
    with pytest.raises(TenderError, match=message):
        made(guest(name), **options).start()


def test_many_at_once(guest: Build) -> None:
    guests = [made(guest("sleep"), "200") for _ in range(20)]
    for each in guests:
        each.start()
    assert [each.wait(PATIENCE_S).status for each in guests] == [0] * 20


def test_the_fixtures(
    guest: Build, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (pytester.path / "ping.spt").write_bytes(guest("ping").read_bytes())
    pytester.makepyfile(
        """
        def test_ping(unikernel, switch):
            guest = unikernel("ping.spt", net={"service": switch.port()})
            assert switch.host("10.0.0.1/24").ping("10.0.0.2", count=3).received == 3
            assert guest.stop().status == 0
        """
    )
    pytester.runpytest_subprocess("-p", "tender.testing.plugin").assert_outcomes(passed=1)
