"""A program's requests for snapshots: what a guest's process may send, and when it is too late."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tender.embed import snapshots
from tender.embed.snapshots import Requester, Snapshot
from tender.errors import GuestEnded, HostError, SnapshotError
from tender.snapshot.helper import ASK, DONE, NO, READY, YES


class Tender:
    """What a guest's process does at its end of the socket."""

    def __init__(self) -> None:
        self.requester = Requester()
        _, fd = self.requester.descriptors
        self.socket = socket.socket(fileno=os.dup(fd))
        self.requester.handed_over()
        self.interruptions = 0

    def interrupt(self) -> None:
        self.interruptions += 1

    def save(self, timeout_s: float = 60.0, *, stop: bool = False) -> Snapshot:
        return self.requester.save("guest", self.interrupt, timeout_s, stop=stop)

    def answer(self, *steps: bytes) -> list[bytes]:
        """Receive a message, send the next of `steps`, and so on: what was received."""
        received = [self.socket.recv(100)]
        for each in steps:
            self.socket.send(each)
            received.append(self.socket.recv(100))
        return received

    def beside(self, call: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=call)
        thread.start()
        return thread


@pytest.fixture
def tender() -> Iterator[Tender]:
    made = Tender()
    yield made
    made.socket.close()
    made.requester.close()


def test_a_file_that_is_no_snapshot(tender: Tender) -> None:
    received: list[bytes] = []
    thread = tender.beside(lambda: received.extend(tender.answer(READY, DONE)))
    with pytest.raises(SnapshotError, match="not a snapshot"):
        tender.save(stop=True)
    thread.join()
    assert received == [ASK, YES, NO]  # the guest goes on, as nothing was saved
    assert tender.interruptions


@pytest.mark.parametrize("why", [b"No space left on device", b"\xff\n\0\x1b[31m", b"n" * 500])
def test_why_it_was_not_saved(tender: Tender, why: bytes) -> None:
    thread = tender.beside(lambda: tender.answer(READY, why))
    with pytest.raises(HostError, match="was not saved: ") as raised:
        tender.save()
    thread.join()
    assert str(raised.value).isprintable()


def test_a_request_that_is_given_up(tender: Tender) -> None:
    with pytest.raises(TimeoutError, match="no hypercall within 0 s"):
        tender.save(0)
    received: list[bytes] = []

    def answer() -> None:
        received.append(tender.socket.recv(100))  # the first request
        tender.socket.send(READY)
        received.append(tender.socket.recv(100))  # it is not wanted any more
        received.extend(tender.answer(READY, b"reason"))  # the second

    thread = tender.beside(answer)
    with pytest.raises(HostError, match="reason"):
        tender.save()
    thread.join()
    assert received == [ASK, NO, ASK, YES, NO]


@pytest.mark.parametrize("message", [b"nonsense", READY])
def test_a_process_that_sends_without_end(
    tender: Tender, monkeypatch: pytest.MonkeyPatch, message: bytes
) -> None:
    """It was taken over: the request ends all the same."""
    monkeypatch.setattr(snapshots, "WRITE_S", 0.1)

    def flood() -> None:
        with suppress(OSError):
            while True:
                tender.socket.send(message)

    thread = tender.beside(flood)
    with pytest.raises((TimeoutError, HostError), match="no hypercall|not answer within 0.1 s"):
        tender.save(0.1)
    tender.socket.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_process_that_reads_nothing(tender: Tender) -> None:
    tender.requester.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for _ in range(30):
        with pytest.raises(TimeoutError):
            tender.save(0)
    with pytest.raises(BlockingIOError):
        tender.requester.sockets[0].send(ASK, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("steps", [(), (READY,)])
def test_a_guest_that_ends_meanwhile(tender: Tender, steps: tuple[bytes, ...]) -> None:
    def answer() -> None:
        tender.answer(*steps)
        tender.socket.close()

    thread = tender.beside(answer)
    with pytest.raises((GuestEnded, HostError), match="not saved"):
        tender.save()
    thread.join()
