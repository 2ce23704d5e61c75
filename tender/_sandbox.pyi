"""What abi/ffi_build.py compiles from abi/sandbox.h."""

from typing import Any

class _Lib:
    SYS_capget: int
    SYS_capset: int
    SYS_close_range: int
    SYS_landlock_add_rule: int
    SYS_landlock_create_ruleset: int
    SYS_landlock_restrict_self: int
    SYS_mount: int
    SYS_pivot_root: int
    SYS_prctl: int
    SYS_prlimit64: int
    SYS_umount2: int
    SYS_unshare: int
    SYS_setns: int
    CLONE_NEWCGROUP: int
    CLONE_NEWIPC: int
    CLONE_NEWNET: int
    CLONE_NEWNS: int
    CLONE_NEWUSER: int
    CLONE_NEWUTS: int
    MNT_DETACH: int
    MS_BIND: int
    MS_NODEV: int
    MS_NOEXEC: int
    MS_NOSUID: int
    MS_PRIVATE: int
    MS_RDONLY: int
    MS_REC: int
    MS_REMOUNT: int
    PR_CAPBSET_DROP: int
    PR_CAP_AMBIENT: int
    PR_CAP_AMBIENT_CLEAR_ALL: int
    PR_SET_DUMPABLE: int
    PR_SET_NO_NEW_PRIVS: int
    RLIMIT_AS: int
    RLIMIT_CORE: int
    RLIMIT_FSIZE: int
    RLIMIT_MSGQUEUE: int
    RLIMIT_NOFILE: int
    SECCOMP_RET_KILL_PROCESS: int
    SECCOMP_RET_TRAP: int
    SANDBOX_VIOLATION: int

    def sandbox_call(self, number: int, a: int, b: int, c: int, d: int, e: int) -> int: ...
    def seccomp_load(self, library: bytes) -> Any: ...
    def sandbox_settle_malloc(self) -> None: ...
    def seccomp_new(self, action: int) -> Any: ...
    def seccomp_free(self, filter: Any) -> None: ...
    def seccomp_set(self, filter: Any, attribute: int, value: int) -> int: ...
    def seccomp_number(self, name: bytes) -> int: ...
    def seccomp_name(self, number: int) -> Any: ...
    def seccomp_prefer(self, filter: Any, number: int, priority: int) -> int: ...
    def seccomp_allow(self, filter: Any, number: int, count: int, compares: Any) -> int: ...
    def seccomp_write(self, filter: Any, fd: int) -> int: ...
    def sandbox_install(self, code: Any, length: int) -> int: ...
    def sandbox_report_to(self, fd: int) -> int: ...
    def free(self, pointer: Any) -> None: ...

ffi: Any
lib: _Lib
