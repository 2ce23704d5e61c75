"""What a wheel is built from is in the source distribution, and in the wheel.

The rule here: the patterns of pyproject.toml find every file of the folders beside tender/.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from abi import ffi_build
from tender import __version__

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("tender.abi_headers", "abi"),
        ("tender.guest_bindings", "guest-bindings"),
        ("tender.seccomp", "seccomp"),
    ],
)
def test_every_file_of_a_data_folder_is_packaged(package: str, folder: str) -> None:
    line = re.search(rf'^"{package}" = \[(.*)\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert line
    here = ROOT / folder
    packaged = {path for pattern in re.findall('"(.*?)"', line[1]) for path in here.glob(pattern)}
    others = (".py", ".pyc")  # packaged as modules, or made by running them
    assert {
        path for path in here.rglob("*.*") if path.is_file() and path.suffix not in others
    } == packaged


def test_every_package_is_packaged() -> None:
    packages = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert packages
    listed = set(re.findall('"(.*?)"', packages[1]))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tender").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= listed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="some C is for x86_64 only")
def test_every_c_file_is_compiled() -> None:
    modules = (ffi_build.native, ffi_build.soft)
    compiled = [file for ffi in modules for file in ffi._assigned_source[3]["sources"]]
    programs = [
        "tender/cpu/native_guest.c",
        "tender/host/frame_filter.c",
        *(f"tender/spt/{name}.c" for name in ("code", "message", "core", "report", "overlay")),
    ]  # by setup.py
    assert sorted([*compiled, *programs]) == [
        file for file in ffi_build.SOURCES if file.endswith(".c")
    ]


def test_the_version_is_the_same_everywhere() -> None:
    """The package has it in one place; what is not made by Python repeats it."""
    debian = re.match(r"ptender \((.+)-\d+\) ", (ROOT / "debian/changelog").read_text())
    changes = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert debian
    assert changes
    assert debian[1] == changes[1] == __version__
