"""`ptender stats`: what a running guest has done, device by device."""

from __future__ import annotations

import json

from tender.cli.argparser import Parser
from tender.cli.units import amount, duration
from tender.errors import ConfigError
from tender.observe.guests import RunningGuest, running


def main(argv: list[str]) -> str:
    """The command; returns what it prints."""
    parser = Parser("ptender stats", "Show what a running guest and its devices have done.")
    parser.add_argument("guest", metavar="NAME|PID", help="a guest, as ptender ps lists it")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    guest = find(options.guest, running())
    return json.dumps(guest.as_dict(), indent=2) if options.json else text(guest)


def find(wanted: str, guests: list[RunningGuest]) -> RunningGuest:
    """The guest with this name or PID; raises ConfigError."""
    found = [each for each in guests if str(each.pid) == wanted]
    found = found or [each for each in guests if each.name == wanted]
    if not found:
        raise ConfigError(f"no guest {wanted!r} runs; see ptender ps")
    if len(found) > 1:
        pids = ", ".join(str(each.pid) for each in found)
        raise ConfigError(
            f"{len(found)} guests have the name {wanted}: take one of the PIDs {pids}"
        )
    return found[0]


def text(guest: RunningGuest) -> str:
    """For people."""
    lines = [
        f"{guest.name}: PID {guest.pid}, {guest.state} for {duration(guest.uptime_s)}, CPU "
        f"{guest.cpu}, memory {amount(guest.mem_bytes)}"
    ]
    if not guest.is_counted:
        lines.append(f"{guest.guest_s:.2f} s of CPU time; an spt guest's devices are not counted")
        return "\n".join(lines)
    lines += [
        f"{guest.exits} exits; {guest.guest_s:.3f} s in the guest, {guest.tender_s:.3f} s outside",
        "",
    ]
    rows = list(guest.statistics.rows())
    room = max(len(name) for name, _ in rows)
    lines.append(
        f"{'DEVICE':<{room}} {'CALLS':>12} {'BYTES':>16} {'ERRORS':>8} {'DROPS':>8} {'DELAYS':>8}"
    )
    lines += [
        f"{name:<{room}} {each.calls:>12} {each.bytes:>16} {each.errors:>8} {each.drops:>8} "
        f"{each.delays:>8}"
        for name, each in rows
    ]
    return "\n".join(lines)
