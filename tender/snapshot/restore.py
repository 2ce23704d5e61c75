"""A snapshot that goes on: its memory, its devices, its CPU and its time.

Where its memory is this process's own (KVM, the software CPU) the file is mapped privately: a page
is read when the guest uses it, and the file must stay as it is while the guest runs. One that
changes is that guest's harm alone, and one that shrinks ends its process by SIGBUS.
"""

from __future__ import annotations

import os
from errno import EACCES, EIO, EPERM, EROFS
from time import monotonic_ns, time_ns

from tender._native import lib
from tender.boot.layout import MMIO_BASE, PAGE_SIZE
from tender.cpu import features, saved
from tender.cpu.vcpu import IoOut, Mmio
from tender.dataclass import replace
from tender.errors import (
    ConfigError,
    DeviceError,
    HostError,
    SnapshotError,
    UsageError,
    option,
    setting,
)
from tender.image.elf import EM_AARCH64
from tender.image.file import check_regular
from tender.observe import touched
from tender.snapshot import file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from tender.accel import Kind
    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.vcpu import Exit, Vcpu
    from tender.image.elf import Image
    from tender.image.manifest import Attached
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.modules.poll import Poll

LEAP_NS = 100_000_000  # by which the guest's clock may be off without a word
NS = 1_000_000_000
U64 = (1 << 64) - 1


