"""The registers that a debugger sees: their order, their description, and a State as bytes.

Names and features are gdb's own: its manual, G.5 ("Standard Target Features").
"""

from __future__ import annotations

from tender.boot import aarch64, x86_64
from tender.cpu.vcpu import NotSupported
from tender.dataclass import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

U32, U64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass
class Register:
    """A register of `size` bytes; `kind` is a type of gdb's, and `write` None: it is shown only."""

    name: str
    size: int
    kind: str
    read: Callable[[Any], int | bytes]
    write: Callable[[Any, int], Any] | None = None


@dataclass
class Architecture:
    """What the debugger is told of a CPU. `pc` is the number of the program counter."""

    name: str
    features: tuple[tuple[str, str, tuple[Register, ...]], ...]  # name, types, registers
    pc: int

    @property
    def registers(self) -> list[Register]:
        """All of them; a register's number is its place here."""
        return [register for _, _, registers in self.features for register in registers]

    def xml(self) -> bytes:
        """The target description."""
        parts = [
            '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">',
            f"<architecture>{self.name}</architecture><osabi>none</osabi>",
        ]
        for feature, types, registers in self.features:
            parts.append(f'<feature name="{feature}">{types}')
            for each in registers:
                group = ' group="system"' if each.write is None else ""
                parts.append(
                    f'<reg name="{each.name}" bitsize="{each.size * 8}" type="{each.kind}"{group}/>'
                )
            parts.append("</feature>")
        return "".join([*parts, "</target>"]).encode()

    def read(self, state: Any, number: int) -> bytes:
        """A register's bytes; raises IndexError."""
        register = self.registers[number]
        value = register.read(state)
        if isinstance(value, int):
            value = (value & ((1 << 8 * register.size) - 1)).to_bytes(register.size, "little")
        return value

    def read_all(self, state: Any) -> bytes:
        """The bytes of all of them."""
        return b"".join(self.read(state, number) for number in range(len(self.registers)))

    def write(self, state: Any, number: int, data: bytes) -> Any:
        """`state` with another value; raises IndexError, ValueError or NotSupported."""
        register = self.registers[number]
        if len(data) != register.size:
            raise ValueError(data)
        if register.write is None:
            raise NotSupported(f"{register.name} can be read only")
        return register.write(state, int.from_bytes(data, "little"))

    def write_all(self, state: Any, data: bytes) -> Any:
        """`state` with other values; raises ValueError or NotSupported."""
        at = 0
        for number, register in enumerate(self.registers):
            value = data[at : at + register.size]
            at += register.size
            if value != self.read(state, number):
                state = self.write(state, number, value)
        if at != len(data):
            raise ValueError(data)
        return state


def of(machine: str) -> Architecture:
    """That of a guest: x86_64 or aarch64."""
    return _aarch64() if machine == "aarch64" else _x86_64()


# x86_64.


