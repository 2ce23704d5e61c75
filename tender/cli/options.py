"""The options of a run: one row each, from which the parser and --help come."""

from __future__ import annotations

from tender.backends import BlockFile
from tender.cli import values
from tender.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cli.values import Suboptions


@dataclass
class Option:
    """An option of a run: its name, its value in --help, what it sets, and its help.

    It sets `field` (of Config, or of CommandLine) to what `parse` makes of its value; a flag has
    no `parse` and sets it to `constant`. Without `help`, it is not in the list of --help.

    With a `default` it needs no value, and takes none that is not written with `=`.

    With `parse_solo5` its name may be followed by a device's (`:NAME`, Solo5's spelling, in which
    this reads the value), and it adds to `field`.
    """

    name: str
    value: str
    field: str
    parse: Callable[[str], Any] | None
    help: str
    suboptions: Suboptions = {}  # noqa: RUF012  # it is frozen
    constant: bool = True
    parse_solo5: Callable[[str], Any] | None = None
    default: str | None = None


# fmt: off
OPTIONS = (
    Option("--name", "NAME", "name", str,
           "the guest's name for ptender ps, stats and metrics\n"
           "(default: the kernel's file name)"),
    Option("--mem", "SIZE", "mem_bytes", values.parse_mem,
           "guest memory: MiB, or with a unit as in 64M, 1G\n"
           "(default 512; a multiple of 2 MiB, at most 4G)"),
    Option("--net", "[NAME=]TAP", "net", values.parse_net,
           "attach a tap or macvtap; NAME as the guest's\n"
           "manifest has it, needed if there are several", values.TAP,
           parse_solo5=values.parse_interface),
    Option("--net", "[NAME=]user", "net", values.parse_net,
           "a network through passt: needs no root and no tap.\n"
           "With user:8080:80, port 8080 of 127.0.0.1 is the\n"
           "guest's port 80; user:ADDRESS:8080:80 takes another\n"
           "address, user:udp:5353:53 UDP; more follow with commas", values.USER,
           parse_solo5=values.parse_interface),
    Option("--net", "[NAME=]@FD", "net", values.parse_net,
           "attach an open descriptor: a tap, or a datagram or\n"
           "seqpacket socket with one frame per message", values.NET_DESCRIPTOR,
           parse_solo5=values.parse_interface),
    Option("--net-mac", "NAME=MAC", "macs", str, "", parse_solo5=str),
    Option("--block", "[NAME=]FILE", "block", values.parse_block,
           "attach a disk image or block device", values.BLOCK, parse_solo5=BlockFile),
    Option("--block", "[NAME=]@FD", "block", values.parse_block,
           "attach an open descriptor of a file or memfd", values.BLOCK_DESCRIPTOR,
           parse_solo5=BlockFile),
    Option("--disk", "FILE", "block", values.parse_block, ""),
    Option("--block-sector-size", "NAME=N", "sector_sizes", values.parse_number, "",
           parse_solo5=values.parse_number),
    Option("--net-rate", "[NAME=]RATE", "net_rate", values.parse_limit,
           "delay what a network moves beyond RATE, each way:\n"
           "bytes or frames per second, as in 10M, 5000ops or\n"
           "10M,5000ops; burst=4M, burst=100ops is what may pass\n"
           "at once after a pause (default: that of a second)"),
    Option("--block-rate", "[NAME=]RATE", "block_rate", values.parse_limit,
           "the same for a disk, where ops are reads and writes"),
    Option("--console-limit", "RATE", "console_limit", values.parse_rate,
           "drop what the guest prints beyond so many bytes per\nsecond, as in 64K or 1M"),
    Option("--dumpcore", "DIR", "dumpcore", str, "write a core file there if the guest aborts"),
    Option("--snapshots", "DIR", "snapshots", str,
           "let ptender snapshot save the guest; until that has\nthe file, it takes room there"),
    Option("--restore", "FILE", "restore", str,
           "let a guest go on that was saved; instead of a kernel.\n"
           "Its devices have to be what they were"),
    Option("--clone", "", "clone", None,
           "... also where it went on before: both have the same\n"
           "keys and random numbers (see guide-snapshots)"),
    Option("--clock-resume", "continue|catch-up", "clock_resume", str,
           "... its time stood still (default), or went on"),
    Option("--cpu", "auto|kvm|native|soft", "cpu", str,
           "what runs the guest: KVM where it is, else a process\n"
           "of its own (native), else a CPU in software\n"
           "(default: auto, or what PTENDER_CPU says)"),
    Option("--clock", "virtual", "clock", values.parse_clock,
           "the guest's time advances only as the guest reads it", values.CLOCK),
    Option("--instructions", "N", "instructions", values.parse_number,
           "end the guest after N instructions (software CPU)"),
    Option("--x-exec-heap", "", "exec_heap", None,
           "let the guest execute its heap, as a JIT does; on KVM\n"
           "it always can"),
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
    Option("--report", "FILE", "report", str,
           "write a JSON object there when the guest has ended:\n"
           "how, with its registers at a fault, and what it did"),
    Option("--trace", "FILE", "trace", values.parse_trace,
           "write a line of JSON there for each hypercall; - is\n"
           "standard error, @FD an open descriptor"),
    Option("--record", "FILE", "record", str,
           "record the run there, to be replayed (software CPU)"),
    Option("--replay", "FILE", "replay", str,
           "run what was recorded once more, without its devices;\n"
           "no KERNEL is named"),
    Option("--gdb", "[=PORT|PATH|-]", "gdb", values.parse_number,
           "wait for gdb before the guest's first instruction: at\n"
           "this port of 127.0.0.1 (default 1234), at a Unix\n"
           "socket (a path with a /), or on standard input and\n"
           "output (then the guest prints on standard error)", default="1234"),
    Option("--gdb-port", "N", "gdb_port", values.parse_number, ""),
    Option("--pcap", "[NAME=]FILE", "pcap", str,
           "write the packets of a network device there (pcapng),\nfor Wireshark and tcpdump"),
    Option("--pidfile", "FILE", "pidfile", str,
           "write the tender's PID there; the file is locked as\n"
           "long as it runs, and stays when it has ended"),
    Option("--log", "text|json", "log", values.parse_log,
           "json: the tender's own messages as lines of JSON"),
    Option("--verbose", "", "verbose", None,
           "show the layers of the sandbox, how the guest ended\nand what its devices did"),
    Option("--version", "", "version", None, "the version, and the ABI version"),
    Option("--help", "", "help", None, "this text"),
)
# fmt: on
BY_NAME = {option.name: option for option in OPTIONS}
SHORT = {"-v": "--verbose", "-h": "--help"}
