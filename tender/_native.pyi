"""Made by abi/ffi_build.py, which says from what."""

from typing import Any

class _Lib:
    ABI1_NOTE_ALIGN: int
    ABI1_NOTE_DESC_OFFSET: int
    ABI1_NOTE_TYPE: int
    ABI_TARGET_HVT: int
    ABI_TARGET_SPT: int
    CLOCK_MONOTONIC: int
    CLOCK_REALTIME: int
    CLONE_NEWCGROUP: int
    CLONE_NEWIPC: int
    CLONE_NEWNET: int
    CLONE_NEWNS: int
    CLONE_NEWUSER: int
    CLONE_NEWUTS: int
    ENGINE_BLOCK: int
    ENGINE_DEVICES: int
    ENGINE_NET: int
    ENGINE_RANGES: int
    FIONREAD: int
    FUTEX_WAIT: int
    FUTEX_WAKE: int
    HEAP_PAGES: int
    HEAP_RANGES: int
    HVT_ABI_VERSION: int
    HVT_CMDLINE_SIZE: int
    HVT_EXIT_ABORT: int
    HVT_FEATURE_NET_RING: int
    HVT_GUEST_MIN_BASE: int
    HVT_HALT_COOKIE_SIZE: int
    HVT_HYPERCALL_BLOCK_READ: int
    HVT_HYPERCALL_BLOCK_WRITE: int
    HVT_HYPERCALL_HALT: int
    HVT_HYPERCALL_MMIO_BASE: int
    HVT_HYPERCALL_NET_READ: int
    HVT_HYPERCALL_NET_WRITE: int
    HVT_HYPERCALL_PIO_BASE: int
    HVT_HYPERCALL_POLL: int
    HVT_HYPERCALL_PUTS: int
    HVT_HYPERCALL_WALLTIME: int
    HVT_RING_ENTRIES: int
    HVT_RING_KICK_MMIO_OFFSET: int
    HVT_RING_KICK_PIO: int
    HVT_RING_NET_READ: int
    HVT_RING_NET_WRITE: int
    HVT_RING_REGION: int
    HVT_R_AGAIN: int
    HVT_R_EINVAL: int
    HVT_R_EUNSPEC: int
    HVT_R_OK: int
    ITIMER_REAL: int
    KVM_CAP_GET_TSC_KHZ: int
    KVM_CAP_IMMEDIATE_EXIT: int
    KVM_CAP_TSC_CONTROL: int
    KVM_CAP_USER_MEMORY: int
    KVM_CAP_X86_MSR_FILTER: int
    KVM_CHECK_EXTENSION: int
    KVM_CREATE_VCPU: int
    KVM_CREATE_VM: int
    KVM_EXIT_DEBUG: int
    KVM_EXIT_FAIL_ENTRY: int
    KVM_EXIT_HLT: int
    KVM_EXIT_INTERNAL_ERROR: int
    KVM_EXIT_IO: int
    KVM_EXIT_IO_OUT: int
    KVM_EXIT_MMIO: int
    KVM_EXIT_SHUTDOWN: int
    KVM_GET_API_VERSION: int
    KVM_GET_DEBUGREGS: int
    KVM_GET_DEVICE_ATTR: int
    KVM_GET_MSRS: int
    KVM_GET_REGS: int
    KVM_GET_SREGS: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_GET_TSC_KHZ: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_GET_XCRS: int
    KVM_GET_XSAVE: int
    KVM_GUESTDBG_ENABLE: int
    KVM_GUESTDBG_INJECT_BP: int
    KVM_GUESTDBG_SINGLESTEP: int
    KVM_GUESTDBG_USE_HW_BP: int
    KVM_GUESTDBG_USE_SW_BP: int
    KVM_INTERNAL_ERROR_EMULATION: int
    KVM_IOEVENTFD: int
    KVM_IOEVENTFD_FLAG_PIO: int
    KVM_MSR_FILTER_DEFAULT_DENY: int
    KVM_MSR_FILTER_READ: int
    KVM_MSR_FILTER_WRITE: int
    KVM_RUN: int
    KVM_SET_CPUID2: int
    KVM_SET_DEBUGREGS: int
    KVM_SET_DEVICE_ATTR: int
    KVM_SET_GUEST_DEBUG: int
    KVM_SET_MSRS: int
    KVM_SET_REGS: int
    KVM_SET_SREGS: int
    KVM_SET_TSC_KHZ: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_SET_XCRS: int
    KVM_SET_XSAVE: int
    KVM_VCPU_TSC_CTRL: int
    KVM_VCPU_TSC_OFFSET: int
    KVM_X86_SET_MSR_FILTER: int
    MADV_DONTNEED: int
    MADV_HUGEPAGE: int
    MADV_NORMAL: int
    MAP_ANONYMOUS: int
    MAP_NORESERVE: int
    MAP_PRIVATE: int
    MFT1_NOTE_DESC_OFFSET: int
    MFT1_NOTE_TYPE: int
    MFT_DEV_BLOCK_BASIC: int
    MFT_DEV_NET_BASIC: int
    MFT_MAX_ENTRIES: int
    MFT_NAME_MAX: int
    MFT_NAME_SIZE: int
    MFT_RESERVED_FIRST: int
    MFT_VERSION: int
    MNT_DETACH: int
    MS_BIND: int
    MS_NODEV: int
    MS_NOEXEC: int
    MS_NOSUID: int
    MS_PRIVATE: int
    MS_RDONLY: int
    MS_REC: int
    MS_REMOUNT: int
    NATIVE_COMM: int
    NATIVE_FILTER_MAX: int
    NATIVE_HYPERCALL: int
    NATIVE_MEMORY_FD: int
    NATIVE_MEMORY_START: int
    NATIVE_PROGRAM: int
    NATIVE_RANGES: int
    NATIVE_REGISTERS: int
    NATIVE_SHARED: int
    NATIVE_SHARED_FD: int
    NATIVE_SHARED_SIZE: int
    NATIVE_STACK: int
    NATIVE_STACK_SIZE: int
    NATIVE_TRAP: int
    NATIVE_TURN_GUEST: int
    NATIVE_TURN_TENDER: int
    PCAP_DROPPED: int
    PCAP_INBOUND: int
    PCAP_OUTBOUND: int
    PCAP_ROOM: int
    PCAP_SNAP: int
    POLLERR: int
    POLLHUP: int
    POLLIN: int
    POLLNVAL: int
    POLLOUT: int
    POLLSET_MAX: int
    PROT_EXEC: int
    PROT_NONE: int
    PROT_READ: int
    PROT_WRITE: int
    PR_CAP_AMBIENT: int
    PR_CAP_AMBIENT_CLEAR_ALL: int
    PR_SET_DUMPABLE: int
    PR_SET_NO_NEW_PRIVS: int
    P_PIDFD: int
    RING_ADDRESS: int
    RING_INDEX: int
    RING_NO_FAULT: int
    RLIMIT_AS: int
    RLIMIT_CORE: int
    RLIMIT_CPU: int
    RLIMIT_FSIZE: int
    RLIMIT_MSGQUEUE: int
    RLIMIT_NOFILE: int
    RLIMIT_NPROC: int
    SECCOMP_RET_KILL_PROCESS: int
    SECCOMP_RET_TRAP: int
    SEEK_DATA: int
    SEEK_HOLE: int
    SIGKILL: int
    SIGTRAP: int
    SIG_BLOCK: int
    SIG_SETMASK: int
    SOCK_CLOEXEC: int
    SOCK_NONBLOCK: int
    SPT_ABI_VERSION: int
    SPT_BOOT_INFO: int
    SPT_CODE_SIZE: int
    SPT_CONSOLE_FD: int
    SPT_GUEST_START: int
    SPT_MESSAGE_MAX: int
    SPT_OVERLAYS: int
    SPT_PLAN: int
    SPT_PROGRAM_MAX: int
    SPT_RANGES: int
    SPT_TIMER_DATA: int
    STATS_DEVICES: int
    STATS_MAGIC: int
    STATS_NAME_SIZE: int
    STATS_RUNNING: int
    STATS_STARTING: int
    STATS_VERSION: int
    STOP_KICK: int
    SYS_capget: int
    SYS_capset: int
    SYS_close_range: int
    SYS_epoll_create1: int
    SYS_epoll_ctl: int
    SYS_landlock_create_ruleset: int
    SYS_landlock_restrict_self: int
    SYS_mount: int
    SYS_pivot_root: int
    SYS_prctl: int
    SYS_prlimit64: int
    SYS_setns: int
    SYS_timerfd_create: int
    SYS_umount2: int
    SYS_unshare: int

    def getenv(self, name: bytes, /) -> Any: ...
    def host_protect(self, address: Any, length: int, writable: int, readable: int, /) -> int: ...
    def host_pread(self, fd: int, data: Any, length: int, offset: int, /) -> int: ...
    def host_pwrite(self, fd: int, data: Any, length: int, offset: int, /) -> int: ...
    def host_write(self, fd: int, data: Any, length: int, /) -> int: ...
    def host_poll(self, set: Any, deadline_ns: int, /) -> int: ...
    def host_events(self, fd: int, events: int, timeout_ms: int, /) -> int: ...
    def host_accept(self, fd: int, /) -> int: ...
    def host_map(self, fd: int, offset: int, size: int, /) -> Any: ...
    def host_map_private(self, at: Any, size: int, fd: int, offset: int, /) -> int: ...
    def host_unmap(self, address: Any, size: int, /) -> int: ...
    def host_ticks(self, /) -> int: ...
    def host_ticks_hz(self, /) -> int: ...
    def host_bytes_waiting(self, fd: int, /) -> int: ...
    def host_end_with_parent(self, /) -> int: ...
    def rate_due(self, rate: Any, now_ns: int, /) -> int: ...
    def rate_take(self, rate: Any, now_ns: int, bytes: int, /) -> int: ...
    def stop_enter(self, stop: Any, /) -> int: ...
    def stop_on_termination(self, interrupt: int, /) -> int: ...
    def stop_on_child(self, /) -> int: ...
    def stop_tick(self, on: int, /) -> None: ...
    def stop_default_actions(self, /) -> None: ...
    def stop_kick(self, stop: Any, /) -> int: ...
    def stop_request(self, stop: Any, /) -> int: ...
    def stop_watch_kick(self, stop: Any, kick: int, of: int, /) -> None: ...
    def pcap_block(self, to: Any, packet: Any, /) -> int: ...
    def pcap_write(self, pcap: Any, time_ns: int, flags: int, frame: Any, size: int, /) -> int: ...
    def heap_clear_cache(self, /) -> None: ...
    def heap_fill(self, /) -> None: ...
    def heap_reserve(self, length: int, /) -> int: ...
    def heap_keep(self, start: int, length: int, /) -> int: ...
    def heap_note_copies(self, pagemap: int, /) -> int: ...
    def heap_give_back(self, kept: int, /) -> int: ...
    def free(self, pointer: Any, /) -> None: ...
    def sandbox_call(self, number: int, a: int, b: int, c: int, d: int, e: int, /) -> int: ...
    def sandbox_empty_bounding_set(self, /) -> int: ...
    def sandbox_settle_malloc(self, /) -> None: ...
    def sandbox_install(self, code: Any, length: int, /) -> int: ...
    def sandbox_report_to(self, fd: int, /) -> int: ...
    def seccomp_load(self, library: bytes, /) -> Any: ...
    def seccomp_new(self, action: int, /) -> Any: ...
    def seccomp_free(self, filter: Any, /) -> None: ...
    def seccomp_set(self, filter: Any, attribute: int, value: int, /) -> int: ...
    def seccomp_number(self, name: bytes, /) -> int: ...
    def seccomp_name(self, number: int, /) -> Any: ...
    def seccomp_prefer(self, filter: Any, number: int, priority: int, /) -> int: ...
    def seccomp_allow(self, filter: Any, number: int, count: int, compares: Any, /) -> int: ...
    def seccomp_write(self, filter: Any, fd: int, /) -> int: ...
    def kvm_ioctl(self, fd: int, request: int, value: int, /) -> int: ...
    def kvm_ioctl_at(self, fd: int, request: int, argument: Any, /) -> int: ...
    def kvm_run_once(self, vcpu_fd: int, run: Any, activity: Any, /) -> int: ...
    def kvm_map_run(self, vcpu_fd: int, size: int, /) -> Any: ...
    def kvm_unmap_run(self, run: Any, size: int, /) -> int: ...
    def kvm_entry_failure(self, run: Any, /) -> int: ...
    def kvm_suberror(self, run: Any, /) -> int: ...
    def kvm_is_hardware(self, /) -> int: ...
    def ring_start(self, ring: Any, /) -> int: ...
    def ring_end(self, ring: Any, /) -> None: ...
    def engine_run(self, engine: Any, /) -> int: ...
    def engine_answer(self, engine: Any, number: int, gpa: int, /) -> int: ...
    def native_memfd(self, name: bytes, size: int, executable: int, /) -> int: ...
    def native_map(self, at: Any, size: int, fd: int, /) -> Any: ...
    def native_unmap(self, at: Any, size: int, /) -> int: ...
    def native_filter(self, shared: Any, /) -> None: ...
    def native_start(self, program_fd: int, shared_fd: int, memory_fd: int, /) -> int: ...
    def native_run(self, native: Any, /) -> int: ...
    def native_set_registers(self, native: Any, /) -> None: ...
    def native_fpu(self, native: Any, area: Any, size: int, set: int, /) -> int: ...
    def native_counter(self, native: Any, /) -> int: ...
    def native_pause(self, native: Any, /) -> None: ...
    def native_has_ended(self, native: Any, /) -> int: ...
    def native_kill(self, native: Any, /) -> None: ...
    def native_missing(self, /) -> int: ...
    def native_limit(self, mem_bytes: int, /) -> int: ...
    def tsc_hz(self, /) -> int: ...
    def tsc_read(self, /) -> int: ...
    def xsave_offset(self, part: int, /) -> int: ...
    def xsave_enabled(self, /) -> int: ...
    def cpuid_leaf(self, leaf: int, subleaf: int, registers: Any, /) -> None: ...
    def spt_become(self, region: Any, /) -> int: ...
    def spt_frame_size(self, /) -> int: ...

ffi: Any
lib: _Lib
