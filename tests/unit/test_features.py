"""The features of the CPU that a snapshot has: names, bytes, and whether a guest looks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tender.cpu import features

WORDS = "sse3 avx fma avx2 avx512f sha_ni 3dnow clzero"
OTHER_NAMES = {"sse3": "pni"}  # of /proc/cpuinfo


def test_names_are_kept_and_unknown_bits_are_nothing() -> None:
    names = frozenset(WORDS.split())
    assert features.decode(features.encode(names)) == names
    everything = features.decode(b"\xff" * features.SIZE)
    assert names < everything
    assert features.decode(features.encode(everything)) == everything
    assert features.decode(bytes(features.SIZE)) == frozenset()


@pytest.mark.parametrize(
    ("xcr0", "expected"),
    [
        (1, "sse3 sha_ni 3dnow clzero"),
        (7, "sse3 avx fma avx2 sha_ni 3dnow clzero"),
        (0x67, "sse3 avx fma avx2 sha_ni 3dnow clzero"),
        (0xE7, WORDS),
    ],
)
def test_avx_is_for_who_has_enabled_it(xcr0: int, expected: str) -> None:
    assert features.usable(WORDS.split(), xcr0) == frozenset(expected.split())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="CPUID is of x86_64")
def test_the_bits_have_the_names_that_linux_gives_them() -> None:
    """It hides some; which it names, the CPU has, and the other way round."""
    from tender.cpu.native_state import machine_cpuid

    found = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)
    assert found
    named = set(found[1].split())
    shown = features.shown(machine_cpuid)
    known = features.decode(b"\xff" * features.SIZE)
    assert {name for name in known if OTHER_NAMES.get(name, name) in named} <= shown
    assert {"sse3", "cx16", "rdtscp"} & named <= shown


@pytest.mark.parametrize("at", [0, 1, 65535, 65536, 131070])
def test_a_cpuid_instruction_is_found_wherever_it_is(at: int) -> None:
    code = bytearray(131072)
    assert not features.looks_at_cpuid(memoryview(code))
    code[at : at + 2] = b"\x0f\xa2"
    assert features.looks_at_cpuid(memoryview(code))
    assert not features.looks_at_cpuid(memoryview(code)[: at + 1])
