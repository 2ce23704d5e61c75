"""Overlays whose memory can't be had."""

from __future__ import annotations

import os

import pytest

from tender._native import lib
from tender.cleanup import Cleanup
from tender.config import BlockFile
from tender.errors import HostError
from tender.host import block
from tender.image.manifest import Device
from tender.stop import Stop

DISK = Device("storage", lib.MFT_DEV_BLOCK_BASIC, 1)


@pytest.mark.parametrize("size", [1 << 60, (1 << 63) - 512])
def test_an_overlay_beyond_all_memory_is_an_error_in_a_line(size: int) -> None:
    fd = os.memfd_create("huge")  # a sparse file of a length that not every file system has
    try:
        os.truncate(fd, size)
        spec = BlockFile(f"/proc/self/fd/{fd}", overlay=True)
        text = f"^block device 'storage': no memory for an overlay of {size} bytes: [^\n]*$"
        with Cleanup() as cleanup, pytest.raises(HostError, match=text):
            block.attach(DISK, spec, cleanup, Stop(), lambda _: None)
    finally:
        os.close(fd)
