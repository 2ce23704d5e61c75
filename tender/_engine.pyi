"""What abi/ffi_build.py compiles from tender/engine.c."""

from typing import Any

class _Lib:
    ENGINE_RANGES: int
    ENGINE_DEVICES: int
    ENGINE_NO_DEVICE: int
    ENGINE_BLOCK: int
    ENGINE_NET: int
    RING_NO_FAULT: int
    RING_INDEX: int
    RING_ADDRESS: int

    def ring_start(self, ring: Any) -> int: ...
    def ring_end(self, ring: Any) -> None: ...
    def engine_run(self, engine: Any) -> int: ...
    def engine_answer(self, engine: Any, number: int, gpa: int) -> int: ...

ffi: Any
lib: _Lib
