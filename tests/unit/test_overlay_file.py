"""Overlays in files: what outlives the guest, and which files are refused."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tender._native import lib
from tender.backends import BlockFile
from tender.cleanup import Cleanup
from tender.errors import DeviceError
from tender.host import block
from tender.host.overlay_file import CAPACITY_MAX, HEADER, Layout
from tender.image.manifest import Device
from tender.modules.block import BlockDevice
from tender.stop import Stop

DISK = Device("storage", lib.MFT_DEV_BLOCK_BASIC, 1)
PAGE = 4096
SIZE = 50 * PAGE + 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return tmp_path / "guest.overlay"


def attach(cleanup: Cleanup, image: Path, overlay: Path, **options: Any) -> BlockDevice:
    spec = BlockFile(image, overlay=overlay, **options)
    return block.attach(DISK, spec, cleanup, Stop(), pytest.fail)


def refusal(image: Path, overlay: Path) -> str:
    with Cleanup() as cleanup, pytest.raises(DeviceError) as raised:
        attach(cleanup, image, overlay)
    text = str(raised.value)
    before = f"block device 'storage', {image}: overlay {overlay}: "
    assert text.startswith(before)
    assert "\n" not in text
    return text.removeprefix(before)


def read(device: BlockDevice, offset: int, size: int) -> bytes:
    data = bytearray(size)
    assert device.read(offset, memoryview(data)) == lib.HVT_R_OK
    return bytes(data)


def test_what_is_written_outlives_the_guest(image: Path, overlay: Path) -> None:
    chance = random.Random(2)
    expected = bytearray(image.read_bytes())
    for _ in range(20):
        with Cleanup() as cleanup:
            device = attach(cleanup, image, overlay)
            assert read(device, 0, SIZE) == expected
            for _ in range(25):
                start, end = sorted(chance.randrange(SIZE // 512 + 1) * 512 for _ in range(2))
                data = chance.randbytes(min(end - start, chance.choice([512, 3 * PAGE, SIZE])))
                assert device.write(start, memoryview(data)) == lib.HVT_R_OK
                expected[start : start + len(data)] = data
                assert read(device, start, end - start) == expected[start:end]
    assert image.read_bytes() == random.Random(1).randbytes(SIZE), "the image is as it was"


def test_it_takes_room_for_what_was_written(tmp_path: Path, overlay: Path) -> None:
    image = tmp_path / "large.img"
    image.touch()
    os.truncate(image, 1 << 38)
    for offset in (0, 1 << 37, (1 << 38) - 512):
        with Cleanup() as cleanup:
            device = attach(cleanup, image, overlay)
            assert device.write(offset, memoryview(b"x" * 512)) == lib.HVT_R_OK
            assert device.counters.bytes == 512
    with Cleanup() as cleanup:
        device = attach(cleanup, image, overlay)
        assert all(read(device, at, 512) == b"x" * 512 for at in (0, 1 << 37, (1 << 38) - 512))
    assert os.stat(overlay).st_blocks * 512 < 1 << 20
    assert os.stat(overlay).st_mode & 0o777 == 0o600


def test_a_write_that_fails_changes_nothing_of_new_pages(
    image: Path, overlay: Path, tmp_path: Path
) -> None:
    """The overlay's descriptor is for reading only: every write of the host fails."""
    warnings: list[str] = []
    with Cleanup() as cleanup:
        spec = BlockFile(image, overlay=overlay)
        device = block.attach(DISK, spec, cleanup, Stop(), warnings.append)
        assert device.overlay_file
        readonly = os.open(overlay, os.O_RDONLY)
        cleanup.callback(lambda: os.close(readonly))
        before, device.overlay_file.fd = device.overlay_file.fd, readonly
        for offset, size in ((0, PAGE), (512, 512), (PAGE - 512, 1024)):
            assert device.write(offset, memoryview(bytes(size))) == lib.HVT_R_EUNSPEC
        device.overlay_file.fd = before
        assert read(device, 0, SIZE) == image.read_bytes()
    assert warnings == ["block device 'storage': Bad file descriptor; the guest goes on"]


def test_the_map_of_a_failed_write(image: Path, overlay: Path, tmp_path: Path) -> None:
    """Data without its bits is not there: a tender may end between the two."""
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay)
    with open(overlay, "rb+") as file:
        file.seek(Layout(SIZE).data)
        file.write(b"y" * PAGE)
    with Cleanup() as cleanup:
        assert read(attach(cleanup, image, overlay), 0, PAGE) == image.read_bytes()[:PAGE]


