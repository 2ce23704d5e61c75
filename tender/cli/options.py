"""The words of a command line: which options there are, and what they make of a Config.

The rule here: pure. Every option is one row of a table, with its help; an error names the word and
says what would be right.
"""

from __future__ import annotations

from tender import config as conf
from tender.boot import layout
from tender.config import BlockDescriptor, BlockFile, Config, Descriptor, Tap, UserNet, VirtualTime
from tender.dataclass import dataclass, replace
from tender.errors import UsageError
from tender.image.manifest import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    NetWord = Tap | Descriptor | UserNet
    BlockWord = BlockFile | BlockDescriptor


@dataclass
class CommandLine:
    """A parsed command line; `config` is None when no kernel is named."""

    config: Config | None
    help: bool = False
    version: bool = False
    verbose: bool = False


def is_solo5_name(program: str) -> bool:
    """Whether the command was started under the name of the tender it stands in for."""
    return program.startswith("solo5-hvt")


def has_solo5_spelling(arguments: list[str]) -> bool:
    """Whether an option names its device as Solo5 has it: `--net:NAME=TAP`."""
    for word in arguments:
        if word == "--" or not word.startswith("-"):
            return False
        if word.startswith(("--net:", "--net-mac:", "--block:", "--block-sector-size:")):
            return True
    return False


class _Parser:
    """What has been read so far."""

    def __init__(self, see: str = "--help", others: tuple[str, ...] = ()) -> None:
        self.see, self.others = see, others  # for what to say of a word that is no option
        self.mem_bytes = layout.MEM_DEFAULT
        self.dumpcore: str | None = None
        self.net: list[tuple[str | None, NetWord]] = []
        self.block: list[tuple[str | None, BlockWord]] = []
        self.macs: dict[str, bytes] = {}
        self.sector_sizes: dict[str, int] = {}
        self.more: dict[str, Any] = {}  # fields of the Config that are as they were said
        self.help = self.version = self.verbose = False

    # Options with a value: (word for messages, device name or None, value).

    def opt_mem(self, _word: str, _name: str | None, value: str) -> None:
        self.mem_bytes = _parsed("Malformed argument to --mem", conf.parse_size, value)

    def opt_dumpcore(self, _word: str, _name: str | None, value: str) -> None:
        self.dumpcore = value

    def opt_net(self, word: str, name: str | None, value: str) -> None:
        if name is None:
            name, value = _split_name(value)
            self.net.append((name, _parse_net(word, value)))
        else:
            self.net.append((name, _parse_interface(word, value)))

    def opt_net_mac(self, word: str, name: str | None, value: str) -> None:
        if name is None:
            name, value = _split_name(value)
        if name is None:
            raise UsageError(f"{word}: name the device: --net-mac NAME={value}")
        self.macs[name] = _parsed(word, conf.parse_mac, value)

    def opt_block(self, word: str, name: str | None, value: str) -> None:
        if name is None:
            name, value = _split_name(value)
            self.block.append((name, _parse_block(word, value)))
        else:
            self.block.append((name, BlockFile(value)))

    def opt_sector_size(self, word: str, name: str | None, value: str) -> None:
        if name is None:
            name, value = _split_name(value)
        if name is None:
            raise UsageError(f"{word}: name the device: --block-sector-size NAME={value}")
        self.sector_sizes[name] = _number(word, value)

    def opt_console_limit(self, word: str, _name: str | None, value: str) -> None:
        self.more["console_limit"] = _parsed(word, conf.parse_rate, value)

    def opt_engine(self, word: str, _name: str | None, value: str) -> None:
        self.more["engine"] = _one_of(word, value, conf.ENGINES)

    def opt_cpu(self, word: str, _name: str | None, value: str) -> None:
        self.more["cpu"] = _one_of(word, value, conf.CPUS)

    def opt_trace(self, word: str, _name: str | None, value: str) -> None:
        if value == "-":
            self.more["trace"] = 2
        else:
            self.more["trace"] = _number(word, value[1:]) if value[0] == "@" else value

    def opt_clock(self, word: str, _name: str | None, value: str) -> None:
        self.more["clock"] = _parse_clock(word, value)

    def opt_instructions(self, word: str, _name: str | None, value: str) -> None:
        self.more["instructions"] = _number(word, value)

    def opt_sandbox(self, word: str, _name: str | None, value: str) -> None:
        self.more["sandbox"] = _one_of(word, value, conf.SANDBOXES)

    def opt_user(self, _word: str, _name: str | None, value: str) -> None:
        self.more["user"] = value

    # Flags.

    def flag_help(self) -> None:
        self.help = True

    def flag_version(self) -> None:
        self.version = True

    def flag_verbose(self) -> None:
        self.verbose = True

    def flag_hugepages(self) -> None:
        self.more["hugepages"] = True

    def flag_no_net_ring(self) -> None:
        self.more["net_ring"] = False

    def flag_net_ring(self) -> None:
        self.more["net_ring"] = True

    def flag_gdb(self) -> None:
        raise UsageError("--gdb: a gdb server is not part of this version")

    def config(self, kernel: str, args: tuple[str, ...]) -> Config:
        net = [(name, self._with_mac(name, spec)) for name, spec in self.net]
        block = [(name, self._with_sector_size(name, spec)) for name, spec in self.block]
        for option, left in (("net-mac", self.macs), ("block-sector-size", self.sector_sizes)):
            for name in left:
                kind = option.split("-")[0]
                raise UsageError(f"--{option}:{name}: nothing is attached with --{kind}:{name}")
        devices = tuple(net), tuple(block)
        return Config(kernel, args, self.mem_bytes, *devices, self.dumpcore, **self.more)

    def _with_mac(self, name: str | None, spec: NetWord) -> NetWord:
        mac = self.macs.pop(name, None) if name else None
        return replace(spec, mac=mac) if mac else spec

    def _with_sector_size(self, name: str | None, spec: BlockWord) -> BlockWord:
        size = self.sector_sizes.pop(name, None) if name else None
        return spec if size is None else replace(spec, sector_size=size)


