"""Overlays: what they keep, how much memory they take, and what happens when they are full."""

from __future__ import annotations

import os
import random
import tracemalloc

import pytest

from tender._native import lib
from tender.backends import OVERLAY_MAX, BlockFile
from tender.cleanup import Cleanup
from tender.errors import HostError
from tender.host import block, overlay
from tender.image.manifest import Device
from tender.modules.block import BlockDevice
from tender.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

DISK = Device("storage", lib.MFT_DEV_BLOCK_BASIC, 1)
PAGE = 4096


class Disks:
    """Sparse files of lengths that not every file system has, attached with an overlay."""

    def __init__(self, cleanup: Cleanup) -> None:
        self.cleanup = cleanup
        self.warnings: list[str] = []

    def attach(self, size: int, limit: bool | int, content: bytes = b"") -> BlockDevice:
        fd = os.memfd_create("disk")
        self.cleanup.callback(lambda: os.close(fd))
        os.truncate(fd, size)
        os.pwrite(fd, content, 0)
        spec = BlockFile(f"/proc/self/fd/{fd}", overlay=limit)
        return block.attach(DISK, spec, self.cleanup, Stop(), self.warnings.append)


@pytest.fixture
def disks() -> Iterator[Disks]:
    with Cleanup() as cleanup:
        yield Disks(cleanup)


def read(device: BlockDevice, offset: int, size: int) -> bytes:
    data = bytearray(size)
    assert device.read(offset, memoryview(data)) == lib.HVT_R_OK
    return bytes(data)


@pytest.mark.parametrize("size", [3 << 40, 1 << 60, (1 << 63) - 512])
def test_an_overlay_takes_nothing_for_the_size_of_its_file(disks: Disks, size: int) -> None:
    tracemalloc.start()
    try:
        device = disks.attach(size, True)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    for offset in (0, size // 2 // 512 * 512, size - 512):
        assert device.write(offset, memoryview(b"x" * 512)) == lib.HVT_R_OK
        assert read(device, offset, 512) == b"x" * 512


def test_a_full_overlay_refuses_new_pages_and_no_others(disks: Disks) -> None:
    content = os.urandom(64 * PAGE)
    device = disks.attach(len(content), 4 * PAGE + 1, content)
    for page in (60, 3, 9, 10):
        assert device.write(page * PAGE + 512, memoryview(b"n" * 512)) == lib.HVT_R_OK
    before = read(device, 0, len(content))
    for offset, length in ((0, 512), (11 * PAGE - 512, 1024), (0, len(content))):
        assert device.write(offset, memoryview(bytes(length))) == lib.HVT_R_EUNSPEC
    assert read(device, 0, len(content)) == before, "a refused write changes nothing"
    assert device.write(9 * PAGE, memoryview(bytes(2 * PAGE))) == lib.HVT_R_OK
    assert read(device, 9 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert device.counters.errors == 3
    assert disks.warnings == [
        "block device 'storage': its overlay of 16384 bytes is full; the guest goes on"
    ]


def test_an_overlay_is_a_disk_like_any_other(disks: Disks) -> None:
    chance = random.Random(1)
    expected = bytearray(chance.randbytes(50 * PAGE + 512))
    device = disks.attach(len(expected), 64 * PAGE, bytes(expected))
    for _ in range(500):
        start, end = sorted(chance.randrange(len(expected) // 512 + 1) * 512 for _ in range(2))
        data = chance.randbytes(min(end - start, chance.choice([512, 4 * PAGE, 50 * PAGE])))
        assert device.write(start, memoryview(data)) == lib.HVT_R_OK
        expected[start : start + len(data)] = data
        assert read(device, start, end - start) == expected[start:end]
    assert read(device, 0, len(expected)) == expected


def test_the_default_is_a_part_of_the_memory() -> None:
    assert PAGE < overlay.default_limit() <= OVERLAY_MAX


def test_an_overlay_beyond_all_memory_is_an_error_in_a_line(disks: Disks) -> None:
    size = 1 << 60
    text = f"^block device 'storage': no memory for an overlay of {size} bytes: [^\n]*$"
    with pytest.raises(HostError, match=text):
        disks.attach(size, size)
