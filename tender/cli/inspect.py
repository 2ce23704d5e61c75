"""`ptender inspect FILE`: the facts of an image, for people and for programs."""

from __future__ import annotations

import json
import os

from tender.boot.layout import MEM_STEP, MIB, PAGE_SIZE
from tender.cli.argparser import Parser
from tender.image.elf import MACHINES, TARGETS
from tender.image.file import open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.image.elf import Image


def main(argv: list[str]) -> str:
    """The command; `argv` without the program's name and `inspect`. What it prints."""
    parser = Parser(
        prog="ptender inspect",
        description="Print target, memory, devices and segments of an image.",
    )
    parser.add_argument("file", metavar="FILE", help="a unikernel for Solo5's hvt or spt target")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    facts = describe(open_image(options.file), options.file)
    return json.dumps(facts, indent=2) if options.json else text(facts)


def describe(image: Image, path: str) -> dict[str, Any]:
    """The facts of an image, as JSON has them. Addresses and sizes are in bytes."""
    return {
        "file": path,
        "size": os.stat(path).st_size,
        "target": TARGETS[image.target],
        "abi_version": image.abi_version,
        "machine": MACHINES[image.machine],
        "entry": image.entry,
        "kernel_end": image.kernel_end,
        "memory_min": memory_min(image),
        "devices": [
            {"name": device.name, "type": device.type_name, "handle": device.handle}
            for device in image.manifest.devices
        ],
        "segments": [
            {
                "start": segment.start,
                "end": segment.end,
                "file_size": segment.filesz,
                "memory_size": segment.memsz,
                "protection": segment.protection,
            }
            for segment in image.segments
        ],
    }


def memory_min(image: Image) -> int:
    """The least memory that the image can be loaded into, with a page for its stack."""
    step = MIB if TARGETS[image.target] == "spt" else MEM_STEP
    return -(-(image.memory_end + PAGE_SIZE) // step) * step


def text(facts: dict[str, Any]) -> str:
    """The facts as a few lines for people, 80 columns wide."""
    devices = [f"{item['type']:<12} {item['name']}" for item in facts["devices"]]
    segments = [
        f"{item['start']:#010x} - {item['end']:#010x}  {item['protection']}"
        f"  {item['file_size']} bytes in the file"
        for item in facts["segments"]
    ]
    rows = {
        "target": [f"{facts['target']}, ABI version {facts['abi_version']}, {facts['machine']}"],
        "entry": [f"{facts['entry']:#x}"],
        "memory": [
            f"at least {facts['memory_min'] // MIB} MiB (loaded up to {facts['kernel_end']:#x})"
        ],
        "devices": devices or ["none"],
        "segments": segments,
    }
    lines = [facts["file"]]
    for name, values in rows.items():
        for index, value in enumerate(values):
            lines.append(f"  {'' if index else name:<10} {value}")
    return "\n".join(lines)
