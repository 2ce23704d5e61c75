"""From an spt guest that is checked to a process that is the guest.

An spt guest is code of an ordinary process: it makes its system calls itself, and a filter says
which. So there is nothing to run beside it. This process opens, loads, enters its sandbox, and then
leaves Python for good: code.c unmaps all that is not the guest's, and jumps.

The rule here: the guest can read what stays mapped and use what stays open. Nothing of the host's
may be in the plan or among the descriptors but what is the guest's own.
"""

from __future__ import annotations

import os
import stat
import struct
from _signal import (  # type: ignore[import-not-found]  # without the enums of `signal`
    SIG_BLOCK,
    SIG_IGN,
    SIGINT,
    SIGPIPE,
    SIGTERM,
    pthread_sigmask,
    signal,
)
from fcntl import F_GETFL, LOCK_NB, LOCK_SH, fcntl, flock

from tender._native import ffi, lib
from tender.boot.bootinfo import join_cmdline
from tender.boot.layout import PAGE_SIZE
from tender.dataclass import replace
from tender.errors import DeviceError, HostError, UsageError, option
from tender.image.manifest import encode
from tender.memory import GuestMemory
from tender.sandbox import confine
from tender.sandbox.fdtable import overlay_handle, spt_table
from tender.spt.region import Overlay, Region, protections

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from tender.cleanup import Cleanup
    from tender.config import Config
    from tender.devices import Devices
    from tender.image.file import ImageFile
    from tender.image.manifest import Attached
    from tender.modules import Warn
    from tender.modules.block import Block
    from tender.observe.core import Target
    from tender.sandbox.sandbox import Sandbox
    from tender.stop import Stop

EPOLL_CTL_ADD, EPOLLIN = 1, 1  # linux/eventpoll.h
EPOLL_EVENT = struct.Struct("<IQ")  # packed on x86_64
CLOEXEC, NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK


def check() -> None:
    """Raise HostError where this process can't become a guest."""
    lowest = _lowest_address()
    if lowest > lib.SPT_GUEST_START:
        raise HostError(
            f"spt: guest memory begins at {lib.SPT_GUEST_START:#x}, and vm.mmap_min_addr is "
            f"{lowest:#x}: sysctl vm.mmap_min_addr={lib.SPT_GUEST_START}"
        )


def check_sandbox(sandbox: Sandbox | None) -> Sandbox:
    """The sandbox, without which no spt guest runs; raises UsageError."""
    if sandbox is None:
        raise UsageError(
            f"{option('sandbox', 'off')} is not for an spt guest, which makes system calls "
            "itself: it runs behind its filter or not at all"
        )
    return sandbox


def _lowest_address() -> int:
    try:
        with open("/proc/sys/vm/mmap_min_addr", "rb") as file:
            return int(file.read())
    except OSError:
        return 0