def _x86_64() -> Architecture:
    general = [
        Register(name, 8, _X86_KINDS.get(name, "int64"), *_in("registers", name))
        for name in (
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rbp",
            "rsp",
            *tuple(f"r{number}" for number in range(8, 16)),
            "rip",
        )
    ]
    flags = Register("eflags", 4, "i386_eflags", *_in("registers", "rflags"))
    selectors = [_selector(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    x87 = [Register(f"st{index}", 10, "i387_ext", *_st(index)) for index in range(8)]
    control = [Register(name, 4, "int", *_X87[name]) for name in _X87]
    sse = [Register(f"xmm{index}", 16, "vec128", *_xmm(index)) for index in range(16)]
    mxcsr = Register("mxcsr", 4, "i386_mxcsr", *_fpu("mxcsr", U32))
    bases = [Register(f"{name}_base", 8, "int64", *_base(name)) for name in ("fs", "gs")]
    system = [
        Register(name, 8, "int64", _in("control", name)[0])
        for name in ("cr0", "cr2", "cr3", "cr4", "efer")
    ]
    return Architecture(
        "i386:x86-64",
        (
            (
                "org.gnu.gdb.i386.core",
                _EFLAGS,
                (*general, flags, *selectors, *x87, *control),
            ),
            ("org.gnu.gdb.i386.sse", _VEC128 + _MXCSR, (*sse, mxcsr)),
            ("org.gnu.gdb.i386.segments", "", tuple(bases)),
            ("ptender.system", "", tuple(system)),
        ),
        16,
    )


_X86_KINDS = {"rip": "code_ptr", "rsp": "data_ptr", "rbp": "data_ptr"}


def _in(field: str, name: str) -> tuple[Callable[[Any], int], Callable[[Any, int], Any]]:
    """An entry of a dictionary of State."""

    def read(state: Any) -> int:
        value: int = getattr(state, field)[name]
        return value & U64

    def write(state: Any, value: int) -> Any:
        return replace(state, **{field: {**getattr(state, field), name: value}})

    return read, write


def _selector(name: str) -> Register:
    return Register(name, 4, "int32", lambda state: state.segments[name].selector)


def _base(name: str) -> tuple[Callable[[Any], int], Callable[[Any, int], Any]]:
    def write(state: Any, value: int) -> Any:
        segment = replace(state.segments[name], base=value)
        return replace(state, segments={**state.segments, name: segment})

    return lambda state: state.segments[name].base, write


def _of(state: Any) -> x86_64.Fpu:
    return state.fpu or x86_64.Fpu()


def _fpu(field: str, mask: int) -> tuple[Callable[[Any], int], Callable[[Any, int], Any]]:
    def write(state: Any, value: int) -> Any:
        return replace(state, fpu=replace(_of(state), **{field: value & mask}))

    return lambda state: getattr(_of(state), field) & mask, write


def _item(field: str, index: int, size: int) -> tuple[Callable[[Any], bytes], Any]:
    def write(state: Any, value: int) -> Any:
        items = list(getattr(_of(state), field))
        items[index] = value.to_bytes(size, "little")
        return replace(state, fpu=replace(_of(state), **{field: tuple(items)}))

    return lambda state: bytes(getattr(_of(state), field)[index]), write


def _st(index: int) -> tuple[Callable[[Any], bytes], Any]:
    return _item("st", index, 10)


def _xmm(index: int) -> tuple[Callable[[Any], bytes], Any]:
    return _item("xmm", index, 16)


VALID, ZERO, SPECIAL, EMPTY = 0, 1, 2, 3


def tag_word(fpu: x86_64.Fpu) -> int:
    """The x87 tag word, two bits for each physical register (Intel SDM volume 1, 8.1.7)."""
    top = fpu.fsw >> 11 & 7
    tags = 0
    for physical in range(8):
        tag = EMPTY
        if fpu.ftwx >> physical & 1:
            tag = _tag(int.from_bytes(fpu.st[(physical - top) & 7], "little"))
        tags |= tag << 2 * physical
    return tags


def _tag(value: int) -> int:
    exponent, significand = value >> 64 & 0x7FFF, value & U64
    if exponent == 0:
        return SPECIAL if significand else ZERO
    return VALID if exponent != 0x7FFF and significand >> 63 else SPECIAL


def _set_tag_word(state: Any, value: int) -> Any:
    used = sum((value >> 2 * index & 3 != EMPTY) << index for index in range(8))
    return replace(state, fpu=replace(_of(state), ftwx=used))


def _half(field: str, shift: int, mask: int) -> tuple[Callable[[Any], int], Any]:
    def write(state: Any, value: int) -> Any:
        whole = getattr(_of(state), field) & ~(mask << shift) | (value & mask) << shift
        return replace(state, fpu=replace(_of(state), **{field: whole}))

    return lambda state: getattr(_of(state), field) >> shift & mask, write


_X87: dict[str, tuple[Any, Any]] = {
    "fctrl": _fpu("fcw", 0xFFFF),
    "fstat": _fpu("fsw", 0xFFFF),
    "ftag": (lambda state: tag_word(_of(state)), _set_tag_word),
    "fiseg": _half("last_ip", 32, 0xFFFF),
    "fioff": _half("last_ip", 0, U32),
    "foseg": _half("last_dp", 32, 0xFFFF),
    "fooff": _half("last_dp", 0, U32),
    "fop": _fpu("last_opcode", 0x7FF),
}


def _flag_fields(names: str, first: int = 0) -> str:
    return "".join(
        f'<field name="{name}" start="{at}" end="{at}"/>'
        for at, name in enumerate(names.split(), first)
        if name != "-"
    )


_EFLAGS = (
    '<flags id="i386_eflags" size="4">'
    + _flag_fields("CF - PF - AF - ZF SF TF IF DF OF - - NT - RF VM AC VIF VIP ID")
    + "</flags>"
)
_MXCSR = (
    '<flags id="i386_mxcsr" size="4">'
    + _flag_fields("IE DE ZE OE UE PE DAZ IM DM ZM OM UM PM - - FZ")
    + "</flags>"
)
_VECTORS = (
    ("v4f", "ieee_single", 4), ("v2d", "ieee_double", 2), ("v16i8", "int8", 16),
    ("v8i16", "int16", 8), ("v4i32", "int32", 4), ("v2i64", "int64", 2),
)  # fmt: skip
_VEC128 = (
    "".join(f'<vector id="{name}" type="{kind}" count="{n}"/>' for name, kind, n in _VECTORS)
    + '<union id="vec128">'
    + "".join(
        f'<field name="{field}" type="{kind}"/>'
        for field, kind in (
            ("v4_float", "v4f"), ("v2_double", "v2d"), ("v16_int8", "v16i8"),
            ("v8_int16", "v8i16"), ("v4_int32", "v4i32"), ("v2_int64", "v2i64"),
            ("uint128", "uint128"),
        )
    )
    + "</union>"
)  # fmt: skip


# aarch64.


def _aarch64() -> Architecture:
    core = [Register(name, 8, "int64", *_in("registers", name)) for name in aarch64.GENERAL]
    core += [
        Register("sp", 8, "data_ptr", _read_sp, _write_sp),
        Register("pc", 8, "code_ptr", *_in("registers", "pc")),
        Register("cpsr", 4, "int32", *_in("registers", "pstate")),
    ]
    vectors = [
        Register(f"v{index}", 16, "vec128", *_vector(index)) for index in range(aarch64.VECTORS)
    ]
    status = [Register(name, 4, "int32", *_field(name)) for name in ("fpsr", "fpcr")]
    return Architecture(
        "aarch64",
        (
            ("org.gnu.gdb.aarch64.core", "", tuple(core)),
            ("org.gnu.gdb.aarch64.fpu", _VEC128, (*vectors, *status)),
        ),
        32,
    )


def _read_sp(state: Any) -> int:
    registers: dict[str, int] = state.registers
    return registers[aarch64.stack_pointer(registers["pstate"])]


def _write_sp(state: Any, value: int) -> Any:
    name = aarch64.stack_pointer(state.registers["pstate"])
    return replace(state, registers={**state.registers, name: value})


def _vector(index: int) -> tuple[Callable[[Any], int], Callable[[Any, int], Any]]:
    def write(state: Any, value: int) -> Any:
        vectors = (*state.vectors[:index], value, *state.vectors[index + 1 :])
        return replace(state, vectors=vectors)

    return lambda state: state.vectors[index], write


def _field(name: str) -> tuple[Callable[[Any], int], Callable[[Any, int], Any]]:
    return (
        lambda state: getattr(state, name) & U32,
        lambda state, value: replace(state, **{name: value}),
    )
