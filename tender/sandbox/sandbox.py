"""The door: what a tender gives away before its guest runs.

The rule here: after `Door.close` this process can run its vCPU and use the descriptors that it
holds, and nothing else, for good. Every layer is tried; one that the machine can't give is told,
and is an error under `--sandbox=require`. The system call filter is never done without.

docs/threat-model.md says what each layer is for.
"""

from __future__ import annotations

import os
import stat

from tender._sandbox import ffi, lib
from tender.config import is_number
from tender.errors import HostError, SandboxError, UsageError
from tender.sandbox import confine, seccomp
from tender.sandbox.fdtable import FIRST_JAIL, SLOTS, SLOTS_END, slot
from tender.stop import end_with

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from tender.sandbox.fdtable import Plan

    class Device(Protocol):
        """A device of the guest."""

        fd: int


NOBODY = 65534
MALLOC_ROOM = 64 << 20  # bytes by which the tender's own memory may grow
TRANSLATOR_ROOM = 3 << 29  # ... where a CPU in software keeps what it has translated


def parse_user(text: str) -> tuple[int, int]:
    """`NAME`, `UID`, `NAME:GROUP` or `UID:GID` -> uid and gid; raises UsageError."""
    name, colon, group = text.partition(":")
    try:
        uid, gid = _user(name)
        if colon:
            gid = _group(group)
    except KeyError as error:
        raise UsageError(f"--user={text}: there is no {error.args[0]}") from None
    if not uid or not gid or max(uid, gid) >= (1 << 32) - 1:
        raise UsageError(f"--user={text}: name an unprivileged user and group, not root's")
    return uid, gid


def _user(name: str) -> tuple[int, int]:
    if is_number(name):
        return int(name), int(name)
    import pwd

    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise KeyError(f"user {name!r}") from None
    return entry.pw_uid, entry.pw_gid


def _group(name: str) -> int:
    if is_number(name):
        return int(name)
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise KeyError(f"group {name!r}") from None


