"""The messages between a program, its fork server and the processes of its guests.

The rule here: a job goes to a child that no guest has run in, and is trusted. What a child sends
may come from a guest that has taken it over: JSON of a limited size, checked field by field. What
does not pass is Malformed. Errors are made from a fixed list of types.
"""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import re
import select
import socket
import struct
import termios
from array import array

from tender import backends, errors
from tender.config import Config, VirtualTime
from tender.dataclass import dataclass
from tender.errors import TenderError
from tender.outcome import Counters, NetCounters, Outcome, Statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MESSAGE_MAX = 1 << 16  # bytes
TEXT_MAX = 4000  # characters of an error or a warning
LAYERS_MAX = 16  # of a sandbox; there are fewer
DEVICES_MAX = 64  # of one kind: a manifest has no more entries
FIRST_FD = 128  # the number of a job's first descriptor in the child
FDS_PER_MESSAGE = 250  # Linux takes 253 (SCM_MAX_FD)

# Between a program and its fork server.
FORKED = struct.Struct("=ii")  # a child: its PID and 0, or 0 and an errno
EXITED = struct.Struct("=ii")  # a child's PID and wait status
# Requests for a child: one that does not warm up, or one that does, for this CPU.
COLD = b"c"
WARM = {"kvm": b"k", "native": b"n", "soft": b"s"}

JOB_MAX = 1 << 17  # bytes of a job in a message; a longer one comes in a memfd
# Beside a job and before it; no marshalled job is that short.
JOB_IN_FILE, MORE_FDS, FRESH = b"f", b"+", b"n"

# What the sandbox's handler of SIGSYS writes: a zero byte, with which no JSON begins, three
# letters, the number of the system call and of the architecture (seccomp's AUDIT_ARCH_*).
VIOLATION = struct.Struct("=4siI")
VIOLATION_MAGIC = b"\0SYS"
# What the process of an spt guest writes (tender/spt/code.c): this, and a line on a CPU exception.
# Before that, with DUMP_MAGIC, the name of a core file; empty where it could not be written.
EXCEPTION_MAGIC, DUMP_MAGIC, EXCEPTION_MAX = b"\0CPU", b"\0DMP", 128

REASONS = ("halted", "stopped", "fault", "host")
_I32, _U64 = range(-(1 << 31), 1 << 31), range(1 << 64)
_SIGNALS = range(65)
_CORE = re.compile(r"core\.solo5-(?:hvt|spt)\.[0-9]{1,10}(\.[0-9]{1,2})?")

# The errors that a child may report.
_ERRORS: dict[str, type[TenderError]] = {
    each.__name__: each
    for each in (
        TenderError,
        errors.UsageError,
        errors.ConfigError,
        errors.ImageError,
        errors.SnapshotError,
        errors.ManifestError,
        errors.DeviceError,
        errors.SandboxError,
        errors.HostError,
        errors.GuestFault,
        errors.NotEmulated,
    )
}


class Malformed(Exception):
    """A message that no guest's process sends, unless a guest has taken it over."""

    def __init__(self, what: str) -> None:
        super().__init__(f"malformed message: {what}")


@dataclass
class Job:
    """What a child does: run a guest, with what is the program's own of its process.

    `descriptors` is the number of those that come with it, the current directory last.
    """

    config: Config
    descriptors: int
    cpus: tuple[int, ...]
    umask: int | None = None  # None: the server's
    default_cpu: str = ""  # PTENDER_CPU of the program


def receive(sock: socket.socket, size: int, flags: int = 0) -> bytes | None:
    """A message, which may be empty, of a seqpacket socket; None: its end. Raises OSError."""
    data = sock.recv(size, flags)
    return None if not data and _is_at_end(sock) else data


