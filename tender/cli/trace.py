"""`ptender trace FILE`: what the calls of a traced guest cost, and its events for Perfetto."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

from tender.cli.argparser import Parser
from tender.errors import ConfigError, HostError, one_line
from tender.image.output import put_in_place, signals, work_folder
from tender.observe.trace_file import LINE_MAX, MICROSECONDS, Events, Summary, TraceFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME_MAX = 24  # of a call and its device: the table has 80 columns


def main(argv: list[str]) -> str:
    """The command; `argv` without the program's name and `trace`. What it prints."""
    parser = Parser(
        prog="ptender trace",
        description="Summarize a trace that --trace has written.",
    )
    parser.add_argument("file", metavar="FILE", help="a trace")
    about = "make a file for https://ui.perfetto.dev or chrome://tracing"
    parser.add_argument("-o", "--output", metavar="OUT.json", help=about)
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    with signals.caught():
        facts = read(options.file, options.output)
    return json.dumps(facts, indent=2) if options.json else text(facts)


def read(path: str, output: str | None) -> dict[str, Any]:
    """The summary of the trace at `path`; with `output`, its events are written there."""
    with ExitStack() as stack:
        try:
            lines = stack.enter_context(open(path, encoding="utf-8", errors="replace"))
            trace = TraceFile(iter(lambda: lines.readline(LINE_MAX), ""), path)
            summary = Summary()
            made = stack.enter_context(work_folder(output)) / "events" if output else None
            file = stack.enter_context(
                open(made or os.devnull, "w", encoding="utf-8", opener=_for_its_owner)
            )
            events = Events(trace.guest)
            file.write(events.begin())
            for call in trace.calls():
                summary.add(call)
                if made:
                    file.write(events.event(call))
            file.write(events.end())
            file.close()
        except OSError as error:
            where = output if output and error.filename != path else path
            raise HostError(one_line(where), None, error.errno or 0) from None
        except ValueError as error:
            raise ConfigError(f"{one_line(path)}: {error}") from None
        if made and output:
            put_in_place(made, output)
        return summary.facts(trace)


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def text(facts: dict[str, Any]) -> str:
    """The summary for people, 80 columns wide."""
    elapsed_us = facts["elapsed_us"]
    count = sum(row["count"] for row in facts["calls"])
    calls_us = elapsed_us - facts["guest_us"] - facts["waited_us"]
    lines = [
        f"{facts['guest'][:NAME_MAX]}: {count} calls in {_time(elapsed_us)}; {_end(facts['end'])}",
        f"  {_share(facts['guest_us'], elapsed_us)} the guest's own, "
        f"{_share(facts['waited_us'], elapsed_us)} asleep in POLL, "
        f"{_share(calls_us, elapsed_us)} other calls",
        "",
        f"{'call':<{NAME_MAX}}{'count':>8}{'total':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}"
        f"{'bytes':>8}",
    ]
    for row in facts["calls"]:
        times = (row[name] for name in ("total_us", "p50_us", "p90_us", "p99_us", "max_us"))
        moved = _amount(row["bytes"]) if row["bytes"] else ""
        lines.append(
            f"{_name(row):<{NAME_MAX}}{_amount(row['count']):>8}"
            f"{''.join(f'{_time(each):>8}' for each in times)}{moved:>8}".rstrip()
        )
    lines += ["", f"{'longest':<{NAME_MAX}}{'took':>8}{'at':>8}"]
    lines += [
        f"{_name(row):<{NAME_MAX}}{_time(row['took_us']):>8}{_time(row['t_us']):>8}"
        for row in facts["longest"]
    ]
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    name = f"{row['call']} {row['device']}".rstrip()
    return name if len(name) < NAME_MAX else f"{name[: NAME_MAX - 3]}.."


def _end(end: dict[str, Any] | None) -> str:
    if end is None:
        return "its end is not in the trace"
    return f"ended: {one_line(str(end['end']))}, status {one_line(str(end.get('status')))}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _time(us: int) -> str:
    if us < 10_000:
        return f"{us} us"
    return f"{us // 1000} ms" if us < 10 * MICROSECONDS else f"{us // MICROSECONDS} s"


def _amount(number: int) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 100_000:
            return f"{number}{unit}"
        number //= 1000
    return f"{number}T"
