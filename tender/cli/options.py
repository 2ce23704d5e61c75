"""The command line of a run: a table of its options, and the Config that they make.

Pure. `--help` and the parser both come from the table. An error names the option and says what
would be right.
"""

from __future__ import annotations

import os

from tender import config as conf
from tender.config import BlockDescriptor, BlockFile, Config, Descriptor, Tap, UserNet, VirtualTime
from tender.dataclass import dataclass, replace
from tender.errors import DeviceError, InvalidValue, UsageError, shown
from tender.image.manifest import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Value = TypeVar("Value")
    Suboptions = dict[str, "Suboption"]


@dataclass
class CommandLine:
    """A parsed command line; `config` is None when no kernel is named."""

    config: Config | None
    help: bool = False
    version: bool = False
    verbose: bool = False


class Suboption:
    """A `,KEY=VALUE` (or `,KEY`) of an option that attaches a device.

    It sets `field` of the device's value to what `parse` makes of VALUE; without `parse` it is a
    flag, and with `is_flag` it can be one.
    """

    def __init__(
        self,
        value: str,
        field: str,
        parse: Callable[[str], object] | None,
        help: str,
        *,
        is_flag: bool = False,
    ) -> None:
        self.value = value  # as --help shows it
        self.field = field
        self.parse = parse
        self.help = help
        self.is_flag = is_flag or parse is None

    def spelling(self, key: str) -> str:
        """As --help and errors show it."""
        value = f"={self.value}" if self.parse else ""
        return f"{key}[{value}]" if value and self.is_flag else f"{key}{value}"


class Option:
    """An option of a run: its name, its value in --help, what it sets, and its help.

    It sets `field` (of Config, or of CommandLine) to what `parse` makes of its value; a flag has
    no `parse` and sets it to `constant`. Without `help`, it is not in the list of --help.

    With `parse_solo5` its name may be followed by a device's (`:NAME`, Solo5's spelling, in which
    this reads the value), and it adds to `field`.
    """

    def __init__(
        self,
        name: str,
        value: str,
        field: str,
        parse: Callable[[str], Any] | None,
        help: str,
        suboptions: Suboptions | None = None,
        *,
        constant: bool = True,
        parse_solo5: Callable[[str], Any] | None = None,
    ) -> None:
        self.name = name
        self.value = value
        self.field = field
        self.parse = parse
        self.help = help
        self.suboptions = suboptions or {}
        self.constant = constant
        self.parse_solo5 = parse_solo5


# What solo5-hvt prints of a wrong value, which its users' scripts look for.
_SOLO5_TEXTS = {"sector_size": "Block size must be a multiple of 2 greater than or equal 512"}


def is_solo5_name(program: str) -> bool:
    """Whether the command was started under the name of the tender it stands in for."""
    return program.startswith("solo5-hvt")


def has_solo5_spelling(arguments: list[str]) -> bool:
    """Whether an option names its device as Solo5 has it: `--net:NAME=TAP`."""
    for argument in arguments:
        if argument == "--" or not argument.startswith("-"):
            return False
        if argument.startswith(("--net:", "--net-mac:", "--block:", "--block-sector-size:")):
            return True
    return False


# What makes a value of an option's text. What it may be is checked where the value is made.


def _number(text: str) -> int | str:
    return int(text) if conf.is_number(text) else text


def _size(text: str) -> int:
    try:
        return conf.parse_size(text)
    except ValueError:
        raise UsageError(
            f"{shown(text)} is not a size: a number of MiB, or one with a unit, as in 64M"
        ) from None


def _rate(text: str) -> int:
    try:
        return conf.parse_size(text, unit="B")
    except ValueError:
        raise UsageError(
            f"{shown(text)} is not a rate: bytes per second, as in 64K or 1M"
        ) from None


def _trace(text: str) -> int | str:
    return 2 if text == "-" else _descriptor(text) if text[0] == "@" else text


def _descriptor(text: str) -> int:
    """`@3`."""
    try:
        number: int = conf.as_descriptor("fd", _number(text[1:]))
    except InvalidValue as error:
        raise UsageError(f"{shown(text)}: {text[1:]!r} is not {error.expected}") from None
    return number


def _clock(text: str) -> VirtualTime | None:
    """`host`, or `virtual,start=2026-01-01T12:00:00,tick=1000`."""
    kind, *options = text.split(",")
    if kind not in ("host", "virtual") or (kind == "host" and options):
        raise UsageError(f"{shown(text)} is neither host nor virtual[,start=WHEN][,tick=NS]")
    return None if kind == "host" else _make(VirtualTime, {}, options, _CLOCK)


