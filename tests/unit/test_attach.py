"""What can be attached, and what wrong devices get. No root, no KVM."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.backends import BlockDescriptor, BlockFile, Descriptor, Tap
from tender.cleanup import Cleanup
from tender.dataclass import replace
from tender.errors import DeviceError
from tender.host import block, keep_descriptors, net, random_mac
from tender.image.manifest import Device
from tender.modules.block import BlockDevice
from tender.stop import Stop
from tests.descriptors import open_descriptors

DISK = Device("storage", 1, 1)
PORT = Device("service", 2, 1)
WHAT = "Could not attach interface"


@pytest.fixture
def cleanup() -> Iterator[Cleanup]:
    with Cleanup() as value:
        yield value


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    return path


def attach(cleanup: Cleanup, path: object, **options: object) -> BlockDevice:
    spec = BlockFile(str(path), **options)  # type: ignore[arg-type]
    return block.attach(DISK, spec, cleanup, Stop(), pytest.fail)


def test_a_file_is_a_disk(cleanup: Cleanup, image: Path) -> None:
    device = attach(cleanup, image, sector_size=4096)
    assert (device.capacity, device.sector_size) == (8192, 4096)


@pytest.mark.parametrize("size", [0, 1, 511, 513, 6143])
def test_sizes_of_images(cleanup: Cleanup, tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(DeviceError, match="Backing storage size must be block aligned"):
        attach(cleanup, path)


def test_images_that_cannot_be_opened(cleanup: Cleanup, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, message in [
        ("/nonexistent/disk.img", "Could not open block device: .*No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "neither a file nor a block device"),
        ("/dev/null", "neither a file nor a block device"),
        ("/proc/self/mem", "it has no size"),
    ]:
        with pytest.raises(DeviceError, match=message) as raised:
            attach(cleanup, path)
        assert "'storage'" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("qcow2", b"QFI\xfb\0\0\0\3"),
        ("VMDK", b"KDMV\1\0\0\0"),
        ("VMDK", b"# Disk DescriptorFile\nversion=1\n"),
        ("VHD", b"conectix\0\0\0\2"),
        ("VHDX", b"vhdxfile"),
        (
            "VDI",
            b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
        ),
    ],
)
def test_images_in_other_formats(cleanup: Cleanup, tmp_path: Path, name: str, head: bytes) -> None:
    path = tmp_path / "a disk.raw"
    path.write_bytes(head.ljust(8192, b"\0"))
    for options in ({}, {"readonly": True}, {"overlay": True}):
        with pytest.raises(DeviceError) as raised:
            attach(cleanup, path, **options)
        assert str(raised.value) == (
            f"block device 'storage', {path}: a {name} image, and a disk is a raw image; to make "
            f"one: qemu-img convert -O raw '{path}' '{path}.raw'"
        )
    with open(path, "rb+") as file:  # the program knows what it passes
        assert block.attach(DISK, BlockDescriptor(file.fileno()), cleanup, Stop(), pytest.fail)


def test_what_a_returned_write_means(cleanup: Cleanup, image: Path) -> None:
    """By the flags of the open file (fcntl_getfl(2)), and by what fsync(2) answers."""
    with Cleanup() as opened:
        assert not flags(attach(opened, image)) & os.O_DSYNC
    with Cleanup() as opened:
        assert flags(attach(opened, image, sync="always")) & os.O_DSYNC == os.O_DSYNC
    fd = os.open(image, os.O_RDWR | os.O_DSYNC)
    cleanup.callback(lambda: os.close(fd))
    always = BlockDescriptor(fd, sync="always")
    assert block.attach(DISK, always, cleanup, Stop(), pytest.fail).fd == fd
    other = os.open(image, os.O_RDWR)
    cleanup.callback(lambda: os.close(other))
    with pytest.raises(DeviceError, match="^block device 'storage': it is open without O_DSYNC"):
        block.attach(DISK, replace(always, fd=other), cleanup, Stop(), pytest.fail)
    warnings: list[str] = []
    ends = os.pipe()
    for end in ends:
        cleanup.callback(lambda end=end: os.close(end))  # type: ignore[misc]
    pipe = BlockDevice("storage", ends[1], 512, 512, False, Stop(), warnings.append)
    pipe.syncs_at_end = True
    pipe.end()
    assert pipe.counters.errors == 1
    assert warnings == [
        "block device 'storage': cannot write it out: Invalid argument; what the guest wrote may "
        "be lost"
    ]


def flags(device: BlockDevice) -> int:
    return fcntl.fcntl(device.fd, fcntl.F_GETFL)


def test_a_writable_image_has_one_user(image: Path) -> None:
    with Cleanup() as first:
        attach(first, image)
        for options in ({}, {"readonly": True}):
            with Cleanup() as second, pytest.raises(DeviceError, match=r"locked by this guest"):
                attach(second, image, **options)
    with Cleanup() as again:
        attach(again, image)


def test_readers_share_an_image(image: Path) -> None:
    with Cleanup() as first, Cleanup() as second:
        attach(first, image, readonly=True)
        attach(second, image, readonly=True)
        with Cleanup() as writer, pytest.raises(DeviceError, match="locked"):
            attach(writer, image)


def test_a_lock_names_its_holder(cleanup: Cleanup, image: Path) -> None:
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.flock(f,2); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(DeviceError, match=rf"locked by process {holder.pid} \(.*python"):
            attach(cleanup, image)
        holder.communicate(b"\n")
    attach(cleanup, image)


def test_a_failed_attach_keeps_nothing(image: Path) -> None:
    before = open_descriptors()
    with Cleanup() as first:
        attach(first, image)
        with Cleanup() as second, pytest.raises(DeviceError):
            attach(second, image)
    assert open_descriptors() <= before
    with open(image, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_descriptors_that_carry_no_frames(cleanup: Cleanup) -> None:
    stream, other = socket.socketpair()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind("")
    listening.listen()
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM)
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    for fd, message in [
        (stream.fileno(), "a stream socket does not keep frames apart"),
        (listening.fileno(), "not a socket for frames"),
        (netlink.fileno(), "not a socket for frames"),
        (reader, "neither a tap nor a socket"),
        (null, "neither a tap nor a socket"),
    ]:
        with pytest.raises(DeviceError, match=message) as raised:
            net.attach(PORT, Descriptor(fd), cleanup, pytest.fail)
        assert "Could not attach interface" in str(raised.value)
    for fd in (reader, writer, null):
        os.close(fd)
    for end in (stream, other, listening, netlink):
        end.close()


def test_descriptors_are_kept_before_anything_is_opened(cleanup: Cleanup) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        given: tuple[tuple[str | None, Tap | Descriptor], ...] = (
            ("a", Descriptor(theirs.fileno(), mtu=9000)),
            ("b", Tap("tap0")),
        )
        (_, kept), (_, tap) = keep_descriptors(given, WHAT, cleanup)
        assert isinstance(kept, Descriptor)
        assert (kept.mtu, tap) == (9000, Tap("tap0"))
        assert os.path.sameopenfile(kept.fd, theirs.fileno())
        assert kept.fd != theirs.fileno()
        with pytest.raises(DeviceError, match="given twice"):
            keep_descriptors((*given, ("c", Descriptor(theirs.fileno()))), WHAT, cleanup)
    with pytest.raises(DeviceError, match="@9999: Could not attach .*no such descriptor"):
        keep_descriptors(((None, Descriptor(9999)),), WHAT, cleanup)


def test_an_interface_that_does_not_exist(cleanup: Cleanup) -> None:
    with pytest.raises(DeviceError, match="Could not attach interface 'nosuch0'.*no such"):
        net.attach(PORT, Tap("nosuch0"), cleanup, pytest.fail)


def test_an_interface_that_is_no_tap(cleanup: Cleanup) -> None:
    with pytest.raises(DeviceError, match="Could not attach interface 'lo'"):
        net.attach(PORT, Tap("lo"), cleanup, pytest.fail)


def test_random_addresses_are_local_and_unicast() -> None:
    addresses = {random_mac() for _ in range(100)}
    assert len(addresses) == 100
    assert all(mac[0] & 3 == 2 for mac in addresses)
