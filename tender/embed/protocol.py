"""What a program and the processes of its guests say to each other.

The rule here: a job goes to a child that nobody has had a hand in yet, and is trusted. What comes
back may come from a guest that took the child over: it is JSON of a limited size, checked field by
field, and what does not fit is a Malformed. Errors are made again from a fixed table of names.
"""

from __future__ import annotations

import json
import marshal
import os
import re
import socket
import struct

from tender import config as conf
from tender import errors
from tender.errors import TenderError
from tender.outcome import Counters, NetCounters, Statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.config import Config
    from tender.outcome import Outcome

MESSAGE_MAX = 1 << 16  # bytes
TEXT_MAX = 4000  # letters of an error or a warning
LAYERS_MAX = 16  # of a sandbox; there are fewer
DEVICES_MAX = 64  # of one kind: a manifest has no more entries
FIRST_FD = 128  # the number of a job's first descriptor in the child
FDS_PER_MESSAGE = 250  # Linux takes 253 (SCM_MAX_FD)

# Between program and server.
NEW = struct.Struct("=ii")  # a child: its PID and 0, or 0 and an errno
ENDED = struct.Struct("=ii")  # a child's PID and wait status
# Requests for a child: one that gets its job at once, or that makes ready for a guest on this CPU.
AT_ONCE, FOR_SOFT, FOR_KVM = b"a", b"s", b"k"

JOB_MAX = 1 << 17  # bytes of a job in a message; a longer one comes in a memfd
JOB_IN_FILE, MORE_FDS = b"f", b"+"  # no marshalled job is that short
_FD = struct.Struct("=i")

# What the sandbox's handler of SIGSYS writes: a zero byte that no JSON begins with, three letters,
# the number of the system call and of the architecture (seccomp's AUDIT_ARCH_*).
VIOLATION = struct.Struct("=4sII")
VIOLATION_MAGIC = b"\0SYS"

REASONS = ("halted", "stopped", "fault", "host")
_I32, _U64 = range(-(1 << 31), 1 << 31), range(1 << 64)
_SIGNALS = range(65)
_CORE = re.compile(r"core\.solo5-hvt\.[0-9]{1,10}(\.[0-9]{1,2})?")

# Errors that a child may report, with what is in them beside the text.
_FIELDS: dict[str, tuple[tuple[str, type], ...]] = {
    "TenderError": (),
    "UsageError": (),
    "ConfigError": (),
    "ImageError": (),
    "ManifestError": (),
    "DeviceError": (),
    "SandboxError": (),
    "HostError": (("syscall", str), ("errno", int)),
    "GuestFault": (("gpa", int), ("size", int), ("hypercall", int)),
    "NotEmulated": (("gpa", int), ("size", int), ("hypercall", int)),
}
_ERRORS = {name: getattr(errors, name) for name in _FIELDS if hasattr(errors, name)}


class Malformed(Exception):
    """A message that no guest's process sends by itself."""


def send_descriptors(to: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """One message with copies of open descriptors."""
    packed = b"".join(map(_FD.pack, descriptors))
    to.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if packed else [])


def receive_descriptors(
    sock: socket.socket, size: int, most: int = FDS_PER_MESSAGE
) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it."""
    room = socket.CMSG_SPACE(most * _FD.size)
    # What comes is no business of the program's children.
    data, ancillary, _, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(packed) // _FD.size * _FD.size
            descriptors += [each for (each,) in _FD.iter_unpack(packed[:whole])]
    return data, descriptors


# The job: program -> child.


def send_job(sock: socket.socket, job: bytes, descriptors: list[int]) -> None:
    """`job` is what pack_job gave, for as many descriptors; the first is the current folder."""
    first, rest = descriptors[:FDS_PER_MESSAGE], descriptors[FDS_PER_MESSAGE:]
    if len(job) < JOB_MAX:
        send_descriptors(sock, job, first)
    else:
        with open(os.memfd_create("job"), "w+b") as file:
            file.write(job)
            file.seek(0)
            send_descriptors(sock, JOB_IN_FILE, [file.fileno()])
        send_descriptors(sock, MORE_FDS, first)
    while rest:
        send_descriptors(sock, MORE_FDS, rest[:FDS_PER_MESSAGE])
        rest = rest[FDS_PER_MESSAGE:]


def receive_job(sock: socket.socket) -> tuple[Config, list[int]] | None:
    """None: there is none to come."""
    data, descriptors = receive_descriptors(sock, JOB_MAX)
    if not data:
        return None
    if data == JOB_IN_FILE:
        with open(descriptors.pop(), "rb") as file:
            data = file.read()
    config, count = unpack_job(data)
    while len(descriptors) < count:
        data, more = receive_descriptors(sock, 1)
        if not data:
            return None
        descriptors += more
    return config, descriptors


def pack_job(config: Config, descriptors: int) -> bytes:
    """A Config whose descriptors have the child's numbers, and how many come with it."""
    return marshal.dumps((_plain(config), descriptors))


def unpack_job(data: bytes) -> tuple[Config, int]:
    """What pack_job was given; for bytes of the program itself."""
    plain, descriptors = marshal.loads(data)
    return _value(plain), descriptors


def _plain(value: Any) -> Any:
    """A record of tender.config as a list that starts with its name; a tuple as a tuple."""
    if value is None or type(value) in (int, str, bytes, bool, float):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(each) for each in value)
    name = type(value).__name__
    if getattr(conf, name, None) is type(value):
        return [name, {key: _plain(each) for key, each in value.__dict__.items()}]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    raise errors.ConfigError(f"{value!r}: not a value that a guest's process can be given")


