"""The CPU as a guest sees it: what is hidden from it, and the MSRs that it has."""

from __future__ import annotations

import os
import re

import pytest

from tender.cleanup import Cleanup
from tender.cpu import cpuid
from tests.guest.conftest import Build, Run

FORBIDDEN = {
    "IA32_FEATURE_CONTROL": 0x3A,
    "KVM's old system time": 0x12,
    "KVM's system time": 0x4B564D01,
    "IA32_PERFEVTSEL0": 0x186,
    "IA32_PERF_GLOBAL_CTRL": 0x38F,
    "IA32_APIC_BASE": 0x1B,
    "IA32_MISC_ENABLE": 0x1A0,
    "the x2APIC's ID": 0x802,
    "VM_CR": 0xC0010114,
    "PERF_CTL0 of AMD": 0xC0010000,
}
# Where MSRs are: all of these are tried. First, count.
EVERYWHERE = (
    (0, 0xE00), (0x40000000, 0x200), (0x4B564D00, 0x10), (0xC0000000, 0x400), (0xC0010000, 0x400),
)  # fmt: skip
NAMES = ("eax", "ebx", "ecx", "edx")
XCR0_SIZE = (0xD, 0, "ebx")  # follows what the guest has switched on, as OSXSAVE does
OSXSAVE = 1 << 27
TSC = 0x10

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="a matter of x86_64")


def leaves(output: str) -> dict[tuple[int, int], dict[str, int]]:
    rows = [[int(word, 16) for word in line.split()[1:]] for line in output.splitlines()
            if line.startswith("cpuid ")]  # fmt: skip
    return {(row[0], row[1]): dict(zip(NAMES, row[2:], strict=True)) for row in rows}


def hidden_and_seen(seen: dict[tuple[int, int], dict[str, int]]) -> dict[str, list[str]]:
    """What of cpuid.HIDDEN a guest sees all the same, by the name of its row."""
    found: dict[str, list[str]] = {}
    for what, _, _, *places in cpuid.HIDDEN:
        for leaf, subleaf, *rest in places:
            for (number, sub), registers in seen.items():
                if number != leaf or subleaf not in (None, sub):
                    continue
                masks = {rest[0]: rest[1]} if rest else dict.fromkeys(NAMES, 0xFFFFFFFF)
                for name, mask in masks.items():
                    if registers[name] & mask:
                        bits = f"{number:#x}.{sub} {name} {registers[name] & mask:#x}"
                        found.setdefault(what, []).append(bits)
    return found


def given() -> list[cpuid.Entry]:
    """What the tender gives this machine's KVM for a guest."""
    from tender import kvm

    with Cleanup() as cleanup:
        return cpuid.shown(kvm.Kvm(cleanup).supported_cpuid())


def test_features_are_hidden(ptender: Run, guest: Build, cpu: str) -> None:
    if cpu == "native":
        pytest.skip("CPUID does not trap on the native CPU: it shows the machine's")
    done = ptender("--mem=8", guest("cpu"), "cpuid")
    assert done.returncode == 0, done
    seen = leaves(done.stdout)
    assert seen[0x40000000, 0]["eax"] == 0x40000000
    assert seen[0x40000000, 0]["ebx"].to_bytes(4, "little") == b"pten"
    assert seen[1, 0]["ebx"] >> 16 == 0
    assert seen[1, 0]["edx"] >> 25 & 3 == 3  # SSE, SSE2
    wrong = hidden_and_seen(seen)
    if cpu == "kvm" and wrong:
        beside = sorted(added(seen))
        assert {place for places in wrong.values() for place in map(where, places)} <= set(beside)
        pytest.skip(f"this KVM shows features that it was not given ({', '.join(beside)})")
    assert wrong == {}


def added(seen: dict[tuple[int, int], dict[str, int]]) -> set[str]:
    """The registers in which a KVM shows bits that it was not given."""
    told = {entry[:2]: dict(zip(NAMES, entry[3:], strict=True)) for entry in given()}
    found = set()
    for place, registers in told.items():
        for name, value in registers.items():
            more = seen.get(place, registers)[name] & ~value
            if place == (1, 0) and name == "ecx":
                more &= ~OSXSAVE
            if more and (*place, name) != XCR0_SIZE:
                found.add(f"{place[0]:#x}.{place[1]} {name}")
    return found


def where(bits: str) -> str:
    return bits.rsplit(" ", 1)[0]


def test_a_guest_has_its_own_msrs_and_no_others(ptender: Run, guest: Build, cpu: str) -> None:
    without = {TSC} if cpu == "native" else set()  # a write ends the guest there
    ranges = ((0, TSC), (TSC + 1, 0xE00 - TSC - 1), *EVERYWHERE[1:]) if without else EVERYWHERE
    words = [word for pair in ranges for word in pair]
    done = ptender("--mem=8", guest("cpu"), "msrs", *words)
    assert done.returncode == 0, done
    found = {int(number, 16): rights
             for number, rights in re.findall(r"^msr (\w+) (\w+)$", done.stdout, re.M)}  # fmt: skip
    own = set(cpuid.msrs()) - without
    tsc_aux = 0xC0000103  # where the CPU has RDTSCP or RDPID
    assert own - {tsc_aux} <= set(found) <= own
    assert set(found.values()) == {"rw"}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_another_msr_is_a_trap_that_is_reported(ptender: Run, guest: Build, name: str) -> None:
    done = ptender("--mem=8", guest("cpu"), "rdmsr", FORBIDDEN[name])
    assert done.returncode == 255, done
    assert re.search(r"trap #GP: error=0x0 rip=0x1[0-9a-f]+", done.stdout), done
    assert "FAILURE" not in done.stdout


def test_the_guests_own_msrs_work(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", guest("cpu"), "own")
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout


def test_this_kvm_filters_msrs() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/kvm")
    from tender import kvm

    with Cleanup() as cleanup:
        assert kvm.Vm(kvm.Kvm(cleanup), cleanup).filters_msrs
