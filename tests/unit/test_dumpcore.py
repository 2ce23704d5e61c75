"""Core files: what is in them, and what is left when they can't be had."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.boot import x86_64
from tender.cpu import native
from tender.errors import ConfigError, HostError
from tender.memory import GuestMemory
from tender.observe import core, core_helper
from tender.stop import Stopped

MIB = 1 << 20
STATE = x86_64.initial_state(0x123456, 4 * MIB)


def nothing() -> None: ...


def no_links(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "")


@pytest.fixture(params=["nameless", "hidden name"])
def target(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[core.Target]:
    """On file systems with files that have no name, and on others, which may have no links."""
    if request.param == "hidden name":
        monkeypatch.setattr(core_helper, "NAMELESS", os.O_DIRECTORY)  # what those others refuse
        monkeypatch.setattr(os, "link", no_links)
    value = core.Target(str(tmp_path))
    yield value
    value.close()


def test_a_core_has_the_memory_that_was_touched(target: core.Target, tmp_path: Path) -> None:
    memory = GuestMemory(4 * MIB)
    memory.put(0x5000, b"here")
    memory.put(3 * MIB, b"and there")
    path = Path(target.write(memory, STATE, nothing))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.name == f"core.solo5-hvt.{os.getpid()}"
    data = path.read_bytes()
    assert data[core.MEMORY_OFFSET :] == bytes(memory.view)
    assert path.stat().st_blocks * 512 < MIB
    (rip,) = struct.unpack_from("<Q", data, data.index(b"CORE") + 8 + 112 + 16 * 8)
    assert rip == 0x123456


def test_pages_of_zeros_take_no_room(target: core.Target) -> None:
    """With huge pages, the kernel holds 512 pages where the guest has touched one."""
    memory = GuestMemory(4 * MIB)
    memory.put(MIB, bytes(2 * MIB))
    memory.put(2 * MIB, b"here")
    path = Path(target.write(memory, STATE, nothing))
    assert path.read_bytes()[core.MEMORY_OFFSET :] == bytes(memory.view)
    assert path.stat().st_blocks * 512 < 1 << 16


@pytest.mark.skipif(bool(native.missing()), reason="only the native CPU has memory with a file")
def test_a_core_has_what_another_process_touched(tmp_path: Path) -> None:
    memory = GuestMemory(16 * MIB, shared=True)
    guest = mmap.mmap(memory.fd, memory.size)
    guest[0x5000:0x5004] = b"here"
    guest[4 * MIB : 10 * MIB] = bytes(range(1, 4)) * (2 * MIB)
    target = core.Target(str(tmp_path), memory.fd)
    path = Path(target.write(memory, STATE, nothing))
    target.close()
    assert path.read_bytes()[core.MEMORY_OFFSET :] == guest[:]
    assert path.stat().st_blocks * 512 < 7 * MIB


def test_no_core_takes_the_place_of_another(target: core.Target, tmp_path: Path) -> None:
    memory = GuestMemory(2 * MIB)
    names = {target.write(memory, STATE, nothing)}
    for _ in range(2):
        another = core.Target(str(tmp_path))
        names.add(another.write(memory, STATE, nothing))
        another.close()
    assert len(names) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_the_helper_names_a_file_once(target: core.Target, tmp_path: Path) -> None:
    helper = target.fds["core-helper"]
    core_helper.request_name(helper)
    for _ in range(300):
        with pytest.raises(
            HostError, match="^dumpcore: the core-file helper was killed: there is "
        ):
            core_helper.request_name(helper)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_core_that_is_given_up_leaves_nothing(target: core.Target, tmp_path: Path) -> None:
    memory = GuestMemory(2 * MIB)
    memory.put(0, b"x")

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        target.write(memory, STATE, check)
    target.close()
    assert list(tmp_path.iterdir()) == []


def test_pages_that_nobody_may_read_are_left_out(target: core.Target) -> None:
    memory = GuestMemory(2 * MIB)
    memory.put(0x100000, b"secret")
    memory.put(0x101000, b"open")
    memory.protect(0x100000, 0x101000, readable=False, writable=False)
    data = Path(target.write(memory, STATE, nothing)).read_bytes()
    assert b"secret" not in data
    assert b"open" in data


def test_no_physical_address_is_to_be_had(target: core.Target) -> None:
    memory = GuestMemory(2 * MIB)
    memory.put(0, b"touched")
    entry = int.from_bytes(os.pread(target.fds["pagemap"], 8, memory.base // 4096 * 8), "little")
    assert entry >> 63, "present"
    assert entry & ((1 << 55) - 1) == 0, "the number of the physical page"


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    folder = tmp_path / "cores"
    folder.mkdir()
    target = core.Target(str(folder))
    folder.rmdir()  # the file has no name, so the folder is empty
    with pytest.raises(HostError, match="dumpcore: .*No such file"):
        target.write(GuestMemory(2 * MIB), STATE, nothing)
    target.close()
    with pytest.raises(ConfigError, match="cannot open dir"):
        core.Target(str(folder))
