"""The names of `tender`: all can be imported, are documented, and cost nothing until used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest

import tender
from tender import errors

NAMES = [name for name in tender.__all__ if not name.startswith("__")]


def methods() -> list[tuple[str, object]]:
    """The public methods and properties of the public classes."""
    return [
        (f"{name}.{key}", member)
        for name in NAMES
        for key, member in vars(getattr(tender, name)).items()
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_imports_and_is_documented(name: str) -> None:
    value = getattr(tender, name)
    assert value.__name__ == name
    assert inspect.getdoc(value), f"{name} has no docstring"
    assert name in dir(tender)


def test_every_method_is_documented() -> None:
    assert [name for name, member in methods() if not inspect.getdoc(member)] == []


def test_a_star_import_gives_every_name() -> None:
    names: dict[str, object] = {}
    exec("from tender import *", names)
    assert set(tender.__all__) <= set(names)


def test_every_error_is_documented() -> None:
    kinds = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.TenderError)
    ]
    assert len(kinds) > 5
    assert [kind for kind in kinds if not kind.__doc__] == []


def test_the_interfaces_of_devices_are_for_annotations_at_run_time() -> None:
    def attach(_net: tender.NetSender | tender.NetReceiver, _block: tender.BlockDevice) -> None: ...

    assert get_type_hints(attach)["_block"] is tender.BlockDevice


def test_importing_tender_imports_nothing_else() -> None:
    code = "import sys, tender; print([name for name in sys.modules if name.startswith('tender.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tender' has no attribute 'Nothing'"):
        _ = tender.Nothing