_FLAGS: dict[str, Callable[[_Parser], None]] = {
    "--help": _Parser.flag_help,
    "-h": _Parser.flag_help,
    "--version": _Parser.flag_version,
    "--verbose": _Parser.flag_verbose,
    "-v": _Parser.flag_verbose,
    "--hugepages": _Parser.flag_hugepages,
    "--no-net-ring": _Parser.flag_no_net_ring,
    "--net-ring": _Parser.flag_net_ring,
    "--gdb": _Parser.flag_gdb,
}

_VALUES: dict[str, Callable[[_Parser, str, str | None, str], None]] = {
    "--mem": _Parser.opt_mem,
    "--dumpcore": _Parser.opt_dumpcore,
    "--console-limit": _Parser.opt_console_limit,
    "--engine": _Parser.opt_engine,
    "--net": _Parser.opt_net,
    "--net-mac": _Parser.opt_net_mac,
    "--block": _Parser.opt_block,
    "--disk": _Parser.opt_block,
    "--block-sector-size": _Parser.opt_sector_size,
    "--cpu": _Parser.opt_cpu,
    "--clock": _Parser.opt_clock,
    "--instructions": _Parser.opt_instructions,
    "--sandbox": _Parser.opt_sandbox,
    "--user": _Parser.opt_user,
    "--trace": _Parser.opt_trace,
    "--gdb-port": lambda parser, *_: parser.flag_gdb(),
}

_NAMED = ("--net", "--net-mac", "--block", "--block-sector-size")  # may have :NAME

_TOOLS = """\
       {program} inspect FILE [--json]
       {program} policy [--bpf|--json] [OPTIONS] KERNEL [ARGS]
       {program} build SOURCE... [--manifest FILE] -o KERNEL
       {program} demo [ARGS]
"""

