"""How a guest ended, and what its devices did, as values."""

from __future__ import annotations

import sys

from tender.dataclass import dataclass
from tender.errors import TenderError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Literal, TypeAlias

    Reason: TypeAlias = Literal[
        "halted", "stopped", "fault", "host", "deadline", "killed", "sandbox"
    ]


@dataclass
class Counters:
    """What a device did, in one direction.

    `calls` is the number of hypercalls and `bytes` what they moved; `errors` counts failures of
    the host, `drops` frames or output that the host did not take, `delays` operations that have
    waited for a rate limit.
    """

    calls: int = 0
    bytes: int = 0
    errors: int = 0
    drops: int = 0
    delays: int = 0


@dataclass
class NetCounters:
    """What a network device received and sent."""

    received: Counters = Counters()
    sent: Counters = Counters()


@dataclass
class Statistics:
    """What a guest's devices did: the console, POLL, and by name its disks and networks.

    All zero and without devices where the guest's process ended before it could report.
    """

    console: Counters = Counters()
    poll: Counters = Counters()
    block: Mapping[str, Counters] = {}
    net: Mapping[str, NetCounters] = {}

    def rows(self) -> Iterator[tuple[str, Counters]]:
        """Every counter group with its name in reports, such as "net:service:sent"."""
        yield "console", self.console
        yield "poll", self.poll
        for name, counters in self.block.items():
            yield f"block:{name}", counters
        for name, both in self.net.items():
            yield f"net:{name}:received", both.received
            yield f"net:{name}:sent", both.sent

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, as JSON has it."""
        return {
            "console": dict(self.console.__dict__),
            "poll": dict(self.poll.__dict__),
            "block": {name: dict(each.__dict__) for name, each in self.block.items()},
            "net": {
                name: {"received": dict(both.received.__dict__), "sent": dict(both.sent.__dict__)}
                for name, both in self.net.items()
            },
        }


@dataclass
class Outcome:
    """How a guest ended.

    Attributes:
        reason: "halted" (by itself), "stopped" (by a program or by the signal `signo`), "fault" (it
            did what no guest may: `error` is a GuestFault) or "host" (the host failed: `error` is
            a HostError). A guest of a program has three more: "deadline" (it took longer than its
            deadline), "killed" (its process was, by `signo`) and "sandbox" (its process did what
            the sandbox does not allow: `error` is a SandboxViolation).
        status: The guest's own exit status if it halted, 255 if it aborted; 0 if its program
            stopped it; else 1.
        signo: The number of the signal that ended it, 0 if none did.
        error: What went wrong, if something did.
        trap: The registers of a CPU exception (cr2, ec, rip, cs, rflags, rsp, ss), if the guest
            reports them.
        registers: The general registers at a fault, by name.
        core: The path of the core file that was written.
        stats: What each device did.
    """

    reason: Reason
    status: int
    signo: int = 0
    error: TenderError | None = None
    trap: Mapping[str, int] | None = None
    core: str | None = None
    stats: Statistics = Statistics()
    registers: Mapping[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers, as `--report` writes it in JSON.

        Without what does not apply: `signal`, `error`, `trap`, `registers` and `core` are missing
        then. `error` has its `type` and `text`, and the fields that its type has.
        """
        found: dict[str, Any] = {"reason": self.reason, "status": self.status}
        if self.signo:
            found["signal"] = self.signo
        if self.error is not None:
            fields = {key: each for key, each in self.error.__dict__.items() if each is not None}
            found["error"] = {
                "type": type(self.error).__name__, "text": str(self.error), **fields
            }  # fmt: skip
        for name in ("trap", "registers"):
            if getattr(self, name) is not None:
                found[name] = dict(getattr(self, name))
        if self.core is not None:
            found["core"] = self.core
        found["statistics"] = self.stats.as_dict()
        found["versions"] = {
            "ptender": sys.modules["tender"].__version__,  # importing it would be a circle
            "python": sys.version.split()[0],
        }
        return found
