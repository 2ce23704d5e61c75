"""The built guest in the package is the one in the sources (docs/decisions/0006-demo-guest.md)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tender.cli.commandline import demo_kernel
from tender.cli.inspect import describe
from tests.guest.conftest import BINDINGS, PTENDER, Run

# Built by: ptender build --cc gcc hello.c --manifest hello.json, with this compiler.
BUILT_WITH = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"


@pytest.fixture
def rebuilt(tmp_path: Path) -> Path:
    hello = BINDINGS / "samples" / "hello.c"
    output = tmp_path / "hello.hvt"
    words: list[object] = [hello, "--manifest", hello.with_suffix(".json"), "-o", output]
    subprocess.run([PTENDER, "build", "--cc", "gcc", *map(str, words)], check=True)
    return output


def test_the_same_compiler_makes_the_same_bytes(rebuilt: Path) -> None:
    version = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    if version.stdout.splitlines()[0] != BUILT_WITH:
        pytest.skip(f"it was built with {BUILT_WITH}, and here is another compiler")
    assert rebuilt.read_bytes() == Path(demo_kernel()).read_bytes(), "build it again"


def test_any_compiler_makes_the_same_guest(ptender: Run, rebuilt: Path) -> None:
    from tender import open_image

    def facts(path: str) -> object:
        said = describe(open_image(path), path)
        rights = [segment["protection"] for segment in said["segments"]]
        return said["target"], said["abi_version"], said["machine"], said["devices"], rights

    def output(path: object) -> str:
        done = ptender("--mem=8", path, "one", "two")
        assert done.returncode == 0
        return re.sub(r"0x[0-9a-f]+|\d+", "N", done.stdout)

    assert facts(str(rebuilt)) == facts(demo_kernel())
    assert output(rebuilt) == output(demo_kernel())
