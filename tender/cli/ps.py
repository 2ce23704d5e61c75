"""`ptender ps`: the guests that run, as a table or as JSON."""

from __future__ import annotations

import json
import os
import shutil

from tender.cli.argparser import Parser
from tender.cli.units import amount, duration
from tender.observe.guests import RunningGuest, running

NAME_MIN = 17  # with which a line has 80 columns
HEADINGS = ("NAME", "PID", "CPU", "UPTIME", "MEMORY", "NET IN", "NET OUT", "DISK", "CONSOLE")


def main(argv: list[str]) -> str:
    """The command; returns what it prints."""
    parser = Parser("ptender ps", "List the guests that run: yours, or everybody's for root.")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    options = parser.parse_args(argv)
    guests = running()
    if options.json:
        return json.dumps([guest.as_dict() for guest in guests], indent=2)
    return table(guests, shutil.get_terminal_size().columns if os.isatty(1) else None)


def table(guests: list[RunningGuest], width: int | None) -> str:
    """A line each. Names are cut to fit into `width` columns."""
    longest = max([NAME_MIN, *(len(guest.name) for guest in guests)])
    room = longest if width is None else min(longest, max(NAME_MIN, NAME_MIN + width - 80))
    rows = [HEADINGS, *(_row(guest) for guest in guests)]
    return "\n".join(_line(name, rest, room) for name, *rest in rows)


def _row(guest: RunningGuest) -> tuple[str, ...]:
    done = guest.statistics
    traffic = [
        sum(each.received.bytes for each in done.net.values()),
        sum(each.sent.bytes for each in done.net.values()),
        sum(each.bytes for each in done.block.values()),
        done.console.bytes,
    ]
    return (
        guest.name,
        str(guest.pid),
        guest.cpu,
        duration(guest.uptime_s) if guest.state == "running" else guest.state,
        amount(guest.mem_bytes),
        *(amount(each) if guest.is_counted else "-" for each in traffic),
    )


def _line(name: str, rest: list[str], room: int) -> str:
    if len(name) > room:
        name = f"{name[: room - 1]}+"
    pid, cpu, uptime, *amounts = rest
    memory, *traffic = amounts
    columns = " ".join(f"{each:>7}" for each in traffic)
    return f"{name:<{room}} {pid:>7} {cpu:<6} {uptime:>8} {memory:>6} {columns}"
