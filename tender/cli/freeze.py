"""Write the modules of a plain run into one file, which the command reads at once.

Python looks for each module, reads it, and makes its names again: that is a third of a start.
setup.py calls this, for the Python that it runs on.
"""

from __future__ import annotations

import ast
import marshal
import os
import sys
from _frozen_importlib_external import MAGIC_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tender.cli.frozen import Entry

    Sources = dict[str, tuple[str, ast.Module]]  # by module: its path below the package, and it

# What every run imports, and what one on KVM, on the native CPU or with a device does, and what is
# restored: each with all that it imports itself.
FIRST = (
    "cli.main", "machine", "sandbox.sandbox", "boot.x86_64", "observe.counters", "engine.engine",
)  # fmt: skip
OTHERS = (
    "kvm", "cpu.kvm_state", "cpu.native", "host.block", "host.net", "host.tap",
    "snapshot.restore", "boot.aarch64",
)  # fmt: skip
NAME = f"cli/frozen.{sys.implementation.cache_tag}"  # of the file, below the package


def write(package: str, target: str, *, in_place: bool) -> None:
    """Write the file of the sources in the folder `package`, for the package in `target`.

    `in_place`: the command finds these very sources, which may change.
    """
    sources: Sources = {}
    for module in FIRST:
        _collect(package, f"tender.{module}", sources)
    first = set(sources)
    for module in OTHERS:
        _collect(package, f"tender.{module}", sources)
    entries: dict[str, Entry] = {}
    for name, (file, tree) in sources.items():
        path = f"{package}/{file}"
        shown = os.path.abspath(path) if in_place else f"tender/{file}"
        code = compile(tree, shown, "exec", annotations.compiler_flag, True, optimize=2)
        info = os.stat(path)
        time_ns = info.st_mtime_ns if in_place else None
        kept = code if name in first else marshal.dumps(code)
        entries[name] = (file, info.st_size, time_ns, kept)
    finder = compile(_parse(f"{package}/cli/frozen.py"), "tender/cli/frozen.py", "exec")
    with open(f"{target}/{NAME}.new", "wb") as output:
        output.write(MAGIC_NUMBER + marshal.dumps((finder, entries)))
    os.replace(f"{target}/{NAME}.new", f"{target}/{NAME}")


def _collect(package: str, name: str, sources: Sources) -> None:
    """Add the module `name` after its package and all that it imports."""
    base = name.replace(".", "/").removeprefix("tender").lstrip("/")
    files = (f"{base}.py", os.path.join(base, "__init__.py"))
    file = next((each for each in files if os.path.isfile(f"{package}/{each}")), None)
    if name in sources or file is None:  # a name in a module, or a compiled module
        return
    tree = _parse(f"{package}/{file}")
    for each in (name.rpartition(".")[0], *_imported(tree)):
        if each:
            _collect(package, each, sources)
    sources[name] = (file, tree)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _parse(path: str) -> ast.Module:
    """A source without what only readers and type checkers need."""
    with open(path, "rb") as source:
        tree: ast.Module = _Strip().visit(ast.parse(source.read()))
    return ast.fix_missing_locations(tree)


class _Strip(ast.NodeTransformer):
    """Takes away the annotations of functions and what is for type checkers."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module == "__future__" else node

    def visit_If(self, node: ast.If) -> ast.If | list[ast.stmt]:
        self.generic_visit(node)
        of_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return node.orelse if of_types else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node
