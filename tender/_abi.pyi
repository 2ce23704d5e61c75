"""What abi/ffi_build.py compiles from abi/note.h, abi/hvt.h and abi/ring.h."""

from typing import Any

class _Lib:
    ABI1_NOTE_TYPE: int
    ABI1_NOTE_ALIGN: int
    ABI1_NOTE_DESC_OFFSET: int
    MFT1_NOTE_TYPE: int
    MFT1_NOTE_ALIGN: int
    MFT1_NOTE_DESC_OFFSET: int
    ABI_TARGET_HVT: int
    HVT_ABI_VERSION: int
    MFT_VERSION: int
    MFT_MAX_ENTRIES: int
    MFT_NAME_SIZE: int
    MFT_NAME_MAX: int
    MFT_DEV_BLOCK_BASIC: int
    MFT_DEV_NET_BASIC: int
    MFT_RESERVED_FIRST: int
    HVT_GUEST_MIN_BASE: int
    HVT_HYPERCALL_PIO_BASE: int
    HVT_HYPERCALL_MMIO_BASE: int
    HVT_MMIO_SIZE: int
    HVT_HYPERCALL_WALLTIME: int
    HVT_HYPERCALL_PUTS: int
    HVT_HYPERCALL_POLL: int
    HVT_HYPERCALL_BLOCK_WRITE: int
    HVT_HYPERCALL_BLOCK_READ: int
    HVT_HYPERCALL_NET_WRITE: int
    HVT_HYPERCALL_NET_READ: int
    HVT_HYPERCALL_HALT: int
    HVT_R_OK: int
    HVT_R_AGAIN: int
    HVT_R_EINVAL: int
    HVT_R_EUNSPEC: int
    HVT_CMDLINE_SIZE: int
    HVT_HALT_COOKIE_SIZE: int
    HVT_EXIT_ABORT: int
    HVT_FEATURE_NET_RING: int
    HVT_RING_KICK_PIO: int
    HVT_RING_KICK_MMIO_OFFSET: int
    HVT_RING_ENTRIES: int
    HVT_RING_REGION: int
    HVT_RING_NET_WRITE: int
    HVT_RING_NET_READ: int

ffi: Any
lib: _Lib
