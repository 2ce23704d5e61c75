"""The states of containers: what is kept, and who may change it meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tender.errors import ConfigError, HostError
from tender.oci import runtime
from tender.oci import state as module
from tender.oci.state import Container, States


@pytest.fixture
def states(tmp_path: Path) -> States:
    return States(str(tmp_path / "states"))


def make(states: States, bundle: str = "/bundle") -> Container:
    container = Container("one", bundle, "now", ("/sys/fs/cgroup/none",), 0, "")
    states.save(states.make("one"), container)
    return container


def test_a_state_is_what_was_kept(states: States) -> None:
    assert make(states) == states.load("one")


def test_what_could_not_be_made_leaves_its_id_free(
    states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkfifo(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as changed:
        changed.setattr(os, "mkfifo", mkfifo)
        with pytest.raises(HostError, match="No space left on device"):
            states.make("one")
    assert make(states) == states.load("one")


@pytest.mark.parametrize("force", [False, True])
def test_who_waits_to_delete_a_container_deletes_no_later_one(
    states: States, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    make(states)

    def flock(fd: int, operation: int) -> None:
        """Another command deletes it, and a new one gets its ID, while this one waits."""
        changed.undo()
        shutil.rmtree(states.path("one"))
        make(states, "/another")
        fcntl.flock(fd, operation)

    with monkeypatch.context() as changed:
        changed.setattr(module, "fcntl", type("", (), {"flock": flock, "LOCK_EX": fcntl.LOCK_EX}))
        with pytest.raises(ConfigError, match="^container with ID one does not exist$"):
            runtime.delete(states, "one", force)
    assert states.load("one").bundle == "/another"
