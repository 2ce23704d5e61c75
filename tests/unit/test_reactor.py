"""The one I/O thread of a program."""

from __future__ import annotations

import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tender.embed.reactor import GONE, READ, WRITE, Reactor, reactor
from tests.unit.interrupts import at_every_moment, comes_back
from tests.waiting import PATIENCE_S

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_descriptor_is_served(pair: Ends) -> None:
    ours, theirs = pair
    got: queue.Queue[bytes] = queue.Queue()
    reactor().register(ours.fileno(), READ, lambda _: got.put(ours.recv(100)))
    try:
        for word in (b"one", b"two"):
            theirs.send(word)
            assert got.get(timeout=PATIENCE_S) == word
    finally:
        reactor().unregister(ours.fileno())
    theirs.send(b"three")
    reactor().call_soon(lambda: got.put(b"after"))
    assert got.get(timeout=PATIENCE_S) == b"after"


def test_other_events(pair: Ends) -> None:
    ours, theirs = pair
    got: queue.Queue[int] = queue.Queue()

    def once(events: int) -> None:
        reactor().modify(ours.fileno(), 0)
        got.put(events)

    reactor().register(ours.fileno(), READ | WRITE, once)
    assert got.get(timeout=PATIENCE_S) == WRITE
    theirs.close()
    assert got.get(timeout=PATIENCE_S) & GONE
    reactor().unregister(ours.fileno())
    reactor().unregister(ours.fileno())


def test_what_cannot_be_registered(pair: Ends) -> None:
    ours, _ = pair
    reactor().register(ours.fileno(), READ, print)
    with pytest.raises(FileExistsError):
        reactor().register(ours.fileno(), READ, print)
    reactor().unregister(ours.fileno())
    with open(__file__) as file, pytest.raises(PermissionError):
        reactor().register(file.fileno(), READ, print)
    with pytest.raises((OSError, ValueError)):
        reactor().register(-1, READ, print)


