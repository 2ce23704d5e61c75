"""The compiled filters, tried call by call in the kernel: allowed is what the policy says."""

from __future__ import annotations

import json
import platform
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tender._native import lib
from tender.dataclass import replace
from tender.sandbox import fdtable, seccomp
from tender.sandbox.fdtable import FdTable
from tender.sandbox.policy import LE, Rule

ROOT = Path(__file__).parents[2]
NUMBERS = 480  # of system calls: more than any kernel has
X32 = 0x40000000
HIGH = 1 << 32  # beyond an int
# Linux lets these pass every filter (kernel/seccomp.c, from 6.14 on): only the code that a uprobe
# has put in place may make them, and from elsewhere they do nothing (SIGILL, ENXIO).
UPROBES = {335, 336} if platform.machine() == "x86_64" else set()

DEVICES = {1: ("net",), 2: ("net",), 3: ("block", "block-writable"), 4: ("block",)}
OTHERS = {2: ("block-remote",)}
USUAL = ("console", "stderr")
SIZES = {
    fdtable.device_fd(3): 5 << 30,
    fdtable.FIXED["core"]: (8 << 20) + 4096,
    fdtable.FIXED["snapshot"]: 9 << 20,
}
TABLES = {
    "kvm": FdTable("kvm", (*USUAL, "vcpu"), DEVICES, SIZES),
    "kvm with everything": FdTable("kvm", tuple(fdtable.FIXED), DEVICES, SIZES),
    "soft": FdTable("soft", USUAL, DEVICES, SIZES),
    "spt": fdtable.spt_table(
        (*USUAL, "epoll", "timer"), [1, 2], {3: (5 << 30, 512, 0), 4: (512, 512, 0)}
    ),
    "spt with everything": fdtable.spt_table(
        (*USUAL, "epoll", "timer", "core", "core-helper"),
        [1],
        {3: (5 << 30, 4096, 1 << 20)},
        (8 << 20) + 4096,
    ),
    "a child on KVM": FdTable("kvm", ("console", "vcpu", "report"), OTHERS, {}),
    "a child on the software CPU": FdTable("soft", ("console", "report"), {}, {}),
}

JUMP_IF_EQUAL, RETURN, ALLOW = 0x15, 0x06, 0x7FFF0000  # linux/bpf_common.h, linux/seccomp.h

Case = tuple[int, ...]


def policies() -> list[tuple[str, list[Rule], bool]]:
    """Each policy by a name: its rules, and whether a violation is reported."""
    found = [
        (name, seccomp.build(each.policies(), each), "report" in each.fixed)
        for name, each in TABLES.items()
    ]
    everything = TABLES["kvm with everything"]
    ring = seccomp.build(everything.ring_policies(), everything)
    return [*found, ("the ring's thread", ring, False)]


def run(compiled: bytes, cases: Sequence[Case]) -> list[str]:
    """What happened to each call."""
    task = {"filter": compiled.hex(), "cases": cases}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.syscalls"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=100,
    )
    results: list[str] = json.loads(done.stdout)
    return results


def expected(rules: Iterable[Rule], names: dict[int, str], case: Case) -> bool:
    arguments = (*case[1:], 0, 0, 0, 0, 0, 0)[:6]
    return any(rule.allows(names.get(case[0], ""), arguments) for rule in rules)


def check(rules: list[Rule], trap: bool, cases: list[Case]) -> None:
    names = {seccomp.syscall_number(rule.call): rule.call for rule in rules}
    wrong = []
    for case, result in zip(cases, run(seccomp.compile(rules, trap=trap), cases), strict=True):
        allowed = expected(rules, names, case)
        # A call that is allowed may end its process in its own way; SIGSYS is the filter's.
        if (result == "SIGSYS") == allowed:
            wrong.append((seccomp.syscall_name(case[0]), case, allowed, result))
    assert not wrong, "call, case, allowed by the policy, what happened"


