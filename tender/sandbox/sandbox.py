"""The sandbox: what a tender gives up before its guest runs.

The rule here: after `Sandbox.enter` this process can run its vCPU and use the descriptors that it
holds, and nothing else, for good. Every layer is tried; one that is not available is reported, or
is an error under `--sandbox=require`. The system call filter is mandatory.

docs/threat-model.md says what each layer is for.
"""

from __future__ import annotations

import _stat as stat
import posix as os
from errno import EINVAL

from tender._native import ffi, lib
from tender.checks import is_number
from tender.errors import HostError, SandboxError, UsageError, option
from tender.sandbox import confine, seccomp
from tender.sandbox.fdtable import FDS_END, FIRST_NAMESPACE, FIXED, device_fd, pcap_fd
from tender.stop import end_with

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn, Protocol, TypeVar

    from tender.sandbox.fdtable import FdTable

    T = TypeVar("T")

    class Device(Protocol):
        """A device of the guest, or where its packets are recorded."""

        fd: int

    class Copies(Protocol):
        """Which pages this process has copied since it was forked."""

        def open(self) -> None:
            """Get ready, while there is a /proc; raises OSError."""

        def note(self) -> None:
            """Note them."""

        def give_back(self) -> None:
            """Give back those that differ in nothing, while there is one thread."""


NOBODY = 65534
REPORT_MAX = 1 << 16  # bytes of --report: seccomp/report-file.policy
FIRST_USER = 0x70000000  # of root's tenders: plus its PID, which no other process has
# Bytes by which the memory of the tender itself may grow; on the software CPU, the translated code.
MALLOC_BYTES = 64 << 20
TRANSLATOR_BYTES = 3 << 29
IMAGE_BYTES, IMAGE_SECONDS = 64 << 20, 10  # to read the headers of an image; it takes milliseconds


def parse_user(text: str) -> tuple[int, int]:
    """`NAME`, `UID`, `NAME:GROUP` or `UID:GID` -> uid and gid; raises UsageError."""
    name, colon, group = text.partition(":")
    try:
        uid, gid = _user(name)
        if colon:
            gid = _group(group)
    except KeyError as error:
        raise UsageError(f"{option('user', text)}: there is no {error.args[0]}") from None
    if not uid or not gid or max(uid, gid) >= (1 << 32) - 1:
        raise UsageError(f"{option('user', text)}: name an unprivileged user and group, not root's")
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


