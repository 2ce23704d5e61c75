"""The content of a test's disks. Their faults are in guest/test_harness.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tender.errors import DeviceError
from tender.testing.disk import DiskImage


def test_a_disk_is_a_copy_of_its_file(tmp_path: Path) -> None:
    """... whatever becomes of the file; a mapping of it would end pytest with SIGBUS here."""
    path = tmp_path / "disk.img"
    content = b"A" * 8192 + bytes(3 << 20) + b"Z"
    path.write_bytes(content)
    disk = DiskImage(path)
    with open(path, "r+b") as file:
        file.write(b"B" * 4096)
    os.truncate(path, 0)
    assert disk.data == content
    with pytest.raises(DeviceError, match=r"disk\.img: the file is empty; a disk has"):
        DiskImage(path)
    with pytest.raises(DeviceError, match=r"nowhere\.img: No such file or directory"):
        DiskImage(tmp_path / "nowhere.img")
    with pytest.raises(DeviceError, match="Is a directory"):
        DiskImage(tmp_path)


def test_a_disk_larger_than_memory_is_an_error() -> None:
    for size in (1 << 60, 1 << 70):
        with pytest.raises(DeviceError, match=f"a disk: no memory for {size} bytes"):
            DiskImage(size)


@pytest.mark.parametrize("content", [0, -1, b""])
def test_an_empty_disk_is_an_error(content: int | bytes) -> None:
    with pytest.raises(DeviceError, match="a disk has at least one sector, not .* bytes"):
        DiskImage(content)