_USAGE = """\
usage: {program} [OPTIONS] [--] KERNEL [ARGS]
{tools}
Run KERNEL, a unikernel for Solo5's hvt target; ARGS are its command line.

  --mem SIZE              guest memory: MiB, or with a unit as in 64M, 1G
                          (default 512; a multiple of 2 MiB, at most 4G)
  --net [NAME=]TAP        attach a tap interface; NAME as the guest's
                          manifest has it, needed if there are several
      ,create             make the tap; it is gone when the guest ends
      ,addr=A.B.C.D/LEN   give the made tap an address (more than one works)
      ,bridge=BR          ... or put it on a bridge
      ,mtu=N  ,mac=MAC    its MTU; the guest's MAC address (default: random)
  --net [NAME=]user       a network through passt: needs no root and no tap
      :8080:80            port 8080 of 127.0.0.1 is the guest's port 80 (or
                          :ADDRESS:8080:80); more follow with commas
      ,udp:5353:53        the same for UDP
      ,addr=A.B.C.D/LEN   the guest's address (default 10.0.0.2/24)
      ,gateway=A.B.C.D    ... and its way out (default 10.0.0.1)
      ,mtu=N  ,mac=MAC    as above
      ,host               the gateway is the host's 127.0.0.1 (so with UDP)
  --net [NAME=]@FD        attach an open descriptor: a tap, or a datagram or
                          seqpacket socket with one frame per message
  --block [NAME=]FILE     attach a disk image or block device
      ,ro                 read-only (a writable image is locked)
      ,overlay            the image stays as it is; what the guest writes is
                          in memory, and gone with it
      ,sector-size=N      block size in bytes (default 512)
  --block [NAME=]@FD      attach an open descriptor of a file or memfd
  --console-limit RATE    drop what the guest prints beyond so many bytes per
                          second, as in 64K or 1M
  --dumpcore DIR          write a core file there if the guest aborts
  --cpu auto|kvm|soft     what runs the guest: KVM where it is, else a CPU in
                          software (default: auto, or what PTENDER_CPU says)
  --clock virtual         the guest's time goes on only as the guest reads it
      ,start=WHEN         from this date (as 2026-01-01T12:00:00) or second on
      ,tick=NS            what a reading takes (default 1000 ns)
  --instructions N        end the guest after N instructions (software CPU)
  --sandbox on|require|off
                          on: confine the tender before the guest runs, as far
                          as this machine can; require: all of it, or do not
                          run; off: not at all
  --user NAME|UID[:GROUP|:GID]
                          who the tender becomes when root starts it (65534)
  --hugepages             ask the kernel for pages of 2 MiB for the guest
  --no-net-ring           do not offer the network ring; --net-ring: offer it
                          even where it is not expected to help
  --engine c|python       what answers most hypercalls: compiled code (default)
                          or the Python handlers, which are the reference
  --trace FILE            write a line of JSON there for each hypercall; - is
                          standard error, @FD an open descriptor
  -v, --verbose           say what the sandbox consists of, how the guest ended
                          and what its devices did
  --version               the version, and the ABI version
  -h, --help              this text

Solo5's own spelling works too: --mem=MIB, --net:NAME=TAP, --net:NAME=@FD,
--net-mac:NAME=MAC, --block:NAME=FILE, --block-sector-size:NAME=N,
--net=TAP, --disk=FILE, --dumpcore=DIR, --no-net-ring."""

# What is typed in the place of commands that other programs have.
NO_COMMANDS = {
    "help": "{program} --help",
    "version": "{program} --version",
    "run": "{program} [OPTIONS] KERNEL [ARGS]; see {program} --help",
}

_DEMO_USAGE = """\
usage: {program} [OPTIONS] demo [ARGS]

Run the guest that comes with the package: it prints ARGS, its command line,
and ends. OPTIONS are those of any guest; see {program} --help."""


def demo_usage(program: str) -> str:
    return _DEMO_USAGE.format(program=program)


def usage(program: str) -> str:
    tools = "" if is_solo5_name(program) else _TOOLS.format(program=program)
    return _USAGE.format(program=program, tools=tools)


def parse(arguments: list[str], see: str = "--help", others: tuple[str, ...] = ()) -> CommandLine:
    """Read a whole command line (without the program's name); raises UsageError.

    Its text sends the user to `see`, and to `others` too, options that the caller has read itself.
    """
    parser = _Parser(see, others)
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        _parse_option(parser, rest)
        if parser.help or parser.version:
            return CommandLine(None, help=parser.help, version=parser.version)
    if rest[:1] == ["--"]:
        rest.pop(0)
    if not rest:
        return CommandLine(None)
    config = parser.config(rest[0], tuple(rest[1:]))
    return CommandLine(config, verbose=parser.verbose)


