"""Run as a program: `denied CALL ARGUMENT|- ERRNO COMMAND...` runs a command without a system call.

ARGUMENT is what the call's first argument must be for that; with -, all such calls are denied.
"""

from __future__ import annotations

import os
import struct
import sys

from tender.sandbox import confine, seccomp

LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
NUMBER, FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data (linux/seccomp.h)
ALLOW, ERRNO = 0x7FFF0000, 0x50000


def denying(number: int, argument: int | None, error: int) -> bytes:
    """A filter for seccomp.install."""
    tests = [(NUMBER, number)] + ([] if argument is None else [(FIRST_ARGUMENT, argument)])
    code = []
    for at, (offset, value) in enumerate(tests):
        code.append((LOAD, 0, 0, offset))
        code.append((JUMP_IF_EQUAL, 0, 2 * (len(tests) - at) - 1, value))
    code += [(RETURN, 0, 0, ERRNO | error), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *each) for each in code)


if __name__ == "__main__":
    name, first, errno_, *command = sys.argv[1:]
    filter = denying(
        seccomp.syscall_number(name), None if first == "-" else int(first), int(errno_)
    )
    confine.no_new_privileges()
    seccomp.install(filter)
    os.execvp(command[0], command)
