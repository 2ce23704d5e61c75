"""The bundle of a container: config.json and the root file system.

Sources: the runtime specification of the Open Container Initiative, version 1.1, config.md and
config-linux.md; openat2(2). What an image says is a stranger's word: a path is looked up inside the
root file system, and nothing in it is an option of the tender.
"""

from __future__ import annotations

import json
import os
import re
import stat
from errno import ENOSYS

from tender._native import ffi
from tender.dataclass import dataclass
from tender.errors import SHOWN_MAX, ConfigError, one_line, shown
from tender.sandbox.confine import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypeVar

    Kind = TypeVar("Kind")

CONFIG_MAX = 16 << 20  # bytes of config.json; an engine's has some 20 KiB
TIMEOUT_MAX_S = 1 << 31
SYS_OPENAT2, RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 437, 0x02, 0x10
HOOKS = (
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
)


@dataclass
class Mount:
    """A file or folder of the host that the container has at `destination`."""

    destination: str
    source: str
    readonly: bool


@dataclass
class Hook:
    """A program to run at a step of the container's life."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int | None


@dataclass
class Bundle:
    """What config.json says, as far as a unikernel has a use for it."""

    folder: str
    root: str
    readonly_root: bool
    args: tuple[str, ...]
    env: tuple[str, ...]
    terminal: bool
    mounts: tuple[Mount, ...]
    annotations: Mapping[str, str]
    network: str | None  # a namespace: its path, "" for a new one, None for the caller's
    cgroup: str | None
    limits: Mapping[str, int | str]  # by name as in config-linux.md: "memory.limit", "cpu.quota"
    oom_score_adj: int | None
    hooks: Mapping[str, tuple[Hook, ...]]


LIMITS: Mapping[str, type] = {
    "memory.limit": int,
    "memory.swap": int,
    "memory.reservation": int,
    "cpu.shares": int,
    "cpu.quota": int,
    "cpu.period": int,
    "cpu.cpus": str,
    "cpu.mems": str,
    "pids.limit": int,
}


def load(folder: str) -> Bundle:
    """The bundle in `folder`. Raises ConfigError."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_MAX + 1)
        if len(data) > CONFIG_MAX:
            raise ConfigError(f"{path}: longer than {CONFIG_MAX >> 20} MiB")
        value = json.loads(data)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not JSON") from None
    try:
        return _parse(os.path.abspath(folder), _Object(value, ""))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(folder: str, config: _Object) -> Bundle:
    root = config.object("root")
    process = config.object("process")
    linux = config.object("linux")
    resources = linux.object("resources")
    limits: dict[str, int | str] = {}
    for name, kind in LIMITS.items():
        section, _, key = name.partition(".")
        limit = resources.object(section).get(key, kind)
        if limit is not None:
            limits[name] = limit
    networks = [each for each in linux.objects("namespaces") if each.get("type", str) == "network"]
    return Bundle(
        folder,
        os.path.join(folder, root.need("path", str)),
        root.get("readonly", bool) or False,
        process.strings("args"),
        process.strings("env"),
        process.get("terminal", bool) or False,
        tuple(map(_mount, config.objects("mounts"))),
        config.object("annotations").texts(),
        (networks[0].get("path", str) or "") if networks else None,
        linux.get("cgroupsPath", str),
        limits,
        process.number("oomScoreAdj", -1000, 1000),
        {name: tuple(map(_hook, config.object("hooks").objects(name))) for name in HOOKS},
    )


def _mount(value: _Object) -> Mount:
    source = value.get("source", str) or ""
    return Mount(value.need("destination", str), source, "ro" in value.strings("options"))


def _hook(value: _Object) -> Hook:
    path = value.need("path", str)
    if not path.startswith("/"):
        raise ConfigError(f"{value.at('path')}: {shown(path)} is not an absolute path")
    env = value.strings("env")
    for each in env:
        if not each.partition("=")[0]:
            raise ConfigError(f"{value.at('env')}: {shown(each)} is not NAME=VALUE")
    timeout_s = value.number("timeout", 1, TIMEOUT_MAX_S)
    return Hook(path, value.strings("args"), env, timeout_s)


class _Object:
    """A JSON object that says where in the file a value of another type is."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{path or 'the file'}: not an object")
        self._value: dict[str, Any] = value
        self._path = path

    def at(self, name: str) -> str:
        """Where a value is, for messages."""
        return f"{self._path}.{one_line(name)[:SHOWN_MAX]}" if self._path else name

    def get(self, name: str, kind: type[Kind]) -> Kind | None:
        value = self._value.get(name)
        if value is None:
            return None
        if type(value) is not kind or (isinstance(value, str) and not is_usable(value)):
            raise ConfigError(f"{self.at(name)}: {shown(value)} is not {_KINDS[kind]}")
        return value

    def number(self, name: str, least: int, most: int) -> int | None:
        value = self.get(name, int)
        if value is not None and not least <= value <= most:
            expected = f"between {least} and {most}"
            raise ConfigError(f"{self.at(name)}: {shown(value)} is not {expected}")
        return value

    def need(self, name: str, kind: type[Kind]) -> Kind:
        value = self.get(name, kind)
        if value is None:
            raise ConfigError(f"{self.at(name)}: missing")
        return value

    def object(self, name: str) -> _Object:
        value = self._value.get(name)
        return _Object({} if value is None else value, self.at(name))

    def objects(self, name: str) -> list[_Object]:
        values = self.get(name, list) or []
        return [_Object(each, f"{self.at(name)}[{index}]") for index, each in enumerate(values)]

    def strings(self, name: str) -> tuple[str, ...]:
        values = self.get(name, list) or []
        numbered = _Object({str(index): each for index, each in enumerate(values)}, self.at(name))
        return tuple(numbered.need(index, str) for index in numbered._value)

    def texts(self) -> dict[str, str]:
        return {name: self.need(name, str) for name in self._value}


_KINDS: Mapping[type, str] = {
    str: "a text",
    int: "an integer",
    bool: "true or false",
    list: "a list",
}


def is_usable(text: str) -> bool:
    """Whether a text can be a path or an argument: without NUL, and without half of a surrogate."""
    return not re.search(r"[\0\ud800-\udfff]", text)


def open_in_root(root: str, path: str, flags: int) -> int:
    """Open a regular file of the root file system; no link leads out of it.

    Raises ConfigError.
    """
    try:
        folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = _openat2(folder, path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno == ENOSYS:
            raise ConfigError("openat2(2) is missing: it takes Linux 5.6") from None
        raise ConfigError(f"{shown(path)} in the root file system: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{shown(path)} in the root file system: not a regular file")
    return fd


def _openat2(folder: int, path: str, flags: int) -> int:
    name = ffi.new("char[]", os.fsencode(path))
    how = ffi.new("uint64_t[3]", [flags, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS])
    address = [int(ffi.cast("uintptr_t", each)) for each in (name, how)]
    return call(SYS_OPENAT2, folder, *address, ffi.sizeof(how))
