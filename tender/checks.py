"""Checks of fields: each takes the field's name and a value, and returns what is kept.

What a field can't be is an InvalidValue. Beside them, how numbers are read from text.
"""

from __future__ import annotations

import sys
from posix import fspath

from tender.errors import InvalidValue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike
    from typing import Any, TypeAlias

    from tender.dataclass import Check, Converted

    Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
    PathField: TypeAlias = Converted[Path, str]

MTU = 1500  # of a socket: Ethernet's own
MTU_MIN, MTU_MAX = 68, 65535  # what IPv4 needs, and what the manifest's u16 holds
INT64_MAX = (1 << 63) - 1
_INTERFACE_NAME_MAX = 15  # bytes: IFNAMSIZ with its NUL
_FD_MAX = (1 << 31) - 1
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def optional(check: Check) -> Check:
    """The same check, where None is allowed as well."""
    return lambda name, value: None if value is None else check(name, value)


def whole(least: int, most: int, expected: str = "") -> Check:
    """A whole number of a range; `expected` describes it in place of its bounds."""
    expected = expected or f"a whole number from {least} to {most}"

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InvalidValue(name, value, expected)
        return int(value)

    return check


def one_of(choices: tuple[str, ...]) -> Check:
    """One of the choices."""

    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise InvalidValue(name, value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        return str(value)

    return check


def as_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InvalidValue(name, value, "True or False")
    return value


def is_path(value: object) -> bool:
    """Whether it is a path as open() takes it: a string, bytes or an os.PathLike."""
    return isinstance(value, (str, bytes)) or hasattr(type(value), "__fspath__")


def encoded(text: str) -> bytes:
    """The bytes that the kernel is given for a text: os.fsencode()."""
    return text.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def decoded(data: bytes) -> str:
    """The text of such bytes: os.fsdecode()."""
    return data.decode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def as_path(name: str, value: Any) -> str:
    """A path, which is kept as a string."""
    text = None
    if is_path(value):
        path = fspath(value)
        text = plain_text(path if isinstance(path, str) else decoded(path))
    if not text:
        raise InvalidValue(name, value, "a path")
    return text


def as_interface_name(name: str, value: Any) -> str:
    """A name that Linux lets an interface have (dev_valid_name(), and no pattern)."""
    text = plain_text(value) or ""
    if (
        not 0 < len(encoded(text)) <= _INTERFACE_NAME_MAX
        or text in (".", "..")
        or any(letter in "/:%," or letter.isspace() for letter in text)
    ):
        raise InvalidValue(
            name,
            value,
            f"an interface name of 1 to {_INTERFACE_NAME_MAX} bytes, without space and /:%,",
        )
    return text


def as_mac(name: str, value: Any) -> bytes | None:
    """A unicast MAC address: 6 bytes, or a string as 52:54:00:12:34:56.

    None means a random one, and so does all zero, as for solo5-hvt: it is kept as None.
    """
    if value is None:
        return None
    mac = _parse_mac(value) if isinstance(value, str) else value
    if not isinstance(mac, bytes) or len(mac) != 6 or mac[0] & 1:
        raise InvalidValue(name, value, "a unicast MAC address, as in 52:54:00:12:34:56")
    return mac if any(mac) else None


def _parse_mac(text: str) -> bytes:
    parts = text.split(":")
    # int() itself would take a sign, spaces and the digits of other scripts as well.
    if all(1 <= len(part) <= 2 and _HEX_DIGITS.issuperset(part) for part in parts):
        return bytes(int(part, 16) for part in parts)
    return b""


def as_addresses(name: str, value: Any) -> tuple[str, ...]:
    """One address with its prefix length, or several."""
    if not isinstance(value, (str, tuple, list)):
        raise InvalidValue(name, value, "a sequence of addresses")
    return tuple(as_address(name, each) for each in ((value,) if isinstance(value, str) else value))


def as_address(name: str, value: Any) -> str:
    """`10.0.0.1/24` or `fd00::1/64`: an address with its prefix length."""
    import ipaddress

    try:
        if isinstance(value, str) and "/" in value:
            return ipaddress.ip_interface(value).with_prefixlen
    except ValueError:
        pass
    raise InvalidValue(name, value, "an address with its prefix length, as in 10.0.0.1/24")


def as_ipv4_interface(name: str, value: Any) -> str:
    """`10.0.0.1/24`."""
    address = as_address(name, value)
    if ":" in address:
        raise InvalidValue(name, value, "an IPv4 address with its prefix length, as in 10.0.0.1/24")
    return address


def as_ipv6_interface(name: str, value: Any) -> str:
    """`fd00::2/64`: an address that others than the neighbours on its link can have."""
    import ipaddress

    expected = "an IPv6 address with /64, as in fd00::2/64"
    address = as_address(name, value)
    if ":" not in address or not address.endswith("/64"):
        raise InvalidValue(name, value, expected)
    ip = ipaddress.IPv6Interface(address).ip
    if ip.is_link_local or ip.is_multicast or not ip.packed[0]:
        raise InvalidValue(name, value, expected)
    return address


def is_ipv6(value: Any) -> bool:
    import ipaddress

    try:
        return isinstance(value, str) and "%" not in value and bool(ipaddress.IPv6Address(value))
    except ValueError:
        return False


def as_ipv4(name: str, value: Any) -> str:
    """`10.0.0.1`."""
    if not is_ipv4(value):
        raise InvalidValue(name, value, "an IPv4 address, as in 10.0.0.1")
    return str(value)


def is_ipv4(value: Any) -> bool:
    import ipaddress

    try:
        return isinstance(value, str) and bool(ipaddress.IPv4Address(value))
    except ValueError:
        return False


def port_number(value: Any) -> int | None:
    """The number of a port, which may be a string; None for anything else."""
    if isinstance(value, str) and is_number(value):
        value = int(value)
    is_port = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 16
    return int(value) if is_port else None


def plain_text(value: Any) -> str | None:
    """A string that the kernel can be given: it can be encoded, and has no NUL. Else None."""
    try:
        if isinstance(value, str) and b"\0" not in encoded(value):
            return str.__str__(value)  # of a subclass, a plain one
    except UnicodeEncodeError:
        pass
    return None


as_port = whole(1, 65535, "a port number from 1 to 65535")
as_descriptor = whole(0, _FD_MAX, "the number of an open descriptor")
as_mtu = whole(MTU_MIN, MTU_MAX)


def is_number(text: str) -> bool:
    """Whether it is a number of decimal digits, and not longer than a 64-bit number can be.

    Python itself refuses to read those of more than 4300 digits.
    """
    return text.isascii() and text.isdigit() and len(text) < 20


def looks_like_size(text: str) -> bool:
    """Whether it begins as a number does: a path that does so is spelled with `./` before it."""
    return text.strip().lstrip("+-.,")[:1].isdigit()


def parse_size(text: str, unit: str = "M") -> int:
    """A size in bytes: `64` (in `unit`), `64M`, `1G`, `65536K`, also with `B` or `iB`.

    Raises ValueError.
    """
    number = text.upper().removesuffix("B").removesuffix("I")
    if number[-1:] in _UNITS:
        unit = number[-1]
        number = number[:-1]
    if not is_number(number) or not int(number):
        raise ValueError(text)
    return int(number) * _UNITS.get(unit, 1)