def matching(rule: Rule) -> list[int]:
    """Arguments that hold, and nothing else that is set."""
    arguments = [0] * 5
    for each in rule.compares:
        arguments[each.argument] |= each.value
    return arguments


def variations(rule: Rule) -> Iterable[list[int]]:
    """The same with one argument that is another descriptor, request, flag or number."""
    for each in rule.compares:
        value = each.value
        for other in (value + 1, value ^ each.mask, 99, value | HIGH, value | 4):
            arguments = matching(rule)
            arguments[each.argument] = other & (1 << 64) - 1
            yield arguments
        if each.op == LE:
            arguments = matching(rule)
            arguments[each.argument] = 0
            yield arguments


@pytest.mark.parametrize(("name", "rules", "trap"), policies(), ids=lambda value: str(value)[:30])
def test_every_number(name: str, rules: list[Rule], trap: bool) -> None:
    """All system calls there are and more, with all arguments 0; x32's too."""
    cases: list[Case] = [(number,) for number in range(NUMBERS) if number not in UPROBES]
    cases += [(number | X32,) for number in (0, 1, 9, 16, 59, 231)]
    check(rules, trap, cases)


@pytest.mark.parametrize(("name", "rules", "trap"), policies(), ids=lambda value: str(value)[:30])
def test_pinned_arguments(name: str, rules: list[Rule], trap: bool) -> None:
    """Each rule as it stands, and with each of its arguments as it must not be."""
    cases: list[Case] = []
    for rule in rules:
        number = seccomp.syscall_number(rule.call)
        cases.append((number, *matching(rule)))
        cases += [(number, *arguments) for arguments in variations(rule)]
    assert any(rule.compares for rule in rules)
    check(rules, trap, cases)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 is x86's")
def test_no_call_of_another_architecture() -> None:
    """`int 0x80` means 32-bit numbers, where 4 is write and 11 is execve."""
    code = """
import ctypes, mmap, os, sys
from tender.sandbox import confine, seccomp
from tender.sandbox.fdtable import FdTable
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
table = FdTable("kvm", ("stderr",), {}, {})
compiled = seccomp.compile(seccomp.build(table.policies(), table))
confine.no_new_privileges()
seccomp.install(compiled)
call()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert done.returncode in (-31, -11), done  # SIGSYS, or no such gate in this kernel (SIGSEGV)


def test_a_filter_is_the_same_each_time() -> None:
    for _, rules, trap in policies()[:-1]:  # the ring's names this process
        assert seccomp.compile(rules, trap=trap) == seccomp.compile(rules, trap=trap)


def test_a_prepared_filter_is_that_of_its_table() -> None:
    for prepared in TABLES.values():
        seccomp.prepare(prepared)
    disk = {fdtable.device_fd(1): 4096}
    changed = [replace(each, sizes={**each.sizes, **disk}) for each in TABLES.values()]
    for table in [*TABLES.values(), *changed]:
        for trap in (False, True):
            compiled = seccomp.compile(seccomp.build(table.policies(), table), trap=trap)
            assert seccomp.of_thread(table, trap=trap) == compiled


def test_what_is_not_allowed_ends_the_process_or_is_reported_first() -> None:
    rules = policies()[0][1]
    kill, trap = lib.SECCOMP_RET_KILL_PROCESS, lib.SECCOMP_RET_TRAP
    assert [k for code, _, _, k in instructions(rules, False) if code == RETURN] == [ALLOW, kill]
    reported = instructions(rules, True)
    assert [k for code, _, _, k in reported if code == RETURN] == [trap, ALLOW, kill]
    at = next(at for at, (code, *_) in enumerate(reported) if code == JUMP_IF_EQUAL)
    assert at + 1 + reported[at][2] == len(reported) - 1, "another architecture is not reported"


def instructions(rules: list[Rule], trap: bool) -> list[tuple[int, int, int, int]]:
    """code, jt, jf and k of each struct sock_filter (linux/filter.h)."""
    return list(struct.iter_unpack("=HBBI", seccomp.compile(rules, trap=trap)))
