"""The tenders that are compared, and how each is started.

The rule here: all of them get the same words, in Solo5's spelling, and are started as a user
starts them: by their command.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import REFERENCE

MEM_MIB = 34  # odd enough to be found among the mappings of a process
ENGINES = ("c", "python")


@dataclass(frozen=True)
class Tender:
    """A command; `engine` is None for the reference."""

    name: str
    command: tuple[str, ...]
    engine: str | None

    def words(
        self,
        image: Path,
        *arguments: str,
        tap: str | None = None,
        disk: Path | None = None,
        sector_size: int = 0,
        mem_mib: int = MEM_MIB,
    ) -> list[str]:
        """The command line that runs `image`."""
        words = [*self.command, f"--mem={mem_mib}"]
        words += [f"--net:service={tap}"] if tap else []
        words += [f"--block:storage={disk}"] if disk else []
        words += [f"--block-sector-size:storage={sector_size}"] if sector_size else []
        return [*words, "--", str(image), *arguments]


def installed() -> Path:
    """The `ptender` of this Python."""
    return Path(sys.executable).with_name("ptender")


def find_all(ptender: Path, engines: list[str]) -> list[Tender]:
    """The reference where SOLO5_HVT names it, then ptender with each engine that it has."""
    found = [_reference()] if os.environ.get("SOLO5_HVT") else []
    if "--engine" not in _help(ptender):
        return [*found, Tender("ptender python", (str(ptender),), "python")]
    return found + [
        Tender(f"ptender {engine}", (str(ptender), f"--engine={engine}"), engine)
        for engine in engines
    ]


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


def version(tender: Tender) -> str:
    done = subprocess.run([tender.command[0], "--version"], capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()[0]
