"""A finder of modules whose code lies in one file, which bin/start.py has read.

A module whose source has changed since, or that is not in it, is imported as ever. The file is made
by freeze.py, with the code of this one in it.
"""

from __future__ import annotations

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.abc import Loader
    from types import CodeType, ModuleType
    from typing import TypeAlias

    # The source below the package, its size, its time (None: it was installed) and its code, which
    # may be marshalled by itself.
    Entry: TypeAlias = tuple[str, int, int | None, CodeType | bytes]
else:
    Loader = object


class Finder(Loader):
    """Finds the modules of the file, for sys.meta_path.

    They are in the order in which they need each other, and those that every run needs come first.
    Before such a module is imported, all before it are made here: importlib takes 20 us for each,
    besides its code.
    """

    def __init__(self, package: str, entries: dict[str, Entry]) -> None:
        self._package = package
        self._entries = entries

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """A module's spec; None: it is not in the file, or has changed."""
        if name not in self._entries:
            return None
        if not isinstance(self._entries[name][3], bytes):
            for before in list(self._entries):
                if before == name:
                    break
                self._load(before)
        return self._spec(name)

    def _spec(self, name: str) -> ModuleSpec | None:
        file, size, time_ns = self._entries[name][:3]
        source = f"{self._package}/{file}"
        try:
            info = posix.stat(source)
        except OSError:
            info = None
        if not info or info.st_size != size or time_ns not in (None, info.st_mtime_ns):
            del self._entries[name]
            return None
        folder, is_package = source.rpartition("/")[0], source.endswith("/__init__.py")
        spec = ModuleSpec(name, self, origin=source, is_package=is_package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(folder)
        return spec

    def _load(self, name: str) -> None:
        spec = self._spec(name)
        if spec is None:  # what needs it imports it
            return
        module = type(sys)(name)
        module.__dict__.update(
            __spec__=spec, __loader__=self, __file__=spec.origin, __package__=spec.parent
        )
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        package, _, last = name.rpartition(".")
        if package not in sys.modules:
            __import__(package)
        setattr(sys.modules[package], last, module)
        sys.modules[name] = module
        try:
            self.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise

    def create_module(self, spec: ModuleSpec) -> None:
        """As ever."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module's code, which is needed once."""
        kept = self._entries.pop(module.__name__)[3]
        exec(marshal.loads(kept) if isinstance(kept, bytes) else kept, module.__dict__)


def use(package: str, entries: dict[str, Entry]) -> None:
    """Import what follows from the file of this package."""
    sys.meta_path.insert(0, Finder(package, entries))
