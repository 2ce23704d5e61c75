"""What is hidden of the CPU, against the manuals' numbers."""

from __future__ import annotations

import pytest

from tender.boot.x86_64 import MSR_TSC, MSRS
from tender.cpu import cpuid
from tender.cpu.cpuid import HIDDEN, shown

ONES = 0xFFFFFFFF
LEAVES = [*range(0x30), *range(0x40000000, 0x40000010), *range(0x80000000, 0x80000030)]
SUBLEAVES = {4: 5, 7: 3, 0xD: 20, 0x14: 2, 0x8000001D: 5}

# Feature by feature, in the manuals' order: leaf, subleaf, register, bit.
GONE = {
    "VMX": (1, 0, "ecx", 5), "SMX": (1, 0, "ecx", 6), "MONITOR": (1, 0, "ecx", 3),
    "PDCM": (1, 0, "ecx", 15), "x2APIC": (1, 0, "ecx", 21), "TSC-Deadline": (1, 0, "ecx", 24),
    "APIC": (1, 0, "edx", 9), "MTRR": (1, 0, "edx", 12), "MCE": (1, 0, "edx", 7),
    "MCA": (1, 0, "edx", 14), "HTT": (1, 0, "edx", 28), "DS": (1, 0, "edx", 21),
    "SGX": (7, 0, "ebx", 2), "SGX_LC": (7, 0, "ecx", 30), "PT": (7, 0, "ebx", 25),
    "RTM": (7, 0, "ebx", 11), "WAITPKG": (7, 0, "ecx", 5), "IBRS": (7, 0, "edx", 26),
    "ARCH_CAPABILITIES": (7, 0, "edx", 29), "SSBD": (7, 0, "edx", 31), "AMX": (7, 0, "edx", 24),
    "PKS": (7, 0, "ecx", 31), "IBT": (7, 0, "edx", 20), "XSAVES": (0xD, 1, "eax", 3),
    "SVM": (0x80000001, 0, "ecx", 2), "SKINIT": (0x80000001, 0, "ecx", 12),
    "PERFCTR_CORE": (0x80000001, 0, "ecx", 23), "IBS": (0x80000001, 0, "ecx", 10),
    "MONITORX": (0x80000001, 0, "ecx", 29), "SSBD (AMD)": (0x80000008, 0, "ebx", 24),
}  # fmt: skip

# What compilers, MirageOS and C libraries use.
KEPT = {
    "FPU": (1, 0, "edx", 0), "TSC": (1, 0, "edx", 4), "MSR": (1, 0, "edx", 5),
    "PAE": (1, 0, "edx", 6), "CX8": (1, 0, "edx", 8), "SEP": (1, 0, "edx", 11),
    "PGE": (1, 0, "edx", 13), "CMOV": (1, 0, "edx", 15), "PAT": (1, 0, "edx", 16),
    "CLFSH": (1, 0, "edx", 19), "FXSR": (1, 0, "edx", 24), "SSE": (1, 0, "edx", 25),
    "SSE2": (1, 0, "edx", 26), "SSE3": (1, 0, "ecx", 0), "PCLMULQDQ": (1, 0, "ecx", 1),
    "SSSE3": (1, 0, "ecx", 9), "FMA": (1, 0, "ecx", 12), "CX16": (1, 0, "ecx", 13),
    "SSE4.1": (1, 0, "ecx", 19), "SSE4.2": (1, 0, "ecx", 20), "MOVBE": (1, 0, "ecx", 22),
    "POPCNT": (1, 0, "ecx", 23), "AES": (1, 0, "ecx", 25), "XSAVE": (1, 0, "ecx", 26),
    "AVX": (1, 0, "ecx", 28), "F16C": (1, 0, "ecx", 29), "RDRAND": (1, 0, "ecx", 30),
    "hypervisor": (1, 0, "ecx", 31),
    "FSGSBASE": (7, 0, "ebx", 0), "BMI1": (7, 0, "ebx", 3), "AVX2": (7, 0, "ebx", 5),
    "SMEP": (7, 0, "ebx", 7), "BMI2": (7, 0, "ebx", 8), "ERMS": (7, 0, "ebx", 9),
    "AVX512F": (7, 0, "ebx", 16), "RDSEED": (7, 0, "ebx", 18), "ADX": (7, 0, "ebx", 19),
    "SMAP": (7, 0, "ebx", 20), "SHA": (7, 0, "ebx", 29), "UMIP": (7, 0, "ecx", 2),
    "GFNI": (7, 0, "ecx", 8), "VAES": (7, 0, "ecx", 9), "RDPID": (7, 0, "ecx", 22),
    "FSRM": (7, 0, "edx", 4), "SERIALIZE": (7, 0, "edx", 14),
    "AVX in XCR0": (0xD, 0, "eax", 2), "AVX-512 in XCR0": (0xD, 0, "eax", 5),
    "XSAVEOPT": (0xD, 1, "eax", 0), "XSAVEC": (0xD, 1, "eax", 1),
    "LAHF": (0x80000001, 0, "ecx", 0), "LZCNT": (0x80000001, 0, "ecx", 5),
    "SSE4A": (0x80000001, 0, "ecx", 6), "SYSCALL": (0x80000001, 0, "edx", 11),
    "NX": (0x80000001, 0, "edx", 20), "1 GiB pages": (0x80000001, 0, "edx", 26),
    "RDTSCP": (0x80000001, 0, "edx", 27), "long mode": (0x80000001, 0, "edx", 29),
    "invariant TSC": (0x80000007, 0, "edx", 8),
}  # fmt: skip