class Door:
    """The sandbox of this process: `take` its descriptors, `close` it, and run the guest.

    `mode` is "on" or "require"; `tell` gets a line for each layer that is missing, and one for
    what there is. `report` is a descriptor on which a program that embeds the tender is told of a
    violation, `parent` the process with which this one is to end, `jail` namespaces that were made
    in advance (layers.make_jail).
    """

    def __init__(
        self,
        mode: str,
        user: str | None,
        tell: Callable[[str], None],
        *,
        report: int | None = None,
        parent: int | None = None,
        jail: list[int] | None = None,
    ) -> None:
        self._require = mode == "require"
        if user is not None and os.geteuid() != 0:
            raise UsageError(f"--user={user}: only root can become somebody else")
        self._user = (NOBODY, NOBODY) if user is None else parse_user(user)
        self._tell = tell
        self._parent = parent
        self._jail = jail or []
        self.layers: list[str] = []  # those that are in force
        self.lacks: list[str] = []  # those that this machine can't give, each with its reason
        self.report = report
        self.closed = False
        seccomp.load()
        lib.sandbox_settle_malloc()

    def take(self, single: Mapping[str, int], devices: Mapping[int, Device]) -> dict[str, int]:
        """Put every descriptor into its slot and close all others; the new numbers of `single`.

        `single` has those of which there is one, by the name of their slot; `devices` are those of
        the guest, by handle.
        """
        if self.report is not None:
            single = {**single, "report": self.report}
        places = {SLOTS[name]: fd for name, fd in single.items()}
        places |= {slot(handle): device.fd for handle, device in devices.items()}
        places |= dict(enumerate(self._jail, FIRST_JAIL))
        self._jail = list(range(FIRST_JAIL, FIRST_JAIL + len(self._jail)))
        try:
            confine.move_descriptors(places, SLOTS_END)
        except OSError as error:
            raise SandboxError(f"sandbox: descriptors: {error.strerror}") from None
        for handle, device in devices.items():
            device.fd = slot(handle)
        if self.report is not None:
            self.report = SLOTS["report"]
        self.layers.append("descriptors")
        return {name: SLOTS[name] for name in single}

    def close(
        self,
        plan: Plan,
        file_bytes: int,
        start_threads: Callable[[bytes], None] | None = None,
    ) -> None:
        """Give everything else away.

        `file_bytes` is how long the guest's files may be; `start_threads` is called with the
        filter of its thread.

        Raises SandboxError; then too much is gone to go on, and the process is to end.
        """
        trap = self.report is not None
        held = plan.held()
        main = seccomp.compile(seccomp.build(plan.policies(), held), trap=trap)
        alongside = plan.thread_policies()
        thread = seccomp.compile(seccomp.build(alongside, held), trap=trap) if alongside else b""
        room = TRANSLATOR_ROOM if plan.cpu == "soft" else MALLOC_ROOM
        memory = self._memory_bytes()  # while there is a /proc
        address_space = None if memory is None else memory + room
        self._become_nobody()
        self._layer("Landlock", confine.landlock)
        if start_threads:
            start_threads(thread)  # before the limits: they leave no room for another thread
        self._layer(
            "limits", lambda: confine.limit(SLOTS_END, address_space, _longest(plan, file_bytes))
        )
        self.layers.append("seccomp")  # or it ends here
        self._tell(f"sandbox: {', '.join(self.layers)}")
        if trap and lib.sandbox_report_to(SLOTS["report"]):
            raise HostError("sandbox: cannot handle SIGSYS", "sigaction", ffi.errno)
        self.closed = True
        seccomp.install(main)

    def _become_nobody(self) -> None:
        self._go_where_nothing_is()
        try:
            confine.no_bounding_set()  # while root, or the owner of its namespaces, can
        except OSError as error:
            self.missing("empty bounding set", os.strerror(error.errno or 0))
        if os.geteuid() == 0:
            self._layer(f"user {self._user[0]}", lambda: confine.become(*self._user))
        self._layer("no capabilities", confine.no_capabilities)
        new, dumpable = lib.PR_SET_NO_NEW_PRIVS, lib.PR_SET_DUMPABLE
        self._layer("no new privileges", lambda: confine.prctl(new, 1))
        self._layer("not dumpable", lambda: confine.prctl(dumpable, 0))
        if self._parent is not None:
            end_with(self._parent)  # after the credentials, whose change takes that away

    def _go_where_nothing_is(self) -> None:
        enter = (lambda: confine.join(self._jail)) if self._jail else confine.unshare
        if not self._layer("namespaces", enter):
            self.missing("empty root", "it takes the namespaces")
        elif self._jail:
            self.layers.append("empty root")  # it came with them
        else:
            self._layer("empty root", confine.empty_root)

    def _memory_bytes(self) -> int | None:
        """What the limit to the address space starts from; None: there can be none."""
        try:
            return confine.memory_bytes()
        except OSError as error:
            self.missing("limit to memory", f"/proc: {os.strerror(error.errno or 0)}")
            return None

    def _layer(self, name: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except OSError as error:
            self.missing(name, os.strerror(error.errno or 0))
            return False
        self.layers.append(name)
        return True

    def missing(self, name: str, reason: str) -> None:
        """Tell of a layer that this machine can't give; raises SandboxError where it must be."""
        lack = f"{name}: {reason}"
        if self._require:
            raise SandboxError(f"sandbox: no {lack} (--sandbox=require)")
        self.lacks.append(lack)
        self._tell(f"sandbox: no {lack}")


def _longest(plan: Plan, file_bytes: int) -> int | None:
    """The limit to the length of files; None where a log is one, and grows as it likes."""
    logs = [SLOTS[name] for name in ("console", "stderr", "trace") if name in plan.single]
    regular = any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in logs)
    return None if regular else file_bytes
