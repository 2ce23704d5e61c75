"""The core-file helper: the process that names a core file for a tender.

A tender cannot make or name a file after lockdown. So this process, forked before, waits for one
byte, gives the file that both hold its name, and answers with the name. It ends with the tender.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enums of `signal`
import errno
import os
from _socket import AF_UNIX, SOCK_SEQPACKET, socketpair

from tender.errors import HostError
from tender.sandbox.confine import move_descriptors

ANSWER_MAX = 300  # bytes: an errno and a file name
NAMELESS = os.O_TMPFILE
_TENDER, _CORE, _FOLDER = 3, 4, 5  # descriptors of the helper


class NamelessFile:
    """A file in the folder `folder_fd` that has no name; where there are none, a hidden name, which
    has `base` in it."""

    def __init__(self, folder_fd: int, base: str) -> None:
        self.folder_fd = folder_fd
        self._hidden: str | None = None
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self.fd = os.open(".", flags | NAMELESS, 0o600, dir_fd=folder_fd)
        except OSError:
            self._hidden = f".{base}.{os.urandom(4).hex()}"
            flags |= os.O_CREAT | os.O_EXCL
            self.fd = os.open(self._hidden, flags, 0o600, dir_fd=folder_fd)

    def publish_as(self, name: str) -> None:
        """Give the finished file its name; raises OSError, FileExistsError where a file has it."""
        folder = self.folder_fd
        if self._hidden is None:
            source = f"/proc/self/fd/{self.fd}"
            os.link(source, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
            return
        # Not a link: some file systems have none. The empty file keeps the name until the rename.
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder))
        os.rename(self._hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
        self._hidden = None

    def discard(self) -> None:
        """Remove the hidden name, if the file still has it."""
        if self._hidden is not None:
            os.unlink(self._hidden, dir_fd=self.folder_fd)


class CoreFile(NamelessFile):
    """A core file of a guest of this process."""

    def __init__(self, folder_fd: int, target: str = "hvt") -> None:
        self._base = f"core.solo5-{target}.{os.getpid()}"
        super().__init__(folder_fd, self._base)

    def publish(self) -> str:
        """Give the finished file a name that no file has; returns it, or raises OSError."""
        for number in range(100):
            name = f"{self._base}.{number}" if number else self._base
            try:
                self.publish_as(name)
            except FileExistsError:
                continue
            return name
        raise OSError(errno.EEXIST, "")


def start_helper(file: CoreFile) -> tuple[int, int]:
    """Fork the helper; returns the tender's end of the socket to it, and its PID."""
    # After lockdown nobody waits for it: it outlives the tender. (SIGCHLD cannot be ignored to say
    # so: then the tender could not tell how another child, such as passt, ended.)
    try:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        pid = os.fork()
    except OSError:
        file.discard()
        raise
    if pid == 0:
        try:
            _serve(file, theirs.fileno())
        finally:
            os._exit(1)
    theirs.close()
    return ours.detach(), pid


def _serve(file: CoreFile, tender: int) -> None:
    for signo in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):  # the tender's: its end counts
        _signal.signal(signo, _signal.SIG_IGN)
    move_descriptors({_TENDER: tender, _CORE: file.fd, _FOLDER: file.folder_fd}, 8)
    file.fd, file.folder_fd = _CORE, _FOLDER
    try:
        if os.read(_TENDER, 1):  # once: it has one core
            try:
                answer = b"\0" + os.fsencode(file.publish())
            except OSError as error:
                answer = bytes([error.errno or 0])
            os.write(_TENDER, answer)
    finally:
        file.discard()
    os._exit(0)


def request_name(helper: int) -> str:
    """Have the helper name the file; returns the name.

    Raises OSError where it can't, HostError where it has ended.
    """
    try:
        os.write(helper, b"n")
        answer = os.read(helper, ANSWER_MAX)
    except OSError:
        answer = b""
    if not answer:
        raise HostError("dumpcore: the core-file helper was killed: there is no core file")
    if answer[0]:
        raise OSError(answer[0], os.strerror(answer[0]))
    return os.fsdecode(answer[1:])
