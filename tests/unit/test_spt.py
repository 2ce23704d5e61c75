"""What an spt guest can't have, and what it finds at its start."""

from __future__ import annotations

import platform
import struct
from typing import Any

import pytest

from tender._native import lib
from tender.backends import BlockFile, BlockRemote, Descriptor, Rate, Tap, UserNet
from tender.config import Config, VirtualTime
from tender.dataclass import replace
from tender.errors import HostError, TenderError, UsageError
from tender.image import manifest
from tender.image.elf import EM_AARCH64, EM_X86_64
from tender.image.manifest import Attached, Device, Manifest
from tests.unit import elves

if platform.machine() != "x86_64":
    pytest.skip("spt guests run on x86_64", allow_module_level=True)

from tender.spt import process, refusals, region

PLAIN = Config("k.spt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace": "t"}, "--trace: an spt guest can't have it: no tender is beside"),
        ({"console_limit": 100}, "--console-limit: an spt guest can't"),
        ({"clock": VirtualTime()}, "--clock: an spt guest can't"),
        ({"instructions": 5}, "--instructions: an spt guest can't"),
        ({"net_rate": ((None, Rate(ops=1)),)}, "--net-rate: an spt guest can't"),
        ({"snapshots": "."}, "--snapshots: an spt guest can't"),
        ({"net_ring": True}, "--net-ring: an spt guest can't"),
        ({"engine": "python"}, "--engine: an spt guest can't"),
        ({"gdb": 1234}, "--gdb: an spt guest is a process: attach"),
        ({"cpu": "soft"}, "--cpu=soft: an spt guest runs as a process"),
        ({"block": ((None, BlockRemote(3, 512)),)}, "a device: .*that a program serves"),
        ({"block": (("a", BlockFile("d", sync="fsync")),)}, "device 'a': .*sync=fsync"),
        ({"block": (("a", BlockFile("d", overlay="o")),)}, "device 'a': .*overlay in a file"),
        ({"net": (("a", Descriptor(3, sync_fd=4)),)}, "device 'a': .*virtual time"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TenderError, match=message):
        refusals.check(replace(PLAIN, **change), EM_X86_64)


def test_what_is_not() -> None:
    net = (("a", Tap("tap0")), ("b", Descriptor(3)), ("d", UserNet()))
    refusals.check(
        replace(PLAIN, net=net, block=(("c", BlockFile("x", readonly=True)),)), EM_X86_64
    )
    refusals.check(replace(PLAIN, net_ring=False, hugepages=True, user="nobody"), EM_X86_64)


def test_a_guest_for_another_machine() -> None:
    with pytest.raises(HostError, match="this guest is for aarch64, this machine is x86_64"):
        refusals.check(PLAIN, EM_AARCH64)


def test_there_is_no_run_without_a_sandbox() -> None:
    with pytest.raises(UsageError, match="--sandbox=off is not for an spt guest"):
        process.check_sandbox(None)


def test_boot_info() -> None:
    declared = Manifest((Device("net0", lib.MFT_DEV_NET_BASIC, 1),))
    note = manifest.encode(declared, {1: Attached(mac=b"123456", mtu=1500, hostfd=17)})
    data = process.boot_info(3 << 20, 0x105000, b"two words", note, {"epoll": 3, "timer": 4})
    memory, end, cmdline, manifest_at, epoll, timer = struct.unpack_from("<QQQQii", data)
    assert (memory, end, epoll, timer) == (3 << 20, 0x105000, 3, 4)
    assert manifest_at == 0x11000 + 40
    assert data[40 : 40 + len(note)] == note
    assert cmdline == manifest_at + len(note)
    assert data[cmdline - 0x11000 :] == b"two words\0"
    entry = 8 + 104  # of handle 1 in the note
    assert struct.unpack_from("<i", note, entry + 88) == (17,)


def test_protections() -> None:
    notes = [elves.abi_note(target=2), elves.manifest_note(Manifest())]
    parsed = elves.parse(elves.image(notes=notes))
    assert parsed.target == lib.ABI_TARGET_SPT
    wanted = {"r--": 1, "r-x": 5, "--x": 4}
    assert region.protections(parsed) == [
        (each.start, each.end, wanted[each.protection])
        for each in parsed.segments
        if each.protection != "rw-"
    ]