def _parse_option(parser: _Parser, rest: list[str]) -> None:
    word = rest.pop(0)
    flag = _FLAGS.get(word)
    if flag is not None:
        flag(parser)
        return
    head, equals, value = word.partition("=")
    option, colon, name = head.partition(":")
    handler = _VALUES.get(option)
    if handler is None or (colon and option not in _NAMED):
        hint = _suggestion(option, parser.others)
        raise UsageError(f"Invalid option: `{word}'; see {parser.see}{hint}")
    if colon and not is_name(name):
        raise UsageError(f"Invalid option: `{word}': {name!r} is not a device name")
    if not equals:
        if colon or not rest:
            raise UsageError(f"Invalid option: `{word}' needs a value, as in {head}=VALUE")
        value = rest.pop(0)
    if not value:
        raise UsageError(f"Invalid option: `{word}' has an empty value")
    handler(parser, head, name or None, value)


def _suggestion(option: str, others: tuple[str, ...]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(option, [*others, *_FLAGS, *_VALUES], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _split_name(value: str) -> tuple[str | None, str]:
    """`service=tap0` -> its name and the rest; without a name, None."""
    name, equals, rest = value.partition("=")
    return (name, rest) if equals and is_name(name) else (None, value)


def _one_of(word: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{word}: {value!r} is none of {', '.join(choices)}")
    return value


def _number(word: str, text: str) -> int:
    if not conf.is_number(text):
        raise UsageError(f"{word}: {text!r} is not a number")
    return int(text)


def _parse_clock(word: str, value: str) -> VirtualTime | None:
    """`host`, or `virtual,start=2026-01-01T12:00:00,tick=1000`."""
    kind, *options = value.split(",")
    if kind not in ("host", "virtual") or (kind == "host" and options):
        raise UsageError(f"{word}: {value!r} is neither host nor virtual[,start=WHEN][,tick=NS]")
    if kind == "host":
        return None
    fields: dict[str, int] = {}
    for option in options:
        key, _, text = option.partition("=")
        if key == "start" and text:
            fields["start_ns"] = _instant(word, text)
        elif key == "tick" and text and _number(word, text):
            fields["tick_ns"] = _number(word, text)
        else:
            raise UsageError(f"{word}: {option!r} is neither start=WHEN nor tick=NANOSECONDS")
    return VirtualTime(**fields)


def _instant(word: str, text: str) -> int:
    """Seconds since the epoch, or a date in ISO 8601 (UTC if it says nothing) -> nanoseconds."""
    if text.isascii() and text.isdigit():
        seconds = int(text) if conf.is_number(text) else -1
    else:
        from datetime import datetime, timezone

        try:
            when = datetime.fromisoformat(text.removesuffix("Z"))
        except ValueError:
            raise UsageError(f"{word}: {text!r} is no date, as in 2026-01-01T12:00:00") from None
        seconds = int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())
    if not 0 <= seconds < 1 << 34:
        raise UsageError(f"{word}: {text!r} is not between 1970 and 2514")
    return seconds * 1_000_000_000


def _parse_interface(word: str, value: str) -> Tap | Descriptor:
    """`tap0` or `@3`."""
    if value.startswith("@"):
        return Descriptor(_number(word, value[1:]))
    if not value:
        raise UsageError(f"{word}: name an interface, or a descriptor as in @3")
    return Tap(value)


def _parse_net(word: str, value: str) -> NetWord:
    """`tap0,create,addr=10.0.0.1/24,mtu=9000,bridge=br0,mac=...`, `@3,mtu=9000` or `user:80:80`."""
    first, *options = value.split(",")
    if first == "user" or first.startswith("user:"):
        return _parse_user(word, first[len("user:") :], options)
    spec = _parse_interface(word, first)
    changes: dict[str, object] = {}
    for option in options:
        key, equals, text = option.partition("=")
        _net_option(word, option, key, text if equals else None, changes)
    if isinstance(spec, Descriptor) and changes.keys() - {"mtu", "mac"}:
        raise UsageError(f"{word}: only mtu and mac go with a descriptor")
    if isinstance(spec, Tap) and changes.keys() - {"mac", "create"} and "create" not in changes:
        raise UsageError(f"{word}: addr, mtu and bridge set up a new tap: add ,create")
    return replace(spec, **changes)


def _parse_user(word: str, first: str, options: list[str]) -> UserNet:
    """`user:8080:80,8443:443,udp:5353:53,addr=10.0.0.2/24,gateway=10.0.0.1,host`."""
    fields: dict[str, Any] = {"forward": {}, "forward_udp": {}}
    for option in [first, *options] if first else options:
        key, equals, text = option.partition("=")
        if key == "addr" and text:
            fields["address"] = _parsed(f"{word}: addr", conf.parse_address, text)
        elif key == "gateway" and text:
            fields["gateway"] = text
        elif key == "mtu" and text:
            fields["mtu"] = _mtu(word, text)
        elif key == "mac" and text:
            fields["mac"] = _parsed(f"{word}: mac", conf.parse_mac, text)
        elif option == "host":
            fields["reach_host"] = True
        elif not equals and option.startswith("udp:"):
            _forward(word, option[len("udp:") :], fields["forward_udp"])
        else:
            _forward(word, option.removeprefix("tcp:"), fields["forward"])
    return UserNet(**fields)


def _forward(word: str, text: str, forwards: dict[str, int]) -> None:
    """`8080:80` or `0.0.0.0:8080:80`."""
    outside, colon, inside = text.rpartition(":")
    address, with_address, port = outside.rpartition(":")
    numbers = [int(part) for part in (port, inside) if conf.is_number(part)]
    right = len(numbers) == 2 and all(0 < number < 1 << 16 for number in numbers)
    if not colon or not right or (with_address and not address):
        raise UsageError(
            f"{word}: {text!r} is none of PORT:PORT (the host's, the guest's), ADDRESS:PORT:PORT, "
            "udp:PORT:PORT, addr=ADDRESS/LENGTH, gateway=ADDRESS, mtu=N, mac=ADDRESS, host"
        )
    if outside in forwards:
        raise UsageError(f"{word}: port {outside} is forwarded twice")
    forwards[outside] = numbers[1]


def _net_option(
    word: str, option: str, key: str, text: str | None, changes: dict[str, object]
) -> None:
    if key == "create" and text is None:
        changes["create"] = True
    elif key == "addr" and text:
        before = changes.get("addr", ())
        changes["addr"] = (*before, _parsed(f"{word}: addr", conf.parse_address, text))  # type: ignore[misc]
    elif key == "mtu" and text:
        changes["mtu"] = _mtu(word, text)
    elif key == "bridge" and text:
        changes["bridge"] = text
    elif key == "mac" and text:
        changes["mac"] = _parsed(f"{word}: mac", conf.parse_mac, text)
    else:
        raise UsageError(
            f"{word}: {option!r} is none of create, addr=ADDRESS/LENGTH, mtu=N, bridge=NAME, "
            "mac=ADDRESS"
        )


def _mtu(word: str, text: str) -> int:
    mtu = _number(f"{word}: mtu", text)
    if not conf.MTU_MIN <= mtu <= conf.MTU_MAX:
        raise UsageError(f"{word}: mtu {mtu} is not {conf.MTU_MIN} to {conf.MTU_MAX}")
    return mtu


def _parsed(word: str, parse: Callable[[str], Any], text: str) -> Any:
    """What one of config's functions makes of it; its error, with the option's name."""
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{word}: {error}") from None


def _parse_block(word: str, value: str) -> BlockWord:
    """`disk.img,ro,overlay,sector-size=4096` or `@3,ro`; a path may have commas of its own."""
    fields: dict[str, Any] = {}
    while True:
        rest, comma, last = value.rpartition(",")
        if comma and last == "ro":
            fields["readonly"] = True
        elif comma and last == "overlay":
            fields["overlay"] = True
        elif comma and last.startswith("sector-size="):
            fields["sector_size"] = _number(f"{word}: sector-size", last.partition("=")[2])
        else:
            break
        value = rest
    if fields.get("overlay") and fields.get("readonly"):
        raise UsageError(f"{word}: ro and overlay: the guest either writes or it does not")
    if not (value.startswith("@") and value[1:].isdigit()):
        return BlockFile(value, **fields)
    if "overlay" in fields:
        raise UsageError(f"{word}: only ro and sector-size go with a descriptor")
    return BlockDescriptor(_number(word, value[1:]), **fields)