def _value(plain: Any) -> Any:
    if type(plain) is tuple:
        return tuple(_value(each) for each in plain)
    if type(plain) is list:
        name, fields = plain
        return getattr(conf, name)(**{key: _value(each) for key, each in fields.items()})
    return plain


# What comes back: child -> program.


def pack(kind: str, value: Any) -> bytes:
    """A message of one kind: started, warn, error, outcome or bug."""
    return json.dumps({kind: value}).encode("ascii")


def pack_error(error: TenderError) -> dict[str, Any]:
    """An error as the table of its type, text and fields."""
    name = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
    fields = {key: getattr(error, key, None) for key, _ in _FIELDS[name]}
    return {"type": name, "text": str(error)[:TEXT_MAX], **fields}


def pack_outcome(outcome: Outcome) -> bytes:
    """The message that says how the guest ended."""
    value = dict(outcome.__dict__)
    value["error"] = pack_error(outcome.error) if outcome.error else None
    value["stats"] = _values(outcome.stats)
    return pack("outcome", value)


def parse(data: bytes) -> tuple[str, Any]:
    """A message's kind and value; raises Malformed."""
    if data[:1] == b"\0":
        return "violation", _violation(data)
    if len(data) > MESSAGE_MAX:
        raise Malformed("a message that is too long")
    try:
        message = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise Malformed("a message that is not JSON") from None
    if type(message) is not dict or len(message) != 1:
        raise Malformed("a message that is none")
    ((kind, value),) = message.items()
    if kind not in _PARSERS:
        raise Malformed("a message of an unknown kind")
    return kind, _PARSERS[kind](value)


def _violation(data: bytes) -> int:
    if len(data) != VIOLATION.size or not data.startswith(VIOLATION_MAGIC):
        raise Malformed("a message that is none")
    return int(VIOLATION.unpack(data)[1])


def _text(value: Any) -> str:
    """One line that is safe to show, as the command shows it."""
    if type(value) is not str or len(value) > TEXT_MAX:
        raise Malformed("a text that is none")
    return errors.one_line(value)


def _lines(value: Any) -> str:
    if type(value) is not str:
        raise Malformed("a text that is none")
    return "\n".join(_text(line) for line in value.split("\n"))


def _layers(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sandbox's layers that are in force, and those that are missing."""
    if type(value) is not list or len(value) != 2:
        raise Malformed("a sandbox that is none")
    for names in value:
        if type(names) is not list or len(names) > LAYERS_MAX:
            raise Malformed("a sandbox that is none")
    there, missing = (tuple(map(_text, names)) for names in value)
    return there, missing


def _number(value: Any, among: range) -> int:
    if type(value) is not int or value not in among:
        raise Malformed("a number that is none")
    return value


def _error(value: Any) -> TenderError:
    value = _dict(value, 8)
    name = value.get("type")
    if type(name) is not str or name not in _ERRORS:
        raise Malformed("an error of an unknown type")
    error: TenderError = _ERRORS[name].__new__(_ERRORS[name])
    error.args = (_text(value.get("text")),)
    for key, kind in _FIELDS[name]:
        field = value.get(key)
        if field is not None:
            field = _text(field) if kind is str else _number(field, _U64)
        setattr(error, key, field)
    return error


def _outcome(value: Any) -> dict[str, Any]:
    value = _dict(value, 16)
    if value.get("reason") not in REASONS:
        raise Malformed("an outcome without a reason")
    trap, error = value.get("trap"), value.get("error")
    return {
        "reason": value["reason"],
        "status": _number(value.get("status"), _I32),
        "signo": _number(value.get("signo"), _SIGNALS),
        "error": None if error is None else _error(error),
        "trap": None if trap is None else _numbers(trap),
        "core": _core(value.get("core")),
        "stats": _statistics(value.get("stats")),
    }


def _values(value: Any) -> Any:
    """A dataclass as the list of its fields, and what is in it likewise."""
    if isinstance(value, dict):
        return {name: _values(each) for name, each in value.items()}
    fields = getattr(value, "__dict__", None)
    return value if fields is None else [_values(each) for each in fields.values()]


def _statistics(value: Any) -> Statistics:
    console, poll, block, net = _list(value, 4)
    return Statistics(
        _counters(console),
        _counters(poll),
        {_text(name): _counters(each) for name, each in _dict(block, DEVICES_MAX).items()},
        {
            _text(name): NetCounters(*map(_counters, _list(each, 2)))
            for name, each in _dict(net, DEVICES_MAX).items()
        },
    )


def _counters(value: Any) -> Counters:
    return Counters(*(_number(each, _U64) for each in _list(value, len(Counters.__annotations__))))


def _list(value: Any, length: int) -> list[Any]:
    if type(value) is not list or len(value) != length:
        raise Malformed("malformed message: not a list of the right length")
    return value


def _core(value: Any) -> str | None:
    """A core's path: the folder is checked by who named it."""
    if value is None:
        return None
    if type(value) is not str or len(value) > TEXT_MAX or "\0" in value:
        raise Malformed("a core file's name that is none")
    if not _CORE.fullmatch(os.path.basename(value)):
        raise Malformed("a core file's name that is none")
    return value


def _numbers(value: Any) -> dict[str, int]:
    return {_text(name): _number(number, _U64) for name, number in _dict(value, 64).items()}


def _dict(value: Any, most: int = 512) -> dict[str, Any]:
    if type(value) is not dict or len(value) > most:
        raise Malformed("a table that is none")
    return value


_PARSERS = {
    "started": _layers,
    "warn": _text,
    "error": _error,
    "outcome": _outcome,
    "bug": _lines,
}
