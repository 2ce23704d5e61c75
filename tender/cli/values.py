"""What an option's text means: text -> a value of tender.config or tender.backends.

Pure. What a value may be is checked where it is made; an error says what would be right.
"""

from __future__ import annotations

from tender import checks
from tender.backends import (
    BlockDescriptor,
    BlockFile,
    Descriptor,
    Rate,
    Tap,
    UserNet,
    as_forwards,
)
from tender.config import VirtualTime
from tender.dataclass import dataclass
from tender.errors import InvalidValue, UsageError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Value = TypeVar("Value")
    Suboptions = dict[str, "Suboption"]


@dataclass
class Suboption:
    """A `,KEY=VALUE` (or `,KEY`) of an option that attaches a device.

    It sets `field` of the device's value to what `parse` makes of VALUE; without `parse` it is a
    flag, and with `is_flag` it may be one. `value` is what --help shows of VALUE.
    """

    value: str
    field: str
    parse: Callable[[str], object] | None
    help: str
    is_flag: bool = False

    def spelling(self, key: str) -> str:
        """As --help and errors show it."""
        value = f"={self.value}" if self.parse else ""
        return f"{key}[{value}]" if value and self.is_flag else f"{key}{value}"


def parse_number(text: str) -> int | str:
    return int(text) if checks.is_number(text) else text


def parse_size(text: str) -> int:
    try:
        return checks.parse_size(text)
    except ValueError:
        raise UsageError(
            f"{shown(text)} is not a size: a number of MiB, or one with a unit, as in 64M"
        ) from None


def parse_overlay(text: str) -> int | str:
    """A size, or else the path of a file."""
    if not checks.looks_like_size(text):
        return text
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{error}; for a file of this name: ./{text}") from None


