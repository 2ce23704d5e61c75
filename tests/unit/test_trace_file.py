"""`ptender trace`: a trace read again, whole, cut off, or made up by somebody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tender.cli import trace as command
from tender.errors import TenderError

HEAD = '{"trace": 1, "guest": "web.hvt"}'
END = '{"t": 2.000000, "took": 0.000001, "end": "halted", "status": 0}'


def call(begun_us: int, took_us: int, name: str, **fields: Any) -> str:
    times = f'"t": {begun_us / 1e6:.6f}, "took": {took_us / 1e6:.6f}'
    return f"{{{times}, {json.dumps({'call': name, **fields})[1:]}"


def write(folder: Path, *lines: str) -> str:
    path = folder / "web.trace"
    path.write_text("".join(f"{line}\n" for line in (HEAD, *lines)))
    return str(path)


def example(folder: Path) -> str:
    reads = [
        call(1_000_000 + 1000 * n, n, "NET_READ", device="service", len=1500, received=60, ret=0)
        for n in range(1, 101)
    ]
    none = call(1_200_000, 7, "NET_READ", device="service", len=1500, received=0, ret=1)
    sleep = call(1_300_000, 600_000, "POLL", timeout_nsecs=1, ready_set=0, ret=0)
    return write(folder, call(900_000, 5, "PUTS", len=10, text="hi"), *reads, none, sleep, END)


def test_what_the_calls_cost(tmp_path: Path) -> None:
    facts = json.loads(command.main([example(tmp_path), "--json"]))
    assert facts["guest"] == "web.hvt"
    assert facts["end"] == {"t": 2.0, "end": "halted", "status": 0}
    assert (facts["elapsed_us"], facts["waited_us"]) == (1_000_000, 600_000)
    assert facts["guest_us"] == 1_000_000 - 600_000 - 5050 - 7 - 5
    poll, read, puts = facts["calls"]
    assert (poll["call"], poll["count"], poll["max_us"], poll["bytes"]) == ("POLL", 1, 600_000, 0)
    assert read == {
        "call": "NET_READ", "device": "service", "count": 101, "total_us": 5057,
        "p50_us": 50, "p90_us": 90, "p99_us": 99, "max_us": 100, "bytes": 6000,
    }  # fmt: skip
    assert (puts["call"], puts["bytes"]) == ("PUTS", 10)
    assert [each["took_us"] for each in facts["longest"]] == [600_000, 100, 99, 98, 97]


def test_80_columns(tmp_path: Path) -> None:
    large = call(1, 10**11, "BLOCK_WRITE", device="n" * 67, len=10**12, ret=0)
    number = call(2, 3, "POLL")
    shown = command.main([write(tmp_path, large, *[number] * 300)])
    assert max(map(len, shown.splitlines())) <= 80
    assert "its end is not in the trace" in shown
    assert "BLOCK_WRITE nnnnnnnnn.." in shown


def test_events_for_perfetto(tmp_path: Path) -> None:
    made = tmp_path / "events.json"
    command.main([example(tmp_path), "-o", str(made)])
    events = json.loads(made.read_text())["traceEvents"]
    names = {each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M"}
    assert names == {0: "web.hvt", 1: "hypercalls", 2: "service"}
    puts, *_, sleep = [each for each in events if each["ph"] == "X"]
    assert (puts["name"], puts["tid"], puts["ts"], puts["dur"]) == ("PUTS", 1, 900_000, 5)
    assert puts["args"] == {"len": 10, "text": "hi"}
    assert (sleep["name"], sleep["dur"]) == ("POLL", 600_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.json", "web.trace"]


def test_a_trace_whose_last_line_was_cut(tmp_path: Path) -> None:
    path = Path(write(tmp_path, call(1, 2, "PUTS", len=3)))
    with path.open("a") as file:
        file.write('{"t": 0.1, "took')
    assert json.loads(command.main([str(path), "--json"]))["calls"][0]["count"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":2: not a line of a trace"),
        ("[1]", ":2: not a line of a trace"),
        ('{"t": "x", "took": 1, "call": "PUTS"}', ":2: not a line of a trace"),
        ('{"t": 1e999, "took": 1, "call": "PUTS"}', ":2: not a line of a trace"),
        ('{"t": 1, "took": 1}', ":2: not a line of a trace"),
        ('{"t": 1, "took": 1, "call": [1]}', ":2: not a line of a trace"),
        ('{"t": 1, "took": 1e30, "call": "PUTS"}', ":2: not a line of a trace"),
        ("[" * 100_000, ":2: not a line of a trace"),
    ],
)
def test_lines_that_no_trace_has(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, line)
    with pytest.raises(TenderError) as caught:
        command.main([path, "-o", str(tmp_path / "out")])
    assert str(caught.value) == f"{path}{message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": not a trace"),
        ('{"t": 1, "took": 1, "call": "PUTS"}\n', ": not a trace"),
        ('{"trace": 2}\n', "its format is 2; this ptender reads 1"),
        ("\0\n", ": not a trace"),
        ("\0" * 100_000, ": not a trace"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(TenderError, match=message):
        command.main([str(path)])
    with pytest.raises(TenderError, match="No such file"):
        command.main([str(tmp_path / "none")])


def test_nothing_of_a_guest_reaches_the_terminal_raw(tmp_path: Path) -> None:
    end = '{"t": 1, "took": 0, "end": "fault", "status": 1, "error": "\\u001b[2J"}'
    shown = command.main([write(tmp_path, call(1, 2, "\x1b[2J", device="\x07"), end)])
    assert "\x1b" not in shown
    assert "\x07" not in shown
