"""The policies in seccomp/: how they are read, and that all of them are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tender.backends import BlockDescriptor, BlockFile, BlockRemote, Descriptor, Tap, UserNet
from tender.modules import STEP
from tender.sandbox import fdtable, policy, seccomp

FOLDER = Path(seccomp.__file__).parents[2] / "seccomp"
FILES = sorted(path.stem for path in FOLDER.glob("*.policy"))
NUMBERS = {"KVM_RUN": 0xAE80, "PROT_EXEC": 4, "A": 1, "B": 2}
SIZES = {17: 4096, 18: 1 << 40}
ARGUMENTS = (0, 0, 0, 0, 0, 0)


def expand(line: str, **held: list[int]) -> list[policy.Rule]:
    return policy.expand(policy.parse(line), held, SIZES, NUMBERS.__getitem__)


def allows(line: str, *arguments: int, **held: list[int]) -> bool:
    call = line.partition("(")[0]
    given = (*arguments, *ARGUMENTS)[:6]
    return any(rule.allows(call, given) for rule in expand(line, **held))


def test_an_entry() -> None:
    (entry,) = policy.parse("# a comment\n\nioctl(@vcpu, KVM_RUN)   -- let the guest run\n")
    assert (entry.call, entry.arguments) == ("ioctl", ("@vcpu", "KVM_RUN"))
    assert entry.reason == "let the guest run"
    assert str(entry) == "ioctl(@vcpu, KVM_RUN)"
    assert entry.labels == ["vcpu"]


def test_a_descriptor_is_one_that_is_held() -> None:
    line = "read(@net) -- x"
    assert allows(line, 17, net=[17, 18])
    assert allows(line, 18, net=[17, 18])
    assert not allows(line, 19, net=[17, 18])
    assert expand(line) == []  # nothing is held, so nothing is allowed


def test_the_kernel_takes_half_a_register_for_an_int() -> None:
    assert allows("read(@net) -- x", 17 | 1 << 32, net=[17])
    assert allows("mmap(_, _, _, _, -1) -- x", 0, 0, 0, 0, -1)
    assert allows("mmap(_, _, _, _, -1) -- x", 0, 0, 0, 0, 0xFFFFFFFF)
    assert not allows("mmap(_, _, _, _, -1) -- x", 0, 0, 0, 0, 0)
    assert not allows("ppoll(_, _, _, 0L) -- x", 0, 0, 0, 1 << 32)
    assert allows("ppoll(_, _, _, 0L) -- x")


def test_flags_limits_and_any() -> None:
    assert allows("f(A|B) -- x", 3)
    assert not allows("f(A|B) -- x", 1)
    assert allows("f(!PROT_EXEC) -- x", 3)
    assert not allows("f(!PROT_EXEC) -- x", 7)
    assert allows("f(<=64) -- x", 64)
    assert not allows("f(<=64) -- x", 65)
    assert not allows("f(<=64) -- x", 1 << 32)
    assert allows("f(_, 0x10) -- x", 12345, 16)
    assert allows("f() -- x", 1, 2, 3)
    assert not policy.Rule("f", (), policy.Entry("f", (), "x")).allows("g", ARGUMENTS)


def test_the_size_of_a_file() -> None:
    line = "pwrite64(@block, _, <=512, <SIZE) -- x"
    disks = {"block": [17, 18]}
    assert allows(line, 17, 0, 512, 4095, **disks)
    assert not allows(line, 17, 0, 512, 4096, **disks)
    assert not allows(line, 17, 0, 513, 0, **disks)
    assert not allows(line, 17, 0, 1, 1 << 40, **disks)
    assert allows(line, 18, 0, 1, (1 << 40) - 1, **disks)
    assert not allows(line, 18, 0, 1, (1 << 64) - 1, **disks)
    assert allows("ftruncate(@core, <=SIZE) -- x", 17, 4096, core=[17])
    assert not allows("ftruncate(@core, <=SIZE) -- x", 17, 4097, core=[17])


def test_one_block_of_a_file() -> None:
    line = "pread64(@block, _, BLOCK, <=SIZE-BLOCK) -- x"
    rules = policy.expand(
        policy.parse(line), {"block": [17, 18]}, SIZES, NUMBERS.__getitem__, {17: 512, 18: 4096}
    )

    def allowed(*arguments: int) -> bool:
        return any(rule.allows("pread64", (*arguments, 0, 0)) for rule in rules)

    assert allowed(17, 0, 512, 4096 - 512)
    assert not allowed(17, 0, 512, 4096 - 511)
    assert not allowed(17, 0, 4096, 0)
    assert not allowed(17, 0, 512 | 1 << 32, 0)
    assert allowed(18, 0, 4096, (1 << 40) - 4096)
    assert not allowed(18, 0, 512, 0)
    assert not allowed(17, 0, 512, (1 << 64) - 512)


def test_every_choice_of_two_descriptors_is_a_rule() -> None:
    assert len(expand("f(@a, @b) -- x", a=[1, 2], b=[3, 4, 5])) == 6


@pytest.mark.parametrize(
    "line", ["read(@net)", "read(@net) --", "read @net -- x", "read(@net -- x", "read(@net) y -- x"]
)
def test_a_line_that_is_no_entry(line: str) -> None:
    with pytest.raises(policy.PolicyError, match="policy: no CALL"):
        policy.parse(line)


def test_an_unknown_constant() -> None:
    with pytest.raises(policy.PolicyError, match=r"sandbox\.cdef has no O_NONSENSE"):
        seccomp.constant("O_NONSENSE")


@pytest.mark.parametrize("name", FILES)
def test_a_policy_file(name: str) -> None:
    text = (FOLDER / f"{name}.policy").read_text()
    assert text.startswith("# "), "it says whose it is"
    entries = policy.parse(text)
    assert len({str(entry) for entry in entries}) == len(entries), "no entry twice"
    held = {each: [fdtable.FIXED.get(each, 17)] for entry in entries for each in entry.labels}
    sizes = {fd: 4096 for fds in held.values() for fd in fds}
    for entry in entries:
        (rule, *_) = policy.expand([entry], held, sizes, seccomp.constant, sizes)
        assert seccomp.syscall_number(rule.call) >= 0, f"x86_64 has no {rule.call}"
        assert not entry.reason.endswith(".") or entry.reason.endswith("...")


def test_each_file_is_somebodys_and_the_other_way_round() -> None:
    remote = BlockRemote(4, 512, readonly=False)
    kinds = [
        fdtable.device_labels(Tap("tap0")),
        fdtable.device_labels(BlockFile("disk.img")),
        fdtable.device_labels(remote),
        fdtable.device_labels(BlockFile("disk.img", sync="fsync")),
    ]
    devices = dict(enumerate(kinds))
    used = set()
    for cpu in ("kvm", "native", "soft", "spt"):
        whole = fdtable.FdTable(cpu, tuple(fdtable.FIXED), devices, {}, pcaps=(0,))
        used |= {*whole.policies(), *whole.ring_policies()}
    overlay = fdtable.spt_table(("console",), [], {1: (512, 512, 4096)})
    used |= set(overlay.policies())
    assert used == set(FILES)
    names = {name for file in FILES for entry in seccomp.entries(file) for name in entry.labels}
    held = {name for each in [*kinds, *overlay.devices.values()] for name in each}
    assert names <= {*fdtable.FIXED, "pcap", *held}


def test_what_a_device_is_called() -> None:
    assert fdtable.device_labels(Descriptor(3)) == ("net",)
    assert fdtable.device_labels(UserNet()) == ("net",)
    assert fdtable.device_labels(BlockFile("x")) == ("block", "block-writable")
    assert fdtable.device_labels(BlockFile("x", readonly=True)) == ("block",)
    assert fdtable.device_labels(BlockFile("x", overlay=True)) == ("block",)
    assert fdtable.labels({3: BlockFile("x", overlay="o", sync="fsync")}) == {
        3: ("block",),
        fdtable.overlay_handle(3): ("block", "block-writable", "block-fsync"),
    }
    assert fdtable.device_labels(BlockDescriptor(3, readonly=True)) == ("block",)
    assert fdtable.device_labels(BlockDescriptor(3)) == ("block", "block-writable")


def test_writes_to_files_are_bounded() -> None:
    """A file gets longer by the length of one call at most, also where RLIMIT_FSIZE is not set."""
    sequential = {"console", "stderr", "trace", "report", "sync", "core-helper", "gdb", "gdb-out"}
    sequential |= {"pcap", "notify", "report-file", "record", "net", "block-remote"}
    sequential.add("snapshot-helper")
    calls = ("pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "write", "writev")
    for name in FILES:
        for entry in seccomp.entries(name):
            if entry.call in calls and entry.labels[0] not in sequential:
                assert entry.arguments[-1] in ("<SIZE", "<=SIZE", "<=SIZE-BLOCK"), entry
    (write,) = (each for each in seccomp.entries("block") if each.call == "pwrite64")
    assert int(write.arguments[2][2:], 0) == STEP


def test_no_policy_opens_anything() -> None:
    """What a tender must not do, whatever else a policy comes to hold."""
    calls = {entry.call for name in FILES for entry in seccomp.entries(name)}
    never = "open openat openat2 creat socket connect bind execve execveat clone clone3 fork vfork "
    never += "ptrace process_vm_readv process_vm_writev kill tkill mount unshare setns bpf "
    never += "io_uring_setup userfaultfd memfd_create dup dup2 dup3 fcntl prctl seccomp chmod "
    assert not calls & set(never.split())


def test_only_the_translator_has_memory_to_execute() -> None:
    for name in FILES:
        for entry in seccomp.entries(name):
            if entry.call in ("mmap", "mprotect", "pkey_mprotect", "shmat", "mremap"):
                words = " ".join(entry.arguments)
                assert "PROT" in words, "protection is pinned"
                assert ("PROT_EXEC" in words) <= (name == "soft")
