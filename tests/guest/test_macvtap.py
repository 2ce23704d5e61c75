"""Guests on macvtap links, by name and as a descriptor."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import PTENDER, Build, Namespace, open_namespace
from tests.guest.test_net import ping, running
from tests.needs import needs

LINK_MAC = "02:00:00:00:00:42"


class Macvtap:
    """A link `mv0` on one end of a veth pair, whose other end has the host's address."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        # The device is named after the index, which two namespaces can both have given.
        self.index = 1000 + secrets.randbelow(1 << 30)
        self.path = f"/dev/tap{self.index}"
        namespace.ip("link add v0 type veth peer name v1")
        namespace.ip(
            f"link add link v0 name mv0 index {self.index} address {LINK_MAC} mtu 1400 "
            "type macvtap mode bridge"
        )
        namespace.ip("addr add 10.0.0.1/24 dev v1")
        for link in ("v0", "v1", "mv0"):
            namespace.ip(f"link set {link} up")


@pytest.fixture
def macvtap(any_cpu: str) -> Iterator[Macvtap]:
    for namespace in open_namespace():
        kind = "ip link add v0 type veth peer name v1 && ip link add link v0 type macvtap"
        needs("unshare", "--net", "sh", "-c", kind)
        value = Macvtap(namespace)
        if not os.path.exists(value.path):
            pytest.skip("no devtmpfs at /dev: a macvtap link has no /dev/tapN")
        yield value


def test_by_name(macvtap: Macvtap, guest: Build) -> None:
    words = ["--net=mv0", "--", guest("ping")]
    with running(macvtap.namespace, *words, says=f"mac {LINK_MAC}, mtu 1400"):
        assert " 0% packet loss" in ping(macvtap.namespace, "10.0.0.2")


def test_one_guest_has_it(macvtap: Macvtap, guest: Build) -> None:
    """The kernel would give each of two a part of the frames."""
    with running(macvtap.namespace, "--net=mv0", guest("ping"), says=f"mac {LINK_MAC}"):
        words = [PTENDER, "--mem=8", "--net=mv0", guest("ping"), "another"]
        done = macvtap.namespace.run(*words, check=False)
        assert "Could not attach interface 'mv0': it is in use by process " in done.stderr
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert " 0% packet loss" in ping(macvtap.namespace, "10.0.0.2")


def test_as_a_descriptor(macvtap: Macvtap, guest: Build) -> None:
    fd = os.open(macvtap.path, os.O_RDWR)
    words = [f"--net=@{fd},mac={LINK_MAC}", "--", guest("ping")]
    with running(macvtap.namespace, *words, says=f"mac {LINK_MAC}, mtu 1400", pass_fds=[fd]):
        assert " 0% packet loss" in ping(macvtap.namespace, "10.0.0.2")
    os.close(fd)


def test_large_segments_are_cut_and_checksums_filled_in(
    macvtap: Macvtap, guest: Build, tmp_path: Path
) -> None:
    """A TCP connection from a stack that leaves both to its interface, which is none here."""
    with running(macvtap.namespace, "--net=mv0", guest("web"), says="listening"):
        page = macvtap.namespace.run("curl", "-s", "--max-time", "60", "http://10.0.0.2/").stdout
        assert "Hello from a unikernel" in page


@pytest.mark.parametrize(
    ("before", "word", "message"),
    [
        ("", "mv0,mac=02:00:00:00:00:43",
         rf"a macvtap has the MAC address of its link, {LINK_MAC}: leave out mac=, or ip link set "
         "mv0 address 02:00:00:00:00:43"),
        ("link set mv0 down", "mv0", "it is down; bring it up: ip link set mv0 up"),
        ("link add link v0 name ml0 index {index}1 type macvlan", "ml0",
         r"it is down; bring it up: ip link set ml0 up"),
        ("link add link v0 name ml1 index {index}1 up type macvlan", "ml1",
         r"there is no /dev/tap\d+: a macvtap link has it, not a macvlan"),
    ],
)  # fmt: skip
def test_links_that_cannot_be_attached(
    macvtap: Macvtap, guest: Build, before: str, word: str, message: str
) -> None:
    if before:
        macvtap.namespace.ip(before.format(index=macvtap.index % 100_000_000))
    done = macvtap.namespace.run(PTENDER, "--mem=8", f"--net={word}", guest("ping"), check=False)
    name = word.partition(",")[0]
    where = f"ptender: network device 'service': Could not attach interface '{name}'"
    assert re.fullmatch(f"{where}: {message}\n", done.stderr), done.stderr
    assert done.returncode == 1
