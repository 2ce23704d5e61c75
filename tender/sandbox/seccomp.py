"""Rules -> the filter that the kernel takes, made by libseccomp.

What no rule allows ends the process. The policies are read from seccomp/; the library is loaded at
run time, so that a tender without a sandbox does not need it. Source: the
manual pages of libseccomp (seccomp_rule_add(3), seccomp_attr_set(3)) and seccomp(2).
"""

from __future__ import annotations

import errno
import posix as os

from tender._native import ffi, lib
from tender.errors import SandboxError, option
from tender.sandbox import policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tender.sandbox.fdtable import FdTable
    from tender.sandbox.policy import Rule

LIBRARY = b"libseccomp.so.2"
SCMP_FLTATR_ACT_BADARCH = 2
SCMP_ERROR = -1  # __NR_SCMP_ERROR
FIRST = 255  # the priority of the call that a filter compares first
INSTRUCTION = 8  # bytes of a struct sock_filter
FILTER_MAX = 4096 * INSTRUCTION  # linux/bpf_common.h: BPF_MAXINSNS

_loaded = False
_policies: dict[str, list[policy.Entry]] = {}


def load() -> None:
    """Find libseccomp; raises SandboxError."""
    global _loaded
    if _loaded:
        return
    problem = lib.seccomp_load(LIBRARY)
    if problem != ffi.NULL:
        reason = ffi.string(problem).decode(errors="replace")
        raise SandboxError(
            f"sandbox: no libseccomp ({reason}): apt install libseccomp2 "
            f"(or use {option('sandbox', 'off')})"
        )
    _loaded = True


def entries(module: str) -> list[policy.Entry]:
    """The entries of one file of seccomp/, which is read once."""
    if module not in _policies:
        _policies[module] = _read(module)
    return _policies[module]


def _read(module: str) -> list[policy.Entry]:
    fd = _open(f"{module}.policy")
    try:
        return policy.parse(os.read(fd, 1 << 16).decode())
    finally:
        os.close(fd)


def _open(name: str) -> int:
    """A file of seccomp/, which lies in the package, or beside it in a checkout."""
    here = __file__.rpartition("/sandbox/")[0]
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(f"{here}/seccomp/{name}", flags)
    except OSError:
        pass
    try:
        return os.open(f"{here}/../seccomp/{name}", flags)
    except OSError as error:
        raise SandboxError(f"sandbox: {name}: {os.strerror(error.errno or 0)}") from None


def build(modules: Iterable[str], table: FdTable) -> list[Rule]:
    """The rules of these modules for these descriptors."""
    fds = table.by_label()
    return [
        rule
        for module in modules
        for rule in policy.expand(entries(module), fds, table.sizes, constant, table.block_sizes)
    ]


_prepared: dict[object, bytes] = {}


def prepare(table: FdTable) -> None:
    """Compile the filter of a program's child with these descriptors, for `of_thread`."""
    _prepared[_key(table)] = of_thread(table, trap=True)


def of_thread(table: FdTable, *, trap: bool) -> bytes:
    """The filter of the guest's thread; see `compile`."""
    filter = _prepared.get(_key(table)) if trap else None
    return filter or compile(build(table.policies(), table), trap=trap)


def _key(table: FdTable) -> object:
    """What the filter of a table depends on."""
    devices, sizes, blocks = (
        frozenset(each.items()) for each in (table.devices, table.sizes, table.block_sizes)
    )
    return table.cpu, frozenset(table.fixed), devices, sizes, blocks, table.pcaps


def constant(name: str) -> int:
    """The value of a constant that a policy names."""
    if name == "PID":
        return os.getpid()
    try:
        value: int = getattr(lib, name)
    except AttributeError:
        raise policy.PolicyError(f"policy: tender/sandbox/sandbox.cdef has no {name}") from None
    return value


def syscall_name(number: int) -> str:
    """The name of a system call on this machine."""
    load()
    name = lib.seccomp_name(number)
    if name == ffi.NULL:
        return f"system call {number}"
    try:
        return str(ffi.string(name).decode())
    finally:
        lib.free(name)


def syscall_number(name: str) -> int:
    """The number of a system call; negative: this architecture does not have it."""
    load()
    number = int(lib.seccomp_number(name.encode()))
    if number == SCMP_ERROR:
        raise SandboxError(f"sandbox: libseccomp does not know {name}: install a newer one")
    return number


def compile(allowed: Iterable[Rule], *, trap: bool = False) -> bytes:
    """A filter as the kernel takes it: an array of struct sock_filter.

    What no rule allows kills the process; with `trap`, SIGSYS lets it report the call first. Calls
    are compared in the order of the rules.
    """
    load()
    kill = lib.SECCOMP_RET_KILL_PROCESS
    filter = lib.seccomp_new(lib.SECCOMP_RET_TRAP if trap else kill)
    if filter == ffi.NULL:
        raise _no_seccomp()
    try:
        if lib.seccomp_set(filter, SCMP_FLTATR_ACT_BADARCH, kill) < 0:
            raise _no_seccomp()
        numbers: dict[str, int] = {}
        for rule in allowed:
            if rule.call not in numbers:
                numbers[rule.call] = syscall_number(rule.call)
            number = numbers[rule.call]
            if number >= 0:  # else this architecture does without it
                compares = [_compare(each) for each in rule.compares]
                _check(lib.seccomp_allow(filter, number, len(compares), compares), str(rule.entry))
        present = [number for number in numbers.values() if number >= 0]
        for place, number in enumerate(present):
            _check(lib.seccomp_prefer(filter, number, max(1, FIRST - place)), "an order")
        return _export(filter)
    finally:
        lib.seccomp_free(filter)


def _no_seccomp() -> SandboxError:
    # libseccomp asks by seccomp(SECCOMP_GET_ACTION_AVAIL) first.
    return SandboxError(
        "sandbox: no seccomp: seccomp(2) does not offer SECCOMP_RET_KILL_PROCESS here "
        f"({option('sandbox', 'off')} does without)"
    )


def _compare(each: policy.Compare) -> dict[str, int]:
    first, second = (each.value, 0) if each.op == policy.LE else (each.mask, each.value)
    return {"arg": each.argument, "op": each.op, "a": first, "b": second}


def _check(result: int, what: str) -> None:
    if result < 0 and result != -errno.EEXIST:  # a rule that is there already
        raise SandboxError(f"sandbox: libseccomp refuses {what}: {os.strerror(-result)}")


def _export(filter: object) -> bytes:
    # A pipe, which holds 64 KiB: a file would be under the operator's limit to the length of files.
    reader, writer = os.pipe()
    try:
        _check(lib.seccomp_write(filter, writer), "to write the filter")
        return os.read(reader, FILTER_MAX)
    finally:
        os.close(reader)
        os.close(writer)


def install(filter: bytes) -> None:
    """Install a filter on this thread, for good; the thread has no_new_privs."""
    if lib.sandbox_install(filter, len(filter) // INSTRUCTION):
        reason = os.strerror(ffi.errno)
        without = option("sandbox", "off")
        raise SandboxError(f"sandbox: no seccomp: {reason} ({without} does without)")
