"""`ptender image`: the command line of tender.oci.image."""

from __future__ import annotations

from tender.cli.argparser import Parser
from tender.errors import UsageError
from tender.image.elf import MACHINES
from tender.image.file import open_image
from tender.image.output import report, signals
from tender.oci import image as oci_image
from tender.oci.annotations import GUESTS, is_port


def main(argv: list[str]) -> str:
    """Run `ptender image`; `argv` are the arguments after `image`. What it prints."""
    options = _parser().parse_intermixed_args(argv)
    reference = oci_image.check_reference(options.tag)
    kernel = open_image(options.kernel)
    disks = dict(map(_disk, options.block))
    guest = options.guest or ("ptender" if kernel.ptender_bindings else "mirage")
    if options.guest is None and guest == "mirage":
        _report("taken for a MirageOS guest, which is given its address so; else --guest=TYPE")
    unikernel = oci_image.describe(
        kernel,
        options.kernel,
        guest,
        tuple(options.args),
        disks,
        options.mem,
        tuple(options.expose),
    )
    files = {unikernel.binary: options.kernel}
    files |= {path: disks[name] for name, path in unikernel.disks.items()}
    name = reference.rsplit("/", 1)[-1].split(":")[0]
    output = options.output or f"{name}.tar"
    with signals.caught():
        digest = oci_image.write(
            unikernel, MACHINES[kernel.machine], files, reference, output, _report
        )
    return f"{output.rstrip('/')}: {reference} {digest}"


def _report(text: str) -> None:
    report(f"ptender image: {text}")


def _disk(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--block={text}: NAME=FILE names the device and the file of a disk")
    return name, path


def _mem(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(text)
    return int(text)


def _port(text: str) -> str:
    if not is_port(text):
        raise ValueError(text)
    return text


def _parser() -> Parser:
    about = "Make a container image (OCI) of a unikernel."
    parser = Parser(prog="ptender image", description=about)
    add = parser.add_argument
    add("kernel", metavar="KERNEL", help="a unikernel")
    about = "its arguments, unless a container is given others"
    add("args", nargs="*", metavar="ARG", help=about)
    add("-t", "--tag", metavar="NAME:TAG", required=True, help="the image's name")
    about = "an archive, or, for a layout, a folder or DIR/ (default: NAME.tar)"
    add("-o", "--output", metavar="FILE|DIR", help=about)
    about = "a file as the content of a disk; may come more than once"
    add("--block", action="append", default=[], metavar="NAME=FILE", help=about)
    add("--mem", type=_mem, metavar="MIB", help="the guest's memory (default: the tender's)")
    about = "a port that it serves, as 80 or 53/udp; may come more than once"
    add("--expose", type=_port, action="append", default=[], metavar="PORT", help=about)
    about = "how it takes its address and gateway (default: what built it, else mirage)"
    add("--guest", choices=GUESTS, help=about)
    return parser