def _instant(text: str) -> int:
    """Seconds since the epoch, or a date in ISO 8601 (UTC if it names no zone) -> nanoseconds."""
    if conf.is_number(text):
        seconds = int(text)
    else:
        from datetime import datetime, timezone

        try:
            when = datetime.fromisoformat(text.removesuffix("Z"))
        except ValueError:
            raise UsageError(f"{shown(text)} is not a date, as in 2026-01-01T12:00:00") from None
        seconds = int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())
    return seconds * 1_000_000_000


def _interface(text: str) -> Tap | Descriptor:
    """`tap0` or `@3`, as Solo5 has it."""
    try:
        return _net_device(text, [])
    except UsageError as error:
        hint = "; suboptions go with --net, as in --net TAP,create" if "," in text else ""
        raise UsageError(f"{error}{hint}") from None


def _net(text: str) -> Tap | Descriptor | UserNet:
    """`tap0,create,addr=10.0.0.1/24,mtu=9000,bridge=br0,mac=...`, `@3,mtu=9000` or `user:80:80`."""
    first, *options = text.split(",")
    if first == "user" or first.startswith("user:"):
        forward = first[len("user:") :]
        return _user_net([forward, *options] if forward else options)
    return _net_device(first, options)


def _net_device(first: str, options: list[str]) -> Tap | Descriptor:
    if first.startswith("@"):
        return _make(Descriptor, {"fd": _descriptor(first)}, options, _NET_DESCRIPTOR)
    return _make(Tap, {"name": first}, options, _TAP)


def _user_net(options: list[str]) -> UserNet:
    """`8080:80,8443:443,udp:5353:53,addr=10.0.0.2/24,gateway=10.0.0.1,host`."""
    forwards: dict[str, dict[int | str, int]] = {"forward": {}, "forward_udp": {}}
    others: list[str] = []
    for option in options:
        protocol, _, rest = option.partition(":")
        if option.partition("=")[0] in _USER:
            others.append(option)
        elif protocol == "udp":
            _forward(rest, forwards["forward_udp"])
        else:
            _forward(option.removeprefix("tcp:"), forwards["forward"])
    return _make(UserNet, forwards, others, _USER)


def _forward(text: str, forwards: dict[int | str, int]) -> None:
    """`8080:80` or `0.0.0.0:8080:80`."""
    outside, _, inside = text.rpartition(":")
    try:
        one: dict[int | str, int] = conf.as_forwards("", {outside: inside})
    except InvalidValue:
        raise UsageError(
            f"{shown(text)} is not HOST:GUEST (ports), ADDRESS:HOST:GUEST, udp:HOST:GUEST, "
            f"{_names(_USER)}"
        ) from None
    if one.keys() & forwards.keys():
        raise UsageError(f"port {outside} is forwarded twice")
    forwards.update(one)


def _block(text: str) -> BlockFile | BlockDescriptor:
    """`disk.img,ro,overlay=64M,sector-size=4096` or `@3,ro`; a path may have commas of its own."""
    options: list[str] = []
    while True:
        rest, comma, last = text.rpartition(",")
        if not comma or not _is_suboption(last, _BLOCK):
            break
        options.insert(0, last)
        text = rest
    if text.startswith("@") and text[1:].isdigit():
        return _make(BlockDescriptor, {"fd": _descriptor(text)}, options, _BLOCK_DESCRIPTOR)
    return _make(BlockFile, {"path": text}, options, _BLOCK)


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
    return bool(suboption.parse and value) if equals else suboption.is_flag


def _names(suboptions: Suboptions) -> str:
    return ", ".join(each.spelling(key) for key, each in suboptions.items())