class Sandbox:
    """The sandbox of this process: `move_descriptors`, then `enter`, then run the guest.

    `mode` is "on" or "require"; `user` is what --user names; `warn` gets a line if this process
    has to stay root, or to share a user. For the child of a program: `report_fd` is where it
    reports a violation, `parent_pid` the process with which it is to end, `namespaces` those that
    confine.make_namespaces made, `copies` notes what it has copied of its server's memory.
    """

    def __init__(
        self,
        mode: str,
        user: str | None,
        warn: Callable[[str], None],
        *,
        report_fd: int | None = None,
        parent_pid: int | None = None,
        namespaces: list[int] | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.copies = copies
        self._require = mode == "require"
        if user is not None and os.geteuid() != 0:
            raise UsageError(f"{option('user', user)}: only root can change the user")
        self._user = None if user is None else parse_user(user)
        self._warn = warn
        self._parent_pid = parent_pid
        self._namespaces = namespaces or []
        self.layers: list[str] = []  # those that are in force
        self.missing_layers: list[str] = []  # those that are not available here: "NAME: REASON"
        self.report_fd = report_fd
        self.entered = False
        self.is_guest = False  # this process is the guest from here on
        seccomp.load()
        lib.sandbox_settle_malloc()

    def move_descriptors(
        self,
        fixed: Mapping[str, int],
        devices: Mapping[int, Device],
        pcaps: Mapping[int, Device],
    ) -> dict[str, int]:
        """Move each descriptor to its number in the table and close all others.

        `fixed` has the descriptors by label, `devices` those of the guest by handle, `pcaps` where
        their packets are recorded. Returns the new numbers of `fixed`. A program's child has a
        report in the place of standard error, which is its program's.
        """
        if self.report_fd is not None:
            fixed = {label: fd for label, fd in fixed.items() if label != "stderr"}
            fixed["report"] = self.report_fd
        table = {FIXED[label]: fd for label, fd in fixed.items()}
        table |= {device_fd(handle): device.fd for handle, device in devices.items()}
        table |= {pcap_fd(handle): pcap.fd for handle, pcap in pcaps.items()}
        table |= dict(enumerate(self._namespaces, FIRST_NAMESPACE))
        self._namespaces = list(range(FIRST_NAMESPACE, FIRST_NAMESPACE + len(self._namespaces)))
        try:
            confine.move_descriptors(table, FDS_END + len(self._namespaces))
        except OSError as error:
            raise SandboxError(f"sandbox: descriptors: {error.strerror}") from None
        for handle, device in devices.items():
            device.fd = device_fd(handle)
        for handle, pcap in pcaps.items():
            pcap.fd = pcap_fd(handle)
        if self.report_fd is not None:
            self.report_fd = FIXED["report"]
        self.layers.append("descriptors")
        return {label: FIXED[label] for label in fixed}

    def read_image(self, read: Callable[[], T]) -> T:
        """What `read` makes of the image, with limits of its own."""
        return confine.limited(read, IMAGE_BYTES, IMAGE_SECONDS)

    def enter(
        self,
        table: FdTable,
        start: Callable[[bytes], None] | None = None,
        become: Callable[[bytes], NoReturn] | None = None,
    ) -> None:
        """Give up everything that is not in `table`, for good.

        `start` starts what runs beside this thread. It gets the filter for the thread of the
        network ring, empty where there is none. `become` is called in the place of installing the
        filter, which it gets.

        Raises SandboxError; then the process must end, because it has given up too much.
        """
        # What can fail for lack of memory or of a file comes first.
        trap = self.report_fd is not None

        main = seccomp.of_thread(table, trap=trap or become is not None)
        ring = b""
        if policies := table.ring_policies():
            ring = seccomp.compile(seccomp.build(policies, table), trap=trap)
        address_space = self._address_space(table.cpu)  # while there is a /proc
        copies = self.copies
        try:
            if copies:
                copies.open()
        except OSError:
            copies = None  # they are not given back

        if self._namespaces:
            if self._layer("namespaces", confine.join_namespaces, self._namespaces):
                self.layers.append("empty root")  # the namespaces have one
        elif self._layer("namespaces", confine.unshare):
            self._layer("empty root", confine.empty_root)
        if "namespaces" not in self.layers:
            self.report_missing("empty root", "it needs the namespaces")
        self._try("empty bounding set", confine.empty_bounding_set)  # needs CAP_SETPCAP
        if os.geteuid() == 0:
            self._become_user()
        self._layer("no capabilities", confine.drop_capabilities)
        self._layer("no new privileges", confine.no_new_privileges)
        self._layer("not dumpable", confine.not_dumpable)
        if self._parent_pid is not None:
            end_with(self._parent_pid)  # a change of credentials would have cleared it
        self._layer("Landlock", confine.landlock)
        if copies and ring:  # else the engine gives them back, when the guest is idle
            copies.note()
            copies.give_back()
        if start:
            start(ring)  # the limits leave no address space for another thread
        self._layer("limits", confine.limit, FDS_END, address_space, _file_limit(table))
        if become:
            self.layers.append("seccomp")
            self.entered = self.is_guest = True
            become(main)
        if trap and lib.sandbox_report_to(FIXED["report"]):
            raise HostError("sandbox: cannot handle SIGSYS", "sigaction", ffi.errno)
        if copies and not ring:
            copies.note()
        seccomp.install(main)
        self.layers.append("seccomp")
        self.entered = True

    def _become_user(self) -> None:
        uid, gid = self._user or (FIRST_USER + os.getpid(),) * 2
        try:
            confine.become_user(uid, gid)
            self.layers.append(f"user {uid}")
            return
        except OSError as error:
            if self._user is None and error.errno == EINVAL:
                self._warn(
                    f"sandbox: this user namespace does not map user {uid}: the tender becomes "
                    f"{NOBODY}, as others may ({option('user', 'UID')} names another)"
                )
                uid = gid = NOBODY
        if not self._layer(f"user {uid}", confine.become_user, uid, gid):
            self._warn(
                f"sandbox: no {self.missing_layers[-1]}: the tender stays root, without "
                "capabilities; start it as an ordinary user"
            )

    def _address_space(self, cpu: str) -> int | None:
        """The limit on the address space, in bytes; None: it cannot be computed."""
        try:
            memory_bytes = confine.memory_bytes()
        except OSError as error:
            self.report_missing("limit to memory", f"/proc: {os.strerror(error.errno or 0)}")
            return None
        return memory_bytes + (TRANSLATOR_BYTES if cpu == "soft" else MALLOC_BYTES)

    def _layer(self, name: str, step: Callable[..., None], *arguments: Any) -> bool:
        """Take one layer; returns whether it is in force."""
        done = self._try(name, step, *arguments)
        if done:
            self.layers.append(name)
        return done

    def _try(self, name: str, step: Callable[..., None], *arguments: Any) -> bool:
        try:
            step(*arguments)
        except OSError as error:
            self.report_missing(name, os.strerror(error.errno or 0))
            return False
        return True

    def report_missing(self, name: str, reason: str) -> None:
        """Record a layer that is not available here; raises SandboxError where it is required."""
        missing = f"{name}: {reason}"
        if self._require:
            raise SandboxError(f"sandbox: no {missing} ({option('sandbox', 'require')})")
        self.missing_layers.append(missing)


def _file_limit(table: FdTable) -> int | None:
    """The limit on the length of files; None where a log is a regular file, which may grow."""
    logs = [FIXED[each] for each in ("console", "stderr", "trace", "record") if each in table.fixed]
    logs += table.by_label().get("pcap", [])
    regular = any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in logs)
    if regular:
        return None
    report = REPORT_MAX if "report-file" in table.fixed else 0
    return max(report, *table.sizes.values(), 0)
