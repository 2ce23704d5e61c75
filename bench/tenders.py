"""The tenders that are compared, and how each is started.

The rule here: all of them get the same arguments, in Solo5's spelling, and are started by their
command, as a user starts them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import REFERENCE
from tender import accel

MEM_MIB = 34  # odd enough to be found among the mappings of a process
ENGINES = ("c", "python")


@dataclass(frozen=True)
class Tender:
    """A command; `engine` is None for the reference. `kvm`: its guests run on KVM; `target` is
    what they are built for."""

    name: str
    command: tuple[str, ...]
    engine: str | None
    kvm: bool = True
    target: str = "hvt"

    def command_line(
        self,
        image: Path,
        *arguments: str,
        tap: str | None = None,
        disk: Path | None = None,
        sector_size: int = 0,
        mem_mib: int = MEM_MIB,
    ) -> list[str]:
        """The command line that runs `image`."""
        command = [*self.command, f"--mem={mem_mib}"]
        command += [f"--net:service={tap}"] if tap else []
        command += [f"--block:storage={disk}"] if disk else []
        command += [f"--block-sector-size:storage={sector_size}"] if sector_size else []
        return [*command, "--", str(image), *arguments]


def environment() -> dict[str, str]:
    """A user's environment, without settings of Python such as PYTHONDONTWRITEBYTECODE."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def installed() -> Path:
    """The `ptender` of this Python."""
    return Path(sys.executable).with_name("ptender")


def find_all(ptender: Path, engines: list[str]) -> list[Tender]:
    """The reference where SOLO5_HVT names it, then ptender with each engine that it has, and on
    the native CPU where that can be had."""
    found = [_reference()] if os.environ.get("SOLO5_HVT") else []
    if "--engine" not in _help(ptender):
        return [*found, Tender("ptender python", (str(ptender),), "python")]
    found += [
        Tender(f"ptender {engine}", (str(ptender), "--cpu=kvm", f"--engine={engine}"), engine)
        for engine in engines
    ]
    if "c" in engines and accel.native_usable():
        found.append(Tender("ptender native", (str(ptender), "--cpu=native"), "c", kvm=False))
    return found


def _reference() -> Tender:
    path = Path(os.environ["SOLO5_HVT"])
    if not os.access(path, os.X_OK):
        raise SystemExit(f"bench: SOLO5_HVT={path}: no such program")
    return Tender(REFERENCE, (str(path.resolve()),), None)


def _help(ptender: Path) -> str:
    try:
        return subprocess.run([str(ptender), "--help"], capture_output=True, text=True).stdout
    except OSError as error:
        raise SystemExit(f"bench: {ptender}: {error.strerror}; pip install -e . first") from None


def describe(tender: Tender) -> str:
    """Its name, its version, and whether an editable install slows its start."""
    done = subprocess.run([tender.command[0], "--version"], capture_output=True, text=True)
    version = (done.stdout + done.stderr).splitlines()[0]
    slower = ", an editable install: its start is slower" if _is_editable(tender) else ""
    return f"{tender.name} ({version}{slower})"


def _is_editable(tender: Tender) -> bool:
    """Whether each start of Python imports a finder for it, with pathlib and more."""
    command = Path(tender.command[0])
    prefix = command.parents[1]
    with command.open("rb") as file:
        flags = file.readline().split()[1:]
    if any(b"S" in flag for flag in flags):  # without site, and so without its finders
        return False
    return bool(list(prefix.glob("lib/python3*/site-packages/__editable__*ptender*.pth")))
