"""The tender's side of the native CPU, whose guest forges all that the two share.

A thread plays the guest's process: it has the shared region mapped, and writes to it while the
tender reads. The seed is fixed, but which of the two is faster is not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import resource
import struct
import threading
from collections.abc import Iterator

import pytest

from tender._native import ffi, lib
from tender.boot import layout, x86_64
from tender.cleanup import Cleanup
from tender.cpu import native
from tender.cpu.vcpu import Failure, Fault, IoIn, IoOut
from tender.errors import GuestFault
from tender.memory import GuestMemory
from tender.observe import core
from tender.stop import Stop

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="a matter of x86_64")

TRAPS = int(os.environ.get("PTENDER_TEST_TRAPS", 2000))  # more by hand
SEED = int(os.environ.get("PTENDER_TEST_SEED", 1))
GROWTH_KB = 2048
SIZE = 4 << 20
TEXT, DATA = 0x100000, 0x200000
U64 = 1 << 64
FUTEX, FUTEX_WAKE = 202, 1

# Offsets in what the two share, in ucontext_t (as the kernel has it), and in that of a register.
TURN, SIGNO, CODE, CONTEXT = (
    ffi.offsetof("struct native_shared", name) for name in ("turn", "signo", "code", "context")
)
GREGS, FPREGS, FRAME = 40, 224, 936
RAX, RSP, RIP, RFLAGS, CS, ERROR, TRAPNO, CR2 = 13, 15, 16, 17, 18, 19, 20, 22

PRIVILEGED = """
    ee ef 66ef e680 e780 e480 e580 ec ed 66ed 6c 6d 6e 6f f36f fa fb f4 cd03 cd80 cdff cf 48cf
    ca1000 48ca0800 cb 48cb 8ed0 8ed8 8ee0 8e25 8e0c25 418ed9 0f30 0f32 0f33 0f06 0f08 0f09
    0f20c0 0f20d8 440f20c0 0f22c0 0f22d0 0f22d8 0f22e0 0f21c0 0f23c0 0f00d0 0f00d8 0f0010
    0f0018 0f00c0 0f0110 0f0118 0f011425 0f0138 0f01f8 0f01d0 0f01f0 0f0130 0fa1 0fa9 f3 4f 66