def become(
    config: Config,
    file: ImageFile,
    inherited: Mapping[str, int],
    devices: Devices,
    stop: Stop,
    warn: Warn,
    sandbox: Sandbox,
    started: Callable[[str], None] | None,
    cleanup: Cleanup,
    *,
    publish: bool,
) -> NoReturn:
    """Load the guest, enter the sandbox and become the guest. Raises TenderError before."""
    image, block, net = file.image, devices.block, devices.net
    memory = GuestMemory(config.mem_bytes // PAGE_SIZE * PAGE_SIZE, huge=config.hugepages)
    cleanup.callback(memory.close)
    file.copy(memory, stop.check)
    file.close()
    for disk in block.devices.values():
        if disk.readonly:
            disk.fd = _read_only(disk.name, disk.fd, cleanup)
    overlays = [
        Overlay(handle, disk) for handle, disk in block.devices.items() if disk.overlay_bytes
    ]
    core = _open_core(config.dumpcore, cleanup)
    fds = _open_descriptors(
        config, file, inherited, block, core, memory.size, warn, cleanup, publish=publish
    )
    memories = {overlay_handle(each.handle): each for each in overlays}
    fds = sandbox.move_descriptors(fds, {**block.devices, **net.devices, **memories}, {})
    cleanup.forget()
    _watch(fds["epoll"], fds["timer"], lib.SPT_TIMER_DATA)
    for handle, port in net.devices.items():
        _watch(fds["epoll"], port.fd, handle)
    manifest = encode(image.manifest, _attached(devices))
    memory.put(
        lib.SPT_BOOT_INFO,
        boot_info(memory.size, image.kernel_end, join_cmdline(config.args), manifest, fds),
    )
    manager = fds.pop("notify", None)
    disks = {
        handle: (disk.capacity, disk.sector_size, disk.overlay_bytes)
        for handle, disk in block.devices.items()
    }
    core_bytes = core.size(memory.size) if core else None
    table = spt_table(tuple(fds), net.devices, disks, core_bytes)
    ranges = protections(image, memory.size if config.exec_heap else 0)
    region = Region(memory, image.entry, ranges, overlays, is_report=sandbox.report_fd is not None)
    if core:
        region.set_core(memory.size)
    if "report-file" in fds:
        region.set_report()

    def leave(filter: bytes) -> NoReturn:
        region.set_filter(filter)
        if manager is not None:
            from tender.observe import notify

            notify.ready(manager, config.kernel)
            os.close(manager)  # what is sent to it is for no guest to decide
        if started:
            started("")
        # A request to end from here on waits until its handler is the guest's process's.
        pthread_sigmask(SIG_BLOCK, (SIGTERM, SIGINT))
        stop.check()
        signal(SIGPIPE, SIG_IGN)  # a guest outlives the reader of its console
        lib.spt_become(region.start)
        raise HostError("spt: its code cannot be made executable", "mprotect", ffi.errno)

    sandbox.enter(table, become=leave)
    raise AssertionError


def _open_descriptors(
    config: Config,
    file: ImageFile,
    inherited: Mapping[str, int],
    block: Block,
    core: Target | None,
    mem_bytes: int,
    warn: Warn,
    cleanup: Cleanup,
    *,
    publish: bool,
) -> dict[str, int]:
    """What the guest's process holds beside its devices, by label."""
    fds = {
        **inherited,
        "console": _blocking(inherited["console"], warn, cleanup),
        "epoll": confine.call(lib.SYS_epoll_create1, CLOEXEC),
        "timer": confine.call(lib.SYS_timerfd_create, lib.CLOCK_MONOTONIC, CLOEXEC | NONBLOCK),
    }
    if core:
        fds |= core.fds
    if config.report is not None or config.notify is not None:
        from tender.observe import observers

        files = [file.info, *(os.fstat(disk.fd) for disk in block.devices.values())]
        fds |= observers.open_outputs(config, files, cleanup)
    if publish:
        from tender.observe import counters

        page = counters.announce(config, mem_bytes, cleanup)
        fds |= {"stats": page} if page is not None else {}
    return fds


def _attached(devices: Devices) -> dict[int, Attached]:
    """What the guest's manifest has of each, with the descriptor that the guest uses."""
    disks, ports = devices.block.devices, devices.net.devices
    fds = {handle: port.fd for handle, port in ports.items()}
    for handle, disk in disks.items():
        fds[handle] = Overlay.guest_fd(handle) if disk.overlay_bytes else disk.fd
    return {
        handle: replace(each, hostfd=fds[handle]) for handle, each in devices.attached().items()
    }


def boot_info(
    mem_bytes: int, kernel_end: int, cmdline: bytes, manifest: bytes, fds: Mapping[str, int]
) -> bytes:
    """What the guest finds at SPT_BOOT_INFO: the struct, the manifest and the command line."""
    manifest_at = lib.SPT_BOOT_INFO + ffi.sizeof("struct spt_boot_info")
    head = ffi.new(
        "struct spt_boot_info *",
        {
            "mem_size": mem_bytes,
            "kernel_end": kernel_end,
            "cmdline": manifest_at + len(manifest),
            "manifest": manifest_at,
            "epollfd": fds["epoll"],
            "timerfd": fds["timer"],
        },
    )
    return bytes(ffi.buffer(head)) + manifest + cmdline + b"\0"


def _watch(epoll: int, fd: int, data: int) -> None:
    """The guest's epoll set reports `data` when there is something to read."""
    event = ffi.new("char[]", EPOLL_EVENT.pack(EPOLLIN, data))
    confine.call(lib.SYS_epoll_ctl, epoll, EPOLL_CTL_ADD, fd, int(ffi.cast("uintptr_t", event)))


def _blocking(fd: int, warn: Warn, cleanup: Cleanup) -> int:
    """The console, opened again where O_NONBLOCK is set: guests take no notice of a full pipe.

    The flag is not cleared, because others may share the open file.
    """
    if not fcntl(fd, F_GETFL) & NONBLOCK:
        return fd
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NOCTTY | CLOEXEC)
        except OSError:
            pass
        else:
            cleanup.callback(lambda: os.close(again))
            return again
    if not stat.S_ISREG(mode):
        warn("console: O_NONBLOCK is set: output is lost where its reader is slow")
    return fd


def _read_only(name: str, fd: int, cleanup: Cleanup) -> int:
    """The same file, open for reading only: then the kernel refuses the guest's writes."""
    if fcntl(fd, F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return fd
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DeviceError(
            f"block device '{name}': cannot be opened for reading only: {reason}"
        ) from None
    cleanup.callback(lambda: os.close(reader))
    flock(reader, LOCK_SH | LOCK_NB)
    return reader


def _open_core(folder: str | None, cleanup: Cleanup) -> Target | None:
    if folder is None:
        return None
    from tender.observe.core import Target

    target = Target(folder, target="spt")
    cleanup.callback(target.close)
    return target
