"""`ptender snapshot` of root: whose guest it asks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tender.cli import snapshot
from tender.errors import ConfigError
from tender.observe.guests import RunningGuest
from tender.outcome import Statistics
from tender.snapshot import helper

USER = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone asks guests of others")
def test_a_link_of_a_user_leads_to_no_guest_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / str(USER)).mkdir()
    monkeypatch.setattr(snapshot, "USERS", f"{tmp_path}/*")
    guest = RunningGuest("web", 7, USER, "soft", "running", 0, 0, 1, 0, 0, 0, Statistics())
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
