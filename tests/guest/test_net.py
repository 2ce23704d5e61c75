"""Guests on real taps, in network namespaces of the test's own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guest.conftest import PTENDER, Build, Namespace, Run
from tests.waiting import PATIENCE_S, wait_until_asleep

TAP_FLAGS = 0x1002  # IFF_TAP | IFF_NO_PI


@contextmanager
def running(
    namespace: Namespace, *words: object, says: str, **options: object
) -> Iterator[subprocess.Popen[str]]:
    """A guest in the namespace, ready when it has said `says`; ended by SIGTERM."""
    process = namespace.start(PTENDER, "--mem=8", *words, **options)
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if says in line:
            break
    else:
        pytest.fail(f"the guest ended: {seen}")
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def ping(namespace: Namespace, address: str, count: int = 5) -> str:
    """What ping(8) says of the last of `count` pings, or of the first that is not answered.

    One process for each: one that sends several sends the next ones, and ends, when an answer is
    late, and counts what is not answered yet as lost.
    """
    script = 'for n in $(seq "$2"); do said=$(ping -c 1 -W "$3" "$1") || break; done; echo "$said"'
    return namespace.run("sh", "-c", script, "sh", address, count, 60).stdout


def test_a_guest_answers_ping(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    for words in (["--net:service=tap0"], ["--net", "tap0"], ["--net=service=tap0"]):
        with running(namespace, *words, "--", guest("ping"), says="listening"):
            assert " 0% packet loss" in ping(namespace, "10.0.0.2")


def test_two_interfaces(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    namespace.tap("tap1", "10.1.0.1/24")
    words = ["--net:service1=tap1", "--net:service0=tap0", "--", guest("ping2")]
    with running(namespace, *words, says="10.1.0.2"):
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")
        assert " 0% packet loss" in ping(namespace, "10.1.0.2")


def test_mtu_and_mac_are_told(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0")
    namespace.ip("link set tap0 mtu 9000")
    mac = "02:00:00:00:00:07"
    done = namespace.run(PTENDER, "--net:service=tap0", f"--net-mac:service={mac}", guest("mtu"))
    assert f"mtu 9000 mac {mac}" in done.stdout
    macs = set()
    for _ in range(2):
        done = namespace.run(PTENDER, "--net", "tap0", guest("mtu"))
        found = re.search(r"mac ((?:[0-9a-f]{2}:){5}[0-9a-f]{2})", done.stdout)
        assert found
        assert int(found[1][:2], 16) & 3 == 2
        macs.add(found[1])
    assert len(macs) == 2


def test_aggregates_are_switched_off(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    with running(namespace, "--net", "tap0", guest("ping"), says="listening"):
        details = namespace.ip("-d link show tap0")
        assert "gso_max_size" in details
        shown = namespace.run("ethtool", "-k", "tap0", check=False).stdout
        if not shown:
            pytest.skip("ethtool is not installed")
        assert "generic-segmentation-offload: off" in shown
        assert "generic-receive-offload: off" in shown


def test_a_page_over_http_and_an_echo(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    with running(namespace, "--net", "tap0", guest("web"), says="listening"):
        for _ in range(3):
            page = namespace.run("curl", "-sS", "-m", "100", "http://10.0.0.2/").stdout
            assert "<title>" in page
        missing = namespace.run("curl", "-sS", "-m", "100", "-i", "http://10.0.0.2/nosuch").stdout
        assert " 404 " in missing.splitlines()[0]
        echo = (
            "import socket; s=socket.socket(type=socket.SOCK_DGRAM); s.settimeout(100);"
            "s.sendto(b'hello?', ('10.0.0.2', 7)); print(s.recv(100).decode())"
        )
        assert namespace.run("python3", "-c", echo).stdout == "hello?\n"


# Taps that are made.


def taps(namespace: Namespace) -> str:
    return namespace.ip("-br link show type tun")


def test_a_made_tap_is_gone_with_the_guest(namespace: Namespace, guest: Build) -> None:
    spec = "service=vm0,create,addr=10.0.0.1/24,addr=fd00::1/64,mtu=1400"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with running(namespace, "--net", spec, guest("ping"), says="listening") as process:
            assert "10.0.0.1/24" in namespace.ip("addr show vm0")
            assert "fd00::1/64" in namespace.ip("addr show vm0")
            assert "mtu 1400" in namespace.ip("link show vm0")
            assert " 0% packet loss" in ping(namespace, "10.0.0.2")
            process.send_signal(number)
            process.wait(timeout=PATIENCE_S)
            assert taps(namespace) == ""
    done = namespace.run(PTENDER, "--net", spec, guest("mtu"))
    assert "mtu 1400" in done.stdout
    assert taps(namespace) == ""


def test_a_made_tap_goes_on_a_bridge(namespace: Namespace, guest: Build) -> None:
    namespace.ip("link add br0 type bridge")
    namespace.ip("addr add 10.0.0.1/24 dev br0")
    namespace.ip("link set br0 up")
    spec = "service=vm0,create,bridge=br0"
    with running(namespace, "--net", spec, guest("ping"), says="listening"):
        assert "master br0" in namespace.ip("link show vm0")
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")
    assert taps(namespace) == ""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("there0,create", "it exists already; leave out 'create'"),
        ("vm0,create,bridge=nosuch0", "there is no bridge 'nosuch0'"),
        ("vm0,create,bridge=there0", "there is no bridge 'there0'"),
        ("vm0,create,mtu=65535", "mtu=65535"),
        ("vm0,create,addr=10.0.0.1/24,addr=10.0.0.1/24", "addr=10.0.0.1/24"),
        ("vm0", "no such interface; add ',create'"),
        ("down0", "it is down; bring it up: ip link set down0 up"),
        ("lo", "not a tap interface"),
    ],
)
def test_a_tap_that_cannot_be_had(
    namespace: Namespace, guest: Build, spec: str, message: str
) -> None:
    namespace.tap("there0")
    namespace.ip("tuntap add down0 mode tap")
    before = taps(namespace)
    done = namespace.run(PTENDER, "--net", spec, guest("ping"), check=False)
    assert done.returncode == 1, done
    assert "Could not attach interface" in done.stderr
    assert message in done.stderr
    assert re.fullmatch(r"ptender: [^\n]+\n", done.stderr), done
    assert taps(namespace) == before


def test_a_tap_has_one_user(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    with running(namespace, "--net", "tap0", guest("ping"), says="listening"):
        done = namespace.run(PTENDER, "--net", "tap0", guest("ping"), check=False)
    assert done.returncode == 1
    assert "in use already" in done.stderr


def test_a_failure_after_a_tap_was_made_removes_it(namespace: Namespace, guest: Build) -> None:
    words = ["--net", "service0=vm0,create", "--net", "service1=nosuch0", guest("ping2")]
    done = namespace.run(PTENDER, *words, check=False)
    assert done.returncode == 1
    assert "'nosuch0'" in done.stderr
    assert taps(namespace) == ""


def test_a_tap_that_exists_needs_no_pyroute2(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0")
    code = (
        "import os, sys; from tender.cli.main import main; "
        f"status = main(['ptender', '--net', 'tap0', '{guest('mtu')}']); "
        "os._exit(status or 'pyroute2' in sys.modules)"
    )
    done = namespace.run(PTENDER.with_name("python"), "-c", code, check=False)
    assert done.returncode == 0, done


# Taps that go down.


def test_a_tap_that_goes_down_does_not_end_the_guest(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    with running(namespace, "--net", "tap0", "--", guest("ping"), says="listening") as process:
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")
        namespace.ip("link set tap0 down")
        wait_until_asleep(process.pid)
        namespace.ip("link set tap0 up")
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")


def test_a_tap_that_is_deleted_does_not_end_the_guest(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    with running(namespace, "--net", "tap0", "--", guest("ping"), says="listening") as process:
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")
        namespace.ip("link delete tap0")
        assert process.stdout
        assert any("disconnected; the guest goes on" in line for line in process.stdout)
        wait_until_asleep(process.pid)
        process.terminate()
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert "disconnected" not in output


# Descriptors.


def open_tap(namespace: Namespace, name: str) -> int:
    """A descriptor of a tap in the namespace, opened by this process."""
    import fcntl
    import struct

    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(namespace.enter[1].partition("=")[2], os.O_RDONLY)
    try:
        _setns(there)
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    finally:
        _setns(here)
        os.close(here)
        os.close(there)
    return fd


def _setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, 0):
        raise OSError(ctypes.get_errno(), "setns")


def test_an_open_tap(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    namespace.ip("link set tap0 mtu 1400")
    fd = open_tap(namespace, "tap0")
    words = [f"--net:service=@{fd}", "--", guest("ping")]
    with running(namespace, *words, says="mtu 1400", pass_fds=[fd]):
        assert " 0% packet loss" in ping(namespace, "10.0.0.2")
    os.close(fd)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_an_open_socket(ptender: Run, guest: Build, kind: socket.SocketKind) -> None:
    """No root, no tap: an ARP request goes in and the reply comes out."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    mac = bytes.fromhex("020000000007")
    request = bytes.fromhex(
        "ffffffffffff 020000000001 0806 0001 0800 06 04 0001"
        "020000000001 0a000001 000000000000 0a000002"
    ).ljust(60, b"\0")
    ours.settimeout(60)
    words = [f"--net:service=@{theirs.fileno()}", f"--net-mac:service={mac.hex(':')}"]
    command = [str(PTENDER), "--mem=8", *words, "--", str(guest("ping"))]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
    ) as process:
        ours.recv(2000)  # it announces itself
        ours.send(request)
        reply = ours.recv(2000)
        process.terminate()
    assert reply[:14] == bytes.fromhex("020000000001") + mac + b"\x08\x06"
    assert reply[20:22] == b"\0\2"
    ours.close()
    theirs.close()
