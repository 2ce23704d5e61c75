"""What abi/ffi_build.py compiles from tender/engine.c."""

from typing import Any

class _Lib:
    ENGINE_RANGES: int
    ENGINE_DEVICES: int
    ENGINE_NO_DEVICE: int
    ENGINE_BLOCK: int
    ENGINE_NET: int

    def engine_run(self, engine: Any) -> int: ...
    def engine_answer(self, engine: Any, number: int, gpa: int) -> int: ...

ffi: Any
lib: _Lib
