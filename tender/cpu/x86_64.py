"""What every x86_64 CPU does with exceptions, page tables and opcodes, as functions of bytes.

The rule here: pure, and of no emulator: soft_x86_64.py asks where Unicorn leaves it to its user.
Source: Intel SDM volume 2, appendix A, and volume 3, chapters 4 and 6.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DE, DB, NMI, BP, UD, DF, TS, NP, SS, GP, PF, AC = 0, 1, 2, 3, 6, 8, 10, 11, 12, 13, 14, 17
HAS_ERROR_CODE = {DF, TS, NP, SS, GP, PF, AC}
PF_PRESENT, PF_FETCH = 1 << 0, 1 << 4  # of #PF's error code
CONTRIBUTORY = {DE, TS, NP, SS, GP}

TF, IF, NT, RF, VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17
INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF

U64 = (1 << 64) - 1  # addresses wrap at 64 bits
PAGE = 4096
PRESENT, WRITABLE, LARGE = 1 << 0, 1 << 1, 1 << 7
ADDRESS_BITS = 0x000FFFFFFFFFF000

_PREFIXES = frozenset(
    [0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, *range(0x40, 0x50)]
)
_INSTRUCTION_MAX = 15
LOCK = 0xF0


class CpuException(Exception):
    """An exception of the guest's CPU; `address` is CR2, of a page fault that is found here."""

    def __init__(self, vector: int, error_code: int = 0, address: int | None = None) -> None:
        super().__init__(vector, error_code)
        self.vector = vector
        self.error_code = error_code
        self.address = address


def combine(first: CpuException, second: CpuException) -> CpuException | None:
    """What two exceptions make when delivering one raises another (SDM table 6-5); None: reset."""
    if first.vector == DF:
        return None
    double = (first.vector in CONTRIBUTORY and second.vector in CONTRIBUTORY) or (
        first.vector == PF and (second.vector in CONTRIBUTORY or second.vector == PF)
    )
    return CpuException(DF, 0, second.address) if double else second


def walk(read: Callable[[int], int], cr3: int, address: int) -> tuple[int, bool] | None:
    """The GPA behind an address and whether its page is writable; None: no page.

    `address` is canonical; `read` gives 8 bytes of physical memory (SDM volume 3, figure 4-8).
    """
    table, writable = cr3 & ADDRESS_BITS, True
    for shift in (39, 30, 21, 12):
        entry = read(table + (address >> shift & 0x1FF) * 8)
        if not entry & PRESENT:
            return None
        writable = writable and bool(entry & WRITABLE)
        if shift == 12 or (entry & LARGE and shift < 39):
            offset = address & ((1 << shift) - 1)
            return entry & ADDRESS_BITS & ~((1 << shift) - 1) | offset, writable
        table = entry & ADDRESS_BITS
    raise AssertionError("a page walk has four steps")


def is_canonical(address: int) -> bool:
    """Whether bits 48 to 63 are those of bit 47 (SDM volume 1, 3.3.7.1)."""
    return address >> 47 in (0, 0x1FFFF)


def skip_prefixes(code: bytes) -> int:
    """Where an instruction's opcode starts."""
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    return at


# One-byte opcodes without a meaning in 64-bit mode (SDM volume 2, table A-2).
_UNDEFINED = frozenset(
    [0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82, 0x9A,
     0xCE, 0xD4, 0xD5, 0xD6, 0xEA]
)  # fmt: skip
_EXTENDED = frozenset([0x0F, 0x62, 0xC4, 0xC5, 0x8F])  # where CPUs differ in what they can do
_UD = (b"\x0f\x0b", b"\x0f\xb9", b"\x0f\xff")


def is_undefined(code: bytes) -> bool:
    """Whether no CPU does this: the guest gets its #UD. Else it is the emulator that can't."""
    at = skip_prefixes(code)
    if code[at : at + 2] in _UD or LOCK in code[:at]:
        return True
    return code[at : at + 1] not in {bytes([byte]) for byte in _EXTENDED} or code[at] in _UNDEFINED