def _is_at_end(sock: socket.socket) -> bool:
    """Whether nothing more can come. recv(2) gives no bytes for an empty message too."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if not poll.poll(0):
        return False
    waiting = fcntl.ioctl(sock, termios.FIONREAD, bytes(4))
    return not any(waiting)


def receive_descriptors(sock: socket.socket, size: int, fds_max: int) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it, which no exec inherits.

    socket.recv_fds ignores its flags.
    """
    space = socket.CMSG_SPACE(fds_max * array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(packed) - len(packed) % descriptors.itemsize
            descriptors.frombytes(packed[:whole])
    return data, descriptors.tolist()


# The job, from program to child.


def send_job(sock: socket.socket, job: bytes, descriptors: list[int]) -> None:
    """Send what `pack_job` gave, and its descriptors."""
    data = job
    if len(job) >= JOB_MAX:
        with open(os.memfd_create("job"), "w+b") as file:
            file.write(job)
            file.seek(0)
            socket.send_fds(sock, [JOB_IN_FILE], [file.fileno()])
        data = MORE_FDS
    for start in range(0, len(descriptors), FDS_PER_MESSAGE):
        socket.send_fds(sock, [data], descriptors[start : start + FDS_PER_MESSAGE])
        data = MORE_FDS


def take_fresh(sock: socket.socket) -> bool:
    """Wait for what is sent first; whether it is FRESH, which comes before a job."""
    return sock.recv(2, socket.MSG_PEEK) == FRESH and bool(sock.recv(1))


def receive_job(sock: socket.socket) -> tuple[Job, list[int]] | None:
    """A job and its descriptors; None: none will come."""
    data, descriptors = receive_descriptors(sock, JOB_MAX, FDS_PER_MESSAGE)
    if not data:
        return None
    if data == JOB_IN_FILE:
        with open(descriptors.pop(), "rb") as file:
            data = file.read()
    job = unpack_job(data)
    while len(descriptors) < job.descriptors:
        data, more = receive_descriptors(sock, 1, FDS_PER_MESSAGE)
        if not data:
            return None
        descriptors += more
    return job, descriptors


def numbers_in_child(descriptors: Iterable[int]) -> dict[int, int]:
    """The number that each descriptor of a job has in the child."""
    return {fd: FIRST_FD + index for index, fd in enumerate(descriptors)}


def pack_job(job: Job) -> bytes:
    """The bytes of a job whose Config has the child's descriptors; raises ConfigError."""
    _, *rest = job.__dict__.values()
    return marshal.dumps((_plain(job.config), *rest))


def unpack_job(data: bytes) -> Job:
    """What `pack_job` was given. Trusts `data`."""
    config, *rest = marshal.loads(data)
    return Job(_value(config), *rest)


_VALUES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Config,
        VirtualTime,
        backends.Tap,
        backends.Descriptor,
        backends.UserNet,
        backends.BlockFile,
        backends.BlockDescriptor,
        backends.BlockRemote,
        backends.Rate,
    )
}


def _plain(value: Any) -> Any:
    """One of _VALUES as a list of its name and fields; a tuple as a tuple."""
    if value is None or type(value) in (int, str, bytes, bool, float):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(each) for each in value)
    name = type(value).__name__
    if _VALUES.get(name) is type(value):
        return [name, {key: _plain(each) for key, each in value.__dict__.items()}]
    raise errors.ConfigError(f"{value!r}: its type can't be sent to a guest's process")


def _value(plain: Any) -> Any:
    if type(plain) is tuple:
        return tuple(_value(each) for each in plain)
    if type(plain) is list:
        name, fields = plain
        value = _VALUES[name].__new__(_VALUES[name])  # its checks have been made
        value.__dict__.update({key: _value(each) for key, each in fields.items()})
        return value
    return plain


# Reports, from child to program.


def pack(kind: str, value: Any) -> bytes:
    """A message of one kind: started, warning, error, outcome or bug."""
    return json.dumps({kind: value}).encode("ascii")


def pack_error(error: TenderError) -> dict[str, Any]:
    """The type, text and fields of an error."""
    name = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
    fields = {key: getattr(error, key, None) for key in _error_fields(_ERRORS[name])}
    return {"type": name, "text": str(error)[:TEXT_MAX], **fields}


def _error_fields(kind: type[TenderError]) -> dict[str, str]:
    """The attributes of an error beside its text, with their types: what it is made from."""
    types: dict[str, str] = getattr(kind.__init__, "__annotations__", {})
    return {name: types[name] for name in types if name not in ("what", "return")}


def pack_outcome(outcome: Outcome) -> bytes:
    """The message that says how the guest ended."""
    value = dict(outcome.__dict__)
    value["error"] = pack_error(outcome.error) if outcome.error else None
    value["stats"] = _values(outcome.stats)
    return pack("outcome", value)


