"""What a program says to `Guest`: each wrong argument is one line that names it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tender import BlockFile, Guest, Rate, Tap, UserNet, VirtualTime
from tender.backends import BlockDescriptor, BlockRemote, Descriptor
from tender.dataclass import replace
from tender.embed import validation
from tender.errors import DeviceError, TenderError, UsageError


@pytest.mark.parametrize(
    ("words", "more", "text"),
    [
        ([None], {}, "kernel=None is not a path"),
        ([""], {}, "kernel='' is not a path"),
        (["k", "a", 5], {}, "argument 2 of the guest: 5 is not a string"),
        (["k", b"a"], {}, "argument 1 of the guest: b'a' is not a string"),
        (["k", "a\0b"], {}, "argument 1 of the guest: .* is not a string that .*, without NUL"),
        (["k", "\ud800"], {}, r"argument 1 of the guest: '\\ud800' is not a string that can be"),
        (["\ud800"], {}, r"kernel='\\ud800' is not a path"),
        (["k"], {"dumpcore": "\ud800"}, r"dumpcore='\\ud800' is not a path"),
        (["k"], {"user": "\ud800"}, r"user='\\ud800' is not a user: a name or a number"),
        (["k"], {"user": -1}, "user=-1 is not a user"),
        (["k"], {"instructions": 10**30}, "instructions=10+ is not a whole number from 1 to 9223"),
        (["k"], {"instructions": 10**5000}, "instructions=<int> is not a whole number"),
        (["k"], {"console_limit": 10**30}, "console_limit=10+ is not a whole number"),
        (["k"], {"mem_mib": "64"}, "mem_mib='64' is not a whole number from 1 to 4096"),
        (["k"], {"mem_mib": 8.5}, "mem_mib=8.5 is not a whole number"),
        (["k"], {"mem_mib": 0}, "mem_mib=0 is not a whole number from 1 to 4096"),
        (["k"], {"mem_mib": 4097}, "mem_mib=4097 is not a whole number from 1 to 4096"),
        (["k"], {"mem_mib": True}, "mem_mib=True is not a whole number"),
        (["k"], {"console_limit": 0}, "console_limit=0 is not a whole number from 1"),
        (["k"], {"instructions": -1}, "instructions=-1 is not a whole number from 1"),
        (["k"], {"cpu": "kmv"}, "cpu='kmv' is not auto, kvm, native or soft"),
        (["k"], {"sandbox": "yes"}, "sandbox='yes' is not on, require or off"),
        (["k"], {"clock": "virtual"}, r"clock='virtual' is not a VirtualTime\(...\)"),
        (["k"], {"user": 1.5}, "user=1.5 is not a user: a name or a number"),
        (["k"], {"dumpcore": 3}, "dumpcore=3 is not a path"),
        (["k"], {"trace": 3}, "trace=3 is not a path"),
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
    assert validation.block("disk.img", "") == BlockFile("disk.img")
    assert validation.block(Path("disk.img"), "") == BlockFile("disk.img")
    for kind, name in ((validation.net, "a/b"), (validation.block, "")):
        with pytest.raises(DeviceError, match=r"^here: (name='a/b'|path='') is not "):
            kind(name, "here")


def test_values_are_kept_in_one_form() -> None:
    assert Tap("t", create=True, addr="10.0.0.1/24").addr == ("10.0.0.1/24",)
    assert Tap("t", create=True, addr=["10.0.0.1/255.0.0.0"]).addr == ("10.0.0.1/8",)
    assert UserNet(mac="02:00:00:00:00:01").mac == b"\2\0\0\0\0\1"
    assert UserNet({"8080": 80}).forward == UserNet({8080: 80}).forward == {8080: 80}
    assert UserNet({"0.0.0.0:08080": 80}).forward == {"0.0.0.0:8080": 80}
    assert BlockFile(Path("disk.img"), overlay=True) == BlockFile("disk.img", overlay=True)
    assert replace(Tap("t"), mac="02:00:00:00:00:01").mac == b"\2\0\0\0\0\1"


IPV4 = "192.0.2.1"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: UserNet(forward=[8080]), r"forward=\[8080\] is not host ports to guest ports, as"),  # type: ignore[arg-type]
        (lambda: UserNet({"8080": [80]}), r"forward=.* is not host ports .*, as in {8080: 80}"),  # type: ignore[dict-item]
        (lambda: UserNet({b"8080": 80}), r"forward=.* is not host ports .*, as in {8080: 80}"),  # type: ignore[dict-item]
        (lambda: UserNet({10**5000: 80}), "forward=<dict> is not host ports"),
        (lambda: UserNet({8080: 99999}), "forward={8080: 99999} is not host ports"),
        (lambda: UserNet({"x:8080": 80}), "forward={'x:8080': 80} is not host ports"),
        (lambda: UserNet({":8080": 80}), "forward={':8080': 80} is not host ports"),
        (lambda: UserNet(forward_udp={53: True}), "forward_udp={53: True} is not host ports"),
        (lambda: UserNet(mtu="1500"), "mtu='1500' is not a whole number from 68 to 65535"),  # type: ignore[arg-type]
        (lambda: UserNet(mtu=None), "mtu=None is not a whole number"),  # type: ignore[arg-type]
        (lambda: UserNet(address="10.0.0.2"), "address='10.0.0.2' is not an address with its"),
        (lambda: UserNet(address="fd00::2/64"), "address='fd00::2/64' is not an IPv4 address"),
        *(
            (lambda given=given: UserNet(address6=given), "address6=.* is not an IPv6 address")
            for given in ("fd00::2/48", "fe80::2/64", "::1/64", "ff02::1/64", "::ffff:1.2.3.4/64")
        ),
        (lambda: UserNet({"[1.2.3.4]:80": 80}, address6="fd00::2/64"), "forward=.* is not host po"),
        (lambda: UserNet({"[fe80::1%1]:80": 80}, address6="fd00::2/64"), "forward=.* is not host"),
        (lambda: UserNet(gateway=IPV4), f"gateway='{IPV4}' is not another address of the network"),
        (lambda: UserNet(gateway="10.0.0.2"), "gateway='10.0.0.2' is not another address"),
        (lambda: UserNet(host_address="x"), "host_address='x' is not an IPv4 address"),
        (lambda: UserNet(mac="02:0"), "mac='02:0' is not a unicast MAC address, as in 52:54"),
        (lambda: Descriptor(3, mac=b""), "mac=b'' is not a unicast MAC address"),
        (lambda: Descriptor(3, mac=b"12345"), "mac=b'12345' is not a unicast MAC address"),
        (lambda: Descriptor(3, mac=b"\2abcdefg"), "mac=.* is not a unicast MAC address"),
        (lambda: Tap("t", mac=b"\1abcde"), "mac=.* is not a unicast MAC address"),
        (lambda: Tap("t", create=True, mtu=10**30), "mtu=10+ is not a whole number from 68 to 655"),
        (lambda: Descriptor(3, mtu=67), "mtu=67 is not a whole number from 68 to 65535"),
        (lambda: Descriptor(3, mtu=0), "mtu=0 is not a whole number from 68 to 65535"),
        (lambda: Descriptor(3, mtu=65536), "mtu=65536 is not a whole number from 68 to 65535"),
        (lambda: Descriptor(3, mtu=1500.0), "mtu=1500.0 is not a whole number"),  # type: ignore[arg-type]
        (lambda: Descriptor("3"), "fd='3' is not the number of an open descriptor"),  # type: ignore[arg-type]
        (lambda: Descriptor(-5), "fd=-5 is not the number of an open descriptor"),
        (lambda: BlockDescriptor(True), "fd=True is not the number of an open descriptor"),
        (lambda: Tap("t", True, addr=("10.0.0.1/999",)), "addr='10.0.0.1/999' is not an address"),
        (lambda: Tap("t", True, addr="10.0.0.1"), "addr='10.0.0.1' is not an address with its pre"),
        (lambda: Tap("t", True, addr=(5,)), "addr=5 is not an address"),  # type: ignore[arg-type]
        (lambda: Tap("t", addr="10.0.0.1/8"), "addr, mtu and bridge set up a new tap, and need cr"),
        (lambda: Tap("t", create=True, bridge="\ud800"), r"bridge='\\ud800' is not an interface"),
        (lambda: Tap("t", create="no"), "create='no' is not True or False"),  # type: ignore[arg-type]
        (lambda: Tap(5), "name=5 is not an interface name"),  # type: ignore[arg-type]
        (lambda: BlockFile("\ud800"), r"path='\\ud800' is not a path"),
        (lambda: BlockFile("a\0b"), r"path='a\\x00b' is not a path"),
        (lambda: BlockFile(3), "path=3 is not a path"),  # type: ignore[arg-type]
        (lambda: BlockFile(""), "path='' is not a path"),
        (lambda: BlockFile(Path), "path=<class 'pathlib.*Path'> is not a path"),  # type: ignore[arg-type]
        (lambda: BlockFile("x", overlay=1), "overlay=1 is not a size of at least 4096 bytes"),
        (lambda: BlockFile("x", overlay="64M"), "overlay='64M' is not a size in bytes .a number"),
        (lambda: BlockFile("x", overlay="-1"), "overlay='-1' is not .* of this name is './-1'"),
        (lambda: BlockFile("x", overlay="64Q"), "overlay='64Q' is not a size in bytes .a number"),
        (lambda: BlockFile("x", True, overlay=True), "a read-only disk needs no overlay"),
        (lambda: BlockFile("x", sector_size="512"), "sector_size='512' is not a power of two fr"),  # type: ignore[arg-type]
        (lambda: BlockRemote(3, 0), "Backing storage size must be block aligned: 0 bytes"),
        (lambda: BlockRemote(3, -1), "capacity=-1 is not a whole number"),
        (lambda: BlockRemote(3, 1000), "Backing storage size must be block aligned: 1000 bytes"),
        (lambda: VirtualTime(0, -5), "tick_ns=-5 is not a whole number from 1 to"),
        (lambda: VirtualTime(0, 0), "tick_ns=0 is not a whole number from 1 to"),
        (lambda: VirtualTime("x", 1), "start_ns='x' is not a time between 1970 and 2554"),  # type: ignore[arg-type]
        (lambda: VirtualTime(1 << 64), "start_ns=[0-9]+ is not a time between 1970 and 2554"),
    ],
)  # fmt: skip
def test_wrong_values(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(TenderError, match=f"^{text}") as raised:
        make()
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("size", [-512, 0, 1, 256, 511, 513, 521, 1000, 1 << 16])
def test_sector_sizes(size: int) -> None:
    message = f"^sector_size={size} is not a power of two from 512 to 32768$"
    for make in (
        lambda: BlockFile("x", sector_size=size),
        lambda: BlockDescriptor(3, sector_size=size),
        lambda: BlockRemote(3, 1 << 20, sector_size=size),
    ):
        with pytest.raises(UsageError, match=message):
            make()


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "tap%d", "a b", ".", "a:b", "a,create"])
def test_names_that_no_interface_has(name: str) -> None:
    with pytest.raises(UsageError, match="^name=.* is not an interface name of 1 to 15 bytes"):
        Tap(name)


def test_who_is_warned() -> None:
    assert validation.warn(None) is None
    assert validation.warn(print) is print
    with pytest.raises(UsageError, match="on_end='x' is not a function, which is given the guest"):
        Guest("k", on_end="x")  # type: ignore[arg-type]
    for kernel in (3.5, None, -1, True):
        with pytest.raises(UsageError, match=f"^kernel={kernel} is not "):
            Guest(kernel)  # type: ignore[arg-type]
    for rates in ({"a": 5}, {3: Rate(1)}, Rate(1)):
        with pytest.raises(UsageError, match="^net_rate=.*: not a mapping from the names of dev"):
            Guest("k", net_rate=rates)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="^bytes=0 is not a whole number"):
        Rate(bytes=0)
    with pytest.raises(UsageError, match="warn='x' is not a function"):
        validation.warn("x")
