"""The core-file helper: the process that names a core file for a tender.

A tender cannot make or name a file after lockdown. So this process, forked before, waits for one
byte, gives the file that both hold its name, and answers with the name. It ends with the tender.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enums of `signal`
import os
from _socket import AF_UNIX, SOCK_SEQPACKET, socketpair

from tender.sandbox.confine import move_descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.observe.core import Target

ANSWER_MAX = 300  # bytes: an errno and a file name
_TENDER, _CORE, _FOLDER = 3, 4, 5  # descriptors of the helper


def start(target: Target) -> int:
    """Fork the helper; returns the tender's end of the socket to it."""
    # Nobody waits for it: it outlives the tender. (Where SIGCHLD were ignored to say so, the end of
    # another child, as passt, would be taken for a good one.)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            _keep(target, theirs.fileno())
        finally:
            os._exit(1)
    theirs.close()
    return ours.detach()


def _keep(target: Target, tender: int) -> None:
    for signo in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):  # the tender's: its end counts
        _signal.signal(signo, _signal.SIG_IGN)
    move_descriptors({_TENDER: tender, _CORE: target.fds["core"], _FOLDER: target.folder_fd}, 8)
    target.fds, target.folder_fd = {"core": _CORE}, _FOLDER
    while os.read(_TENDER, 1):
        try:
            answer = b"\0" + os.fsencode(target.name_file())
        except OSError as error:
            answer = bytes([error.errno or 0])
        os.write(_TENDER, answer)
    target.discard()
    os._exit(0)


def ask(helper: int) -> str:
    """Have the file named; raises OSError."""
    os.write(helper, b"n")
    answer = os.read(helper, ANSWER_MAX)
    if not answer or answer[0]:
        error = answer[0] if answer else 5  # EIO: the helper has ended
        raise OSError(error, os.strerror(error))
    return os.fsdecode(answer[1:])
