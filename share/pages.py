"""The manual page and the shell completions, made of the table of options.

`python share/pages.py` writes them beside this file; a test compares them with the table.
Sources: man(7), groff_man(7), bash(1), zshcompsys(1), fish's complete(1).
"""

from __future__ import annotations

import re
from pathlib import Path

from tender import __version__
from tender.cli.options import OPTIONS, SHORT, Option

HERE = Path(__file__).parent
COMMANDS = {
    "inspect": "print target, memory, devices and segments of an image",
    "policy": "print the system call filter of a run",
    "build": "build a guest from C sources",
    "image": "make a container image of a unikernel",
    "trace": "summarize a trace of hypercalls",
    "ps": "list the guests that run",
    "stats": "print what a running guest has done",
    "snapshot": "save a running guest to a file",
    "metrics": "serve the numbers of all guests to Prometheus",
    "demo": "run the guest that comes with the package",
    "help": "print the options",
    "version": "print the version",
}
TOOLS = [name for name in COMMANDS if name not in ("policy", "demo")]  # without a run's options
TEXT = r"""
.SH DESCRIPTION
.B ptender
runs
.IR KERNEL ,
a unikernel for the hvt or spt target of Solo5: it gives the guest its memory and a CPU, answers its
hypercalls, attaches its networks and disks, and confines itself before the guest runs.
.I ARGS
are the guest's command line, with all that follows
.IR KERNEL ,
options too.
.PP
Under the name
.B solo5-hvt
it takes the options of that tender and speaks as it does. Solo5's spelling of options, as in
.BR \-\-net:service=tap0 ,
is taken under either name.
"""
AFTER = r"""
.SH EXIT STATUS
The guest's own, from 0 to 255, where it exits. Else:
.TP
.B 1
the tender could not run the guest, or ended it: a fault of the guest, SIGINT or SIGTERM, an error
of the host.
.TP
.B 2
a wrong command line.
.TP
.B 159
a taken-over tender was ended by its sandbox (SIGSYS).
.TP
.B 255
the guest aborted.
.SH ENVIRONMENT
.TP
.B PTENDER_CPU
the CPU where
.B \-\-cpu
is not given.
.SH EXAMPLES
.TP
A guest on a tap that is made for it and gone with it:
.EX
ptender \-\-net tap0,create,addr=10.0.0.1/24 web.hvt \-\-ipv4=10.0.0.2/24
.EE
.TP
Without root, with a port of this machine as the guest's:
.EX
ptender \-\-net user:8080:80 web.hvt
.EE
.TP
A disk that stays as it is:
.EX
ptender \-\-block disk.img,overlay disk.hvt
.EE
.SH SEE ALSO
.BR ip\-tuntap (8),
.BR passt (1),
.BR gdb (1),
.BR pcap\-filter (7)
"""


def manual() -> str:
    """ptender(1), as roff."""
    lines = [
        f'.TH PTENDER 1 "" "ptender {__version__}"',
        ".SH NAME",
        r"ptender \- run a unikernel of Solo5",
        ".SH SYNOPSIS",
        ".SY ptender",
        r".RI [ OPTIONS ]\ [\-\-]\  KERNEL\ [ ARGS ]",
        ".YS",
    ]
    for name in (each for each in COMMANDS if each not in ("help", "version")):
        lines += [f".SY ptender\\ {name}", ".RI [ ... ]", ".YS"]
    lines += [TEXT.strip(), ".SH OPTIONS"]
    letters = {name: letter for letter, name in SHORT.items()}
    for option in OPTIONS:
        if not option.help:
            continue
        names = [letters[option.name]] if option.name in letters else []
        shown = ", ".join(rf"\fB{_roff(name)}\fR" for name in (*names, option.name))
        space = "" if option.value.startswith("[=") else " "  # --gdb[=PORT], but --mem SIZE
        value = rf"{space}\fI{_roff(option.value)}\fR" if option.value else ""
        lines += [".TP", shown + value, _roff(_joined(option.help))]
        for key, each in option.suboptions.items():
            spelling = _roff(each.spelling(key))
            lines += [".RS", ".TP", rf"\fB,{spelling}\fR", _roff(_joined(each.help)), ".RE"]
    lines.append(".SH COMMANDS")
    for name, about in COMMANDS.items():
        lines += [".TP", rf"\fBptender {name}\fR", f"{about}."]
    return "\n".join([*lines, AFTER.strip(), ""])


def _joined(help: str) -> str:
    return " ".join(help.split("\n"))