def test_timers_come_in_order_and_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    got: queue.Queue[str] = queue.Queue()
    loop = reactor()

    def schedule() -> None:
        """All in one instant, and on the thread: nothing is called before the rest is there."""
        now = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr("tender.embed.reactor.monotonic", lambda: now)
            cancelled = loop.call_later(0.01, lambda: got.put("cancelled"))
            loop.call_later(0.05, lambda: got.put("late"))
            loop.call_later(0.02, lambda: got.put("early"))
            cancelled.cancel()
            for number in range(3):
                loop.call_soon(lambda number=number: got.put(str(number)))  # type: ignore[misc]

    loop.call_soon(schedule)
    assert [got.get(timeout=PATIENCE_S) for _ in range(5)] == ["0", "1", "2", "early", "late"]
    assert got.empty()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_is_reported_and_survived(pair: Ends) -> None:
    ours, theirs = pair
    shown: queue.Queue[object] = queue.Queue()
    before, threading.excepthook = threading.excepthook, lambda args: shown.put(args.exc_type)
    try:
        reactor().register(ours.fileno(), READ, lambda _: 1 // 0)
        theirs.send(b"x")
        assert shown.get(timeout=PATIENCE_S) is ZeroDivisionError
        reactor().call_soon(lambda: int("x"))
        assert shown.get(timeout=PATIENCE_S) is ValueError
        reactor().call_soon(lambda: shown.put("alive"))
        assert shown.get(timeout=PATIENCE_S) == "alive"
        assert shown.empty()  # the descriptor that is still readable is not looked at any more
    finally:
        threading.excepthook = before
    reactor().unregister(ours.fileno())


def test_unregister_waits_for_the_callback_that_runs(pair: Ends) -> None:
    ours, theirs = pair
    begun, steps = threading.Event(), []

    def slow(_events: int) -> None:
        ours.recv(100)
        begun.set()
        time.sleep(0.2)
        steps.append("callback")

    reactor().register(ours.fileno(), READ, slow)
    theirs.send(b"x")
    assert begun.wait(PATIENCE_S)
    reactor().unregister(ours.fileno())
    steps.append("unregistered")
    assert steps == ["callback", "unregistered"]


def test_a_callback_may_unregister_itself(pair: Ends) -> None:
    ours, theirs = pair
    got: queue.Queue[int] = queue.Queue()

    def once(events: int) -> None:
        assert reactor().is_here()
        reactor().unregister(ours.fileno())
        got.put(events)

    reactor().register(ours.fileno(), READ, once)
    theirs.send(b"x")
    got.get(timeout=PATIENCE_S)
    with pytest.raises(queue.Empty):
        got.get(timeout=0.05)
    assert not reactor().is_here()


def test_thousands_of_descriptors_from_many_threads() -> None:
    before = set(reactor()._entries)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4000 if hard == resource.RLIM_INFINITY else min(4000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 200), hard))
    pairs = [socket.socketpair() for _ in range(wanted // 2)]
    got: queue.Queue[int] = queue.Queue()

    def serve(part: list[Ends]) -> None:
        for number, (ours, theirs) in enumerate(part):
            reactor().register(ours.fileno(), READ, partial(take, ours))
            theirs.send(b"x" * (number % 7 + 1))

    def take(ours: socket.socket, _events: int) -> None:
        got.put(len(ours.recv(100)))

    threads = [threading.Thread(target=serve, args=(pairs[part::4],)) for part in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes = [got.get(timeout=PATIENCE_S) for _ in pairs]
        assert len(sizes) == len(pairs)
    finally:
        for ours, theirs in pairs:
            reactor().unregister(ours.fileno())
            ours.close()
            theirs.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(reactor()._entries) <= before


def test_a_forked_child_has_a_reactor_of_its_own_and_the_parent_keeps_its() -> None:
    code = """
import os, queue, socket, threading
from tender.embed.reactor import READ, reactor
def ask():
    got = queue.Queue()
    a, b = socket.socketpair()
    reactor().register(a.fileno(), READ, lambda _: got.put(a.recv(9)))
    b.send(b"x")
    got.get(timeout=20)
    reactor().unregister(a.fileno())
ask()
before = set(os.listdir("/proc/self/fd"))
pid = os.fork()
if not pid:
    left = {fd for fd in os.listdir("/proc/self/fd") if "event" in
            (os.readlink(f"/proc/self/fd/{fd}") if os.path.islink(f"/proc/self/fd/{fd}") else "")}
    print("left", sorted(left), threading.active_count(), flush=True)
    ask()
    os._exit(0)
print(os.waitpid(pid, 0)[1])
ask()
print(set(os.listdir("/proc/self/fd")) == before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "left [] 1\n0\nTrue\n", done


def test_a_program_may_end_while_the_thread_waits() -> None:
    code = "from tender.embed.reactor import reactor; reactor().call_later(1000, print)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_it_starts_at_the_first_use() -> None:
    loop = Reactor()
    assert loop._thread is None
    loop._forget()


def test_an_interrupted_unregister_leaves_the_reactor_at_work(pair: Ends) -> None:
    ours, theirs = pair
    begun, go_on = threading.Event(), threading.Event()

    def slow(_events: int) -> None:
        ours.recv(100)
        begun.set()
        go_on.wait(PATIENCE_S)

    def prepare() -> Callable[[], object]:
        """Its callback runs: to unregister waits for that."""
        begun.clear()
        go_on.clear()
        reactor().register(ours.fileno(), READ, slow)
        theirs.send(b"x")
        assert begun.wait(PATIENCE_S)
        threading.Timer(0.002, go_on.set).start()
        return lambda: reactor().unregister(ours.fileno())

    def check() -> None:
        go_on.set()
        assert comes_back(lambda: reactor().unregister(ours.fileno()))
        served = threading.Event()
        assert comes_back(lambda: reactor().call_soon(served.set))
        assert served.wait(PATIENCE_S)

    at_every_moment(prepare, check)


def test_a_call_that_is_due_in_centuries_does_not_end_the_thread() -> None:
    far = [reactor().call_later(seconds, print) for seconds in (1e10, 1e300, float("inf"))]
    got: queue.Queue[str] = queue.Queue()
    reactor().call_later(0.01, lambda: got.put("alive"))
    assert got.get(timeout=PATIENCE_S) == "alive"
    reactor().call_soon(lambda: got.put("still"))
    assert got.get(timeout=PATIENCE_S) == "still"
    for timer in far:
        timer.cancel()
