"""`ptender build`: the command line of tender.image.build."""

from __future__ import annotations

from tender.cli.argparser import Parser
from tender.image import build
from tender.image.output import signals

PASSED_ON = (  # to the compiler of the guest's sources: the option's letter, its value, its meaning
    ("I", "DIR", "look for headers in DIR too"),
    ("D", "NAME[=VALUE]", "define a macro"),
    ("O", "LEVEL", "optimise (default: 2)"),
    ("W", "WARNING", "switch a warning on or off"),
)


def main(argv: list[str]) -> None:
    """Run `ptender build`; `argv` are the arguments after `build`."""
    options = _parser().parse_intermixed_args(_joined(argv))
    cflags = [f"-{letter}{value}" for letter, *_ in PASSED_ON for value in getattr(options, letter)]
    with signals.caught():
        build.build(
            options.sources,
            options.manifest,
            options.output,
            target=options.target,
            cc=options.cc,
            cflags=[*cflags, *(["-g"] if options.g else []), *options.cflag],
            fp=options.fp,
            verbose=options.verbose,
        )


def _joined(argv: list[str]) -> list[str]:
    """With `--cflag -fx` as `--cflag=-fx`: argparse takes no value that begins with a dash."""
    arguments = list(argv)
    while "--cflag" in arguments[:-1]:
        at = arguments.index("--cflag")
        arguments[at : at + 2] = [f"--cflag={arguments[at + 1]}"]
    return arguments


def _parser() -> Parser:
    about = "Build a guest from C sources."
    parser = Parser(prog="ptender build", description=about)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="a .c, .S, .s, .o or .a file")
    add("--manifest", metavar="FILE", help="the devices, as JSON (default: none)")
    add("-o", "--output", metavar="FILE", required=True, help="the image to write")
    add(
        "--target",
        choices=[*build.MACHINES.values(), "spt"],
        help="the guest's machine (default: this one's), or spt: Solo5's other target",
    )
    add("--cc", metavar="COMMAND", help="the compiler (default: $CC, gcc or clang)")
    add("--fp", action="store_true", help="let the guest use floating point and vector registers")
    for letter, value, meaning in PASSED_ON:
        add(f"-{letter}", action="append", default=[], metavar=value, help=meaning)
    about = "anything else for it, as in --cflag -fwrapv; may come more than once"
    add("--cflag", action="append", default=[], metavar="FLAG", help=about)
    add("-g", action="store_true", help="keep debug information")
    add("-v", "--verbose", action="store_true", help="print each command")
    return parser