def parse_mem(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:  # with solo5-hvt's words, which its users' scripts look for
        raise UsageError(f"{error}: Malformed argument to --mem") from None


def parse_rate(text: str) -> int:
    try:
        return checks.parse_size(text, unit="B")
    except ValueError:
        raise UsageError(
            f"{shown(text)} is not a rate: bytes per second, as in 64K or 1M"
        ) from None


def parse_limit(text: str) -> Rate:
    """`10M`, `1000ops`, `10M,1000ops,burst=4M,burst=100ops`."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        is_burst, number = part.startswith("burst="), part.removeprefix("burst=")
        is_ops = number.endswith("ops")
        name = ("burst_" if is_burst else "") + ("ops" if is_ops else "bytes")
        try:
            value = checks.parse_size(number.removesuffix("ops"), unit="B")
        except ValueError:
            raise UsageError(
                f"{shown(part)} is not a rate: bytes per second, as in 64K or 1M, 1000ops, or "
                "burst=1M, burst=100ops"
            ) from None
        if name in fields:
            raise UsageError(f"{shown(part)}: it is given twice")
        fields[name] = value
    return Rate(**fields)


def parse_trace(text: str) -> int | str:
    return 2 if text == "-" else _descriptor(text) if text[0] == "@" else text


def parse_log(text: str) -> str:
    if text not in ("text", "json"):
        raise UsageError(f"{shown(text)} is neither text nor json")
    return text


def _descriptor(text: str) -> int:
    """`@3`."""
    try:
        number: int = checks.as_descriptor("fd", parse_number(text[1:]))
    except InvalidValue as error:
        raise UsageError(f"{shown(text)}: {text[1:]!r} is not {error.expected}") from None
    return number


def parse_clock(text: str) -> VirtualTime | None:
    """`host`, or `virtual,start=2026-01-01T12:00:00,tick=1000`."""
    kind, *options = text.split(",")
    if kind not in ("host", "virtual") or (kind == "host" and options):
        raise UsageError(f"{shown(text)} is neither host nor virtual[,start=WHEN][,tick=NS]")
    return None if kind == "host" else _make(VirtualTime, {}, options, CLOCK)


def _instant(text: str) -> int:
    """Seconds since the epoch, or a date in ISO 8601 (UTC if it names no zone) -> nanoseconds."""
    if checks.is_number(text):
        seconds = int(text)
    else:
        from datetime import datetime, timezone

        try:
            when = datetime.fromisoformat(text.removesuffix("Z"))
        except ValueError:
            raise UsageError(f"{shown(text)} is not a date, as in 2026-01-01T12:00:00") from None
        seconds = int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())
    return seconds * 1_000_000_000


def parse_interface(text: str) -> Tap | Descriptor:
    """`tap0` or `@3`, as Solo5 has it."""
    try:
        return _net_device(text, [])
    except UsageError as error:
        hint = "; suboptions go with --net, as in --net TAP,create" if "," in text else ""
        raise UsageError(f"{error}{hint}") from None


def parse_net(text: str) -> Tap | Descriptor | UserNet:
    """`tap0,create,addr=10.0.0.1/24,mtu=9000,bridge=br0,mac=...`, `@3,mtu=9000` or `user:80:80`."""
    first, *options = text.split(",")
    if first == "user" or first.startswith("user:"):
        forward = first[len("user:") :]
        return _user_net([forward, *options] if forward else options)
    return _net_device(first, options)


def _net_device(first: str, options: list[str]) -> Tap | Descriptor:
    if first.startswith("@"):
        return _make(Descriptor, {"fd": _descriptor(first)}, options, NET_DESCRIPTOR)
    return _make(Tap, {"name": first}, options, TAP)


def _user_net(options: list[str]) -> UserNet:
    """`8080:80,8443:443,udp:5353:53,addr=10.0.0.2/24,gateway=10.0.0.1,host`."""
    forwards: dict[str, dict[int | str, int]] = {"forward": {}, "forward_udp": {}}
    others: list[str] = []
    for option in options:
        protocol, _, rest = option.partition(":")
        if option.partition("=")[0] in USER:
            others.append(option)
        elif protocol == "udp":
            _forward(rest, forwards["forward_udp"])
        else:
            _forward(option.removeprefix("tcp:"), forwards["forward"])
    return _make(UserNet, forwards, others, USER)


def _forward(text: str, forwards: dict[int | str, int]) -> None:
    """`8080:80` or `0.0.0.0:8080:80`."""
    outside, _, inside = text.rpartition(":")
    try:
        one: dict[int | str, int] = as_forwards("", {outside: inside})
    except InvalidValue:
        raise UsageError(
            f"{shown(text)} is not HOST:GUEST (ports), ADDRESS:HOST:GUEST, udp:HOST:GUEST, "
            f"{_names(USER)}"
        ) from None
    if one.keys() & forwards.keys():
        free = " (of free ports, one for each address)" if 0 in one else ""
        raise UsageError(f"port {outside} is forwarded twice{free}")
    forwards.update(one)


def parse_block(text: str) -> BlockFile | BlockDescriptor:
    """`disk.img,ro,overlay=64M,sector-size=4096` or `@3,ro`; a path may have commas of its own."""
    options: list[str] = []
    while True:
        rest, comma, last = text.rpartition(",")
        if not comma or not _is_suboption(last, BLOCK):
            break
        options.insert(0, last)
        text = rest
    if text.startswith("@") and text[1:].isdigit():
        return _make(BlockDescriptor, {"fd": _descriptor(text)}, options, BLOCK_DESCRIPTOR)
    return _make(BlockFile, {"path": text}, options, BLOCK)


def _make(
    kind: type[Value], fields: dict[str, Any], options: list[str], suboptions: Suboptions
) -> Value:
    """A value with `fields`, and those that `options` set."""
    texts = {name: shown(value) for name, value in fields.items()}
    for option in options:
        if not _is_suboption(option, suboptions):
            raise UsageError(f"{shown(option)} is not one of {_names(suboptions)}")
        key, equals, text = option.partition("=")
        suboption = suboptions[key]
        try:
            value = suboption.parse(text) if suboption.parse and equals else True
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
        if suboption.field == "addr":  # which may be given several times
            value = (*fields.get("addr", ()), value)
        fields[suboption.field] = value
        texts[suboption.field] = f"{key}={text}"
    try:
        return kind(**fields)
    except InvalidValue as error:
        text = texts.get(error.name, f"{error.name}={shown(error.value)}")
        raise UsageError(f"{text} is not {error.expected}") from None


def _is_suboption(text: str, suboptions: Suboptions) -> bool:
    key, equals, value = text.partition("=")
    suboption = suboptions.get(key)
    if suboption is None:
        return False
    return bool(suboption.parse and value) if equals else suboption.is_flag or not suboption.parse


def _names(suboptions: Suboptions) -> str:
    return ", ".join(each.spelling(key) for key, each in suboptions.items())


# fmt: off
_MTU = Suboption("N", "mtu", parse_number, "its MTU")
_MAC = Suboption("MAC", "mac", str, "the guest's MAC address (default: random)")
TAP: Suboptions = {
    "create": Suboption("", "create", None, "make the tap; it is gone when the guest ends"),
    "addr": Suboption("ADDR/LEN", "addr", str,
                      "give the made tap an address (more than one\nworks), as in 10.0.0.1/24"),
    "bridge": Suboption("BR", "bridge", str, "... or put it on a bridge"),
    "mtu": _MTU,
    "mac": _MAC,
}
USER: Suboptions = {
    "addr": Suboption("ADDR/LEN", "address", str, "the guest's address (default 10.0.0.2/24)"),
    "addr6": Suboption("ADDR/64", "address6", str, "... and its IPv6 address (default: no IPv6)"),
    "gateway": Suboption("ADDR", "gateway", str, "... and its way out (default: the first other)"),
    "mtu": _MTU,
    "mac": _MAC,
    "host": Suboption("", "reach_host", None,
                      "the gateway is the host's 127.0.0.1 (so with UDP)"),
}
NET_DESCRIPTOR: Suboptions = {"mtu": _MTU, "mac": _MAC}
BLOCK: Suboptions = {
    "ro": Suboption("", "readonly", None, "read-only (a writable image is locked)"),
    "overlay": Suboption("SIZE|FILE", "overlay", parse_overlay,
                         "the image stays as it is; what the guest writes is\n"
                         "in memory, at most SIZE, and gone with it (default:\n"
                         "a quarter of the machine's memory, at most 1G), or\n"
                         "in FILE, which is made if there is none", is_flag=True),
    "sector-size": Suboption("N", "sector_size", parse_number, "block size in bytes (default 512)"),
    "sync": Suboption("none|fsync|always", "sync", str,
                      "write it to the host's disk: when the kernel does\n"
                      "(default), at the guest's end, or at each write"),
}
BLOCK_DESCRIPTOR: Suboptions = {key: BLOCK[key] for key in ("ro", "sector-size", "sync")}
CLOCK: Suboptions = {
    "start": Suboption("WHEN", "start_ns", _instant,
                       "from this date (as 2026-01-01T12:00:00) or second on"),
    "tick": Suboption("NS", "tick_ns", parse_number, "what a reading takes (default 1000 ns)"),
}
# fmt: on