"""
CODES = [bytes.fromhex(text) for text in PRIVILEGED.split()]


def word(chance: random.Random) -> int:
    """A number that may mean something: an address, a limit, one beside it, or any."""
    near = [0, layout.MIN_BASE, x86_64.READ_ONLY_FROM, TEXT, DATA, SIZE, 1 << 32, 1 << 47, U64 - 1]
    near += [lib.NATIVE_SHARED, lib.NATIVE_PROGRAM, 0x500, 0x3B, U64 - (1 << 47), 0xC0000100]
    if chance.random() < 0.2:
        return chance.getrandbits(64)
    if chance.random() < 0.4:
        return DATA + chance.randrange(SIZE - DATA)
    return (chance.choice(near) + chance.choice((0, 0, 0, 1, -1, 8, -8, 4096, -4096))) % U64


class Guest:
    """A CPU whose guest is a thread."""

    def __init__(self, cleanup: Cleanup) -> None:
        self.memory = GuestMemory(SIZE, shared=True)
        cleanup.callback(self.memory.close)
        self.memory.put(layout.X86_GDT, x86_64.gdt())
        self.memory.put(layout.X86_PML4, x86_64.page_tables(SIZE))
        self.memory.view[TEXT : TEXT + 4096] = bytes([0xEF]) * 4096
        self.memory.view[DATA:] = bytes(SIZE - DATA)  # touched, as it will be
        self.memory.protect(TEXT, TEXT + 4096, readable=True, writable=False)
        self.cpu = native.NativeCpu(self.memory, [(TEXT, TEXT + 4096)], Stop(), cleanup)
        self.cpu.set_state(x86_64.initial_state(TEXT, SIZE))
        fd = self.cpu.fds["guest-shared"]
        self.shared = mmap.mmap(fd, lib.NATIVE_SHARED_SIZE)
        cleanup.callback(self.shared.close)
        start = ctypes.c_char.from_buffer(self.shared)
        self._address = ctypes.addressof(start)
        del start  # it holds the mapping
        self._chance = random.Random(SEED)
        self._libc = ctypes.CDLL(None)
        self._ending = False
        self._thread = threading.Thread(target=self._play)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ending = True
        self._thread.join()

    def _play(self) -> None:
        while not self._ending:
            if self.shared[TURN] == lib.NATIVE_TURN_TENDER:
                self._scribble()
                continue
            self._forge()
            self.shared[TURN : TURN + 4] = struct.pack("<I", lib.NATIVE_TURN_TENDER)
            self._libc.syscall(FUTEX, ctypes.c_void_p(self._address), FUTEX_WAKE, 1)

    def _scribble(self) -> None:
        """Change anything but the turn while the tender looks at it."""
        at = self._chance.randrange(4, lib.NATIVE_SHARED_SIZE)
        self.shared[at] = self._chance.getrandbits(8)
        self._set_register(self._chance.randrange(23), word(self._chance))

    def _set_register(self, index: int, value: int) -> None:
        struct.pack_into("<Q", self.shared, self._frame + GREGS + 8 * index, value)

    def _forge(self) -> None:
        chance = self._chance
        self._frame = lib.NATIVE_STACK + 8 * chance.randrange(
            (lib.NATIVE_STACK_SIZE - FRAME) // 8 + 1
        )
        context = lib.NATIVE_SHARED + self._frame
        if chance.random() < 0.02:
            context = word(chance)
        signo = chance.choice((11, 11, 11, 7, 4, 8, 5, 31, chance.getrandbits(31)))
        struct.pack_into("<iIQ", self.shared, SIGNO, signo, chance.getrandbits(32), word(chance))
        struct.pack_into("<i", self.shared, CODE, chance.choice((0, 1, 0x80)))
        struct.pack_into("<3Q", self.shared, CONTEXT, context, word(chance), word(chance))
        for index in range(23):
            self._set_register(index, word(chance))
        self._set_register(CS, chance.choice((0x33, 0x33, 0x33, 0x33, 0x23, word(chance))))
        self._set_register(TRAPNO, chance.choice((13, 13, 13, 14, 6, *range(34), word(chance))))
        struct.pack_into("<Q", self.shared, self._frame + FPREGS, word(chance))
        self._write_instruction()

    def _write_instruction(self) -> None:
        chance = self._chance
        code = chance.choice(CODES) + chance.randbytes(chance.randrange(12))
        if chance.random() < 0.3:
            code = chance.choice((b"\x66", b"\x48", b"\x41", b"\x4f", b"\xf2\x66\x48")) + code
        at = min(DATA + chance.randrange(SIZE - DATA), SIZE - len(code))
        self.memory.view[at : at + len(code)] = code
        self._set_register(RIP, at)
        if chance.random() < 0.3:
            self._set_register(RIP, TEXT + chance.randrange(4100))


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Cleanup() as cleanup:
        made = Guest(cleanup)
        made.start()
        cleanup.callback(made.end)
        yield made


def test_a_forged_trap_is_an_exit(guest: Guest) -> None:
    """Or a fault of the guest; the state can be read after each, and nothing grows."""
    seen: set[type] = set()
    before = 0
    for nth in range(TRAPS):
        try:
            seen.add(type(guest.cpu.run()))
        except GuestFault:
            seen.add(GuestFault)
        state = guest.cpu.get_state()
        assert len(core.header(SIZE, guest.cpu.core_state())) <= 4096
        assert 0 <= guest.cpu.instruction_pointer() < U64
        assert state.registers["rflags"] < U64
        if nth == TRAPS // 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert {Failure, Fault, IoIn, IoOut} <= seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB
