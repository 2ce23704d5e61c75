"""Guests on the network of an ordinary user: passt, as installed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tender import Guest, UserNet
from tender.errors import DeviceError
from tender.host import passt
from tests.descriptors import open_descriptors
from tests.guest.conftest import PTENDER, Build, Namespace, Run, open_namespace
from tests.guest.ordinary import ordinary
from tests.needs import needs
from tests.waiting import PATIENCE_S, command_lines, state_of, wait_until

pytestmark = pytest.mark.usefixtures("cpu")

WHERE = "network device 'service'"
GUEST_MAC = bytes.fromhex("020000000009")


@pytest.fixture(autouse=True, scope="module")
def needs_passt() -> None:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed: apt install passt")
    needs("unshare", "--user")  # passt does
    try:
        passt.wait_for_end(passt.start(UserNet(), WHERE).device.fd)
    except DeviceError as error:
        if "default route" in str(error):
            pytest.skip("this machine has no default route, which passt needs")
        raise


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """One that no connection of another test takes: Linux gives those ports from 32768 on."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def page(port: int, address: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{address}:{port}/", timeout=PATIENCE_S) as answer:
        text: str = answer.read().decode()
        return text


def echo(port: int, data: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(1)
        for _ in range(PATIENCE_S):
            asker.sendto(data, ("127.0.0.1", port))
            try:
                return asker.recv(2000)
            except TimeoutError:
                continue
    raise AssertionError("no echo")


def passts(port: int) -> list[int]:
    """Those that run and have this port."""
    return [pid for pid, line in command_lines() if re.search(rf"passt.*/{port}:", line)]


def wait_until_gone(port: int, pids: Sequence[int] = ()) -> None:
    """Return once these processes have ended, and no other passt has this port.

    A process that ends loses its command line before its sockets.
    """
    wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in pids) and not passts(port))


@contextmanager
def command(*words: object, says: str = "listening") -> Iterator[subprocess.Popen[str]]:
    """A guest of the command, ready when it has said `says`; killed at the end."""
    with subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        seen = ""
        for line in process.stdout:
            seen += line
            if says in line:
                break
        else:
            pytest.fail(f"the guest ended: {seen}{process.stderr.read()}")
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_page_and_an_echo(guest: Build, engine: str) -> None:
    port, udp = free_port(), free_port(socket.SOCK_DGRAM)
    net = f"service=user:{port}:80,udp:{udp}:7"
    words = ["--engine", engine, "--mem=8", "--net", net, guest("web"), "--limit=3"]
    with command(PTENDER, *words) as process:
        for number in (1, 2):
            assert f"this is request {number}." in page(port)
        for size in (1, 500, 1400):
            assert echo(udp, bytes(size)) == bytes(size)
        page(port)
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout
        assert "answered 3 requests" in process.stdout.read()
    wait_until_gone(port)