def _short(help: str) -> str:
    """A help text up to its first semicolon or parenthesis."""
    return re.split(r";| \(", _joined(help).removeprefix("... "))[0]


def _roff(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def choices(option: Option) -> list[str]:
    """The values that an option takes, where there are few."""
    few = re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", option.value)
    return option.value.split("|") if few else []


def takes_file(option: Option) -> bool:
    """Whether a value of the option is a path."""
    return option.value.endswith(("FILE", "DIR"))


def takes_next(option: Option) -> bool:
    """Whether its value may be the next word: that of --gdb[=PORT] may not."""
    return bool(option.value) and not option.value.startswith("[=")


def _options() -> list[Option]:
    """Each option once; one of several rows by that which takes a file."""
    rows: dict[str, Option] = {}
    for option in OPTIONS:
        if option.help and (option.name not in rows or takes_file(option)):
            rows[option.name] = option
    return list(rows.values())


BASH = """\
# bash completion of ptender, made of its table of options (share/pages.py)
_ptender() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    [ "$before" != = ] || before=${{COMP_WORDS[COMP_CWORD - 2]}}
    [ "$word" != = ] || word=
    compopt -o filenames 2>/dev/null
    case $before in
{cases}
    esac
    case $word in
    -*)
        case ${{COMP_WORDS[1]}} in {tools}) return ;; esac
        mapfile -t COMPREPLY < <(compgen -W '{names}' -- "$word")
        return
        ;;
    esac
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -W '{commands}' -- "$word")
    fi
}}
complete -F _ptender ptender
"""


def bash() -> str:
    """Completion for bash."""
    cases = []
    for option in _options():
        if choices(option):
            reply = f"compgen -W '{' '.join(choices(option))}' -- \"$word\""
        elif takes_file(option) and option.value:
            reply = f'compgen -{"d" if option.value.endswith("DIR") else "f"} -- "$word"'
        elif takes_next(option):
            reply = "true"
        else:
            continue
        body = f"mapfile -t COMPREPLY < <({reply}) && return"
        cases.append(f"    {option.name}) {body} ;;")
    names = [option.name for option in _options()] + list(SHORT)
    return BASH.format(
        cases="\n".join(cases),
        names=" ".join(names),
        commands=" ".join(COMMANDS),
        tools="|".join(TOOLS),
    )


def zsh() -> str:
    """Completion for zsh."""
    lines = ["#compdef ptender", "# made of the table of options (share/pages.py)"]
    lines += ["local -a subcommands", "subcommands=("]
    lines += [f"    '{name}:{about}'" for name, about in COMMANDS.items()]
    lines += [")", "_arguments -S \\"]
    for option in _options():
        about = re.sub(r"[\[\]:]", r"\\\g<0>", _short(option.help)).replace("'", r"'\''")
        action = ""
        if option.value:
            kind = " ".join(choices(option))
            action = f":value:({kind})" if kind else ":value:"
            if takes_file(option):
                action = ":directory:_files -/" if option.value.endswith("DIR") else ":file:_files"
        equals = "=" if takes_next(option) else "=-" if option.value else ""
        action = action if takes_next(option) or not action else f":{action}"
        lines.append(f"    '*{option.name}{equals}[{about}]{action}' \\")
    lines += [
        "    '1:kernel:{((CURRENT > 2)) || _describe command subcommands; _files}' \\",
        "    '*::argument:_files'",
        "",
    ]
    return "\n".join(lines)


def fish() -> str:
    """Completion for fish."""
    lines = ["# completion of ptender, made of its table of options (share/pages.py)"]
    runs = f"complete -c ptender -n 'not __fish_seen_subcommand_from {' '.join(TOOLS)}'"
    for name, about in COMMANDS.items():
        lines.append(f"complete -c ptender -n __fish_use_subcommand -a {name} -d '{about}'")
    letters = {name: letter.strip("-") for letter, name in SHORT.items()}
    for option in _options():
        about = _short(option.help).replace("'", r"\'")
        words = [f"{runs} -l {option.name.strip('-')}"]
        words += [f"-s {letters[option.name]}"] if option.name in letters else []
        if choices(option):
            words.append(f"-x -a '{' '.join(choices(option))}'")
        elif takes_next(option):
            words.append("-r" if takes_file(option) else "-x")
        lines.append(f"{' '.join(words)} -d '{about}'")
    return "\n".join([*lines, ""])


PAGES = {"ptender.1": manual, "ptender.bash": bash, "_ptender": zsh, "ptender.fish": fish}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