def parse(data: bytes) -> tuple[str, Any]:
    """The kind and the value of a message; raises Malformed."""
    if data.startswith(EXCEPTION_MAGIC):
        return "exception", _exception(data)
    if data.startswith(DUMP_MAGIC):
        return "core", _exception(data)
    if data[:1] == b"\0":
        return "violation", _violation(data)
    if len(data) > MESSAGE_MAX:
        raise Malformed("too long")
    try:
        message = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    if type(message) is not dict or len(message) != 1:
        raise Malformed("not an object with one member")
    ((kind, value),) = message.items()
    if kind not in _PARSERS:
        raise Malformed("unknown kind")
    return kind, _PARSERS[kind](value)


def _violation(data: bytes) -> int:
    if len(data) != VIOLATION.size or not data.startswith(VIOLATION_MAGIC):
        raise Malformed("not a violation")
    return int(VIOLATION.unpack(data)[1])


def _exception(data: bytes) -> str:
    if len(data) > EXCEPTION_MAX:
        raise Malformed("too long")
    return errors.one_line(data[len(EXCEPTION_MAGIC) :].decode("ascii", "replace"))


def _text(value: Any) -> str:
    """One line that is safe to show, as the command shows it."""
    if type(value) is not str or len(value) > TEXT_MAX:
        raise Malformed("not a text, or too long")
    return errors.one_line(value)


def _lines(value: Any) -> str:
    if type(value) is not str:
        raise Malformed("not a text")
    return "\n".join(_text(line) for line in value.split("\n"))


def _started(value: Any) -> tuple[tuple[str, ...], tuple[str, ...], str, bool, str]:
    """The sandbox's layers that are in force, those that are missing, a notice on the CPU,
    whether the process is the guest from here on, and the name of its file of counters."""
    layers, missing, notice, is_guest, counters = _list(value, 5)
    if type(is_guest) is not bool:
        raise Malformed("not a bool")
    return _texts(layers), _texts(missing), _text(notice), is_guest, _text(counters)


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list or len(value) > LAYERS_MAX:
        raise Malformed("not a list of layers")
    return tuple(map(_text, value))


def _integer(value: Any, among: range) -> int:
    if type(value) is not int or value not in among:
        raise Malformed("integer out of range")
    return value


def _error(value: Any) -> TenderError:
    value = _dict(value, 8)
    name = value.get("type")
    if type(name) is not str or name not in _ERRORS:
        raise Malformed("unknown type of error")
    error = _ERRORS[name].__new__(_ERRORS[name])
    error.args = (_text(value.get("text")),)
    for key, kind in _error_fields(_ERRORS[name]).items():
        field = value.get(key)
        if field is not None:
            among = _U64 if key in ("gpa", "size") else range(1 << 31)
            field = _text(field) if kind.startswith("str") else _integer(field, among)
        setattr(error, key, field)
    return error


def _outcome(value: Any) -> Outcome:
    value = _dict(value, 16)
    if value.get("reason") not in REASONS:
        raise Malformed("unknown reason of an outcome")
    trap, error, registers = (value.get(name) for name in ("trap", "error", "registers"))
    return Outcome(
        value["reason"],
        _integer(value.get("status"), _I32),
        _integer(value.get("signo"), _SIGNALS),
        None if error is None else _error(error),
        None if trap is None else _integers(trap),
        _core(value.get("core")),
        _statistics(value.get("stats")),
        None if registers is None else _integers(registers),
    )


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
    return Counters(*(_integer(each, _U64) for each in _list(value, len(Counters.__annotations__))))


def _list(value: Any, length: int) -> list[Any]:
    if type(value) is not list or len(value) != length:
        raise Malformed("not a list of the right length")
    return value


def _core(value: Any) -> str | None:
    """The path of a core file. Whether it is this guest's is not known here."""
    if value is None:
        return None
    if type(value) is not str or len(value) > TEXT_MAX or "\0" in value:
        raise Malformed("not the path of a core file")
    if not _CORE.fullmatch(os.path.basename(value)):
        raise Malformed("not the path of a core file")
    return value


def _integers(value: Any) -> dict[str, int]:
    return {_text(name): _integer(each, _U64) for name, each in _dict(value, 64).items()}


def _dict(value: Any, most: int = 512) -> dict[str, Any]:
    if type(value) is not dict or len(value) > most:
        raise Malformed("not an object, or too large")
    return value


_PARSERS = {
    "started": _started,
    "warning": _text,
    "error": _error,
    "outcome": _outcome,
    "bug": _lines,
}
