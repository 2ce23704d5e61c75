"""A guest's console output, without a guest: the tests feed it."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tender.embed.aio import Flag
from tender.embed.console import Console
from tender.errors import GuestEnded, TenderError, UsageError
from tests.unit.interrupts import at_every_moment, comes_back
from tests.waiting import PATIENCE_S


def test_a_console_is_kept_and_searched() -> None:
    console = Console()
    console.feed(b"one\ntw")
    console.feed("o\nä\n".encode()[:-1])
    assert console.data == "one\ntwo\nä".encode()
    assert console.text == "one\ntwo\nä"
    assert console.lines() == ["one", "two", "ä"]
    assert console.wait_for("^two$").group() == "two"
    assert console.wait_for(re.compile("(.)ne")).group(1) == "o"


def test_waiting_for_what_comes_later() -> None:
    console = Console()
    threading.Timer(0.05, console.feed, (b"list",)).start()
    threading.Timer(0.1, console.feed, (b"ening on 10.0.0.2\n",)).start()
    assert console.wait_for(r"listening on (\S+)", PATIENCE_S).group(1) == "10.0.0.2"


def test_what_does_not_come_says_what_did() -> None:
    console = Console()
    with pytest.raises(TimeoutError, match=r"'never' within 0.01 s; it said nothing$"):
        console.wait_for("never", timeout=0.01)
    console.feed(b"".join(b"line %d\n" % number for number in range(100)))
    with pytest.raises(TimeoutError) as raised:
        console.wait_for("never", timeout=0.01)
    assert str(raised.value).splitlines()[1:] == [f"  line {number}" for number in range(80, 100)]


def test_the_end_of_a_guest_ends_the_waiting() -> None:
    console = Console()
    console.feed(b"bye\n")
    threading.Timer(0.05, console.end, ("halted, status 3",)).start()
    with pytest.raises(GuestEnded, match=r"before its end \(halted, status 3\); .*\n  bye"):
        console.wait_for("never", PATIENCE_S)
    assert console.wait_for("bye")
    assert issubclass(GuestEnded, TenderError)


def test_an_interrupted_wait_leaves_the_console_to_others() -> None:
    console, never = Console(), re.compile("never")
    console.feed(b"said\n")

    def check() -> None:
        assert comes_back(lambda: console.text)
        assert comes_back(lambda: console.feed(b"more\n"))

    at_every_moment(lambda: lambda: _times_out(console, never), check)


def _times_out(console: Console, pattern: re.Pattern[str]) -> None:
    with pytest.raises(TimeoutError):
        console.wait_for(pattern, 0.001)


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e10, 10**400])
def test_waiting_without_a_limit(timeout: Any) -> None:
    console = Console()
    threading.Timer(0.05, console.feed, (b"ready",)).start()
    assert console.wait_for("ready", timeout)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("x", "5"), "timeout='5' is not a number of seconds"),
        (("x", float("nan")), "timeout=nan is not a number of seconds"),
        ((b"x", 5), "pattern=b'x' is not a string, nor a compiled pattern of one"),
        ((re.compile(b"x"), 5), "pattern=re.compile.* is not a string, nor"),
        ((None, 5), "pattern=None is not a string"),
    ],
)
def test_what_can_not_be_waited_for(words: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Console().wait_for(*words)


def test_how_a_guest_ended_may_be_known_late() -> None:
    console = Console()
    console.end()
    threading.Timer(0.05, console.end, ("killed",)).start()
    with pytest.raises(GuestEnded, match=r"\(killed\)"):
        console.wait_for("never", PATIENCE_S)


def test_a_console_keeps_the_last_bytes() -> None:
    console = Console(limit=10)
    console.feed(b"0123456789")
    console.feed(b"abc")
    assert (console.data, console.lost) == (b"3456789abc", 3)
    console.feed(bytes(25))
    assert (len(console.data), console.lost) == (10, 28)


# A pattern in output that grows.


def test_a_guest_that_prints_single_bytes_leaves_the_program_most_of_its_time() -> None:
    """The output is not searched for every byte: that would be quadratic."""
    console, searched = Console(), threading.Event()
    console.feed(b"x" * (1 << 20))

    def print_bytes() -> None:
        while not searched.is_set():
            console.feed(b"x")
        console.feed(b"done")

    thread = threading.Thread(target=print_bytes)
    thread.start()
    before = time.thread_time()
    with pytest.raises(TimeoutError):
        console.wait_for("never", timeout=0.5)
    assert time.thread_time() - before < 0.4
    searched.set()
    thread.join()
    assert console.wait_for("xdone", PATIENCE_S)


def test_escape_sequences_are_made_printable_in_errors() -> None:
    console = Console()
    console.feed(b"\x1b[2Jred\n")
    console.end("halted, status 0")
    with pytest.raises(GuestEnded) as raised:
        console.wait_for("never", PATIENCE_S)
    assert str(raised.value).splitlines()[-1] == r"  \x1b[2Jred"


# Lines.


def test_lines_are_given_as_they_are_completed() -> None:
    console = Console()
    console.feed(b"one\r\ntw")
    lines = iter(console)
    assert next(lines) == "one"
    threading.Timer(0.05, console.feed, (b"o\n\nthr",)).start()
    assert [next(lines), next(lines)] == ["two", ""]
    console.feed(b"ee")
    console.end()
    assert list(lines) == ["three"]
    assert list(console) == console.lines() == ["one", "two", "", "three"]


def test_lost_output_is_skipped() -> None:
    console = Console(limit=8)
    console.feed(b"first\nse")
    lines = iter(console)
    assert next(lines) == "first"
    console.feed(b"cond line\nthird\n")
    console.end()
    assert list(lines) == ["e", "third"]
    assert list(Console.__iter__(_ended(b""))) == []


def _ended(data: bytes) -> Console:
    console = Console()
    console.feed(data)
    console.end()
    return console


# asyncio.


def beside(console: Console, feed: Callable[[], object], wait: Awaitable[Any]) -> Any:
    """What `wait` gives, while another thread calls `feed` a moment later."""

    async def main() -> Any:
        threading.Timer(0.05, feed).start()
        return await wait

    return asyncio.run(main())


def test_a_task_waits_for_a_pattern() -> None:
    console = Console()
    console.feed(b"list")
    wait = console.wait_for_async(r"listening on (\S+)", PATIENCE_S)
    assert beside(console, lambda: console.feed(b"ening on 10.0.0.2\n"), wait)[1] == "10.0.0.2"
    with pytest.raises(TimeoutError, match="'never' within 0.01 s; the last lines:"):
        asyncio.run(console.wait_for_async("never", 0.01))
    with pytest.raises(GuestEnded, match=r"before its end \(halted, status 3\)"):
        beside(console, lambda: console.end("halted, status 3"), console.wait_for_async("never"))
    with pytest.raises(UsageError, match="timeout='5'"):
        asyncio.run(console.wait_for_async("never", "5"))  # type: ignore[arg-type]
    assert not console._listeners


def test_a_task_reads_lines() -> None:
    console = Console()
    console.feed(b"one\ntw")

    async def read() -> list[str]:
        return [line async for line in console]

    def feed() -> None:
        console.feed(b"o\nthree")
        console.end()

    assert beside(console, feed, read()) == ["one", "two", "three"]


def test_other_tasks_run_while_one_waits() -> None:
    console = Console()

    async def main() -> int:
        waiting = asyncio.create_task(console.wait_for_async("ready", PATIENCE_S))
        rounds = 0
        while not waiting.done():
            await asyncio.sleep(0.001)
            rounds += 1
            if rounds == 5:
                console.feed(b"ready")
        return rounds

    assert asyncio.run(main()) >= 5


def test_a_closed_event_loop_does_not_stop_the_output() -> None:
    async def main() -> Flag:
        return Flag()

    console = Console()
    console._listeners.add(asyncio.run(main()).set)
    console.feed(b"goes on")
    assert console.text == "goes on"
