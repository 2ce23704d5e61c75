"""Inner pytest runs, for the tests of the plugin."""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from importlib import import_module

import pytest

import tender

PLUGINS = ("-p", "tender.testing.plugin", "-p", "no:cacheprovider")


@functools.cache
def import_all() -> None:
    """Import all of the package: pytester removes the modules that an inner run has imported."""
    for module in pkgutil.walk_packages(tender.__path__, "tender."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # optional dependencies
                import_module(module.name)


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    """Run a test file by an inner pytest, in this process."""
    import_all()
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess(*PLUGINS, *options)


def run_beside(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    """The same in a process of its own."""
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess(*PLUGINS, *options)