def test_it_has_one_user_and_the_image_many(image: Path, overlay: Path, tmp_path: Path) -> None:
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay)
        assert refusal(image, overlay).startswith("locked by this guest itself")
        attach(cleanup, image, tmp_path / "another")
        with pytest.raises(DeviceError, match="locked by"):
            block.attach(DISK, BlockFile(image), cleanup, Stop(), pytest.fail)
    assert refusal(image, image).startswith("locked by this guest itself")


def test_another_image(image: Path, overlay: Path) -> None:
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay).write(0, memoryview(b"z" * 512))
    image.write_bytes(image.read_bytes())
    text = refusal(image, overlay)
    assert text.startswith("the image has been modified since it was made, so they do not fit")
    subprocess.run(text.partition("(if only the time is another: ")[2][:-1], shell=True, check=True)
    with Cleanup() as cleanup:
        assert read(attach(cleanup, image, overlay), 0, 512) == b"z" * 512
    with open(image, "ab") as file:
        file.write(bytes(512))
    assert refusal(image, overlay) == (
        f"made for an image of {SIZE} bytes, and this one has {SIZE + 512}"
    )


def truncated(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size - 1)


def longer(path: Path) -> None:
    os.truncate(path, os.stat(path).st_size + PAGE)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def other_version(path: Path) -> None:
    with open(path, "rb+") as file:
        fields = list(HEADER.unpack(file.read(HEADER.size)))
        file.seek(0)
        file.write(HEADER.pack(fields[0], 2, *fields[2:]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "damaged: its length is "),
        (longer, "damaged: its length is "),
        (other_version, "made by another version of ptender (format 2)"),
        (lambda path: path.write_bytes(b"PTENDOVL"), "not an overlay of ptender"),
        (lambda path: path.write_bytes(bytes(SIZE)), "not an overlay of ptender"),
        (fifo, "not a regular file"),
        (link_to("/"), "Is a directory"),
        (link_to("/dev/null"), "not a regular file"),
        (link_to("no/where"), "No such file or directory"),
    ],
)
def test_files_that_are_no_overlays(
    image: Path, overlay: Path, damage: Callable[[Path], object], message: str
) -> None:
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay)
    damage(overlay)
    assert refusal(image, overlay).startswith(message)


def test_a_hostile_map(image: Path, overlay: Path) -> None:
    """All of its bits set, those behind the disk as well: the disk is the overlay's data."""
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay)
    layout = Layout(SIZE)
    with open(overlay, "rb+") as file:
        file.seek(PAGE)
        file.write(b"\xff" * (layout.data - PAGE))
    with Cleanup() as cleanup:
        device = attach(cleanup, image, overlay)
        assert read(device, 0, SIZE) == bytes(SIZE)
        assert device.write(SIZE - 512, memoryview(b"w" * 512)) == lib.HVT_R_OK
        assert read(device, SIZE - 512, 512) == b"w" * 512
    assert os.stat(overlay).st_size == layout.size


def test_a_making_that_was_interrupted(image: Path, overlay: Path) -> None:
    with Cleanup() as cleanup:
        attach(cleanup, image, overlay)
    os.truncate(overlay, PAGE)
    with Cleanup() as cleanup:
        assert read(attach(cleanup, image, overlay), 0, SIZE) == image.read_bytes()


def test_an_image_that_is_too_large(tmp_path: Path, overlay: Path) -> None:
    fd = os.memfd_create("disk")
    try:
        os.truncate(fd, CAPACITY_MAX + 512)
        image = Path(f"/proc/self/fd/{fd}")
        assert refusal(image, overlay) == "its image has more than 16 TiB"
    finally:
        os.close(fd)
    assert not overlay.exists()


def test_what_sync_means_for_it(image: Path, overlay: Path) -> None:
    with Cleanup() as cleanup:
        device = attach(cleanup, image, overlay, sync="always")
        assert device.overlay_file
        assert fcntl.fcntl(device.overlay_file.fd, fcntl.F_GETFL) & os.O_DSYNC == os.O_DSYNC
    with Cleanup() as cleanup:
        device = attach(cleanup, image, overlay, sync="fsync")
        assert device.syncs_at_end
        device.end()
