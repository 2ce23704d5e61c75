"""The command line of a run: arguments -> CommandLine, whose Config is what is to run.

Pure. An error names the option as it was written, and says what would be right.
"""

from __future__ import annotations

from tender.cli.options import BY_NAME, SHORT
from tender.config import TARGETS, Config
from tender.dataclass import dataclass, replace
from tender.errors import DeviceError, InvalidValue, UsageError, shown
from tender.image.manifest import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cli.options import Option

# Options that change nothing for a guest whose run is replayed.
_BESIDE_REPLAY = {
    *("replay", "gdb", "console_fd", "console_limit", "trace", "report", "name"),
    *("sandbox", "user", "cpu"),
}
# What solo5-hvt prints of a wrong value, which its users' scripts look for.
_SOLO5_TEXTS = {"sector_size": "Block size must be a multiple of 2 greater than or equal 512"}


@dataclass
class CommandLine:
    """A parsed command line; `config` is None when no kernel is named."""

    config: Config | None
    help: bool = False
    version: bool = False
    verbose: bool = False
    log: str = "text"


def is_solo5_name(program: str) -> bool:
    """Whether the command was started under the name of a tender that it stands in for."""
    return solo5_target(program) is not None


def solo5_target(program: str) -> str | None:
    """The target of the tender that it stands in for: "hvt" or "spt"."""
    target = program.removeprefix("solo5-")[:3]
    return target if program.startswith("solo5-") and target in TARGETS else None


def has_solo5_spelling(arguments: list[str]) -> bool:
    """Whether an option names its device as Solo5 has it: `--net:NAME=TAP`."""
    for argument in arguments:
        if argument == "--" or not argument.startswith("-"):
            return False
        if argument.startswith(("--net:", "--net-mac:", "--block:", "--block-sector-size:")):
            return True
    return False


def with_demo(line: CommandLine) -> CommandLine:
    """The same, where the kernel `demo` is the guest that comes with the package."""
    if line.config is None or line.config.kernel != "demo":
        return line
    return replace(line, config=replace(line.config, kernel=demo_kernel()))


def demo_kernel() -> str:
    """The path of guest-bindings/samples/hello.c, built."""
    return f"{__file__.rpartition('/cli/')[0]}/guests/hello-x86_64.hvt"


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
    if line.restore is not None:
        return CommandLine(line.restored(rest), **line.flags)
    if line.replays():
        return CommandLine(line.replay(rest), **line.flags)
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
    option = BY_NAME.get(SHORT.get(written, written))
    is_flag = option is not None and option.parse is None
    if option is None or (colon and option.parse_solo5 is None) or (is_flag and equals):
        from tender.cli import usage

        hint = usage.hint(written, others)
        raise UsageError(f"Invalid option: `{argument}'; see {see}{hint and f' ({hint})'}")
    if colon and not is_name(name):
        raise UsageError(f"Invalid option: `{argument}': {name!r} is not a device name")
    if is_flag:
        return option, head, None, ""
    if not equals and option.default is not None:
        return option, head, None, option.default
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
    return next((name for name in names if name in BY_NAME), None)


_BY_DEVICE = ("pcap", "net_rate", "block_rate")  # beside what a device is attached to


class _Line:
    """What has been read of a command line so far."""

    def __init__(self) -> None:
        self.flags: dict[str, Any] = {}  # of CommandLine
        self._fields: dict[str, Any] = {}  # of Config
        self._texts: dict[str, str] = {}  # what they were made of, for errors
        self._devices: dict[str, list[tuple[str | None, Any]]] = {
            "net": [],
            "block": [],
            **{name: [] for name in _BY_DEVICE},
        }
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
            self.flags[option.field] = value
        else:
            self._fields[option.field] = value
            self._texts[option.field] = f"{written}: {shown(text)}"

    @property
    def restore(self) -> str | None:
        """The snapshot that goes on."""
        value: str | None = self._fields.get("restore")
        return value

    def restored(self, rest: list[str]) -> Config:
        """What is to go on; `rest` comes after the options."""
        if rest:
            raise UsageError(f"--restore: {shown(rest[0])}: the snapshot has kernel and arguments")
        for field in ("mem_bytes", "clock", "exec_heap"):
            if field in self._fields:
                raise UsageError(f"{self._texts[field].partition(':')[0]}: the snapshot has this")
        return self.config(self._fields.pop("restore"), (), restore=True)

    def config(self, kernel: str, arguments: tuple[str, ...], *, restore: bool = False) -> Config:
        for field in ("clone", "clock_resume"):
            if field in self._fields and not restore:
                raise UsageError(
                    f"{self._texts[field].partition(':')[0]}: this goes with --restore"
                )
        self._set_gdb()
        net = self._with("net", "macs", "mac")
        block = self._with("block", "sector_sizes", "sector_size")
        try:
            self._fields["restore"] = restore
            fields = {name: tuple(self._devices[name]) for name in _BY_DEVICE} | self._fields
            return Config(kernel, arguments, net=net, block=block, **fields)
        except InvalidValue as error:
            text = self._texts.get(error.name)
            raise UsageError(f"{text} is not {error.expected}" if text else str(error)) from None

    def replays(self) -> bool:
        """Whether a record is to be replayed, and no kernel to be run."""
        return "replay" in self._fields

    def replay(self, rest: list[str]) -> Config:
        """What to do with the record, which has everything that its guest can see."""
        self._set_gdb()
        surplus = [self._texts[name] for name in self._fields if name not in _BESIDE_REPLAY]
        surplus += [
            f"--{kind.replace('_', '-')}" for kind, devices in self._devices.items() if devices
        ]
        surplus += [shown(argument) for argument in rest[:1]]
        if surplus:
            raise UsageError(
                f"--replay: the record has all that its guest had: leave out {surplus[0]}"
            )
        return self.config(self._fields["replay"], ())

    def _set_gdb(self) -> None:
        fields = self._fields
        if "gdb_port" in fields:  # Solo5's, which goes with --gdb
            fields["gdb"] = fields.pop("gdb_port")
            self._texts["gdb"] = self._texts["gdb_port"]
        if fields.get("gdb") == "-":
            fields["console_fd"] = 2

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
