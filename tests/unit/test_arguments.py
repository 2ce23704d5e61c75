"""What a program says to `Guest`: each wrong argument is one line that names it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tender import BlockFile, Guest, Tap, UserNet, VirtualTime, config
from tender.config import BlockDescriptor, Descriptor
from tender.embed import validation
from tender.errors import DeviceError, UsageError


@pytest.mark.parametrize(
    ("words", "more", "text"),
    [
        ([None], {}, "kernel=None: not a path"),
        ([""], {}, "kernel='': not a path"),
        (["k", "a", 5], {}, "argument 2 of the guest: 5 is not a string"),
        (["k", b"a"], {}, "argument 1 of the guest: b'a' is not a string"),
        (["k", "a\0b"], {}, "argument 1 of the guest: .* ends at a NUL"),
        (["k", "\ud800"], {}, r"argument 1 of the guest: '\\ud800' can't be encoded"),
        (["\ud800"], {}, r"kernel='\\ud800': not a path"),
        (["k"], {"dumpcore": "\ud800"}, r"dumpcore='\\ud800': not a path"),
        (["k"], {"user": "\ud800"}, r"user='\\ud800' is not a user: a name or a number"),
        (["k"], {"user": -1}, "user=-1 is not a user"),
        (["k"], {"instructions": 10**30}, "instructions=10+ is too large: there are 63 bits"),
        (["k"], {"instructions": 10**5000}, "instructions=<int> is too large"),
        (["k"], {"console_limit": 10**30}, "console_limit=10+ is too large"),
        (["k"], {"clock": VirtualTime(0, -5)}, "clock: tick_ns=-5 is not a number of nanoseconds"),
        (["k"], {"clock": VirtualTime(0, 0)}, "clock: tick_ns=0 is not .* nanoseconds, 1 or more"),
        (["k"], {"clock": VirtualTime("x", 1)}, "clock: start_ns='x' is not a number of nano"),  # type: ignore[arg-type]
        (["k"], {"clock": VirtualTime(1 << 64)}, "clock: start_ns=[0-9]+ is not a number of nano"),
        (["k"], {"mem_mib": "64"}, "mem_mib='64' is not a number of MiB: a whole one, 1 or more"),
        (["k"], {"mem_mib": 8.5}, "mem_mib=8.5 is not a number of MiB"),
        (["k"], {"mem_mib": 0}, "mem_mib=0 is not a number of MiB"),
        (["k"], {"mem_mib": True}, "mem_mib=True is not a number of MiB"),
        (["k"], {"console_limit": 0}, "console_limit=0 is not a number of bytes per second"),
        (["k"], {"instructions": -1}, "instructions=-1 is not a number of instructions"),
        (["k"], {"cpu": "kmv"}, "cpu='kmv' is none of auto, kvm, soft"),
        (["k"], {"sandbox": "yes"}, "sandbox='yes' is none of on, require, off"),
        (["k"], {"clock": "virtual"}, r"clock='virtual' is not a VirtualTime\(...\)"),
        (["k"], {"user": 1.5}, "user=1.5 is not a user: a name or a number"),
        (["k"], {"dumpcore": 3}, "dumpcore=3: not a path"),
        (["k"], {"trace": 3}, "trace=3: not a path"),
        (["k"], {"deadline": "5"}, "deadline='5' is not a number of seconds"),
        (["k"], {"deadline": float("nan")}, "deadline=nan is not a number of seconds"),
        (["k"], {"deadline": float("-inf")}, "deadline=-inf is not a number of seconds"),
        (["k"], {"net": [Tap("tap0")]}, "net=.*: not a mapping .*, as {\"service\": Tap"),
        (["k"], {"block": {1: "x"}}, "block=.*: not a mapping .*, as {\"storage\": BlockFile"),
    ],
)  # fmt: skip
def test_wrong_arguments(words: list[Any], more: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as raised:
        Guest(*words, **more)
    assert str(raised.value).isprintable()


def test_what_is_taken() -> None:
    assert Guest("k", user=1000).config.user == "1000"
    assert Guest(Path("k"), dumpcore=Path("d")).config.kernel == "k"
    assert Guest("k", deadline=5).deadline == 5.0
    assert Guest("k", deadline=float("inf")).deadline is None
    assert Guest("k", deadline=10**400).deadline == threading.TIMEOUT_MAX
    assert Guest("k", clock=VirtualTime()).config.clock == VirtualTime()


def test_devices_in_short() -> None:
    assert validation.net("tap0", "") == Tap("tap0")
    assert validation.net(Tap("t", create=True, addr="10.0.0.1/24"), "").addr == ("10.0.0.1/24",)  # type: ignore[arg-type]
    assert validation.net(UserNet(mac="02:00:00:00:00:01"), "").mac == b"\2\0\0\0\0\1"  # type: ignore[arg-type]
    assert validation.block("disk.img", "") == BlockFile("disk.img")
    assert validation.block(Path("disk.img"), "") == BlockFile("disk.img")
    assert validation.block(BlockFile(Path("disk.img"), overlay=True), "") == BlockFile(  # type: ignore[arg-type]
        "disk.img", overlay=True
    )


@pytest.mark.parametrize(
    ("kind", "spec", "text"),
    [
        ("net", UserNet(forward=[8080]), r"here: forward=\[8080\]: no mapping .*, as {8080: 80}"),  # type: ignore[arg-type]
        ("net", UserNet(mac="02:0"), "here: mac='02:0': '02:0' is not a unicast MAC address"),  # type: ignore[arg-type]
        ("net", UserNet(mac=b"12345"), "here: mac=b'12345': not 6 bytes"),
        ("net", UserNet(mtu="1500"), "here: mtu='1500': not a whole number"),  # type: ignore[arg-type]
        ("net", UserNet(mtu=None), "here: mtu=None: not a whole number"),  # type: ignore[arg-type]
        ("net", UserNet({"8080": [80]}), r"here: forward=.*: no mapping .*, as {8080: 80}"),  # type: ignore[dict-item]
        ("net", UserNet({b"8080": 80}), r"here: forward=.*: no mapping .*, as {8080: 80}"),  # type: ignore[dict-item]
        ("net", UserNet({10**5000: 80}), "here: forward=<dict>: no mapping"),
        ("net", UserNet(forward_udp={53: True}), "here: forward_udp=.*: no mapping"),
        ("net", Tap("t", create=True, mtu=10**30), "here: mtu=10+: not 68 to 65535"),
        ("net", Descriptor(3, mtu=1500.0), "here: mtu=1500.0: not a whole number or None"),  # type: ignore[arg-type]
        ("net", Tap("t", create=True, addr=("10.0.0.1/999",)), "'10.0.0.1/999' is not an address"),
        ("net", Tap("t", create=True, addr="10.0.0.1"), "'10.0.0.1' is not an address with its"),  # type: ignore[arg-type]
        ("net", "\ud800", r"here: name='\\ud800': not a name"),
        ("net", Tap("t", create=True, bridge="\ud800"), r"here: bridge='\\ud800': not a name"),
        ("block", "\ud800", r"here: path='\\ud800': not a path"),
        ("net", Tap(5), "here: name=5: not a string"),  # type: ignore[arg-type]
        ("net", Tap("t", create="no"), "here: create='no': not True or False"),  # type: ignore[arg-type]
        ("net", Tap("t", create=True, addr=(5,)), r"here: addr=\(5,\): not strings"),  # type: ignore[arg-type]
        ("net", Descriptor("3"), "here: fd='3': not a whole number"),  # type: ignore[arg-type]
        ("block", BlockFile(3), "here: path=3: not a path"),  # type: ignore[arg-type]
        ("block", "", "here: path='': not a path"),
        ("block", BlockFile("x", sector_size="512"), "here: sector_size='512': not a whole"),  # type: ignore[arg-type]
        ("block", BlockDescriptor(True), "here: fd=True: not a whole number"),
    ],
)
def test_wrong_devices(kind: str, spec: Any, text: str) -> None:
    with pytest.raises(DeviceError, match=text) as raised:
        getattr(validation, kind)(spec, "here")
    assert str(raised.value).isprintable()


def test_who_is_warned() -> None:
    assert validation.warn(None) is None
    assert validation.warn(print) is print
    with pytest.raises(UsageError, match="warn='x' is not a function"):
        validation.warn("x")


def test_every_field_of_a_device_is_known() -> None:
    values = [config.Tap, config.Descriptor, config.StreamNet, config.UserNet]
    values += [config.BlockFile, config.BlockDescriptor, config.BlockRemote]
    names = {name for value in values for name in value.__annotations__}
    assert names == set(validation._FIELDS)
