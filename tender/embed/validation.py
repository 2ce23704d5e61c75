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
    MTU_MAX,
    MTU_MIN,
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
    parse_address,
    parse_mac,
)
from tender.dataclass import replace
from tender.errors import DeviceError, UsageError, one_line

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
    return Config(
        kernel=_argument("kernel", kernel, _path),
        args=tuple(_word(number, word) for number, word in enumerate(args, 1)),
        mem_bytes=_number("mem_mib", mem_mib, "MiB") * layout.MIB,
        console_limit=_optional("console_limit", console_limit, "bytes per second"),
        dumpcore=None if dumpcore is None else _argument("dumpcore", dumpcore, _path),
        trace=None if trace is None else _argument("trace", trace, _path),
        cpu=_one_of("cpu", cpu, CPUS),
        clock=_clock(clock),
        instructions=_optional("instructions", instructions, "instructions"),
        sandbox=_one_of("sandbox", sandbox, SANDBOXES),
        user=_user(user),
    )


def seconds(name: str, value: Any) -> float | None:
    """A time in seconds, which every lock and timer can take; None for no limit."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or isnan(value if isinstance(value, float) else 0) or value == -inf:
        raise UsageError(f"{name}={_shown(value)} is not a number of seconds")
    return None if value == inf else float(min(max(value, -TIMEOUT_MAX), TIMEOUT_MAX))


def warn(given: Any) -> Any:
    """What `warn` says: something to call with a line of text, or None."""
    if given is not None and not callable(given):
        raise UsageError(f"warn={_shown(given)} is not a function, which is given a line of text")
    return given


def devices(name: str, given: Any) -> Mapping[str, Any]:
    """What `net` or `block` says, by the devices' names."""
    if given is None:
        return {}
    if not hasattr(given, "items") or not all(isinstance(key, str) for key in given):
        example = {"net": '{"service": Tap("tap0")}', "block": '{"storage": BlockFile("x.img")}'}
        raise UsageError(
            f"{name}={_shown(given)}: not a mapping from the names in the guest's manifest to "
            f"devices, as {example[name]}"
        )
    return dict(given)


def net(spec: Any, where: str) -> Any:
    """What a program attaches as a network: a string is a tap's name, other values are checked.

    A MAC address may be a string, as "02:00:00:00:00:01". Raises DeviceError.
    """
    if isinstance(spec, str):
        spec = Tap(spec)
    if isinstance(spec, Tap) and isinstance(spec.addr, str):
        spec = replace(spec, addr=(spec.addr,))
    return _checked(spec, where) if isinstance(spec, (*NET_VALUES, UserNet)) else spec


def block(spec: Any, where: str) -> Any:
    """The same for a block device: a path is the file there."""
    if isinstance(spec, (str, os.PathLike)):
        spec = BlockFile(os.fspath(spec))
    return _checked(spec, where) if isinstance(spec, BLOCK_VALUES) else spec


NET_VALUES = (Tap, Descriptor, StreamNet)  # what a guest's process can attach
BLOCK_VALUES = (BlockFile, BlockDescriptor, BlockRemote)


def _checked(spec: Any, where: str) -> Any:
    """A value whose fields have their types."""
    fields = dict(spec.__dict__)
    checks = _FIELDS | ({"mtu": _mtu} if isinstance(spec, UserNet) else {})
    try:
        for name, value in fields.items():
            fields[name] = checks[name](value)
    except (TypeError, ValueError, UsageError) as error:
        raise DeviceError(f"{where}: {name}={_shown(value)}: {error}") from None
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
    """Numbers and strings; what they say is found out where passt is started."""
    if hasattr(value, "items"):
        pairs = dict(value.items())
        if all(_is_port(each) for pair in pairs.items() for each in pair):
            return pairs
    raise TypeError("no mapping of the host's ports to the guest's, as {8080: 80}")


def _is_port(value: Any) -> bool:
    return isinstance(value, str) or (_is_whole(value) and 0 <= value < 1 << 32)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _addresses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(each, str) for each in value):
        raise TypeError('not strings, as ("10.0.0.1/24",)')
    return tuple(map(parse_address, value))


