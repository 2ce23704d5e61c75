"""config.json of a bundle, with anything in the place of anything."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tender.errors import ConfigError
from tender.oci import bundle
from tender.oci.annotations import from_annotations, parse_root_file

HOOK = {"path": "/bin/hook", "args": ["hook", "x"], "env": ["A=b"], "timeout": 5}
CONFIG: dict[str, Any] = {
    "ociVersion": "1.1.0",
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "args": ["/unikernel/kernel.hvt", "a"],
        "env": ["PATH=/bin"],
        "terminal": False,
        "oomScoreAdj": 100,
    },
    "mounts": [{"destination": "/storage", "source": "/disk", "options": ["ro"]}],
    "annotations": {
        "com.urunc.unikernel.binary": "/unikernel/kernel.hvt",
        "com.urunc.unikernel.hypervisor": "hvt",
        "com.urunc.unikernel.unikernelType": "mirage",
        "com.urunc.unikernel.cmdline": "a b",
        "ptender.mem": "64",
        "ptender.ports": "80 53/udp",
        "ptender.block.storage": "/unikernel/storage.img",
    },
    "linux": {
        "namespaces": [{"type": "network", "path": "/proc/1/ns/net"}, {"type": "pid"}],
        "cgroupsPath": "/a/b",
        "resources": {
            "memory": {"limit": 1 << 26, "swap": 1 << 27, "reservation": 1 << 25},
            "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 50},
        },
    },
    "hooks": {step: [HOOK] for step in bundle.HOOKS},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
VALUES = SCALARS | st.sampled_from(["\0", "\ud800", "-1", "--block", "@3", 10**400, -1, 0, [[]]])
ANYTHING = st.recursive(
    VALUES, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3)
)


def paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value in it."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    return [path, *(each for name, part in inside for each in paths(part, (*path, name)))]


def put(config: object, path: tuple[str | int, ...], value: object) -> object:
    """A copy of it with another value at this path."""
    if not path:
        return value
    changed: Any = json.loads(json.dumps(config))
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


def load(text: str) -> bundle.Bundle:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(text)
        return bundle.load(folder)


def test_all_of_it() -> None:
    loaded = load(json.dumps(CONFIG))
    assert loaded.args == ("/unikernel/kernel.hvt", "a")
    assert loaded.mounts == (bundle.Mount("/storage", "/disk", True),)
    assert loaded.network == "/proc/1/ns/net"
    assert set(loaded.limits) == set(bundle.LIMITS)
    assert loaded.hooks["poststop"] == (bundle.Hook("/bin/hook", ("hook", "x"), ("A=b",), 5),)


@given(st.sampled_from(paths(CONFIG)), ANYTHING)
def test_a_value_is_taken_or_is_one_line_of_error(path: tuple[str | int, ...], value: Any) -> None:
    try:
        loaded = load(json.dumps(put(CONFIG, path, value)))
        from_annotations(loaded.annotations)
    except ConfigError as error:
        assert str(error).isprintable()
        return
    texts = (*loaded.args, *loaded.env, *loaded.annotations.values(), loaded.root)
    assert all(bundle.is_usable(text) for text in texts)
    for hook in (hook for hooks in loaded.hooks.values() for hook in hooks):
        assert hook.path.startswith("/")
        assert hook.timeout_s is None or hook.timeout_s > 0


@given(ANYTHING)
def test_a_root_file_is_taken_or_is_one_line_of_error(value: Any) -> None:
    try:
        values = parse_root_file(json.dumps(value).encode())
        from_annotations(values)
    except ConfigError as error:
        assert str(error).isprintable()
        return
    assert all(bundle.is_usable(text) for text in values.values())
