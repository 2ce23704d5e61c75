"""The CPU features by which a guest may have chosen its code, as CPUID shows them.

Names are those of Linux (/proc/cpuinfo). Only instructions for computing are here: a guest that
uses another feature (debug registers, bits of CR4) has it in its state. Sources: Intel SDM volume
2A, CPUID; AMD APM volume 3, appendix E.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Cpuid = Callable[[int, int], tuple[int, int, int, int]]  # leaf, subleaf: EAX to EDX

EAX, EBX, ECX, EDX = range(4)

# Leaf, subleaf, register; names by bit. A snapshot has one word for each row.
_WORDS = (
    (1, 0, ECX, {
        0: "sse3", 1: "pclmulqdq", 9: "ssse3", 12: "fma", 13: "cx16", 19: "sse4_1", 20: "sse4_2",
        22: "movbe", 23: "popcnt", 25: "aes", 26: "xsave", 28: "avx", 29: "f16c", 30: "rdrand",
    }),
    (7, 0, EBX, {
        3: "bmi1", 5: "avx2", 8: "bmi2", 16: "avx512f", 17: "avx512dq", 18: "rdseed", 19: "adx",
        21: "avx512ifma", 23: "clflushopt", 24: "clwb", 28: "avx512cd", 29: "sha_ni",
        30: "avx512bw", 31: "avx512vl",
    }),
    (7, 0, ECX, {
        1: "avx512vbmi", 6: "avx512_vbmi2", 8: "gfni", 9: "vaes", 10: "vpclmulqdq",
        11: "avx512_vnni", 12: "avx512_bitalg", 14: "avx512_vpopcntdq", 22: "rdpid",
        27: "movdiri", 28: "movdir64b",
    }),
    (7, 0, EDX, {8: "avx512_vp2intersect", 14: "serialize", 23: "avx512_fp16"}),
    (7, 1, EAX, {
        0: "sha512", 1: "sm3", 2: "sm4", 4: "avx_vnni", 5: "avx512_bf16", 7: "cmpccxadd",
        23: "avx_ifma",
    }),
    (0xD, 1, EAX, {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1"}),
    (0x80000001, 0, ECX, {
        0: "lahf_lm", 5: "abm", 6: "sse4a", 7: "misalignsse", 11: "xop", 16: "fma4", 21: "tbm",
    }),
    (0x80000001, 0, EDX, {22: "mmxext", 27: "rdtscp", 30: "3dnowext", 31: "3dnow"}),
    (0x80000008, 0, EBX, {0: "clzero"}),
)  # fmt: skip
_LEAVES = {row[:2] for row in _WORDS}
_RECORD = struct.Struct(f"<{len(_WORDS)}I")
SIZE = _RECORD.size

# What XCR0 must have (SDM volume 1, 13.3), beside what begins with "avx512".
_AVX, _AVX512 = 1 << 2, 7 << 5 | 1 << 2
_NEED_AVX = {
    "avx", "avx2", "fma", "f16c", "vaes", "vpclmulqdq", "sha512", "sm3", "sm4", "avx_vnni",
    "avx_ifma", "xop", "fma4",
}  # fmt: skip

_CPUID = b"\x0f\xa2"
_STEP = 1 << 16


def shown(cpuid: Cpuid) -> frozenset[str]:
    """What CPUID shows. A hypervisor takes 20 us for each leaf."""
    leaves = {(leaf, subleaf): cpuid(leaf, subleaf) for leaf, subleaf in _LEAVES}
    return frozenset(_names(leaves[row[:2]][row[2]] for row in _WORDS))


def usable(names: Iterable[str], xcr0: int) -> frozenset[str]:
    """Of these, what a guest can execute while XCR0 is so."""
    return frozenset(name for name in names if xcr0 & _needs(name) == _needs(name))


def _needs(name: str) -> int:
    return _AVX512 if name.startswith("avx512") else _AVX if name in _NEED_AVX else 0


def encode(names: Iterable[str]) -> bytes:
    """These as SIZE bytes."""
    given = set(names)
    return _RECORD.pack(
        *(sum(1 << bit for bit, name in row[3].items() if name in given) for row in _WORDS)
    )


def decode(data: bytes) -> frozenset[str]:
    """What encode() was given. A bit without a name is nothing that this tender knows of."""
    return frozenset(_names(_RECORD.unpack(data)))


def _names(words: Iterable[int]) -> Iterator[str]:
    for word, row in zip(words, _WORDS, strict=True):
        yield from (name for bit, name in row[3].items() if word >> bit & 1)


def looks_at_cpuid(code: memoryview) -> bool:
    """Whether there may be a CPUID instruction in it: without one, a guest has chosen nothing."""
    return any(
        bytes(code[at : at + _STEP + 1]).find(_CPUID) >= 0 for at in range(0, len(code), _STEP)
    )