# fmt: off
_MTU = Suboption("N", "mtu", _number, "its MTU")
_MAC = Suboption("MAC", "mac", str, "the guest's MAC address (default: random)")
_TAP: Suboptions = {
    "create": Suboption("", "create", None, "make the tap; it is gone when the guest ends"),
    "addr": Suboption("ADDR/LEN", "addr", str,
                      "give the made tap an address (more than one\nworks), as in 10.0.0.1/24"),
    "bridge": Suboption("BR", "bridge", str, "... or put it on a bridge"),
    "mtu": _MTU,
    "mac": _MAC,
}
_USER: Suboptions = {
    "addr": Suboption("ADDR/LEN", "address", str, "the guest's address (default 10.0.0.2/24)"),
    "gateway": Suboption("ADDR", "gateway", str, "... and its way out (default 10.0.0.1)"),
    "mtu": _MTU,
    "mac": _MAC,
    "host": Suboption("", "reach_host", None,
                      "the gateway is the host's 127.0.0.1 (so with UDP)"),
}
_NET_DESCRIPTOR: Suboptions = {"mtu": _MTU, "mac": _MAC}
_BLOCK: Suboptions = {
    "ro": Suboption("", "readonly", None, "read-only (a writable image is locked)"),
    "overlay": Suboption("SIZE", "overlay", _size,
                         "the image stays as it is; what the guest writes is\n"
                         "in memory, at most SIZE, and gone with it (default:\n"
                         "a quarter of the machine's memory, at most 1G)", is_flag=True),
    "sector-size": Suboption("N", "sector_size", _number, "block size in bytes (default 512)"),
}
_BLOCK_DESCRIPTOR: Suboptions = {key: _BLOCK[key] for key in ("ro", "sector-size")}
_CLOCK: Suboptions = {
    "start": Suboption("WHEN", "start_ns", _instant,
                       "from this date (as 2026-01-01T12:00:00) or second on"),
    "tick": Suboption("NS", "tick_ns", _number, "what a reading takes (default 1000 ns)"),
}

OPTIONS = (
    Option("--mem", "SIZE", "mem_bytes", _size,
           "guest memory: MiB, or with a unit as in 64M, 1G\n"
           "(default 512; a multiple of 2 MiB, at most 4G)"),
    Option("--net", "[NAME=]TAP", "net", _net,
           "attach a tap interface; NAME as the guest's\n"
           "manifest has it, needed if there are several", _TAP, parse_solo5=_interface),
    Option("--net", "[NAME=]user", "net", _net,
           "a network through passt: needs no root and no tap.\n"
           "With user:8080:80, port 8080 of 127.0.0.1 is the\n"
           "guest's port 80; user:ADDRESS:8080:80 takes another\n"
           "address, user:udp:5353:53 UDP; more follow with commas", _USER, parse_solo5=_interface),
    Option("--net", "[NAME=]@FD", "net", _net,
           "attach an open descriptor: a tap, or a datagram or\n"
           "seqpacket socket with one frame per message", _NET_DESCRIPTOR, parse_solo5=_interface),
    Option("--net-mac", "NAME=MAC", "macs", str, "", parse_solo5=str),
    Option("--block", "[NAME=]FILE", "block", _block,
           "attach a disk image or block device", _BLOCK, parse_solo5=BlockFile),
    Option("--block", "[NAME=]@FD", "block", _block,
           "attach an open descriptor of a file or memfd", _BLOCK_DESCRIPTOR,
           parse_solo5=BlockFile),
    Option("--disk", "FILE", "block", _block, ""),
    Option("--block-sector-size", "NAME=N", "sector_sizes", _number, "", parse_solo5=_number),
    Option("--console-limit", "RATE", "console_limit", _rate,
           "drop what the guest prints beyond so many bytes per\nsecond, as in 64K or 1M"),
    Option("--dumpcore", "DIR", "dumpcore", str, "write a core file there if the guest aborts"),
    Option("--cpu", "auto|kvm|native|soft", "cpu", str,
           "what runs the guest: KVM where it is, else a CPU in\n"
           "software (default: auto, or what PTENDER_CPU says);\n"
           "native: a process of its own, without KVM"),
    Option("--clock", "virtual", "clock", _clock,
           "the guest's time advances only as the guest reads it", _CLOCK),
    Option("--instructions", "N", "instructions", _number,
           "end the guest after N instructions (software CPU)"),
    Option("--sandbox", "on|require|off", "sandbox", str,
           "on: confine the tender before the guest runs, as far\n"
           "as this machine can; require: all of it, or do not\n"
           "run; off: not at all"),
    Option("--user", "NAME|UID[:GROUP|:GID]", "user", str,
           "who the tender becomes when root starts it\n"
           "(default: a user of its own, 0x70000000 + PID)"),
    Option("--hugepages", "", "hugepages", None,
           "ask the kernel for pages of 2 MiB for the guest"),
    Option("--no-net-ring", "", "net_ring", None,
           "do not offer the network ring to the guest", constant=False),
    Option("--net-ring", "", "net_ring", None, "offer it even where it is not expected to help"),
    Option("--engine", "c|python", "engine", str,
           "what answers most hypercalls: compiled code (default)\n"
           "or the Python handlers, which are the reference"),
    Option("--trace", "FILE", "trace", _trace,
           "write a line of JSON there for each hypercall; - is\n"
           "standard error, @FD an open descriptor"),
    Option("--verbose", "", "verbose", None,
           "show the layers of the sandbox, how the guest ended\nand what its devices did"),
    Option("--version", "", "version", None, "the version, and the ABI version"),
    Option("--help", "", "help", None, "this text"),
)
# fmt: on
_BY_NAME = {option.name: option for option in OPTIONS}
_SHORT = {"-v": "--verbose", "-h": "--help"}
_NO_GDB = "a gdb server is not part of this version"
_HINTS = {
    "--gdb": _NO_GDB,
    "--gdb-port": _NO_GDB,
    "-m": "guest memory is --mem SIZE",
    "-p": "a port of the host is --net user:8080:80",
    "--tap": "a tap is --net TAP",
}
_COLUMN = 26  # where the help of an option begins