def test_as_an_ordinary_user_without_kvm(guest: Build) -> None:
    """The second example of README.md."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="ptender-"))
    try:
        folder.chmod(0o755)
        kernel = Path(shutil.copy(guest("web"), folder))
        kernel.chmod(0o644)
        words = [PTENDER, "--cpu=soft", "--mem=8", "--net", f"service=user:{port}:80", kernel]
        with command(*ordinary(folder / "root", words)) as process:
            assert "Hello from a unikernel" in page(port)
            assert passts(port)
            process.terminate()
            assert process.wait(PATIENCE_S) == 1
            assert process.stderr
            assert process.stderr.read() == "ptender: Exiting on signal 15\n"
        wait_until_gone(port)
        low = [PTENDER, "--cpu=soft", "--mem=8", "--net", "service=user:81:80", kernel]
        done = subprocess.run(ordinary(folder / "root", low), capture_output=True, text=True)
        assert done.returncode == 1
        assert "TCP port 81 of 127.0.0.1: Permission denied: ports below 1024 are" in done.stderr
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL])
def test_passt_ends_with_the_guest(guest: Build, signo: int) -> None:
    port = free_port()
    with command(PTENDER, "--mem=8", "--net", f"user:{port}:80", guest("web")) as process:
        pids = passts(port)
        assert len(pids) == 1
        process.send_signal(signo)
        process.wait(PATIENCE_S)
        wait_until_gone(port, pids)
    # The port can be had again at once.
    with command(PTENDER, "--mem=8", "--net", f"user:{port}:80", guest("web")):
        assert "Hello" in page(port)


def test_the_guest_goes_on_without_passt(guest: Build) -> None:
    port = free_port()
    with command(PTENDER, "--mem=8", "--net", f"user:{port}:80", guest("web")) as process:
        (pid,) = passts(port)
        os.kill(pid, signal.SIGKILL)
        assert process.stderr
        assert "disconnected; the guest goes on" in process.stderr.readline()
        assert process.poll() is None
        process.terminate()
        assert process.wait(PATIENCE_S) == 1


def test_two_guests_of_a_program(guest: Build) -> None:
    Guest(guest("exit"), mem_mib=8).run()  # what the first guest of a program leaves stays
    ports = [free_port(), free_port()]
    descriptors = open_descriptors()
    guests = [
        Guest(guest("web"), mem_mib=8, net={"service": UserNet(forward={port: 80})}).start()
        for port in ports
    ]
    for running, port in zip(guests, ports, strict=True):
        running.console.wait_for("listening", PATIENCE_S)
        assert "this is request 1." in page(port)
    for running, port in zip(guests, ports, strict=True):
        assert running.stop().reason == "stopped"
        assert not passts(port)
    assert open_descriptors() <= descriptors


def test_passt_ends_with_a_guest_or_a_program_that_is_killed(guest: Build) -> None:
    port = free_port()
    with Guest(guest("web"), mem_mib=8, net={"service": UserNet({port: 80})}) as running:
        running.console.wait_for("listening", PATIENCE_S)
        assert running.pid
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait(PATIENCE_S).reason == "killed"
        assert not passts(port)
    code = f"""
