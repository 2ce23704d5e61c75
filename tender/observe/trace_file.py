"""A trace, read: what its calls cost, and its events for Perfetto.

The rule here: a line at a time, so that a trace may be longer than memory. Times are in
microseconds, as the lines have them. Source of the events: the Trace Event Format of Chrome.
"""

from __future__ import annotations

import heapq
import json
from array import array

from tender.dataclass import dataclass
from tender.errors import ConfigError, one_line
from tender.observe.trace import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    Fields = dict[str, Any]

LONGEST = 5
PERCENTILES = (50, 90, 99, 100)
MICROSECONDS = 1_000_000
LINE_MAX = 1 << 16  # letters: a longer one is of no trace
_TIMES = ("t", "took")
_TIME_MAX = 1 << 62  # microseconds: more than a clock has
_OWN = (*_TIMES, "call", "device")  # fields that an event shows otherwise


@dataclass
class Call:
    """A hypercall: when it began and how long it took, in microseconds since the start."""

    name: str
    device: str
    begun_us: int
    took_us: int
    fields: Fields

    @property
    def bytes(self) -> int:
        """What it has moved: none where it failed."""
        if self.fields.get("ret", 0) or self.name == "POLL":
            return 0
        moved = self.fields.get("received", self.fields.get("len", 0))
        return moved if isinstance(moved, int) else 0


class TraceFile:
    """The lines of a trace, cut at LINE_MAX letters; `path` is for errors.

    After `calls`, `end` has how the guest ended.
    """

    def __init__(self, lines: Iterable[str], path: str) -> None:
        self._lines = enumerate(lines, 1)
        self._path = path
        self.end: Fields = {}  # the last line; empty: the tender was killed
        head = self._fields(*next(self._lines, (1, "{}")))
        version = (head or {}).get("trace")
        if version is None:
            raise self._error(1)
        if version != VERSION:
            raise ConfigError(f"{path}: its format is {version}; this ptender reads {VERSION}")
        self.guest = one_line(str((head or {}).get("guest", "")))

    def calls(self) -> Iterator[Call]:
        """Each of them, in order. Raises ConfigError for a line that no trace has."""
        for number, line in self._lines:
            fields = self._fields(number, line)
            if fields is None:
                return
            try:
                if "end" in fields:
                    self.end = {name: fields[name] for name in fields if name != "took"}
                    continue
                yield _call(fields)
            except (KeyError, TypeError, ValueError, OverflowError):
                raise self._error(number) from None

    def _fields(self, number: int, line: str) -> Fields | None:
        """None: the rest of the line was never written."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            if not line.endswith("\n") and number > 1 and len(line) < LINE_MAX:
                return None
            raise self._error(number) from None
        if not isinstance(fields, dict):
            raise self._error(number)
        return fields

    def _error(self, number: int) -> ConfigError:
        if number == 1:
            return ConfigError(f"{self._path}: not a trace")
        return ConfigError(f"{self._path}:{number}: not a line of a trace")


def _call(fields: Fields) -> Call:
    begun, took = (round(float(fields[name]) * MICROSECONDS) for name in _TIMES)
    if not (0 <= begun < _TIME_MAX and 0 <= took < _TIME_MAX):
        raise ValueError
    shown = {name: value for name, value in fields.items() if name not in _OWN}
    name = fields["call"]
    name = name if isinstance(name, str) else "none" if name is None else f"number {int(name)}"
    return Call(one_line(name), one_line(str(fields.get("device", ""))), begun, took, shown)


class Summary:
    """What the calls of a trace cost, by kind: the call and its device."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], tuple[array[int], list[int]]] = {}
        self._longest: list[tuple[int, int, str, str]] = []
        self._first_us = self._last_us = 0  # the first call's beginning, the last one's end

    def add(self, call: Call) -> None:
        """Count one call."""
        kind = call.name, call.device
        if not self._kinds:
            self._first_us = call.begun_us
        took, moved = self._kinds.setdefault(kind, (array("q"), [0]))
        took.append(call.took_us)
        moved[0] += call.bytes
        self._last_us = max(self._last_us, call.begun_us + call.took_us)
        entry = call.took_us, -call.begun_us, *kind
        if len(self._longest) < LONGEST:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)

    def facts(self, trace: TraceFile) -> Fields:
        """As JSON has them: times in microseconds, from the first call on."""
        rows = [_row(*kind, *values) for kind, values in self._kinds.items()]
        rows.sort(key=lambda row: -row["total_us"])
        calls_us = sum(row["total_us"] for row in rows)
        waited_us = sum(row["total_us"] for row in rows if row["call"] == "POLL")
        elapsed_us = self._last_us - self._first_us
        return {
            "guest": trace.guest,
            "end": trace.end or None,
            "elapsed_us": elapsed_us,
            "guest_us": max(elapsed_us - calls_us, 0),
            "waited_us": waited_us,
            "calls": rows,
            "longest": [
                {"call": name, "device": device, "t_us": -begun, "took_us": took}
                for took, begun, name, device in sorted(self._longest, reverse=True)
            ],
        }


def _row(name: str, device: str, took: array[int], moved: list[int]) -> Fields:
    ordered = sorted(took)
    row: Fields = {"call": name, "device": device, "count": len(ordered), "total_us": sum(ordered)}
    for percentile in PERCENTILES:
        row["max_us" if percentile == 100 else f"p{percentile}_us"] = ordered[
            max(0, -(-len(ordered) * percentile // 100) - 1)
        ]
    return {**row, "bytes": moved[0]}


class Events:
    """The events of a trace, as the text of a JSON file: a track for each device."""

    def __init__(self, guest: str) -> None:
        self._tracks: dict[str, int] = {}
        self._head = [_named("process_name", 0, guest or "guest")]

    def begin(self) -> str:
        """The file's beginning."""
        return f'{{"displayTimeUnit": "ns", "traceEvents": [\n{json.dumps(self._head[0])}'

    def event(self, call: Call) -> str:
        """The text of one call, and of its track where it is the first there."""
        text = ""
        if call.device not in self._tracks:
            track = self._tracks[call.device] = len(self._tracks) + 1
            text = f",\n{json.dumps(_named('thread_name', track, call.device or 'hypercalls'))}"
        event = {
            "name": call.name, "ph": "X", "pid": 1, "tid": self._tracks[call.device],
            "ts": call.begun_us, "dur": call.took_us, "args": call.fields,
        }  # fmt: skip
        return f"{text},\n{json.dumps(event)}"

    def end(self) -> str:
        """The file's end."""
        return "\n]}\n"


def _named(what: str, track: int, name: str) -> Fields:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}
