"""The compiled modules: their stubs are their declarations, and each declaration is used."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from abi import ffi_build
from tender import _native, _soft

ROOT = Path(__file__).parents[2]
MODULES: dict[str, Any] = {"_native": _native, "_soft": _soft}


@pytest.mark.parametrize("name", MODULES)
def test_the_stub_is_what_is_declared(name: str) -> None:
    stub = (ROOT / f"tender/{name}.pyi").read_text()
    made = ffi_build.stub(ffi_build.MODULES[name])
    assert stub == made, "python abi/ffi_build.py writes the stubs"


@pytest.mark.parametrize("name", MODULES)
def test_the_stub_is_what_is_compiled(name: str) -> None:
    stub = (ROOT / f"tender/{name}.pyi").read_text()
    names = re.findall(r"^    (?:def )?(\w+)[:(]", stub, re.M)
    assert sorted(names) == sorted(dir(MODULES[name].lib))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
@pytest.mark.parametrize("name", MODULES)
def test_it_is_hardened(name: str) -> None:
    if os.environ.get("PTENDER_SANITIZE") == "1":
        pytest.skip("with sanitizers in the place of it")

    def readelf(*options: str) -> str:
        command = ["readelf", "-W", *options, MODULES[name].__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "BIND_NOW" in readelf("-d")
    assert "TEXTREL" not in readelf("-d")
    segments = readelf("-l")
    assert "GNU_RELRO" in segments
    assert re.search(r"GNU_STACK .* RW ", segments)
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
    # FORTIFY: soft.c has no call that it checks, and longjmp() to another stack, which it refuses.
    assert name == "_soft" or re.search(r"__\w+_chk\b(?!_fail)", symbols)
    # CET: a shadow stack for what needs none of its own (_soft has two stacks), and marks where an
    # indirect jump may lead. The note for those needs every object to have one, and those of
    # Debian's C library have none.
    assert platform.machine() != "x86_64" or name == "_soft" or "SHSTK" in readelf("-n")
    code = Path(MODULES[name].__file__).read_bytes()
    assert platform.machine() != "x86_64" or code.count(b"\xf3\x0f\x1e\xfa") > 10  # endbr64


def words(folder: str, *ends: str) -> Counter[str]:
    paths = [path for path in (ROOT / folder).rglob("*.*") if path.name.endswith(ends)]
    return Counter(word for path in paths for word in re.findall(r"\w+", path.read_text()))


def test_each_declaration_is_used() -> None:
    """By Python, a policy or a guest; in C, beyond its declaration and its definition."""
    used = words("tender", ".py") + words("tests", ".py")
    used += words("seccomp", ".policy") + words("guest-bindings", ".c", ".h")
    in_c = words("abi", ".h") + words("tender", ".h", ".c")
    for module in MODULES.values():
        for name in dir(module.lib):
            own = 1 if isinstance(getattr(module.lib, name), int) else 2
            assert used[name] or in_c[name] > own, name
