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
    from types import CodeType

    from tender.cli.frozen import Entry

# tests/guest/test_start.py: what a run of hello imports on any CPU,
FILES = (
    "__init__", "accel", "backends", "checks", "cleanup", "clock", "config", "dataclass", "devices",
    "errors", "hypercalls", "loop", "machine", "memory", "outcome", "stop",
    "boot/__init__", "boot/bootinfo", "boot/layout", "boot/x86_64",
    "cli/__init__", "cli/commandline", "cli/main", "cli/options", "cli/values",
    "cpu/__init__", "cpu/vcpu",
    "engine/__init__", "engine/engine",
    "host/__init__",
    "image/__init__", "image/elf", "image/file", "image/manifest",
    "modules/__init__", "modules/assign", "modules/block", "modules/console", "modules/net",
    "modules/poll", "modules/time",
    "observe/__init__", "observe/counters",
    "sandbox/__init__", "sandbox/confine", "sandbox/fdtable", "sandbox/policy", "sandbox/sandbox",
    "sandbox/seccomp",
)  # fmt: skip
# what one on KVM, on the native CPU or with a device does, and what is restored.
OTHERS = (
    "boot/aarch64", "cpu/kvm_state", "cpu/saved", "cpu/xsave", "observe/touched",
    "snapshot/__init__", "snapshot/file", "snapshot/restore",
    "kvm", "cpu/cpuid",
    "cpu/exceptions", "cpu/instruction", "cpu/native", "cpu/native_state", "cpu/privileged",
    "cpu/x86_64",
    "host/block", "host/lock", "host/net", "host/tap",
)  # fmt: skip
NAME = f"cli/frozen.{sys.implementation.cache_tag}"  # of the file, below the package


def module_name(file: str) -> str:
    """`cli/main` -> tender.cli.main."""
    return f"tender/{file}".removesuffix("/__init__").replace("/", ".")


def write(package: str, target: str, *, in_place: bool) -> None:
    """Write the file of the sources in the folder `package`, for the package in `target`.

    `in_place`: the command finds these very sources, which may change.
    """
    entries: dict[str, Entry] = {}
    for file in (*FILES, *OTHERS):
        path = f"{package}/{file}.py"
        info = os.stat(path)
        time_ns = info.st_mtime_ns if in_place else None
        code = _compile(path, os.path.abspath(path) if in_place else f"tender/{file}.py")
        kept = code if file in FILES else marshal.dumps(code)
        entries[module_name(file)] = (f"{file}.py", info.st_size, time_ns, kept)
    reader = _compile(f"{package}/cli/frozen.py", "tender/cli/frozen.py")
    with open(f"{target}/{NAME}.new", "wb") as output:
        output.write(MAGIC_NUMBER + marshal.dumps((reader, entries)))
    os.replace(f"{target}/{NAME}.new", f"{target}/{NAME}")


def _compile(path: str, shown: str) -> CodeType:
    """The code of a source, without what only readers and type checkers need."""
    with open(path, "rb") as source:
        tree = ast.fix_missing_locations(_Strip().visit(ast.parse(source.read())))
    code: CodeType = compile(tree, shown, "exec", annotations.compiler_flag, True, optimize=2)
    return code


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
