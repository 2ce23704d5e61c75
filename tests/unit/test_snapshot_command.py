"""`ptender snapshot`: whose guest it asks, and what a helper of somebody else's may answer."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from tender.boot import layout
from tender.cli import snapshot
from tender.errors import ConfigError, HostError
from tender.observe.guests import RunningGuest
from tender.outcome import Statistics
from tender.snapshot import helper

USER = 65534


def named(name: str, pid: int, uid: int) -> RunningGuest:
    return RunningGuest(name, pid, uid, "soft", "running", 0, 0, 1, 0, 0, 0, Statistics())


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone asks guests of others")
def test_a_link_of_a_user_leads_to_no_guest_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / str(USER)).mkdir()
    monkeypatch.setattr(snapshot, "USERS", f"{tmp_path}/*")
    guest = named("web", 7, USER)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        listener.bind(f"{tmp_path}/roots")
        listener.listen()
        os.symlink(f"{tmp_path}/roots", helper.socket_path(f"{tmp_path}/{USER}", guest.pid))
        with pytest.raises(ConfigError, match="web: cannot ask for it: its socket is of another"):
            snapshot._connect(guest)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(10) == b""


def save(folder: Path, size: int, *, stop: bool) -> int:
    """Save this process, as if it were a guest: its helper passes a file, and ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(folder / "source", "w+b") as file:
        file.truncate(size)

        def answer() -> None:
            theirs.recv(10)
            theirs.shutdown(socket.SHUT_RD)
            socket.send_fds(theirs, [helper.SAVED], [file.fileno()])

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            guest = named("web", os.getpid(), os.geteuid())
            return snapshot._save(ours, guest, str(folder / "saved"), 100, stop=stop)
        finally:
            thread.join()


def test_a_helper_that_ends_once_it_has_saved(tmp_path: Path) -> None:
    assert save(tmp_path, 5, stop=False) == 0
    assert (tmp_path / "saved").read_bytes() == bytes(5)
    (tmp_path / "saved").unlink()
    with pytest.raises(HostError, match="web: saved in .*/saved, but not ended: its snapshot hel"):
        save(tmp_path, 5, stop=True)
    assert (tmp_path / "saved").exists()


def test_a_file_that_is_no_snapshot_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="^web: what it was saved to is not a snapshot$"):
        save(tmp_path, layout.MEM_MAX + (2 << 20), stop=False)
    assert os.listdir(tmp_path) == ["source"]
