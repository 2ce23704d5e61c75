"""The FPU's state as an XSAVE area has it: of KVM, and of a signal frame.

Source: Intel SDM volume 1, chapter 13 (the standard format), and volume 2, FXSAVE.
"""

from __future__ import annotations

import struct

from tender._native import lib
from tender.boot.x86_64 import EXTENDED, X87_AND_SSE, Fpu
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LEGACY = 512  # bytes: x87 and SSE, as FXSAVE has them; then comes XSTATE_BV

_FIELDS = struct.Struct("<HHBxHQQI")
_ST, _XMM = 32, 160  # offsets
_IN_USE = struct.Struct("<Q")
_OFFSETS = {part: lib.xsave_offset(part) for part in EXTENDED}


def size() -> int:
    """Of an area with all parts that this CPU has and that are kept, in bytes."""
    ends = [_OFFSETS[part] + size for part, size in EXTENDED.items() if _OFFSETS[part]]
    return max(ends, default=LEGACY)


def parts_in_use(area: bytes) -> int:
    """XSTATE_BV: the parts that are not as after a reset, as bits of XCR0."""
    value: int = _IN_USE.unpack_from(area, LEGACY)[0] if len(area) > LEGACY else X87_AND_SSE
    return value


def fpu(area: bytes) -> Fpu:
    """What an area has."""
    fcw, fsw, ftwx, last_opcode, last_ip, last_dp, mxcsr = _FIELDS.unpack_from(area)
    st = tuple(area[at : at + 10] for at in range(_ST, _XMM, 16))
    xmm = tuple(area[at : at + 16] for at in range(_XMM, _XMM + 256, 16))
    in_use, extended = parts_in_use(area), {}
    for part, size in EXTENDED.items():
        if in_use >> part & 1:
            offset = _OFFSETS[part]
            extended[part] = area[offset : offset + size]
    return Fpu(fcw, fsw, ftwx, last_opcode, last_ip, last_dp, st, xmm, mxcsr, extended)


def write(fpu: Fpu, area: Any, what: str) -> None:
    """Put it into an area, a buffer, whose other parts stay.

    Raises HostError where the CPU, `what`, lacks a part.
    """
    fields = (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp, fpu.mxcsr)
    _FIELDS.pack_into(area, 0, *fields)
    for start, values in ((_ST, fpu.st), (_XMM, fpu.xmm)):
        for index, value in enumerate(values):
            at = start + 16 * index
            area[at : at + len(value)] = value
    if len(area) == LEGACY and not fpu.extended:
        return
    in_use = parts_in_use(bytes(area[:])) & ~sum(1 << part for part in EXTENDED) | X87_AND_SSE
    for part, value in fpu.extended.items():
        offset = _OFFSETS[part]
        if not offset:
            raise HostError(f"{what}: the guest uses AVX or AVX-512, which this machine has not")
        area[offset : offset + len(value)] = value
        in_use |= 1 << part
    _IN_USE.pack_into(area, LEGACY, in_use)
