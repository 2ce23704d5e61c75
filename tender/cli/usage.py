"""The text of --help, made of the table of options, and of the hint on a wrong option."""

from __future__ import annotations

from tender.cli.options import BY_NAME, OPTIONS, SHORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cli.values import Suboption

_COLUMN = 26  # where the help of an option begins
_HINTS = {
    "-m": "guest memory is --mem SIZE",
    "-p": "a port of the host is --net user:8080:80",
    "--tap": "a tap is --net TAP",
}

TOOLS = """\
       {program} inspect FILE [--json]
       {program} policy [--bpf|--json] [OPTIONS] KERNEL [ARGS]
       {program} build SOURCE... [--manifest FILE] -o KERNEL
       {program} image KERNEL -t NAME:TAG [-o FILE|DIR] [--block NAME=FILE]
       {program} trace FILE [-o OUT.json] [--json]
       {program} ps [--json]
       {program} stats NAME|PID [--json]
       {program} snapshot NAME|PID FILE [--stop] [--timeout S]
       {program} --restore FILE [OPTIONS]
       {program} metrics [--listen HOST:PORT|PATH]
       {program} demo [ARGS]
"""

_USAGE = """\
usage: {program} [OPTIONS] [--] KERNEL [ARGS]
{tools}
Run KERNEL, a unikernel for Solo5's hvt or spt target; ARGS are its command
line, with all that follows KERNEL, options too.

{options}
Examples:
  {program} --net tap0,create,addr=10.0.0.1/24 web.hvt --ipv4=10.0.0.2/24
  {program} --net user:8080:80 web.hvt
  {program} --block disk.img,overlay disk.hvt

Solo5's own spelling works too: --mem=MIB, --net:NAME=TAP, --net:NAME=@FD,
--net-mac:NAME=MAC, --block:NAME=FILE, --block-sector-size:NAME=N,
--net=TAP, --disk=FILE, --dumpcore=DIR, --no-net-ring, --gdb-port=N."""

DEMO_USAGE = """\
usage: {program} [OPTIONS] demo [ARGS]

Run the guest that comes with the package: it prints ARGS, its command line,
and ends. OPTIONS are those of any guest; see {program} --help."""


def text(program: str, tools: str = "") -> str:
    """The text of --help; `tools` are the commands beside a run."""
    tools = tools.format(program=program)
    return _USAGE.format(program=program, tools=tools, options=_options_help())


def _options_help() -> str:
    short = {name: letter for letter, name in SHORT.items()}
    seen: set[Suboption] = set()
    text = ""
    for option in OPTIONS:
        if option.help:
            letter = f"{short[option.name]}, " if option.name in short else ""
            space = "" if option.default else " "
            text += _row(f"  {letter}{option.name}{space}{option.value}", option.help)
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


def hint(written: str, others: tuple[str, ...]) -> str:
    """What may have been meant by an option that there is not: the nearest of the table's and
    `others`, where at most two letters differ."""
    if written in _HINTS:
        return _HINTS[written]
    distance, _, name = min(
        (_distance(written, name), abs(len(written) - len(name)), name)
        for name in (*others, *BY_NAME)
    )
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
