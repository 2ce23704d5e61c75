"""The import graph of the project: imports run down, without a circle.

Imports for type checkers only count as well: a circle of types is a circle for a reader.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules among `modules` that the file at `path` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in modules else module)
    return found & modules - {module_name(path)}


def graph(*folders: str) -> dict[str, set[str]]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = {module_name(path) for path in files}
    return {module_name(path): imports(path, modules) for path in files}


@pytest.mark.parametrize("folders", [("tender",), ("tender", "bench")], ids="-".join)
def test_no_circle(folders: tuple[str, ...]) -> None:
    try:
        TopologicalSorter(graph(*folders)).prepare()
    except CycleError as error:
        pytest.fail(f"an import circle: {' -> '.join(error.args[1])}")


def test_few_files_in_the_package_itself() -> None:
    assert len(list((ROOT / "tender").glob("*.py"))) <= 20