def _mtu(value: Any) -> int:
    if not _is_whole(value):
        raise TypeError("not a whole number")
    if not MTU_MIN <= value <= MTU_MAX:
        raise ValueError(f"not {MTU_MIN} to {MTU_MAX}")
    return int(value)


def _mtu_or_none(value: Any) -> int | None:
    _integer_or_none(value)
    return None if value is None else _mtu(value)


def _name(value: Any) -> str:
    """An interface's name: what it may be is found out where it is opened."""
    if not isinstance(value, str) or not _is_encodable(value):
        raise TypeError("not a string" if not isinstance(value, str) else "not a name")
    return value


def _name_or_none(value: Any) -> str | None:
    return None if value is None else _name(value)


def _path(value: Any) -> str:
    """A path as a string."""
    text = os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else ""
    if not text or "\0" in text or not _is_encodable(text):
        raise TypeError("not a path")
    return text


def _is_encodable(text: str) -> bool:
    """Whether it can be had as bytes, which is what the kernel takes."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


_flag = _of(bool, what="True or False")
_integer = _of(int, what="a whole number")
_integer_or_none = _of(int, type(None), what="a whole number or None")
_text = _of(str, what="a string")

# Every field of the values in tender.config, by its name: what it means is the same in all.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "addr": _addresses,
    "address": _text,
    "bridge": _name_or_none,
    "capacity": _integer,
    "create": _flag,
    "fd": _integer,
    "forward": _forwards,
    "forward_udp": _forwards,
    "gateway": _text,
    "host_address": _text,
    "mac": _mac,
    "mtu": _mtu_or_none,
    "name": _name,
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
        raise UsageError(f"{name}={_shown(value)}: {error}") from None


def _clock(value: Any) -> VirtualTime | None:
    if value is None:
        return None
    if not isinstance(value, VirtualTime):
        raise UsageError(f"clock={_shown(value)} is not a VirtualTime(...)")
    for name, number, least in (("start_ns", value.start_ns, 0), ("tick_ns", value.tick_ns, 1)):
        if not _is_whole(number) or not least <= number < 1 << 64:
            raise UsageError(
                f"clock: {name}={_shown(number)} is not a number of nanoseconds, {least} or more"
            )
    return value


def _user(value: Any) -> str | None:
    if value is None:
        return None
    if _is_whole(value) and 0 <= value < 1 << 32:
        return str(value)
    if not isinstance(value, str) or "\0" in value or not _is_encodable(value):
        raise UsageError(f"user={_shown(value)} is not a user: a name or a number")
    return value


def _word(number: int, word: Any) -> str:
    if not isinstance(word, str):
        raise UsageError(f"argument {number} of the guest: {_shown(word)} is not a string")
    if "\0" in word:
        raise UsageError(
            f"argument {number} of the guest: {_shown(word)}: its command line ends at a NUL"
        )
    if not _is_encodable(word):
        raise UsageError(f"argument {number} of the guest: {_shown(word)} can't be encoded")
    return word


def _number(name: str, value: Any, unit: str) -> int:
    if not _is_whole(value) or value < 1:
        raise UsageError(
            f"{name}={_shown(value)} is not a number of {unit}: a whole one, 1 or more"
        )
    if value >= 1 << 63:
        raise UsageError(f"{name}={_shown(value)} is too large: there are 63 bits for it")
    return int(value)


def _optional(name: str, value: Any, unit: str) -> int | None:
    return None if value is None else _number(name, value, unit)


def _one_of(name: str, value: Any, among: tuple[str, ...]) -> str:
    if value not in among:
        raise UsageError(f"{name}={_shown(value)} is none of {', '.join(among)}")
    return str(value)


def _shown(value: Any) -> str:
    """A value as an error of one line shows it."""
    try:
        return one_line(repr(value))
    except Exception:  # a number with thousands of digits, or an object of the program's
        return f"<{type(value).__name__}>"
