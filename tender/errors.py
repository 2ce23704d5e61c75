"""What can go wrong, as types.

The rule here: every error that a user or a guest can cause is a `TenderError` whose text is one
line that says what is wrong, where, and what would be right. Anything else that is raised is a
bug of ours and shows its traceback.
"""

from __future__ import annotations

import posix as os
from errno import EMFILE

EXIT_FAILURE = 1  # the tender's own fatal errors, as solo5-hvt has it
EXIT_USAGE = 2  # a malformed command line, in the friendly spelling
SHOWN_MAX = 100  # letters of a wrong value


def one_line(text: str) -> str:
    """The same, safe to show: what does not print is shown as Python writes it."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(value: object) -> str:
    """A value as an error of one line shows it, shortened."""
    try:
        text = one_line(repr(value))
    except Exception:  # a number with thousands of digits, or an object of the program's
        return f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


def reason(number: int) -> str:
    """What an error number means, and what helps where that is always the same."""
    hint = " (raise `ulimit -n`, RLIMIT_NOFILE)" if number == EMFILE else ""
    return f"{os.strerror(number)}{hint}"


_in_program = False


def serve_program() -> None:
    """This process runs a guest of a program: errors name the arguments of Guest, not options."""
    global _in_program
    _in_program = True


def setting(command: str, program: str) -> str:
    """How the user makes a setting: an option of the command, or an argument of Guest."""
    return program if _in_program else command


def option(name: str, value: str) -> str:
    """The same for an option that has the name of its argument: `--cpu=soft`, or `cpu='soft'`."""
    return setting(f"--{name}={value}", f"{name}={value!r}")


def bug_text(error: BaseException) -> str:
    """Where something went wrong that is ours to mend.

    The lines of a traceback without the sources: a tender can't open those after lockdown.
    """
    lines = [f"{type(error).__name__}: {error}"]
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{trace.tb_lineno}, in {code.co_name}")
        trace = trace.tb_next
    return "\n".join(lines[:40])


class TenderError(Exception):
    """The root of all expected errors; `exit_status` is what a command ends with."""

    exit_status = EXIT_FAILURE


class UsageError(TenderError):
    """The caller asked for something that has no meaning, or left something out."""

    exit_status = EXIT_USAGE


class InvalidValue(UsageError):
    """The `value` of the field or argument `name` is not `expected` (a noun with its article)."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={shown(value)} is not {expected}")
        self.name = name
        self.value = value
        self.expected = expected


class ConfigError(TenderError):
    """What is asked for is well said, but no guest can have it."""


class ImageError(TenderError):
    """A file is not an image that this tender can run."""


class SnapshotError(TenderError):
    """A file is not a snapshot that this tender can restore."""


class ManifestError(ImageError):
    """A manifest, in an image or as JSON, is not valid."""


class DeviceError(ConfigError):
    """A device can't be attached as asked."""


class BuildError(TenderError):
    """A guest could not be compiled or linked."""


class HostError(TenderError):
    """The host refused something.

    `syscall` is the call that failed (or None) and `errno` its error number (0: none).
    """

    def __init__(self, what: str, syscall: str | None = None, errno: int = 0) -> None:
        text = what if not errno else f"{what}: {reason(errno)}"
        super().__init__(text)
        self.syscall = syscall
        self.errno = errno


class SandboxError(TenderError):
    """The sandbox that was asked for can't be had on this machine."""


class GuestEnded(TenderError):
    """The guest has ended, and what was waited for can't come any more.

    Further lines of its text are the last ones of the guest's console.
    """


class GuestFault(TenderError):
    """The guest did something that ends it.

    `gpa` and `size` name the memory it asked for and `hypercall` the number of the call, where
    those make sense.
    """

    def __init__(
        self,
        what: str,
        gpa: int | None = None,
        size: int | None = None,
        hypercall: int | None = None,
    ) -> None:
        super().__init__(what)
        self.gpa = gpa
        self.size = size
        self.hypercall = hypercall


class NotEmulated(GuestFault):
    """The guest did what its CPU can't do; another CPU may."""


class SandboxViolation(TenderError):
    """The guest's process made a system call that its sandbox does not allow, and was ended.

    `syscall` is the call's name and `number` its number; both None where they are not known.
    """

    def __init__(self, syscall: str | None = None, number: int | None = None) -> None:
        super().__init__(f"the sandbox ended the guest's process: {syscall or 'a system call'}")
        self.syscall = syscall
        self.number = number