class SnapshotFile:
    """An open snapshot in the place of an image.ImageFile.

    `fd` is its descriptor where it is open already; then `path` is what messages call it. Raises
    TenderError for a file that is no snapshot, and for one that was restored before, unless this is
    to be a `clone`.
    """

    def __init__(self, path: str, fd: int | None = None, *, clone: bool = False) -> None:
        self.path = path
        self.is_writable = True
        self._fd = check_regular(path, self._open() if fd is None else fd)
        try:
            self.info = os.fstat(self._fd)
            self.snapshot, self._offset, is_used = file.read(self._fd)
            self.image: Image = self.snapshot.image()
            is_aarch64 = self.image.machine == EM_AARCH64
            self.state: Any = saved.decode(self.snapshot.state, is_aarch64=is_aarch64)
            if self.image.target != lib.ABI_TARGET_HVT:
                raise SnapshotError("the snapshot is damaged: its image is not of the hvt target")
        except SnapshotError as error:
            self.close()
            raise SnapshotError(f"{path}: {error}") from None
        self.pieces = dict(self.snapshot.pieces)
        self._clone = clone
        self._is_saved_again = False
        self._passed_ns = 0  # for the guest, since it was saved
        if is_used and not clone:
            raise self._used()

    def _open(self) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            try:
                return os.open(self.path, os.O_RDWR | flags)
            except OSError as error:
                if error.errno not in (EACCES, EPERM, EROFS):
                    raise
                self.is_writable = False
                return os.open(self.path, os.O_RDONLY | flags)
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise SnapshotError(f"{self.path}: Could not open: {reason}") from None

    def _used(self) -> ConfigError:
        self.close()
        return ConfigError(
            f"{self.path}: it was restored before, and two guests with the same secrets are no "
            f"longer safe from each other: to have one all the same, {setting('--clone', 'clone=')}"
        )

    def config(self, config: Config) -> Config:
        """The same with what the guest was started with."""
        snapshot, virtual = self.snapshot, self.snapshot.virtual
        self._is_saved_again = config.snapshots is not None or config.dumpcore is not None
        return replace(
            config,
            mem_bytes=snapshot.mem_bytes,
            exec_heap=snapshot.exec_heap,
            clock=virtual.time if virtual else None,
        )

    def load(self, memory: GuestMemory, check: Callable[[], None]) -> None:
        """Map or copy the memory, and protect it as the image's segments say.

        `check` is called after each piece that is copied, and may raise.
        """
        end = max((segment.end for segment in self.image.segments), default=0)
        if end > memory.size or memory.size != self.snapshot.mem_bytes:
            raise SnapshotError(f"{self.path}: the snapshot is damaged: the size of its memory")
        try:
            if memory.fd >= 0:
                for start, end in self._pages(memory.size):
                    self._copy(memory.fd, start, end)
                    check()
            else:
                memory.map_private(self._fd, self._offset)
                for start, end in self._pages(memory.size) if self._is_saved_again else ():
                    memory.backed.update(range(start // PAGE_SIZE, -(-end // PAGE_SIZE)))
        except OSError as error:
            what = f"{self.path}: cannot read the snapshot"
            raise HostError(what, None, error.errno or 0) from None
        for segment in self.image.segments:
            readable = segment.readable or segment.executable
            memory.protect(segment.start, segment.end, readable=readable, writable=segment.writable)

    def _copy(self, memory_fd: int, start: int, end: int) -> None:
        """From file to file: half of what it costs to touch the pages here first."""
        os.lseek(memory_fd, start, os.SEEK_SET)
        while start < end:
            count = os.sendfile(memory_fd, self._fd, self._offset + start, end - start)
            if not count:
                raise OSError(EIO, "")
            start += count

    def _pages(self, size: int) -> Iterator[tuple[int, int]]:
        """The runs of memory that the file has, as (start, end)."""
        first = self._offset
        for start, end in touched.data_ranges(self._fd, first, first + size):
            yield start - first, end - first

    def mark(self, warn: Warn) -> None:
        """Write into the file that the guest runs; raises ConfigError where another was first."""
        try:
            if not self.is_writable:
                raise PermissionError
            was_used = file.mark(self._fd)
        except OSError:
            if not self._clone:
                warn(f"{self.path}: read-only: that it was restored can't be noted there")
            return
        if was_used and not self._clone:
            raise self._used()

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    # The devices, the CPU and the time.

    def macs(self) -> dict[int, bytes]:
        """The MAC address that the guest knows of each network, by handle."""
        nets = self.image.manifest.of_type(lib.MFT_DEV_NET_BASIC)
        return {net.handle: self.snapshot.attached[net.handle].mac for net in nets}

    def check_devices(self, attached: Mapping[int, Attached]) -> None:
        """Raise DeviceError where a device is not as the guest was told."""
        for device in self.image.manifest.devices:
            known, found = self.snapshot.attached[device.handle], attached[device.handle]
            for field, what in _TOLD.items():
                was, now = getattr(known, field), getattr(found, field)
                if was != now:
                    shown = [each.hex(":") if field == "mac" else each for each in (was, now)]
                    raise DeviceError(
                        f"'{device.name}': the guest was saved with {what} {shown[0]}, and this "
                        f"device has {shown[1]}"
                    )

    def set_cpu(
        self, config: Config, kind: Kind, vcpu: Vcpu[Any], clock: HostClock, warn: Warn
    ) -> None:
        """Give the CPU the guest's registers and its time; raises TenderError."""
        snapshot, virtual = self.snapshot, self.snapshot.virtual
        self._check_features(kind, vcpu, warn)
        is_catching_up = config.clock_resume == "catch-up"
        if virtual:
            if is_catching_up:
                how = option("clock-resume", "catch-up")
                raise UsageError(f"{how}: the guest's time is virtual, and goes on as it stood")
            clock.cell.now_ns = virtual.now_ns
            fresh = int.from_bytes(os.urandom(8), "little")
            clock.cell.random = fresh if self._clone else virtual.random
        elapsed_ns = max(0, time_ns() - snapshot.wall_ns) if is_catching_up else 0
        wanted = min(U64, snapshot.counter + elapsed_ns * snapshot.hz // NS)
        reads = vcpu.set_counter(wanted, snapshot.hz)
        vcpu.set_state(self.state)  # in which aarch64 has the frequency
        if reads < snapshot.counter:
            raise HostError(
                f"this CPU can't set the guest's counter, and its own is lower, so that time would "
                f"go back: use {option('cpu', 'soft')}"
            )
        off_ns = (reads - wanted) * NS // snapshot.hz
        if abs(off_ns) > LEAP_NS:
            warn(
                "this CPU can't set the guest's counter: for the guest, "
                f"{(reads - snapshot.counter) / snapshot.hz:.3f} s have passed since it was saved"
            )
        self._passed_ns = (reads - snapshot.counter) * NS // snapshot.hz

    def _check_features(self, kind: Kind, vcpu: Vcpu[Any], warn: Warn) -> None:
        """Refuse a CPU that lacks what the guest may have chosen its code by."""
        needed = self.snapshot.features
        missing = sorted(needed - features.shown(vcpu.cpuid)) if needed else []
        if not missing:
            return
        names = ", ".join(missing)
        if kind.name == "soft":
            warn(f"the software CPU ends the guest if it uses what this CPU lacks: {names}")
            return
        raise HostError(
            f"{self.path}: this CPU lacks features that the guest may use: {names} "
            f"({option('cpu', 'soft')} runs it until it uses one)"
        )

    def pending(self, poll: Poll) -> Exit | None:
        """The POLL that is still to be answered, if there is one; `poll` has its deadline then."""
        saved_poll = self.snapshot.poll
        if saved_poll is None:
            return None
        left_ns = max(0, saved_poll.left_ns - self._passed_ns)
        poll.begun = min(U64, monotonic_ns() + left_ns)
        gpa, number = saved_poll.gpa & 0xFFFFFFFF, lib.HVT_HYPERCALL_POLL
        if self.image.machine == EM_AARCH64:
            return Mmio(MMIO_BASE + (number << 3), 4, True, gpa)
        return IoOut(lib.HVT_HYPERCALL_PIO_BASE + number, 4, gpa)


_TOLD = {
    "capacity": "a size of", "block_size": "a sector size of", "mac": "the MAC address",
    "mtu": "an MTU of",
}  # fmt: skip
