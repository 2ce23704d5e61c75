"""The modules of a plain run in one file, which the command reads at once.

Python looks for each module, reads it, and makes its names again: that is a third of a start.
setup.py writes the file, for the Python that it runs on; bin/ptender reads it. A module whose
source has changed since, or that is not in it, is imported as ever.
"""

from __future__ import annotations

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.abc import Loader
    from types import CodeType, ModuleType
    from typing import TypeAlias

    # The source below the package, its size, its time (None: it was installed) and its code, which
    # is marshalled by itself for one of OTHERS.
    Entry: TypeAlias = tuple[str, int, int | None, CodeType | bytes]
else:
    Loader = object

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
# and what one on KVM, on the native CPU or with a device does.
OTHERS = (
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
    import os

    entries: dict[str, Entry] = {}
    for file in (*FILES, *OTHERS):
        path = f"{package}/{file}.py"
        info = os.stat(path)
        time_ns = info.st_mtime_ns if in_place else None
        shown = os.path.abspath(path) if in_place else f"tender/{file}.py"
        code = _compile(path, shown)
        kept = code if file in FILES else marshal.dumps(code)
        entries[module_name(file)] = (f"{file}.py", info.st_size, time_ns, kept)
    reader = _compile(f"{package}/cli/frozen.py", "tender/cli/frozen.py")
    with open(f"{target}/{NAME}.new", "wb") as output:
        output.write(MAGIC_NUMBER + marshal.dumps((reader, entries)))
    os.replace(f"{target}/{NAME}.new", f"{target}/{NAME}")


def _compile(path: str, shown: str) -> CodeType:
    """The code of a source, without what needs the import of __future__."""
    import ast

    with open(path, "rb") as source:
        tree = ast.parse(source.read())
    tree.body = [
        each
        for each in tree.body
        if not isinstance(each, ast.ImportFrom) or each.module != "__future__"
    ]
    code: CodeType = compile(tree, shown, "exec", annotations.compiler_flag, True, optimize=2)
    return code


class Finder(Loader):
    """Finds the modules of the file, for sys.meta_path."""

    def __init__(self, package: str, entries: dict[str, Entry]) -> None:
        self._package = package
        self._entries = entries

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """A module's spec; None: it is not in the file, or has changed."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        file, size, time_ns = entry[:3]
        source = f"{self._package}/{file}"
        try:
            info = posix.stat(source)
        except OSError:
            return None
        if info.st_size != size or time_ns not in (None, info.st_mtime_ns):
            return None
        folder, is_package = source.rpartition("/")[0], source.endswith("/__init__.py")
        spec = ModuleSpec(name, self, origin=source, is_package=is_package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(folder)
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """As ever."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module's code, which is needed once."""
        kept = self._entries.pop(module.__name__)[3]
        exec(marshal.loads(kept) if isinstance(kept, bytes) else kept, module.__dict__)


def use(package: str, entries: dict[str, Entry]) -> None:
    """Import what follows from the file of this package."""
    sys.meta_path.insert(0, Finder(package, entries))