from tender import Guest, UserNet
net = {{"service": UserNet({{{port}: 80}})}}
Guest({str(guest("web"))!r}, mem_mib=8, net=net, console=1).start().wait()
"""
    with command(sys.executable, "-c", code) as program:
        assert len(passts(port)) == 1
        program.kill()
        program.wait(PATIENCE_S)
        wait_until_gone(port)


def test_another_address_of_both_sides(guest: Build) -> None:
    port = free_port()
    net = UserNet(
        {f"0.0.0.0:{port}": 80}, address="192.168.9.7/28", gateway="192.168.9.1", mtu=1280
    )
    with Guest(guest("web"), "--ipv4=192.168.9.7/28", mem_mib=8, net={"service": net}) as running:
        running.console.wait_for("listening on 192.168.9.7/28, mac .*, mtu 1280", PATIENCE_S)
        assert "request 1." in page(port, "127.0.0.2")


def test_a_free_port_is_found_and_reported(guest: Build) -> None:
    net = "service=user:0:80,0.0.0.0:0:81,udp:0:7,addr=10.0.2.15/24"
    words = ["--mem=8", "--net", net, guest("web"), "--ipv4=10.0.2.15/24"]
    with command(PTENDER, *words) as process:
        assert process.stderr
        ports = [int(process.stderr.readline().split()[-3].rpartition(":")[2]) for _ in range(3)]
        assert "request 1." in page(ports[0])
        assert echo(ports[2], b"hello") == b"hello"
        process.terminate()
        rest = process.stderr.read()
    assert rest == "ptender: Exiting on signal 15\n"
    user_net = UserNet({0: 80}, {0: 7})
    with Guest(guest("web"), mem_mib=8, net={"service": user_net}) as running:
        assert running.ports.keys() == {80, "udp:7"}
        running.console.wait_for("listening", PATIENCE_S)
        assert "request 1." in page(running.ports[80])
        assert echo(running.ports["udp:7"], b"hello") == b"hello"


def test_the_lines_about_free_ports() -> None:
    asked = UserNet({0: 80, 8080: 81, "0.0.0.0:0": 82}, {0: 7}, address="10.0.2.15/24")
    started = passt.start(asked, WHERE)
    passt.wait_for_end(started.device.fd)
    tcp, _, other, udp = started.ports.values()
    assert started.chosen == (
        f"127.0.0.1:{tcp} -> 80",
        f"0.0.0.0:{other} -> 82",
        f"udp:127.0.0.1:{udp} -> 7",
    )
    assert started.ports[81] == 8080


def test_a_free_port_that_is_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], taken.getsockname()[1], free_port()]
        monkeypatch.setattr(passt, "_free_port", lambda *_: ports.pop(0))
        started = passt.start(UserNet({0: 80}), WHERE)
        passt.wait_for_end(started.device.fd)
        assert not ports
        ports = [taken.getsockname()[1]] * 100
        with pytest.raises(DeviceError, match="already in use"):
            passt.start(UserNet({0: 80}), WHERE)


def test_what_bad_words_get(ptender: Run, guest: Build) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        port, udp_port = taken.getsockname()[1], udp.getsockname()[1]
        for words, message in [
            (f"user:{port}:80", f"TCP port {port} of 127.0.0.1: Address already in use"),
            (f"user:udp:{udp_port}:7", f"UDP port {udp_port} of 127.0.0.1: Address already in use"),
            ("user:192.0.2.77:8080:80", "TCP port 8080 of 192.0.2.77: Cannot assign"),
            ("user:x", "'x' is not HOST:GUEST"),
            ("user:80", "'80' is not HOST:GUEST"),
            ("user:0:80,0:81", "port 0 is forwarded twice (of free ports, one for each address)"),
            ("user:80:0", "'80:0' is not HOST:GUEST"),
            ("user,addr=10.0.0.2/32", "addr=10.0.0.2/32 is not an address of a network with room"),
            (
                "user:[::1]:8080:80",
                "a forward from an IPv6 address needs an IPv6 address of the guest",
            ),
            ("user:80:65536", "'80:65536' is not HOST:GUEST"),
            ("user::80:80", "':80:80' is not HOST:GUEST"),
            ("user:8080:80,8080:81", "port 8080 is forwarded twice"),
            ("user,create", "'create' is not HOST:GUEST"),
            ("user,addr=10.0.0.2", "--net: addr=10.0.0.2 is not an address with its prefix length"),
            ("user,gateway=10.9.0.1", "gateway=10.9.0.1 is not another address of the network"),
            ("user,gateway=x", "gateway=x is not an IPv4 address"),
            ("user,mtu=1", "mtu=1 is not"),
            ("user,mac=01:00:00:00:00:00", "is not a unicast MAC"),
        ]:
            done = ptender("--mem=8", "--net", words, guest("web"))
            assert done.returncode in (1, 2)
            assert re.fullmatch(f"ptender: .*{re.escape(message)}.*\n", done.stderr), done


def test_a_passt_that_failed_is_told_where_nobody_has_its_status() -> None:
    """The kernel keeps no status for a program that ignores SIGCHLD."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(DeviceError, match=f"{WHERE}: TCP port {port} .* already in use"):
                passt.start(UserNet(forward={port: 80}), WHERE)
        started = passt.start(UserNet(forward={free_port(): 80}), WHERE)
        passt.wait_for_end(started.device.fd)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_port_that_is_taken_beside_a_dump_core(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    """The core-file helper is a child as well: the end of passt must be told from its."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--mem=8", f"--dumpcore={tmp_path}", "--net", f"user:{port}:80"]
        done = ptender(*words, guest("web"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"TCP port {port} of 127.0.0.1: Address already in use\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_passt_starts(guest: Build, tmp_path: Path) -> None:
    script = tmp_path / "passt"  # the whole group of the tender's gets it, as from a terminal
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, sys\n"
        "os.killpg(os.getppid(), 2)\n"
        f"os.execv({shutil.which('passt')!r}, sys.argv)\n"
    )
    script.chmod(0o755)
    port = free_port()
    done = subprocess.run(
        [PTENDER, "--mem=8", "--net", f"user:{port}:80", guest("web")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "ptender: Exiting on signal 2\n")
    wait_until_gone(port)


def test_without_passt(ptender: Run, guest: Build, tmp_path: Path) -> None:
    done = ptender("--mem=8", "--net", "user", guest("web"), env={**os.environ, "PATH": "/none"})
    assert done.returncode == 1
    assert done.stderr == f"ptender: {WHERE}: passt is not installed: apt install passt\n"
    (tmp_path / "passt").write_text("#!/bin/sh\necho first >&2; echo second >&2; exit 3\n")
    (tmp_path / "passt").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = ptender("--mem=8", "--net", "user", guest("web"), env={**os.environ, "PATH": path})
    assert done.stderr == f"ptender: {WHERE}: passt: second\n"
    done = subprocess.run(
        ["unshare", "--net", PTENDER, "--mem=8", "--net", "user", guest("web")],
        capture_output=True,
        text=True,
    )
    if "unshare failed" not in done.stderr:
        assert re.fullmatch("ptender: .*it needs an interface with a default route\n", done.stderr)


# The network itself, with a test in the place of the guest.


class Link:
    """The guest's end of a UserNet."""

    def __init__(self, net: UserNet) -> None:
        self.end = socket.socket(fileno=passt.start(net, WHERE).device.fd)
        self.end.settimeout(PATIENCE_S)

    def send(self, frame: bytes) -> None:
        self.end.send(frame)

    def send_ip(self, payload: bytes, protocol: int, source: str, target: str) -> None:
        gateway = bytes.fromhex("52550a000001")
        self.send(gateway + GUEST_MAC + b"\x08\x00" + ipv4(payload, protocol, source, target))

    def receive(self) -> bytes:
        return self.end.recv(1 << 17)

    def settle(self) -> None:
        """Return when passt has handled what was sent before: it takes ARP and the rest apart, so
        the second answer is after that."""
        ask = b"\xff" * 6 + GUEST_MAC + bytes.fromhex("08060001080006040001") + GUEST_MAC
        ask += socket.inet_aton("10.0.0.2") + bytes(6) + socket.inet_aton("10.0.0.1")
        for _ in range(2):
            self.send(ask)
            while self.receive()[12:14] != b"\x08\x06":
                pass


def ipv4(payload: bytes, protocol: int, source: str, target: str) -> bytes:
    head = b"\x45\0" + (20 + len(payload)).to_bytes(2, "big") + b"\0\1\0\0\x40"
    head += bytes([protocol, 0, 0]) + socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(int.from_bytes(head[at : at + 2], "big") for at in range(0, 20, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + (total ^ 0xFFFF).to_bytes(2, "big") + head[12:] + payload


def udp(data: bytes, source: int, target: int) -> bytes:
    words = [source, target, 8 + len(data), 0]
    return b"".join(word.to_bytes(2, "big") for word in words) + data


def test_dhcp_tells_what_was_asked_for() -> None:
    link = Link(UserNet(address="10.7.0.9/16", gateway="10.7.0.1", mtu=1400))
    ask = bytes([1, 1, 6, 0]) + b"abcd" + bytes(20) + GUEST_MAC + bytes(10 + 192)
    ask += bytes.fromhex("63825363") + bytes([53, 1, 1, 55, 3, 1, 3, 26, 255])
    link.send_ip(udp(ask, 68, 67), 17, "0.0.0.0", "255.255.255.255")
    offer = link.receive()
    link.end.close()
    assert socket.inet_ntoa(offer[58:62]) == "10.7.0.9"  # yiaddr
    assert bytes([1, 4, 255, 255, 0, 0]) in offer  # the netmask
    assert bytes([3, 4, 10, 7, 0, 1]) in offer  # the router
    assert bytes([26, 2]) + (1400).to_bytes(2, "big") in offer
    assert offer[6:12] == bytes.fromhex("52550a070001")  # no address of the host's own


class Service:
    """Of TCP and UDP, on one port of all addresses of the host, the loopback's among them."""

    def __init__(self) -> None:
        self.tcp = socket.create_server(("", 0), backlog=256)
        self.port: int = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("", self.port))
        for each in (self.tcp, self.udp):
            each.setblocking(False)

    def reached_by(self) -> list[str]:
        """By what it has been reached: protocols."""
        found = []
        for name, take in (("TCP", lambda: self.tcp.accept()), ("UDP", lambda: self.udp.recv(99))):
            try:
                take()
                found.append(name)
            except BlockingIOError:
                pass
        return found


@pytest.fixture
def service() -> Iterator[Service]:
    value = Service()
    yield value
    value.tcp.close()
    value.udp.close()


def reach(link: Link, source: str, target: str, port: int, source_port: int = 4000) -> None:
    """Send a datagram and ask for a connection."""
    link.send_ip(udp(b"to the host", source_port, port), 17, source, target)
    ask = b"".join(word.to_bytes(2, "big") for word in (source_port, port, 0, 1, 0, 0))
    link.send_ip(ask + bytes.fromhex("5002ffff00000000"), 6, source, target)
    link.settle()


NETS = [UserNet(), UserNet(forward_udp={0: 7})]
LOOPBACK = ["127.0.0.1", "127.0.0.2", "127.1.2.3", "127.255.255.254", "0.0.0.0", "0.0.0.1"]


@pytest.mark.parametrize("net", NETS, ids=["alone", "with a UDP port"])
def test_no_address_of_the_hosts_loopback_is_reached(net: UserNet, service: Service) -> None:
    link = Link(net)
    number = 4000
    with link.end:
        for target in [*LOOPBACK, "10.0.0.1"]:
            for source in ["10.0.0.2", "10.0.0.77", "127.0.0.1", "0.0.0.0", target]:
                number += 1
                reach(link, source, target, service.port, number)
                assert service.reached_by() == [], (source, target)


def test_with_reach_host_the_gateway_is_the_hosts_loopback(service: Service) -> None:
    link = Link(UserNet(reach_host=True))
    with link.end:
        reach(link, "10.0.0.2", "10.0.0.1", service.port)
        assert service.reached_by() == ["TCP", "UDP"]
        for target in LOOPBACK:
            reach(link, "10.0.0.2", target, service.port)
            assert service.reached_by() == []


def test_a_resolver_of_the_hosts_own_is_not_the_guests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, upstream = tmp_path / "local", tmp_path / "upstream"
    upstream.write_text("# of systemd-resolved\nnameserver 192.0.2.53\nnameserver fd00::1\n")
    monkeypatch.setattr(passt, "RESOLV_CONF", (str(local), str(upstream)))
    for text, spec, words in [
        ("nameserver 127.0.0.53\noptions edns0\n", UserNet(), ["--dns", "192.0.2.53"]),
        ("nameserver 192.0.2.1\n", UserNet(), []),
        ("nameserver\nnameserver x\n", UserNet(), ["--dns", "192.0.2.53"]),
        ("nameserver 127.0.0.53\n", UserNet(reach_host=True), []),
    ]:
        local.write_text(text)
        assert passt._resolvers(spec) == words
    upstream.unlink()
    assert passt._resolvers(UserNet()) == []


def test_arguments_of_passt() -> None:
    net: Any = UserNet({8080: 80, "10.1.1.1:8081": 81}, {"0.0.0.0:53": 53})
    words = passt.arguments(net)
    assert "127.0.0.1/8080:80" in words
    assert "10.1.1.1/8081:81" in words
    assert words[-2:] == ["-u", "0.0.0.0/53:53"]


@pytest.fixture
def six(any_cpu: str) -> Iterator[Namespace]:
    """A network namespace whose way out has IPv6."""
    for namespace in open_namespace():
        if not os.path.exists("/proc/net/if_inet6"):
            pytest.skip("this kernel has no IPv6")
        namespace.run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")
        namespace.ip("link add out0 type veth peer name out1")
        namespace.ip("addr add 192.0.2.2/24 dev out0")
        namespace.ip("addr add 2001:db8::2/64 dev out0 nodad")
        for link in ("out0", "out1"):
            namespace.ip(f"link set {link} up")
        namespace.ip("route add default via 192.0.2.1")
        yield namespace


def test_ipv6(six: Namespace) -> None:
    """Router, addresses and ports; and nothing of the host's loopback and link."""
    play = [sys.executable, "-m", "tests.guest.usernet6", "out0", "2001:db8::2"]
    without = six.run(*play, check=False)
    assert without.returncode == 1
    assert "IPv6 needs an interface with a default route for it" in without.stderr
    six.ip("-6 route add default via 2001:db8::1")
    done = six.run(*play, check=False)
    assert done.stdout.splitlines() == [
        "router fe80::1, prefix fd00:7::",
        "connected to the host's address",
        "and to no other",
        "a connection from the host's loopback",
        "a datagram from there, and its answer",
    ], done
