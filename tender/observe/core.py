"""A core file of a guest that aborted, for gdb.

The rule here: the file has its name only when it is complete, and costs disk only for the memory
that the guest touched. Sources: the ELF specification (core files), and Linux's struct
elf_prstatus and the registers in it (linux/elfcore.h; asm/user_64.h of x86, asm/ptrace.h of arm64).
"""

from __future__ import annotations

import os
import struct

from tender.boot.layout import PAGE_SIZE
from tender.errors import ConfigError, HostError
from tender.image.elf import EM_AARCH64, EM_X86_64, IDENT, PHDR, PT_LOAD, PT_NOTE
from tender.observe import touched
from tender.observe.core_helper import CoreFile, request_name, start_helper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.boot import aarch64, x86_64
    from tender.memory import GuestMemory

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
ET_CORE, NT_PRSTATUS = 4, 1
PRSTATUS_PID, PRSTATUS_REGISTERS, PRSTATUS_AFTER = 32, 112, 8
REGISTER_ORDER = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base",
    "ds", "es", "fs", "gs",
)  # fmt: skip

MEMORY_OFFSET = PAGE_SIZE  # of guest memory in the file


class Target:
    """The place where a core file will be written: opened at the start, used at an abort.

    `memory_fd` is the file of the guest's memory where it has one, `target` is Solo5's. `fds` are
    the descriptors for writing it, by their labels in the policies.
    """

    def __init__(self, folder: str, memory_fd: int = -1, target: str = "hvt") -> None:
        self._folder = folder
        self.fds: dict[str, int] = {}
        folder_fd = _open_folder(folder)
        try:
            if target != "spt":  # which looks at its memory itself
                self.fds |= touched.open_source(memory_fd)
            file = CoreFile(folder_fd, target)
            self.fds["core"] = file.fd
            self.fds["core-helper"], self._helper_pid = start_helper(file)
        except OSError as error:
            while self.fds:
                os.close(self.fds.popitem()[1])
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"--dumpcore={folder}: cannot make a file there: {reason}") from None
        finally:
            os.close(folder_fd)

    def close(self) -> None:
        """Give up a file that was not named."""
        while self.fds:
            os.close(self.fds.popitem()[1])
        try:
            os.waitpid(self._helper_pid, 0)
        except ChildProcessError:
            pass  # whoever started this process had it ignore SIGCHLD

    @staticmethod
    def size(mem_bytes: int) -> int:
        """The length of the core file of a guest with this memory, in bytes."""
        return MEMORY_OFFSET + mem_bytes

    def write(self, memory: GuestMemory, state: Any, check: Callable[[], None]) -> str:
        """Write the core of a guest, once; returns its path.

        `check` is called now and then, and may raise; then there is no file.
        """
        try:
            _write_core(self.fds, memory, state, check)
            name = request_name(self.fds["core-helper"])
        except OSError as error:
            raise HostError(f"dumpcore: {self._folder}", "write", error.errno or 0) from None
        return os.path.join(self._folder, name)


def _open_folder(folder: str) -> int:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"--dumpcore={folder}: cannot open dir: {reason}") from None
    if not os.access(folder, os.W_OK):
        os.close(fd)
        raise ConfigError(f"--dumpcore={folder}: dir not writable")
    return fd


def header(mem_bytes: int, state: Any) -> bytes:
    """All of the core file that comes before the guest's memory."""
    is_x86 = "rip" in state.registers
    registers = _x86_registers(state) if is_x86 else _aarch64_registers(state)
    return header_of(mem_bytes, EM_X86_64 if is_x86 else EM_AARCH64, registers)


# Where the registers are in the header.
REGISTERS_OFFSET = EHDR.size + 2 * PHDR.size + 20 + PRSTATUS_REGISTERS


def header_of(mem_bytes: int, machine: int, registers: list[int]) -> bytes:
    """The same of registers in the order of the machine's prstatus."""
    status = prstatus(registers)
    note = struct.pack("<III8s", 5, len(status), NT_PRSTATUS, b"CORE") + status
    note_offset = EHDR.size + 2 * PHDR.size
    ehdr = EHDR.pack(
        IDENT, ET_CORE, machine, 1, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, 2, 0, 0, 0
    )
    notes = PHDR.pack(PT_NOTE, 0, note_offset, 0, 0, len(note), len(note), 4)
    load = PHDR.pack(PT_LOAD, 7, MEMORY_OFFSET, 0, 0, mem_bytes, mem_bytes, PAGE_SIZE)
    return ehdr + notes + load + note


def prstatus(registers: list[int]) -> bytes:
    """A struct elf_prstatus around the machine's registers."""
    data = bytearray(PRSTATUS_REGISTERS + 8 * len(registers) + PRSTATUS_AFTER)
    struct.pack_into("<i", data, PRSTATUS_PID, 1)
    struct.pack_into(f"<{len(registers)}Q", data, PRSTATUS_REGISTERS, *registers)
    return bytes(data)


def _x86_registers(state: x86_64.State) -> list[int]:
    values = {**state.registers, "orig_rax": (1 << 64) - 1}
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        values[name] = state.segments[name].selector
    values["fs_base"] = state.segments["fs"].base
    values["gs_base"] = state.segments["gs"].base
    return [values[name] for name in REGISTER_ORDER]


def _aarch64_registers(state: aarch64.State) -> list[int]:
    from tender.boot.aarch64 import GENERAL, stack_pointer

    values = state.registers
    names = (*GENERAL, stack_pointer(values["pstate"]), "pc", "pstate")
    return [values[name] for name in names]


def _write_core(
    fds: dict[str, int], memory: GuestMemory, state: Any, check: Callable[[], None]
) -> None:
    fd = fds["core"]
    os.ftruncate(fd, Target.size(memory.size))
    touched.pwrite(fd, memoryview(header(memory.size, state)), 0)
    touched.write(fd, MEMORY_OFFSET, fds, memory, check)