_TOOLS = """\
       {program} inspect FILE [--json]
       {program} policy [--bpf|--json] [OPTIONS] KERNEL [ARGS]
       {program} build SOURCE... [--manifest FILE] -o KERNEL
       {program} image KERNEL -t NAME:TAG [-o FILE|DIR] [--block NAME=FILE]
       {program} demo [ARGS]
"""

_USAGE = """\
usage: {program} [OPTIONS] [--] KERNEL [ARGS]
{tools}
Run KERNEL, a unikernel for Solo5's hvt target; ARGS are its command line,
with all that follows KERNEL, options too.

{options}
Solo5's own spelling works too: --mem=MIB, --net:NAME=TAP, --net:NAME=@FD,
--net-mac:NAME=MAC, --block:NAME=FILE, --block-sector-size:NAME=N,
--net=TAP, --disk=FILE, --dumpcore=DIR, --no-net-ring."""

DEMO_USAGE = """\
usage: {program} [OPTIONS] demo [ARGS]

Run the guest that comes with the package: it prints ARGS, its command line,
and ends. OPTIONS are those of any guest; see {program} --help."""


def with_demo(line: CommandLine) -> CommandLine:
    """The same, where the kernel `demo` is the guest that comes with the package."""
    if line.config is None or line.config.kernel != "demo":
        return line
    return replace(line, config=replace(line.config, kernel=demo_kernel()))


