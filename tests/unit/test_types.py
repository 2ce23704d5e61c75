"""The types that tests are annotated with: what a type checker sees, and what importing costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tender import testing

ROOT = Path(__file__).parents[2]
WRONG = """
from tender.testing import Switch, UnikernelFactory

def test_wrong(unikernel: UnikernelFactory, switch: Switch) -> None:
    unikernel("ping.hvt", memory=8)
    unikernel("ping.hvt").console.wait_for(7)
    switch.host("10.0.0.1/24").expect(b"x").wrong
    switch.host("10.0.0.2/24").expect(Layer).right

class Layer:
    def __init__(self, frame: bytes) -> None: ...
"""


def mypy(folder: Path, source: str) -> str:
    """What `mypy --strict` says to a file of tests."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (folder / "test_it.py").write_text(source)
    words = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "test_it.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return result.stdout + result.stderr


def test_the_guides_annotated_tests_pass_strict(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide-testing.md").read_text()
    (source,) = re.findall(r"^```python test_types.py\n(.*?)^```$", guide, re.M | re.S)
    assert mypy(tmp_path, source).startswith("Success: ")
    wrong = mypy(tmp_path, WRONG)
    assert 'Unexpected keyword argument "memory"' in wrong
    assert 'Argument 1 to "wait_for" of "Console"' in wrong
    assert '"bytes" has no attribute "wrong"' in wrong
    assert "Found 3 errors" in wrong


def test_importing_the_types_is_cheap() -> None:
    source = (
        "import sys, tender.testing\n"
        "assert not [name for name in sys.modules if name.startswith('tender.testing.')]\n"
        "from tender.testing import Switch\n"
        "print(Switch.__module__, 'pytest' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert told.stdout == "tender.testing.net.switch False\n", told.stderr


def test_every_name_leads_somewhere() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = testing.Nothing
