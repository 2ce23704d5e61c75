"""What guests are told, and a parser of rumprun's configuration as its source has it."""

from __future__ import annotations

import re

import pytest

from tender.errors import ConfigError
from tender.oci.annotations import Unikernel
from tender.oci.conventions import guest_args
from tender.oci.network import Network

NETWORK = Network("@3", "10.0.0.2/24", "10.0.0.1")


def unikernel(guest: str) -> Unikernel:
    return Unikernel(guest, "hvt", "/kernel", (), {}, (), None)


@pytest.mark.parametrize(
    ("guest", "network", "told"),
    [
        ("mirage", NETWORK, ("--ipv4=10.0.0.2/24", "--ipv4-gateway=10.0.0.1", "a b")),
        ("mirage", Network("@3", "10.0.0.2/24", ""), ("--ipv4=10.0.0.2/24", "a b")),
        ("ptender", NETWORK, ("--ipv4=10.0.0.2/24", "a b")),
        ("none", NETWORK, ("a b",)),
        ("mirage", None, ("a b",)),
        ("mirage", Network("@3", "", ""), ("a b",)),
    ],
)
def test_an_address(guest: str, network: Network | None, told: tuple[str, ...]) -> None:
    assert guest_args(unikernel(guest), ("a b",), ("A=b",), network, False) == told


def parsed(config: str) -> list[tuple[str, object]]:
    """As jsmn and config.c take it: each key in order, backslashes left in the texts."""
    text = r'"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*)"'
    pairs = re.findall(rf"{text}:(?:{text}|{{([^}}]*)}})", config)
    assert (
        "{"
        + ",".join(
            f'"{key}":' + (f"{{{inside}}}" if inside else f'"{value}"')
            for key, value, inside in pairs
        )
        + "}"
        == config
    )
    return [
        (key, dict(re.findall(rf"{text}:{text}", inside)) if inside else value)
        for key, value, inside in pairs
    ]


def words(cmdline: str) -> list[str]:
    """As rumprun_parseargs() splits `cmdline`."""
    found: list[str] = []
    quote = ""
    inside = False
    letters = iter(cmdline)
    for letter in letters:
        plain = letter
        if letter == "\\":
            plain = next(letters)
        elif letter in " \n\t" and not quote:
            inside = False
            continue
        if not inside:
            found.append("")
            inside = True
        if letter == quote:
            quote = ""
        elif letter in "'\"":
            quote = letter
        else:
            found[-1] += plain
    return found


def rumprun(
    args: tuple[str, ...],
    env: tuple[str, ...] = (),
    network: Network | None = None,
    has_disk: bool = False,
) -> list[tuple[str, object]]:
    (config,) = guest_args(unikernel("rumprun"), args, env, network, has_disk)
    return parsed(config)


def test_the_configuration_of_rumprun() -> None:
    env = ("PATH=/bin", "NAME=h\u00e9")
    assert rumprun(("redis", "/data/redis.conf"), env, NETWORK, True) == [
        ("cmdline", "redis /data/redis.conf"),
        ("env", "PATH=/bin"),
        ("env", "NAME=h\u00e9"),
        (
            "net",
            {
                "if": "ukvmif0",
                "cloner": "True",
                "type": "inet",
                "method": "static",
                "addr": "10.0.0.2",
                "mask": "24",
                "gw": "10.0.0.1",
            },
        ),
        (
            "blk",
            {"source": "etfs", "path": "/dev/ld0a", "fstype": "blk", "mountpoint": "/data"},
        ),
    ]


def test_a_gateway_of_rumprun() -> None:
    """An empty one would be taken for an address; one outside of the network widens that."""
    (_, none) = rumprun((), network=Network("@3", "10.0.0.2/24", ""))
    assert isinstance(none[1], dict)
    assert "gw" not in none[1]
    (_, outside) = rumprun((), network=Network("@3", "10.0.0.2/32", "169.254.1.1"))
    assert isinstance(outside[1], dict)
    assert (outside[1]["mask"], outside[1]["gw"]) == ("1", "169.254.1.1")


@pytest.mark.parametrize(
    "args", [("a", "b c", ""), ('say "hi"', '"'), ("back\\slash", "\\"), ("h\u00e9",), ()]
)
def test_arguments_reach_rumprun_as_they_are(args: tuple[str, ...]) -> None:
    ((key, cmdline),) = rumprun(args)
    assert key == "cmdline"
    assert words(str(cmdline)) == list(args)


def test_what_rumprun_can_not_be_given() -> None:
    for args, env in (
        (("it's",), ()),
        (("two\nlines",), ()),
        ((), ('A="b"',)),
        ((), ("A=b\\c",)),
        ((), ("A=b\tc",)),
    ):
        with pytest.raises(ConfigError, match="rumprun takes no"):
            rumprun(args, env)
