"""The report on a failed test: files in its folder, and sections for pytest's report.

The rule here: the report is made whatever happens to the files. A folder that cannot be written
to, or a full disk, is one line in it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from tender.errors import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.testing.disk import DiskImage
    from tender.testing.net.switch import Switch
    from tender.testing.unikernel import Unikernel

    Section = tuple[str, str]  # a title, and a text

LAST_LINES = 40  # of each part in a report; the files have all of them
LINE_MAX = 200  # characters
END_S = 10.0  # for a guest to end


class Artifacts:
    """The folder of one test, made with its first file.

    `error` is the first error that kept a file out of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._written = 0  # files

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._written += 1
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError):  # a truncated file would look complete
                path.unlink()

    def about(self) -> list[str]:
        """Where the files are, or why they are missing."""
        if self.error is not None:
            return [f"artifacts: could not keep them in {self.folder}: {self.error.strerror}"]
        return [str(self.folder)] if self._written else []


def sections(
    artifacts: Artifacts,
    guests: list[Unikernel],
    switches: list[Switch],
    disks: list[DiskImage],
) -> list[Section]:
    """A section for each; switches and disks that were not used have none."""
    return [
        *(_keep_guest(artifacts, *each) for each in enumerate(guests)),
        *(_keep_switch(artifacts, *each) for each in enumerate(switches) if each[1].lines()),
        *(_keep_disk(artifacts, *each) for each in enumerate(disks) if each[1].log),
    ]


def _keep_guest(artifacts: Artifacts, number: int, guest: Unikernel) -> Section:
    name = f"guest{number}-{Path(guest.kernel).stem}"
    outcome = describe_end(guest)
    artifacts.write(f"{name}.outcome.txt", f"{outcome}\n".encode())
    parts = [outcome]
    if console := guest.last_output():
        artifacts.write(f"{name}.console.txt", console)
        parts += _tail("console", console.decode(errors="replace").splitlines())
    if record := _read(guest.config.record):
        artifacts.write(f"{name}.rec", record)
        parts.append(f"once more: ptender --replay {artifacts.folder / name}.rec --gdb")
    if trace := _read(guest.config.trace):
        artifacts.write(f"{name}.trace.jsonl", trace)
        lines = trace.decode(errors="replace").splitlines()[1:]  # the first is the version
        parts += _tail("hypercalls", lines, short_call)
    return f"guest {number}: {guest.kernel}", "\n".join(parts)


def _read(path: str | int | None) -> bytes | None:
    """What is in a file that a guest's tender has written."""
    if not isinstance(path, str):
        return None
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _keep_switch(artifacts: Artifacts, number: int, switch: Switch) -> Section:
    name = f"switch{number}.pcapng"
    artifacts.write(name, switch.packets())
    lines = [str(artifacts.folder / name), *_tail("packets", switch.lines())]
    return f"switch {number}", "\n".join(lines)


def _keep_disk(artifacts: Artifacts, number: int, disk: DiskImage) -> Section:
    artifacts.write(f"disk{number}.log.txt", "".join(f"{line}\n" for line in disk.log).encode())
    return f"disk {number}", "\n".join(_tail("operations", list(disk.log)))


def describe_end(guest: Unikernel) -> str:
    """The outcome of a guest, as text."""
    if guest.running:  # that of a module, or of the run
        return "\n".join(["still running", *(f"warning: {text}" for text in guest.warnings)])
    try:
        outcome = guest.wait(END_S)
    except Exception as error:
        return f"no outcome: {type(error).__name__}: {error}"
    lines = [f"ended: {outcome.reason}, status {outcome.status}"]
    lines += [f"error: {outcome.error}"] if outcome.error else []
    if outcome.trap:
        lines.append(
            "trap: " + " ".join(f"{key}={value:#x}" for key, value in outcome.trap.items())
        )
    for name, counters in outcome.stats.rows():
        values = " ".join(f"{key}={value}" for key, value in counters.__dict__.items())
        lines.append(f"{name}: {values}")
    return "\n".join([*lines, *(f"warning: {text}" for text in guest.warnings)])


def short_call(line: str) -> str:
    """A line of a trace (tender/observe/trace.py) in short: time, call, device, result."""
    try:
        fields = json.loads(line)
        if "end" in fields:
            return f"{fields['t']:.6f} ended: {fields['end']}, status {fields['status']}"
        parts = [f"{fields['t']:.6f} {fields['call']}", fields.get("device")]
        parts += [f"ret {fields['ret']}" if "ret" in fields else None]
        parts += [fields.get("fault"), fields.get("error")]
    except (ValueError, KeyError, TypeError):  # a truncated line
        return line
    return ", ".join(str(part) for part in parts if part is not None)


def _tail(title: str, lines: list[str], shorten: Callable[[str], str] = str) -> list[str]:
    left_out = f" (the last {LAST_LINES} of {len(lines)})" if len(lines) > LAST_LINES else ""
    return [f"{title}{left_out}:", *(f"  {_cut(shorten(line))}" for line in lines[-LAST_LINES:])]


def _cut(line: str) -> str:
    """A guest may have printed it: nothing in it controls the terminal that shows the report."""
    line = one_line(line.expandtabs())
    return line if len(line) <= LINE_MAX else f"{line[:LINE_MAX]}..."
