"""A reader of x86_64 instructions: prefixes, ModRM, operands (Intel SDM volume 2, chapter 2)."""

from __future__ import annotations

from tender.cpu.x86_64 import U64, skip_prefixes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ORDER = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


class Instruction:
    """A reader of an instruction's bytes; raises IndexError behind their end.

    `read` gives a register by its name, `load` bytes of memory, for the operands.
    """

    def __init__(
        self, code: bytes, read: Callable[[str], int], load: Callable[[int, int], bytes]
    ) -> None:
        self._code = code
        self._read = read
        self._load = load
        self.at = skip_prefixes(code)
        prefixes = code[: self.at]
        rex = prefixes[-1] if prefixes and prefixes[-1] & 0xF0 == 0x40 else 0
        self.is_16_bit = 0x66 in prefixes
        self.is_64_bit = bool(rex & 8)
        self.rex_r, self._rex_x, self.rex_b = rex >> 2 & 1, rex >> 1 & 1, rex & 1
        self.address = 0  # of the last operand in memory

    def peek(self) -> int:
        """The next byte."""
        return self._code[self.at]

    def byte(self) -> int:
        """The next byte, taken."""
        self.at += 1
        return self._code[self.at - 1]

    def word(self) -> int:
        """The next 16 bits, taken."""
        return self.byte() | self.byte() << 8

    def _signed(self, size: int) -> int:
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little", signed=True)

    def operand(self, size: int) -> tuple[int, Callable[[], int]]:
        """The register of a ModRM byte, and a function that reads its other operand."""
        modrm = self.byte()
        mode, register, rm = modrm >> 6, modrm >> 3 & 7 | self.rex_r << 3, modrm & 7
        if mode == 3:
            name = ORDER[rm | self.rex_b << 3]
            return register, lambda: self._read(name) & ((1 << 8 * size) - 1)
        address = 0
        relative = False
        if rm == 4:
            sib = self.byte()
            scale, index, base = sib >> 6, sib >> 3 & 7 | self._rex_x << 3, sib & 7
            if index != 4:
                address += self._read(ORDER[index]) << scale
            if base != 5 or mode:
                address += self._read(ORDER[base | self.rex_b << 3])
            else:
                address += self._signed(4)
        elif rm == 5 and not mode:
            address += self._signed(4)
            relative = True
        else:
            address += self._read(ORDER[rm | self.rex_b << 3])
        if mode:
            address += self._signed(1 if mode == 1 else 4)
        if relative:
            address += self._read("rip") + self.at
        self.address = address & U64
        return register, lambda: int.from_bytes(self._load(self.address, size), "little")
