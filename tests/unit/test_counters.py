"""The counters page: what a reader makes of a good one, of torn and of hostile ones."""

from __future__ import annotations

import fcntl
import json
import os
import posix
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender._native import ffi, lib
from tender.cleanup import Cleanup
from tender.cli import metrics, ps, stats
from tender.config import Config, guest_name
from tender.errors import ConfigError, UsageError
from tender.image.manifest import Device, Manifest
from tender.modules.net import NetDevice
from tender.observe import counters, guests
from tender.snapshot import helper
from tender.stop import Stop

MANIFEST = Manifest((
    Device("service", lib.MFT_DEV_NET_BASIC, 1), Device("storage", lib.MFT_DEV_BLOCK_BASIC, 2)
))  # fmt: skip
NOBODY = 65534
HEADER, SPAN = 4096, 256  # where the counters are here, and about how many bytes are used


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ptender"
    monkeypatch.setattr(counters, "SYSTEM", str(path))
    monkeypatch.setattr(guests, "USERS", str(tmp_path / "users" / "*"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return path


def publish(cleanup: Cleanup, name: str = "web") -> tuple[counters.Page | None, NetDevice]:
    port = NetDevice("service", 1, -1, bytes(6), 1500, print, is_socket=True)
    config = Config("k.hvt", name=name)
    return counters.publish(config, "soft", 32 << 20, MANIFEST, {1: port}, cleanup), port


@pytest.fixture
def page(folder: Path) -> Iterator[counters.Page]:
    with Cleanup() as cleanup:
        made, port = publish(cleanup)
        assert made is not None
        port.sent.bytes += 1500
        yield made
    assert os.listdir(folder) == []


def test_a_page_shows_what_the_devices_count(page: counters.Page) -> None:
    page.stats.state = lib.STATS_RUNNING
    page.console.calls += 7
    (found,) = guests.running()
    assert (found.name, found.pid, found.uid) == ("web", os.getpid(), os.geteuid())
    assert (found.cpu, found.state, found.mem_bytes) == ("soft", "running", 32 << 20)
    assert found.statistics.console.calls == 7
    assert found.statistics.net["service"].sent.bytes == 1500
    assert found.statistics.block == {}, "the manifest has it, and the guest has not"
    assert 0 <= found.guest_s <= found.uptime_s


def test_a_file_is_for_its_user_only(page: counters.Page, folder: Path) -> None:
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_time_in_the_guest_counts_while_it_is_there(page: counters.Page) -> None:
    entered = lib.host_ticks()
    page.activity.guest_ticks = lib.host_ticks_hz() // 1000 - entered  # a millisecond, and on
    (found,) = guests.running()
    left = lib.host_ticks()
    most = 0.001 + (left - entered) / lib.host_ticks_hz()
    assert min(0.001, found.uptime_s) <= found.guest_s <= most


def test_the_next_tender_removes_what_dead_ones_left(page: counters.Page, folder: Path) -> None:
    (folder / "dead.4194999.1").write_bytes(bytes(8192))  # above every pid_max
    with socket.socket(socket.AF_UNIX) as helper:
        helper.bind(str(folder / "4194999.snapshot"))
    other = folder / "no page"
    other.touch()
    with Cleanup() as cleanup:
        assert publish(cleanup)[0]
        assert len(os.listdir(folder)) == 3
        assert other.exists()
    other.unlink()


def test_a_list_shows_and_keeps_no_unlocked_file(page: counters.Page, folder: Path) -> None:
    (mine,) = folder.iterdir()
    copy = folder / f"copy.{os.getpid()}.1"
    copy.write_bytes(mine.read_bytes())
    (folder / "fifo.1.1").symlink_to("/dev/zero")
    assert [each.name for each in guests.running()] == ["web"]
    assert not copy.exists()
    (folder / "fifo.1.1").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the guests of others")
def test_root_sees_all(page: counters.Page, folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "users" / "1000"
    theirs.parent.mkdir()
    folder.rename(theirs)
    dead = theirs / "dead.4194999.1"
    dead.touch()
    assert [each.name for each in guests.running()] == ["web"]
    os.chown(theirs, 1000, 1000)
    assert [each.name for each in guests.running()] == ["web"]
    assert not dead.exists(), "it was root's when it was listed first"
    dead.touch()
    assert [each.name for each in guests.running()] == ["web"]
    assert dead.exists(), "what is another user's stays"
    dead.unlink()
    theirs.rename(folder)
    os.chown(folder, 0, 0)


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with Cleanup() as cleanup:
        page, port = publish(cleanup)
        assert page is None
        port.sent.bytes += 1  # it counts all the same
    assert os.listdir(folder) == []


def test_without_a_folder_there_is_no_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/proc/ptender", "/dev/null"):
        monkeypatch.setattr(counters, "folder", lambda path=path: path)
        with Cleanup() as cleanup:
            assert publish(cleanup)[0] is None


@pytest.mark.parametrize(
    ("runtime", "why"),
    [
        (None, "XDG_RUNTIME_DIR is not set: "),
        ("/nonexistent", "XDG_RUNTIME_DIR=/nonexistent: No such file or directory: "),
        ("/proc/1", "XDG_RUNTIME_DIR=/proc/1: No such file or directory: "),
        ("{shared}", "XDG_RUNTIME_DIR={shared}: it is for others to write to: "),
        ("{own}", None),
    ],
)
def test_a_user_whose_guests_are_not_listed_reads_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: str | None, why: str | None
) -> None:
    user = os.geteuid() or NOBODY
    monkeypatch.setattr(posix, "geteuid", lambda: user)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    names = {"shared": tmp_path / "shared", "own": tmp_path / "own"}
    (names["shared"] / "ptender").mkdir(parents=True)
    (names["shared"] / "ptender").chmod(0o777)
    names["own"].mkdir()
    if runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime.format(**names))
    with Cleanup() as cleanup:
        if why is None:
            assert ps.main([]).startswith("NAME ")
            return
        for tool, words in ((ps, []), (stats, ["web"]), (metrics, [])):
            with pytest.raises(ConfigError) as error:
                tool.main(words)
            assert str(error.value).startswith(why.format(**names))
        with pytest.raises(ConfigError) as caught:
            helper.open_requests(str(tmp_path), -1, Stop(), cleanup)
        assert str(caught.value) == f"--snapshots: {error.value}"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 5000),
    changes=st.lists(
        st.tuples(
            st.integers(0, SPAN) | st.integers(HEADER, HEADER + SPAN),
            st.binary(min_size=1, max_size=16),
        ),
        max_size=6,
    ),
)
def test_whatever_is_in_a_page_it_is_a_guest_or_none(
    page: counters.Page, cut: int, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(os.pread(page.fd, 1 << 16, 0))
    for at, new in changes:
        data[at : at + len(new)] = new
    parsed = guests._parse("web", 1, 0, bytes(data[: len(data) - cut]))
    if parsed is not None:
        json.dumps(parsed.as_dict())
        assert stats.text(parsed).replace("\n", "").isprintable()
        (line,) = ps.table([parsed], 80).splitlines()[1:]
        assert len(line) <= 80
        assert line.isprintable()


def test_an_offset_beyond_the_file_is_no_guest(page: counters.Page) -> None:
    data = bytearray(os.pread(page.fd, 1 << 16, 0))
    at = ffi.offsetof("struct stats_header", "offset")
    for offset in (len(data), 1 << 31, (1 << 32) - 1):
        data[at : at + 4] = offset.to_bytes(4, "little")
        assert guests._parse("web", 1, 0, bytes(data)) is None


def test_every_counter_may_have_its_largest_value_in_80_columns(page: counters.Page) -> None:
    fd = page.fd
    data = bytearray(os.pread(fd, 1 << 16, 0))
    data[HEADER:] = b"\xff" * (len(data) - HEADER)
    at = ffi.offsetof("struct stats_header", "mem_bytes")
    data[at : at + 8] = b"\xff" * 8
    guest = guests._parse("n" * 64, 4194304, 0, bytes(data))
    assert guest is not None
    lines = ps.table([guest], 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert ps.table([guest], None).splitlines()[1].startswith("n" * 64 + " ")


def test_a_name_or_a_pid_names_a_guest(page: counters.Page, folder: Path) -> None:
    with Cleanup() as cleanup:
        publish(cleanup)
        with pytest.raises(ConfigError, match="2 guests have the name web: take one of the PIDs"):
            stats.find("web", guests.running())
    assert stats.find(str(os.getpid()), guests.running()).name == "web"
    with pytest.raises(ConfigError, match="no guest 'we' runs"):
        stats.find("we", guests.running())


def test_the_lock_is_held_by_the_page_alone(page: counters.Page, folder: Path) -> None:
    with open(next(folder.iterdir())) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_names() -> None:
    assert guest_name(Config("/images/my kernel.hvt")) == "my_kernel.hvt"
    assert guest_name(Config("/" + "é" * 100)) == "_" * 64
    assert guest_name(Config("k", name="web-1_b.c")) == "web-1_b.c"
    for wrong in ("", "a b", "a/b", "n" * 65, "é"):
        with pytest.raises(
            UsageError, match=r"a name of 1 to 64 letters, digits, '\.', '_' and '-'"
        ):
            Config("k", name=wrong)
