"""What a program says to `Guest`, checked: a wrong argument is a UsageError that names it.

The rule here: pure, and before anything is opened. What comes out has the types that its
annotations say, so that nothing further down has to look at them again.
"""

from __future__ import annotations

import os
from _thread import TIMEOUT_MAX
from math import inf, isnan

from tender.boot import layout
from tender.config import (
    CPUS,
    SANDBOXES,
    BlockDescriptor,
    BlockFile,
    BlockRemote,
    Config,
    Descriptor,
    StreamNet,
    Tap,
    UserNet,
    VirtualTime,
    parse_mac,
)
from tender.errors import DeviceError, UsageError
from tender.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def build_config(
    kernel: Any,
    args: tuple[Any, ...],
    *,
    mem_mib: Any,
    console_limit: Any,
    dumpcore: Any,
    trace: Any,
    cpu: Any,
    clock: Any,
    instructions: Any,
    sandbox: Any,
    user: Any,
) -> Config:
    """The Config of a guest without its devices; the arguments are those of `Guest`."""
    if clock is not None and not isinstance(clock, VirtualTime):
        raise UsageError(f"clock={clock!r} is not a VirtualTime(...)")
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if user is not None and not isinstance(user, str):
        raise UsageError(f"user={user!r} is not a user: a name or a number")
    return Config(
        kernel=_argument("kernel", kernel, _path),
        args=tuple(_word(number, word) for number, word in enumerate(args, 1)),
        mem_bytes=_number("mem_mib", mem_mib, "MiB") * layout.MIB,
        console_limit=_optional("console_limit", console_limit, "bytes per second"),
        dumpcore=None if dumpcore is None else _argument("dumpcore", dumpcore, _path),
        trace=None if trace is None else _argument("trace", trace, _path),
        cpu=_one_of("cpu", cpu, CPUS),
        clock=clock,
        instructions=_optional("instructions", instructions, "instructions"),
        sandbox=_one_of("sandbox", sandbox, SANDBOXES),
        user=user,
    )


def seconds(name: str, value: Any) -> float | None:
    """A time in seconds, which every lock and timer can take; None for no limit."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or isnan(value if isinstance(value, float) else 0) or value == -inf:
        raise UsageError(f"{name}={value!r} is not a number of seconds")
    return None if value == inf else float(min(max(value, -TIMEOUT_MAX), TIMEOUT_MAX))


def devices(name: str, given: Any) -> Mapping[str, Any]:
    """What `net` or `block` says, by the devices' names."""
    if given is None:
        return {}
    if not hasattr(given, "items") or not all(isinstance(key, str) for key in given):
        example = {"net": '{"service": Tap("tap0")}', "block": '{"storage": BlockFile("x.img")}'}
        raise UsageError(
            f"{name}={given!r}: not a mapping from the names in the guest's manifest to devices, "
            f"as {example[name]}"
        )
    return dict(given)


def net(spec: Any, where: str) -> Any:
    """What a program attaches as a network: a string is a tap's name, other values are checked.

    A MAC address may be a string, as "02:00:00:00:00:01". Raises DeviceError.
    """
    if isinstance(spec, str):
        return Tap(spec)
    if isinstance(spec, Tap) and isinstance(spec.addr, str):
        spec = replace(spec, addr=(spec.addr,))
    return _checked(spec, where) if isinstance(spec, _NET_VALUES) else spec


def block(spec: Any, where: str) -> Any:
    """The same for a block device: a path is the file there."""
    if isinstance(spec, (str, os.PathLike)):
        spec = BlockFile(os.fspath(spec))
    return _checked(spec, where) if isinstance(spec, _BLOCK_VALUES) else spec


_NET_VALUES = (Tap, Descriptor, StreamNet, UserNet)
_BLOCK_VALUES = (BlockFile, BlockDescriptor, BlockRemote)


def _checked(spec: Any, where: str) -> Any:
    """A value whose fields have their types."""
    fields = dict(spec.__dict__)
    try:
        for name, value in fields.items():
            fields[name] = _FIELDS[name](value)
    except (TypeError, ValueError, UsageError) as error:
        raise DeviceError(f"{where}: {name}={value!r}: {error}") from None
    return type(spec)(**fields)


def _of(*types: type, what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"not {what}")
        return value

    return check


def _mac(value: Any) -> bytes | None:
    if isinstance(value, str):
        return parse_mac(value)
    if value is not None and (not isinstance(value, bytes) or len(value) != 6):
        raise TypeError("not 6 bytes, nor a string as 52:54:00:12:34:56")
    return value


def _forwards(value: Any) -> Any:
    if not hasattr(value, "items"):
        raise TypeError("no mapping of the host's ports to the guest's, as {8080: 80}")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(each, str) for each in value):
        raise TypeError('not strings, as ("10.0.0.1/24",)')
    return tuple(value)


def _path(value: Any) -> str:
    """A path as a string."""
    text = os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else ""
    if not text or "\0" in text:
        raise TypeError("not a path")
    return text


_flag = _of(bool, what="True or False")
_integer = _of(int, what="a whole number")
_integer_or_none = _of(int, type(None), what="a whole number or None")
_text = _of(str, what="a string")

# Every field of the values in tender.config, by its name: what it means is the same in all.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "addr": _strings,
    "address": _text,
    "bridge": _of(str, type(None), what="a string or None"),
    "capacity": _integer,
    "create": _flag,
    "fd": _integer,
    "forward": _forwards,
    "forward_udp": _forwards,
    "gateway": _text,
    "host_address": _text,
    "mac": _mac,
    "mtu": _integer_or_none,
    "name": _text,
    "overlay": _flag,
    "path": _path,
    "reach_host": _flag,
    "readonly": _flag,
    "sector_size": _integer,
    "sync_fd": _integer_or_none,
}


def _argument(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except TypeError as error:
        raise UsageError(f"{name}={value!r}: {error}") from None


def _word(number: int, word: Any) -> str:
    if not isinstance(word, str):
        raise UsageError(f"argument {number} of the guest: {word!r} is not a string")
    if "\0" in word:
        raise UsageError(
            f"argument {number} of the guest: {word!r}: its command line ends at a NUL"
        )
    return word


def _number(name: str, value: Any, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} is not a number of {unit}: a whole one, 1 or more")
    return value


def _optional(name: str, value: Any, unit: str) -> int | None:
    return None if value is None else _number(name, value, unit)


def _one_of(name: str, value: Any, among: tuple[str, ...]) -> str:
    if value not in among:
        raise UsageError(f"{name}={value!r} is none of {', '.join(among)}")
    return str(value)