def demo_kernel() -> str:
    """The path of guest-bindings/samples/hello.c, built."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "guests", "hello-x86_64.hvt")


def usage(program: str) -> str:
    """The text of --help."""
    tools = "" if is_solo5_name(program) else _TOOLS.format(program=program)
    return _USAGE.format(program=program, tools=tools, options=_options_help())


def _options_help() -> str:
    short = {name: letter for letter, name in _SHORT.items()}
    seen: set[Suboption] = set()
    text = ""
    for option in OPTIONS:
        if option.help:
            letter = f"{short[option.name]}, " if option.name in short else ""
            text += _row(f"  {letter}{option.name} {option.value}", option.help)
        for key, each in option.suboptions.items():
            if each not in seen:
                seen.add(each)
                text += _row(f"      ,{each.spelling(key)}", each.help)
    return text


def _row(left: str, help: str) -> str:
    first, *more = help.split("\n")
    left = left.rstrip()
    head = f"{left:<{_COLUMN}}" if len(left) < _COLUMN - 1 else f"{left}\n{'':<{_COLUMN}}"
    return "\n".join([head + first, *(" " * _COLUMN + line for line in more)]) + "\n"


def parse(arguments: list[str], see: str = "--help", others: tuple[str, ...] = ()) -> CommandLine:
    """Read a whole command line (without the program's name); raises UsageError.

    Its text sends the user to `see`, and suggests `others` too, options that the caller has read
    itself.
    """
    line = _Line()
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        option, written, name, value = _split(rest, see, others)
        try:
            line.add(option, written, name, value)
        except (UsageError, DeviceError) as error:
            raise UsageError(f"{written}: {error}") from None
        if line.flags.get("help") or line.flags.get("version"):
            return CommandLine(None, **line.flags)
    if rest[:1] == ["--"]:
        rest.pop(0)
    if not rest:
        return CommandLine(None)
    return CommandLine(line.config(rest[0], tuple(rest[1:])), **line.flags)


def _split(
    rest: list[str], see: str, others: tuple[str, ...]
) -> tuple[Option, str, str | None, str]:
    """Take an option from `rest`: it, as it was written, its device's name, and its value."""
    argument = rest.pop(0)
    head, equals, value = argument.partition("=")
    written, colon, name = head.partition(":")
    option = _BY_NAME.get(_SHORT.get(written, written))
    is_flag = option is not None and option.parse is None
    if option is None or (colon and option.parse_solo5 is None) or (is_flag and equals):
        hint = _HINTS.get(written) or _suggestion(written, others)
        raise UsageError(f"Invalid option: `{argument}'; see {see}{hint and f' ({hint})'}")
    if colon and not is_name(name):
        raise UsageError(f"Invalid option: `{argument}': {name!r} is not a device name")
    if is_flag:
        return option, head, None, ""
    if not equals:
        if colon or not rest:
            raise UsageError(f"Invalid option: `{argument}' needs a value, as in {head}=VALUE")
        value = rest.pop(0)
    if not value:
        raise UsageError(f"Invalid option: `{argument}' has an empty value")
    return option, head, name or None, value


def first_option(arguments: tuple[str, ...]) -> str | None:
    """The first of a guest's arguments that looks like an option of the tender."""
    names = (argument.partition("=")[0].partition(":")[0] for argument in arguments)
    return next((name for name in names if name in _BY_NAME), None)


def _suggestion(written: str, others: tuple[str, ...]) -> str:
    """The nearest option, where at most two letters differ."""
    distance, name = min((_distance(written, name), name) for name in (*others, *_BY_NAME))
    return f"did you mean {name}?" if distance <= 2 else ""


def _distance(one: str, other: str) -> int:
    """How many letters must be put in, left out or changed to make `other` of `one`."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        before, row[0] = row[0], count
        for at, wanted in enumerate(other, 1):
            before, row[at] = (
                row[at],
                min(row[at] + 1, row[at - 1] + 1, before + (letter != wanted)),
            )
    return row[-1]


class _Line:
    """What has been read of a command line so far."""

    def __init__(self) -> None:
        self.flags: dict[str, bool] = {}  # of CommandLine
        self._fields: dict[str, Any] = {}  # of Config
        self._texts: dict[str, str] = {}  # what they were made of, for errors
        self._devices: dict[str, list[tuple[str | None, Any]]] = {"net": [], "block": []}
        self._of_devices: dict[str, dict[str, tuple[str, Any]]] = {"macs": {}, "sector_sizes": {}}

    def add(self, option: Option, written: str, name: str | None, text: str) -> None:
        parse = option.parse_solo5 if name else option.parse
        if name is None and (option.field in self._devices or option.field in self._of_devices):
            name, text = _split_name(text)
        value = parse(text) if parse else option.constant
        if option.field in self._devices:
            self._devices[option.field].append((name, value))
        elif option.field in self._of_devices:
            if name is None:
                raise UsageError(f"name the device: {option.name} NAME={text}")
            self._of_devices[option.field][name] = written, value
        elif option.field in CommandLine.__annotations__:
            self.flags[option.field] = True
        else:
            self._fields[option.field] = value
            self._texts[option.field] = f"{written}: {shown(text)}"

    def config(self, kernel: str, arguments: tuple[str, ...]) -> Config:
        net = self._with("net", "macs", "mac")
        block = self._with("block", "sector_sizes", "sector_size")
        try:
            return Config(kernel, arguments, net=net, block=block, **self._fields)
        except InvalidValue as error:
            text = self._texts.get(error.name)
            raise UsageError(f"{text} is not {error.expected}" if text else str(error)) from None

    def _with(self, kind: str, given: str, field: str) -> tuple[tuple[str | None, Any], ...]:
        """The devices of a kind, with their --net-mac or --block-sector-size."""
        devices, values = [], self._of_devices[given]
        for name, device in self._devices[kind]:
            written, value = values.pop(name, ("", None)) if name else ("", None)
            try:
                devices.append((name, replace(device, **{field: value}) if written else device))
            except InvalidValue as error:
                text = f"{written}: {shown(value)} is not {error.expected}"
                solo5 = _SOLO5_TEXTS.get(field)
                raise UsageError(f"{text}: {solo5}" if solo5 else text) from None
        for name, (written, _) in values.items():
            raise UsageError(
                f"{written.partition(':')[0]}:{name}: nothing is attached with --{kind}:{name}"
            )
        return tuple(devices)


def _split_name(text: str) -> tuple[str | None, str]:
    """`service=tap0` -> its name and the rest; without a name, None."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and is_name(name) else (None, text)