WHOLE_LEAVES_GONE = (5, 6, 0xA, 0xB, 0x12, 0x14, 0x1C, 0x1F, 0x23, 0x8000000A, 0x80000022)


@pytest.fixture(scope="module")
def seen() -> dict[tuple[int, int], dict[str, int]]:
    """A CPU that has everything, as a guest sees it."""
    everything = [
        (leaf, subleaf, 0, ONES, ONES, ONES, ONES)
        for leaf in LEAVES
        for subleaf in range(SUBLEAVES.get(leaf, 1))
    ]
    names = ("eax", "ebx", "ecx", "edx")
    return {
        (entry[0], entry[1]): dict(zip(names, entry[3:], strict=True))
        for entry in shown(everything)
    }


Seen = dict[tuple[int, int], dict[str, int]]


@pytest.mark.parametrize("feature", GONE)
def test_what_a_guest_has_no_use_for_is_hidden(seen: Seen, feature: str) -> None:
    leaf, subleaf, register, bit = GONE[feature]
    assert not seen[leaf, subleaf][register] >> bit & 1


@pytest.mark.parametrize("feature", KEPT)
def test_what_computes_stays(seen: Seen, feature: str) -> None:
    leaf, subleaf, register, bit = KEPT[feature]
    assert seen[leaf, subleaf][register] >> bit & 1


@pytest.mark.parametrize("leaf", WHOLE_LEAVES_GONE)
def test_whole_leaves_are_hidden(seen: Seen, leaf: int) -> None:
    assert not [place for place in seen if place[0] == leaf]


def test_a_guest_has_one_cpu(seen: Seen) -> None:
    assert seen[1, 0]["ebx"] >> 16 == 0  # how many, and which
    assert [seen[4, subleaf]["eax"] >> 14 for subleaf in range(5)] == [0] * 5


def test_the_hypervisor_is_the_tender_and_offers_nothing(seen: Seen) -> None:
    leaves = [place for place in seen if 0x40000000 <= place[0] < 0x50000000]
    assert leaves == [(0x40000000, 0)]
    leaf = seen[0x40000000, 0]
    assert leaf["eax"] == 0x40000000
    words = (leaf["ebx"], leaf["ecx"], leaf["edx"])
    assert b"".join(word.to_bytes(4, "little") for word in words) == b"ptender kvm\0"


def test_leaves_that_are_not_there_are_not_invented() -> None:
    assert [entry[0] for entry in shown([(0, 0, 0, 1, 2, 3, 4)])] == [0, 0x40000000]


def test_each_row_says_why_and_from_where() -> None:
    for what, why, source, *places in HIDDEN:
        assert all((what, why, places)), what
        assert "SDM" in source or "APM" in source, what


def test_no_bit_is_in_two_rows() -> None:
    places: dict[object, int] = {}
    for _, _, _, *row in HIDDEN:
        for leaf, subleaf, *rest in row:
            register, bits = rest or ("all of it", 1)
            assert 0 < bits <= ONES
            assert not places.get((leaf, subleaf, register), 0) & bits, (leaf, subleaf, register)
            places[leaf, subleaf, register] = places.get((leaf, subleaf, register), 0) | bits


def test_the_software_cpu_shows_nothing_that_is_hidden() -> None:
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    from tender.cpu import soft_x86_64

    own = [(leaf, 0, 0, *values) for leaf, values in soft_x86_64._LEAVES.items()]
    assert shown(own)[:-1] == [entry for entry in own if entry[0] != cpuid.HYPERVISOR]


def test_the_msrs_of_a_guest() -> None:
    efer, fs_base, gs_base = 0xC0000080, 0xC0000100, 0xC0000101
    assert set(cpuid.msrs()) == {*MSRS.values(), MSR_TSC, efer, fs_base, gs_base}
    assert all(count <= 64 for _, count, *_ in cpuid.MSRS)  # the filter's bitmap has 64 bits
