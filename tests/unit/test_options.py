"""The command line: Solo5's spelling, the friendlier one, and the errors of wrong options."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender._native import lib
from tender.backends import BlockDescriptor, BlockFile, Descriptor, Rate, Tap, UserNet
from tender.checks import as_mac, parse_size
from tender.cleanup import Cleanup
from tender.cli import commandline, usage
from tender.config import Config, usable_memory
from tender.errors import DeviceError, TenderError, UsageError
from tender.host import block
from tender.image.manifest import Device, Manifest
from tender.modules.assign import assign, check_all_attached
from tender.stop import Stop

MIB = 1 << 20
MAC = b"\x02\x00\x00\x00\x00\x07"


def parse(text: str) -> Config:
    config = commandline.parse(text.split()).config
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("10M", (None, Rate(bytes=10 * MIB))),
        ("a=5000ops", ("a", Rate(ops=5000))),
        ("a=64K,1000ops,burst=1M,burst=5ops", ("a", Rate(64 << 10, 1000, MIB, 5))),
    ],
)
def test_rates(text: str, given: object) -> None:
    config = parse(f"--net-rate {text} --block-rate={text} k")
    assert config.net_rate == config.block_rate == (given,)


def test_solo5_spelling() -> None:
    config = parse(
        "--mem=64 --no-net-ring --net:service=tap0 --net-mac:service=02:00:00:00:00:07 "
        "--block:storage=a,ro --block-sector-size:storage=4096 --dumpcore=/var -- k.hvt --x y"
    )
    assert config == Config(
        "k.hvt",
        ("--x", "y"),
        64 * MIB,
        (("service", Tap("tap0", mac=MAC)),),
        (("storage", BlockFile("a,ro", sector_size=4096)),),
        "/var",
        net_ring=False,
    )


def test_empty_arguments_are_kept_as_urunc_passes_them() -> None:
    line = commandline.parse(["--mem=100", "--net:a=tap0", "k.hvt", "", "a", "", "--net=x"])
    assert line.config is not None
    assert line.config.args == ("", "a", "", "--net=x")


def test_an_option_after_another_may_come_in_any_order() -> None:
    config = parse(
        "--net-mac:a=02:00:00:00:00:07 --net:a=tap0 --block-sector-size:d=512 --block:d=f k"
    )
    assert config.net == (("a", Tap("tap0", mac=MAC)),)
    assert config.block == (("d", BlockFile("f")),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--net tap0 k", (None, Tap("tap0"))),
        ("--net=tap0 k", (None, Tap("tap0"))),
        ("--net service=tap0 k", ("service", Tap("tap0"))),
        ("--net=service=tap0 k", ("service", Tap("tap0"))),
        ("--net @3 k", (None, Descriptor(3))),
        ("--net service=@3,mtu=9000 k", ("service", Descriptor(3, 9000))),
        ("--net:service=@3 k", ("service", Descriptor(3))),
        ("--net a=t,mac=2:0:0:0:0:7 k", ("a", Tap("t", mac=MAC))),
        ("--net user k", (None, UserNet())),
        ("--net=a=user:8080:80 k", ("a", UserNet({"8080": 80}))),
        (
            "--net user:0.0.0.0:8080:80,tcp:2222:22,udp:5353:53,mtu=1400,host k",
            (
                None,
                UserNet({"0.0.0.0:8080": 80, "2222": 22}, {"5353": 53}, mtu=1400, reach_host=True),
            ),
        ),
        (
            "--net a=user,addr=10.1.0.2/16,gateway=10.1.0.1,mac=2:0:0:0:0:7 k",
            ("a", UserNet(address="10.1.0.2/16", gateway="10.1.0.1", mac=MAC)),
        ),
        ("--net:a=user --net-mac:a=2:0:0:0:0:7 k", ("a", Tap("user", mac=MAC))),
        (
            "--net a=user:[::1]:8080:80,addr6=fd00::2/64 k",
            ("a", UserNet({"[::1]:8080": 80}, address6="fd00::2/64")),
        ),
        ("--net a=user --net-mac a=2:0:0:0:0:7 k", ("a", UserNet(mac=MAC))),
        (
            "--net a=t,create,addr=10.0.0.1/255.255.255.0 k",
            ("a", Tap("t", True, ("10.0.0.1/24",))),
        ),
        (
            "--net a=t,create,addr=10.0.0.1/24,addr=fd00::1/64,mtu=9000,bridge=br0 k",
            ("a", Tap("t", True, ("10.0.0.1/24", "fd00::1/64"), 9000, "br0")),
        ),
    ],
)
def test_net(text: str, expected: object) -> None:
    assert parse(text).net == (expected,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--block disk.img k", (None, BlockFile("disk.img"))),
        ("--disk=disk.img k", (None, BlockFile("disk.img"))),
        ("--block storage=disk.img,ro k", ("storage", BlockFile("disk.img", True))),
        ("--block a=x=y,sector-size=4096,ro k", ("a", BlockFile("x=y", True, 4096))),
        ("--block ./a=b,c.img k", (None, BlockFile("./a=b,c.img"))),
        ("--block a,b.img,ro k", (None, BlockFile("a,b.img", True))),
        ("--block a.img,overlay k", (None, BlockFile("a.img", overlay=True))),
        ("--block a.img,overlay=64K k", (None, BlockFile("a.img", overlay=64 << 10))),
        (
            "--block a.img,overlay=o,sync=fsync k",
            (None, BlockFile("a.img", overlay="o", sync="fsync")),
        ),
        ("--block a.img,overlay=./1 k", (None, BlockFile("a.img", overlay="./1"))),
        ("--block a.img,overlay=1 k", (None, BlockFile("a.img", overlay=1 << 20))),
        ("--block a.img,sync=fsync k", (None, BlockFile("a.img", sync="fsync"))),
        ("--block @3,sync=always k", (None, BlockDescriptor(3, sync="always"))),
        ("--block:a=a.img,overlay k", ("a", BlockFile("a.img,overlay"))),
        ("--block @3 k", (None, BlockDescriptor(3))),
        ("--block a=@3,ro,sector-size=4096 k", ("a", BlockDescriptor(3, True, 4096))),
        ("--block a=@3 --block-sector-size a=4096 k", ("a", BlockDescriptor(3, False, 4096))),
        ("--block @x k", (None, BlockFile("@x"))),
        ("--block:a=@3 k", ("a", BlockFile("@3"))),
    ],
)
def test_block(text: str, expected: object) -> None:
    assert parse(text).block == (expected,)


@pytest.mark.parametrize(
    ("text", "address", "console"),
    [
        ("--gdb k", 1234, 1),
        ("--gdb=99 k", 99, 1),
        ("--gdb --gdb-port=99 k", 99, 1),
        ("--gdb-port 99 --gdb k", 99, 1),
        ("--gdb=./socket k", "./socket", 1),
        ("--gdb=- k", "-", 2),
    ],
)
def test_gdb(text: str, address: int | str, console: int) -> None:
    config = parse(text)
    assert (config.gdb, config.console_fd, config.kernel) == (address, console, "k")


@pytest.mark.parametrize(
    ("text", "size"),
    [("64", 64), ("64M", 64), ("64MiB", 64), ("64mb", 64), ("1G", 1024), ("65536K", 64)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size * MIB
    assert parse(f"--mem {text} k").mem_bytes == size * MIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--block:a=f --block-sector-size:a=521 k",
            "521 is not a power of two from 512 to 32768: "
            "Block size must be a multiple of 2 greater than or equal 512$",
        ),
        ("--mem=0 k", "--mem: '0' is not a size: a number of MiB.*: Malformed argument to --mem$"),
        ("--mem=-5 k", "--mem: '-5' is not a size"),
        ("--mem=x k", "'x' is not a size"),
        ("--mem=5X k", "'5X' is not a size"),
        ("--mem= k", "empty value"),
        ("--mem=4097 k", "--mem: '4097' is not a size of at most 4096 MiB"),
        ("--mem:a=5 k", "Invalid option: `--mem:a=5'"),
        ("--nte tap0 k", r"Invalid option: `--nte'.*did you mean --net\?"),
        ("-x k", "Invalid option: `-x'"),
        ("--net:a k", "needs a value"),
        ("--net", "needs a value"),
        ("--net:a-b=tap0 k", "'a-b' is not a device name"),
        ("--net:=tap0 k", "'' is not a device name"),
        ("--net @x k", "--net: '@x': 'x' is not the number of an open descriptor"),
        ("--net @-1 k", "'-1' is not the number of an open descriptor"),
        ("--net a=t,addr=10.0.0.1/24 k", "set up a new tap, and need create"),
        ("--net a=t,create,addr=10.0.0.1 k", "as in 10.0.0.1/24"),
        ("--net a=t,create,addr=10.0.0/24 k", "as in 10.0.0.1/24"),
        ("--net a=t,create=1 k", "'create=1' is not one of create"),
        ("--net a=t,mtu=big,create k", "--net: mtu=big is not a whole number from 68 to 65535"),
        ("--net a=t,mtu=67,create k", "--net: mtu=67 is not a whole number from 68 to 65535"),
        ("--net a=t,mtu=4294967296,create k", "is not a whole number from 68 to 65535"),
        (f"--net @{'9' * 5000} k", "is not the number of an open descriptor"),
        (f"--mem={'9' * 5000}T k", "is not a size"),
        (f"--net a=user:{'9' * 5000}:80 k", "is not HOST:GUEST"),
        (f"--net a=user:80:{'9' * 5000} k", "is not HOST:GUEST"),
        (f"--net a=user:udp:53:{'9' * 5000} k", "is not HOST:GUEST"),
        (f"--clock=virtual,start={'9' * 5000} k", "start: '9.* is not a date"),
        (f"--clock=virtual,tick={'9' * 5000} k", "tick=9.* is not a whole number"),
        (f"--instructions={'9' * 5000} k", "--instructions: '9.* is not a whole number"),
        (f"--console-limit={'9' * 5000} k", "is not a rate"),
        (f"--trace=@{'9' * 5000} k", "is not the number of an open descriptor"),
        (f"--block @{'9' * 5000} k", "is not the number of an open descriptor"),
        (f"--block f,sector-size={'9' * 5000} k", "is not a power of two from 512 to 32768"),
        ("--net @3,create k", "'create' is not one of mtu=N, mac=MAC"),
        ("--net-mac:a=02:00:00:00:00:07 k", "nothing is attached with --net:a"),
        ("--net-mac=02:00:00:00:00:07 k", "name the device"),
        ("--net:a=t --net-mac:a=01:00:00:00:00:00 k", "--net-mac:a: '01.* not a unicast MAC"),
        ("--net:a=t --net-mac:a=zz:00:00:00:00:00 k", "not a unicast MAC"),
        ("--net a=t,mac=bad k", "--net: mac=bad is not a unicast MAC address, as in 52:"),
        ("--net a=user,mac=bad k", "--net: mac=bad is not a unicast MAC address, as in 52:"),
        ("--net:a=t --net-mac:a=02:00 k", "not a unicast MAC"),
        ("--block-sector-size:a=512 k", "nothing is attached with --block:a"),
        ("--block a=f,sector-size=x k", "--block: sector-size=x is not a power of two"),
        ("--block a=f --block-sector-size:a=513 k", "--block-sector-size:a: 513 is not a power of"),
        ("--block a=f,overlay=64Q k", "--block: overlay: '64Q' is not a size"),
        (
            "--block a=f,overlay=-1 k",
            "--block: overlay: '-1' is not a size: a number of MiB, or "
            "one with a unit, as in 64M; for a file of this name: ./-1",
        ),
        ("--block a=f,overlay=.5G k", "--block: overlay: '.5G' is not a size"),
        ("--block a=f,overlay=1KB k", "--block: overlay=1KB is not a size of at least 4096 bytes"),
        (
            "--net-rate fast k",
            "--net-rate: 'fast' is not a rate: bytes per second, as in 64K or",
        ),
        ("--net-rate a=0 k", "--net-rate: '0' is not a rate"),
        ("--net-rate 1M,2M k", "--net-rate: '2M': it is given twice"),
        ("--block-rate a=burst=1M k", "--block-rate: a rate limits bytes, operations or both"),
        ("--block-rate 1M,burst=5ops k", "--block-rate: a burst of operations needs a rate of op"),
        ("--net-rate 1M --clock virtual k", "a rate limit is one of the host's time"),
        ("--net user,addr6=10.0.0.2/24 k", "--net: addr6=10.0.0.2/24 is not an IPv6 address with"),
        ("--net user:[::1]:80:80 k", "--net: a forward from an IPv6 address needs an IPv6 address"),
        ("--net user:::1:80:80,addr6=fd00::2/64 k", "--net: '::1:80:80' is not HOST:GUEST"),
        ("--block a=f,sync=on k", "--block: sync=on is not none, fsync or always"),
        (
            "--block a=f,ro,sync=fsync k",
            "--block: a read-only disk is not written to: leave out sy",
        ),
        ("--block a=f,overlay,sync=always k", "--block: an overlay in memory ends with the guest"),
        ("--block a=f,ro,overlay k", "--block: a read-only disk needs no overlay"),
        ("--net a=user,mtu=1 k", "--net: mtu=1 is not a whole number from 68 to 65535"),
        ("--net a=user,gateway=x k", "--net: gateway=x is not an IPv4 address"),
        ("--net a=user,gateway=10.9.0.1 k", "another address of the network of 10.0.0.2/24"),
        ("--net a=user:80:80,tcp:80:81 k", "--net: port 80 is forwarded twice"),
        ("--net:a=t,create k", "is not an interface name .*; suboptions go with --net"),
        ("--cpu=kmv k", "--cpu: 'kmv' is not auto, kvm, native or soft"),
        ("--clock=virtual,tick=0 k", "--clock: tick=0 is not a whole number"),
        ("--clock=virtual,start=1960-01-01 k", "start=1960-01-01 is not a time between 1970"),
        ("--hugepages=yes k", "Invalid option: `--hugepages=yes'"),
        ("--nothing-of-the-kind k", "see --help$"),
        ("--men 64 k", r"\(did you mean --mem\?\)$"),
        ("--tap tap0 k", r"\(a tap is --net TAP\)$"),
        ("-p 8080:80 k", r"\(a port of the host is --net user:8080:80\)$"),
        ("--gdb=x k", "^--gdb: 'x' is not a port number, the path of a socket"),
        ("--gdb=0 k", "^--gdb: '0' is not a port number"),
        ("--gdb-port 0 k", "^--gdb-port: '0' is not a port number"),
    ],
)
def test_wrong_options(arguments: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        commandline.parse(arguments.split())
    assert "\n" not in str(raised.value)


def test_help_and_version_win() -> None:
    assert commandline.parse(["--mem=64", "--help", "--nonsense"]).help
    assert commandline.parse(["--version"]).version
    assert commandline.parse([]).config is None
    assert commandline.parse(["--"]).config is None


def test_help_fits_80_columns() -> None:
    assert max(map(len, usage.text("ptender", usage.TOOLS).splitlines())) <= 80


def test_help_under_solo5s_name_has_no_tools() -> None:
    """`inspect` and the like are names of kernels there."""
    assert "inspect" in usage.text("ptender", usage.TOOLS)
    assert "inspect" not in usage.text("solo5-hvt.2")


@given(st.lists(st.text(max_size=20), max_size=6))
def test_any_arguments_are_a_command_line_or_a_usage_error(arguments: list[str]) -> None:
    try:
        commandline.parse(arguments)
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("wish", "given"), [(1, 2), (2, 2), (3, 2), (511, 510), (512, 512), (4096, 4096)]
)
def test_memory_is_a_multiple_of_2_mib(wish: int, given: int) -> None:
    assert usable_memory(wish * MIB) == given * MIB


def test_mac() -> None:
    assert as_mac("mac", "52:54:00:aB:c:1") == b"\x52\x54\x00\xab\x0c\x01"


def test_a_mac_of_zeros_is_a_random_one() -> None:
    """As for solo5-hvt; bridges drop every frame of such an address."""
    assert Tap("t", mac="0:0:0:0:0:0") == Tap("t", mac=bytes(6)) == Tap("t")


@pytest.mark.parametrize("digit", ["+6", "-0", " 6", "6 ", "6_", "\N{ARABIC-INDIC DIGIT SIX}", ""])
def test_mac_of_hex_digits_only(digit: str) -> None:
    with pytest.raises(UsageError, match="not a unicast MAC"):
        as_mac("mac", f"52:54:00:12:34:{digit}")


# What is attached to what.

NET, BLOCK = lib.MFT_DEV_NET_BASIC, lib.MFT_DEV_BLOCK_BASIC
MANIFEST = Manifest((Device("a", NET, 1), Device("disk", BLOCK, 2), Device("b", NET, 3)))


def test_named_devices() -> None:
    assert assign(MANIFEST, NET, [("b", "tapb"), ("a", "tapa")]) == {1: "tapa", 3: "tapb"}


def test_the_only_device_of_its_kind_needs_no_name() -> None:
    assert assign(MANIFEST, BLOCK, [(None, "f")]) == {2: "f"}
    assert assign(MANIFEST, NET, [(None, "tapb"), ("a", "tapa")]) == {1: "tapa", 3: "tapb"}


@pytest.mark.parametrize(
    ("kind", "specs", "message"),
    [
        (NET, [(None, "t")], r"several network devices \(a, b\): name one, as in --net a="),
        (NET, [("a", "t"), ("a", "u")], "'a' is attached twice"),
        (NET, [("c", "t")], r"Resource not declared in manifest: 'c' \(it declares a, b\)"),
        (NET, [("disk", "t")], "Resource not declared in manifest: 'disk'"),
        (BLOCK, [(None, "f"), (None, "g")], "every block device"),
    ],
)
def test_wrong_assignments(kind: int, specs: list[tuple[str | None, str]], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        assign(MANIFEST, kind, specs)


def test_a_guest_without_devices_gets_none() -> None:
    with pytest.raises(DeviceError, match="declares no block device"):
        assign(Manifest(), BLOCK, [(None, "f")])


def test_every_device_must_be_attached() -> None:
    check_all_attached(MANIFEST, [1, 2, 3])
    with pytest.raises(
        DeviceError, match="All declared devices must be attached; missing: 'disk' of type BLOCK"
    ) as raised:
        check_all_attached(MANIFEST, [1, 3])
    assert str(raised.value).endswith(": add --block disk=FILE")
    with pytest.raises(DeviceError) as raised:
        check_all_attached(MANIFEST, [])
    assert str(raised.value).endswith(": add --net a=TAP --block disk=FILE --net b=TAP")


@pytest.mark.parametrize("wrong", ["rw", "sectorsize=4096", "ro,rw", "sector-size=512,overlap"])
def test_the_error_names_the_suboptions(tmp_path: Path, wrong: str) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    ((_, spec),) = parse(f"--block {image},{wrong} k").block
    assert isinstance(spec, BlockFile)
    with Cleanup() as cleanup, pytest.raises(DeviceError) as raised:
        block.attach(Device("disk", BLOCK, 1), spec, cleanup, Stop(), pytest.fail)
    assert str(raised.value).endswith(
        f": No such file or directory (after a comma, --block NAME={image} takes: "
        "ro, overlay[=SIZE|FILE], sector-size=N, sync=WHEN)"
    )


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("new.img", " (to make an empty one: truncate -s 1M new.img)"),
        ("new.img,overlay", ""),  # which is to read what is there
        ("nowhere/new.img", ""),
    ],
)
def test_the_error_tells_how_to_make_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ((_, spec),) = parse(f"--block {value} k").block
    assert isinstance(spec, BlockFile)
    with Cleanup() as cleanup, pytest.raises(DeviceError) as raised:
        block.attach(Device("disk", BLOCK, 1), spec, cleanup, Stop(), pytest.fail)
    assert str(raised.value).endswith(f": No such file or directory{hint}")


def test_a_path_in_solo5s_spelling_has_its_commas() -> None:
    assert parse("--block:disk=a.img,rw k").block == (("disk", BlockFile("a.img,rw")),)
    assert parse("--block:disk=a.img,ro k").block == (("disk", BlockFile("a.img,ro")),)


def test_status_follows_the_spelling() -> None:
    assert UsageError.exit_status == 2
    assert TenderError.exit_status == DeviceError.exit_status == 1
    assert commandline.has_solo5_spelling(["--mem=1", "--net:a=x", "k"])
    assert not commandline.has_solo5_spelling(["--net", "tap0", "k", "--net:a=x"])
