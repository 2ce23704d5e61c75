"""The network ring with real guests: traffic, and guests that misuse it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.guest.conftest import PTENDER, Build, Namespace, Run
from tests.guest.test_net import ping, running
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def on_kvm(cpu: str) -> None:
    if cpu != "kvm":
        pytest.skip("only KVM offers a ring")


@pytest.fixture
def port() -> Iterator[int]:
    """A descriptor to attach; frames that arrive at its other end are nobody's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield theirs.fileno()
    ours.close()
    theirs.close()


def with_ring(ptender: Run, port: int, *words: object) -> subprocess.CompletedProcess[str]:
    return ptender("--mem=8", "--net-ring", f"--net=@{port}", *words, pass_fds=[port])


def test_traffic_over_the_ring(namespace: Namespace, guest: Build) -> None:
    namespace.tap("tap0", "10.0.0.1/24")
    words = ["--net-ring", "-v", "--net", "tap0", guest("ping")]
    with running(namespace, *words, says="listening") as process:
        assert " 0% packet loss" in ping(namespace, "10.0.0.2", count=200)
        process.terminate()
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert "net:service:sent: 20" in output  # 200 replies, ARP, the announcement


def test_the_ring_comes_out_of_the_memory(ptender: Run, guest: Build, port: int) -> None:
    assert "ABI 2, 6 MiB" in with_ring(ptender, port, guest("mtu")).stdout
    done = ptender("--mem=8", "--no-net-ring", f"--net=@{port}", guest("mtu"), pass_fds=[port])
    assert "ABI 2, 8 MiB" in done.stdout
    # Without a network device there is nothing to offer, and a small guest can't give it up.
    assert "ABI 2, 8 MiB" in ptender("--mem=8", "--net-ring", guest("exit")).stdout
    done = ptender("--mem=2", "--net-ring", f"--net=@{port}", guest("mtu"), pass_fds=[port])
    assert "ABI 2, 2 MiB" in done.stdout


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("index", "Invalid guest access: ring index 1025 entries ahead"),
        ("address", "Invalid guest access: ring gpa=0x5fffc5, len=0x3c"),
        ("wrap", "Invalid guest access: ring gpa=0xfffffffffffffff7, len=0x3c"),
        ("readonly", "Invalid guest access: ring gpa=0x10"),
    ],
)
def test_a_forged_ring_ends_its_guest(
    ptender: Run, guest: Build, port: int, how: str, message: str
) -> None:
    done = with_ring(ptender, port, guest("ringforge"), how)
    assert done.returncode == 1, done
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["handle", "op", "greedy"])
def test_a_guest_survives_smaller_mistakes(ptender: Run, guest: Build, port: int, how: str) -> None:
    done = with_ring(ptender, port, guest("ringforge"), how)
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout


def test_a_guest_that_never_stops_is_ended_by_a_signal(guest: Build, port: int, kvm: None) -> None:
    words = [PTENDER, "--mem=8", "--net-ring", f"--net=@{port}", guest("ringforge"), "storm"]
    with subprocess.Popen(
        [*map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[port],
    ) as process:
        assert process.stdout
        while "storming" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (1, "ptender: Exiting on signal 15\n")


def test_one_cpu_means_no_ring(ptender: Run, guest: Build, port: int) -> None:
    cpu = min(os.sched_getaffinity(0))
    done = ptender(
        "--mem=8",
        f"--net=@{port}",
        guest("mtu"),
        pass_fds=[port],
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    assert "ABI 2, 8 MiB" in done.stdout
