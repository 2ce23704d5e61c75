"""The arguments of `Guest`, checked: a wrong one is a UsageError that names it.

Pure, and before anything is opened. The values of tender.backends check themselves.
"""

from __future__ import annotations

import os
from _thread import TIMEOUT_MAX
from math import inf, isnan

from tender import checks
from tender.backends import BlockDescriptor, BlockFile, BlockRemote, Descriptor, Rate, Tap
from tender.boot import layout
from tender.errors import DeviceError, InvalidValue, TenderError, UsageError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

NET_VALUES = (Tap, Descriptor)  # what a guest's process can attach
BLOCK_VALUES = (BlockFile, BlockDescriptor, BlockRemote)
mem_mib = checks.whole(1, layout.MEM_MAX // layout.MIB)


def kernel(given: Any) -> tuple[str, bytes | int | None]:
    """The `kernel` of a guest: its path, or what it is called and its bytes or descriptor."""
    if isinstance(given, (bytes, bytearray, memoryview)):
        return "the kernel in memory", bytes(given)
    if isinstance(given, int):
        return f"descriptor {checks.as_descriptor('kernel', given)}", given
    if not isinstance(given, (str, os.PathLike)):
        expected = "a path, the bytes of an image, or an open descriptor"
        raise InvalidValue("kernel", given, expected)
    return checks.as_path("kernel", given), None


def trace(given: Any) -> str | None:
    """The `trace` of a guest: a path, as a descriptor would not be the child's."""
    return None if given is None else checks.as_path("trace", given)


def pcap(given: Any) -> tuple[tuple[str, str], ...]:
    """The `pcap` of a guest: paths by the names of network devices."""
    if given is None:
        return ()
    if not hasattr(given, "items") or not all(isinstance(key, str) for key in given):
        raise UsageError(
            f"pcap={shown(given)}: not a mapping from the names of network devices to files, as "
            '{"service": "packets.pcapng"}'
        )
    return tuple((name, checks.as_path("pcap", path)) for name, path in given.items())


def rates(name: str, given: Any) -> tuple[tuple[str, Rate], ...]:
    """The `net_rate` or `block_rate` of a guest: rates by the names of devices."""
    values = given.items() if hasattr(given, "items") else () if given is None else [(None, given)]
    for key, rate in values:
        if not isinstance(key, str) or not isinstance(rate, Rate):
            raise UsageError(
                f"{name}={shown(given)}: not a mapping from the names of devices to rates, as "
                '{"service": Rate(bytes=10_000_000)}'
            )
    return tuple(values)


def seconds(name: str, value: Any) -> float | None:
    """A time in seconds, which every lock and timer can take; None for no limit."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or isnan(value if isinstance(value, float) else 0) or value == -inf:
        raise UsageError(f"{name}={shown(value)} is not a number of seconds")
    return None if value == inf else float(min(max(value, -TIMEOUT_MAX), TIMEOUT_MAX))


def warn(given: Any) -> Any:
    """The `warn` of a guest: something to call with a line of text, or None."""
    if given is not None and not callable(given):
        raise UsageError(f"warn={shown(given)} is not a function, which is given a line of text")
    return given


def on_end(given: Any) -> Any:
    """The `on_end` of a guest: something to call with the guest, or None."""
    if given is not None and not callable(given):
        raise UsageError(f"on_end={shown(given)} is not a function, which is given the guest")
    return given


def devices(name: str, given: Any) -> Mapping[str, Any]:
    """The `net` or `block` of a guest: values by the devices' names."""
    if given is None:
        return {}
    if not hasattr(given, "items") or not all(isinstance(key, str) for key in given):
        example = {"net": '{"service": Tap("tap0")}', "block": '{"storage": BlockFile("x.img")}'}
        raise UsageError(
            f"{name}={shown(given)}: not a mapping from the names in the guest's manifest to "
            f"devices, as {example[name]}"
        )
    return dict(given)


def net(value: Any, where: str) -> Any:
    """What a program attaches as a network: a string is a tap's name. Raises DeviceError."""
    return make(where, Tap, value) if isinstance(value, str) else value


def block(value: Any, where: str) -> Any:
    """The same for a block device: a path is the file there."""
    return make(where, BlockFile, value) if isinstance(value, (str, os.PathLike)) else value


def make(where: str, kind: Callable[..., T], *fields: Any) -> T:
    """A value of tender.backends; what is wrong with it is a DeviceError that says `where`."""
    try:
        return kind(*fields)
    except TenderError as error:
        raise DeviceError(f"{where}: {error}") from None
