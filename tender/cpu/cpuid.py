"""What a guest sees of the CPU: the features that are hidden from it, and the MSRs that it has.

The rule here: pure, and tables with one row per thing: what, why, and where its numbers are from.
What computes in the guest's own registers stays (SSE, AVX, AES, RDRAND, TSC, ...). What goes is
what a guest of this target has no use for, or no MSR for. Sources: "SDM" is Intel's manual, volume
2A, CPUID, and volume 4; "APM" is AMD's, volume 3, appendix E; "KVM" is Linux,
Documentation/virt/kvm.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    Entry = tuple[int, int, int, int, int, int, int]  # leaf, subleaf, flags, EAX, EBX, ECX, EDX

_REGISTERS = {"eax": 3, "ebx": 4, "ecx": 5, "edx": 6}  # their places in an Entry

# What, why, source, and where: (leaf, subleaf, register, bits), or a whole leaf, which then reads
# as zeros: (leaf, subleaf). Subleaf None: all of them. All of it is one constant to the compiler.
HIDDEN: tuple[tuple[Any, ...], ...] = (
    ("VMX", "a guest runs no guests", "SDM 1",
        (1, 0, "ecx", 1 << 5)),
    ("SVM", "a guest runs no guests", "APM 80000001h, 8000000Ah",
        (0x80000001, 0, "ecx", 1 << 2), (0x8000000A, None)),
    ("SMX, SKINIT", "nothing is measured or launched in a guest", "SDM 1; APM 80000001h",
        (1, 0, "ecx", 1 << 6), (0x80000001, 0, "ecx", 1 << 12)),
    ("SGX, SGX_LC", "memory that nobody could dump, and MSRs", "SDM 7, 12h",
        (7, 0, "ebx", 1 << 2), (7, 0, "ecx", 1 << 30), (7, 1, "eax", 1 << 0), (0x12, None)),
    ("PDCM, DS, DTES64, DS-CPL", "counters that reveal others on the host's CPU",
        "SDM 1, 0Ah, 23h",
        (1, 0, "ecx", 1 << 2 | 1 << 4 | 1 << 15), (1, 0, "edx", 1 << 21),
        (0xA, None), (0x23, None)),
    ("PERFCTR_CORE, _NB, _LLC, PTSC, IBS, LWP", "the same", "APM 80000001h, 8000001Bh, 1Ch, 22h",
        (0x80000001, 0, "ecx", 1 << 10 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28),
        (0x8000001B, None), (0x8000001C, None), (0x80000022, None)),
    ("Intel PT", "a trace, written past the guest's page tables", "SDM 7, 14h, 0Dh.8",
        (7, 0, "ebx", 1 << 25), (0x14, None), (0xD, 8)),
    ("LBR", "a record of branches, by MSR", "SDM 7, 1Ch, 0Dh.15",
        (7, 0, "edx", 1 << 19), (0x1C, None), (0xD, 15)),
    ("SDBG, bus lock detection, DBEXT", "debugging by MSR", "SDM 1, 7; APM 80000001h",
        (1, 0, "ecx", 1 << 11), (7, 0, "ecx", 1 << 24), (0x80000001, 0, "ecx", 1 << 26)),
    ("MONITOR, WAITPKG, MONITORX", "a guest waits with POLL, so that others can run",
        "SDM 1, 5, 7; APM 80000001h",
        (1, 0, "ecx", 1 << 3), (7, 0, "ecx", 1 << 5), (0x80000001, 0, "ecx", 1 << 29), (5, None)),
    ("APIC, x2APIC, TSC-Deadline, ExtApicSpace", "there is no APIC: no interrupts, no timer",
        "SDM 1; APM 80000001h",
        (1, 0, "edx", 1 << 9), (1, 0, "ecx", 1 << 21 | 1 << 24),
        (0x80000001, 0, "edx", 1 << 9), (0x80000001, 0, "ecx", 1 << 3)),
    ("EIST, TM, TM2, ACPI, PBE, HWP", "power and heat are the host's", "SDM 1, 6, 0Dh.16",
        (1, 0, "ecx", 1 << 7 | 1 << 8), (1, 0, "edx", 1 << 22 | 1 << 29 | 1 << 31),
        (6, None), (0xD, 16)),
    # The bit that stays is the invariant TSC, on which the guest's clock rests.
    ("power, RAS, CPPC", "the same", "APM 80000007h, 80000008h",
        (0x80000007, 0, "ebx", 0xFFFFFFFF), (0x80000007, 0, "ecx", 0xFFFFFFFF),
        (0x80000007, 0, "edx", 0xFFFFFEFF), (0x80000008, 0, "ebx", 1 << 27)),
    ("MCE, MCA", "a broken machine is for the host to know", "SDM 1; APM 80000001h",
        (1, 0, "edx", 1 << 7 | 1 << 14), (0x80000001, 0, "edx", 1 << 7 | 1 << 14)),
    ("MTRR", "memory has one type: there is no device in it", "SDM 1; APM 80000001h",
        (1, 0, "edx", 1 << 12), (0x80000001, 0, "edx", 1 << 12)),
    ("TSC_ADJUST", "one way to set the guest's clock is enough", "SDM 7",
        (7, 0, "ebx", 1 << 1)),
    ("IBRS, STIBP, SSBD, L1D_FLUSH, ARCH_ and CORE_CAPABILITIES, SRBDS_CTRL",
        "they keep processes apart by MSR: a guest is one, and the host looks after itself",
        "SDM 7, 7.2", (7, 0, "edx", 1 << 9 | 0x3F << 26), (7, 2, "edx", 0x1F)),
    ("IBPB, IBRS, STIBP, SSBD, PSFD, AutoIBRS, SBPB, prefetch control", "the same",
        "APM 80000008h, 80000021h",
        (0x80000008, 0, "ebx", 1 << 12 | 0x3F << 14 | 1 << 24 | 1 << 25 | 1 << 28),
        (0x80000021, 0, "eax", 1 << 8 | 1 << 13 | 1 << 27 | 1 << 28)),
    ("HLE, RTM and its controls, TSXLDTRK", "transactions are a window into the host's caches",
        "SDM 7", (7, 0, "ebx", 1 << 4 | 1 << 11), (7, 0, "edx", 1 << 11 | 1 << 13 | 1 << 16)),
    ("PQM, PQE", "how the host's cache is shared out", "SDM 7, 0Fh, 10h; APM 80000020h",
        (7, 0, "ebx", 1 << 12 | 1 << 15), (0xF, None), (0x10, None), (0x80000020, None)),
    ("MPX", "gone from newer CPUs, and needs an MSR", "SDM 7, 0Dh",
        (7, 0, "ebx", 1 << 14), (0xD, 0, "eax", 3 << 3), (0xD, 3), (0xD, 4)),
    ("AMX", "8 KiB of state that Linux gives to those who ask; the tender does not",
        "SDM 7, 7.1, 0Dh, 1Dh, 1Eh",
        (7, 0, "edx", 1 << 22 | 1 << 24 | 1 << 25), (7, 1, "eax", 1 << 21), (7, 1, "edx", 1 << 8),
        (0xD, 0, "eax", 3 << 17), (0xD, 17), (0xD, 18), (0x1D, None), (0x1E, None)),
    ("XSAVES, XFD", "they are set up by MSR; XSAVE, XSAVEOPT and XSAVEC stay", "SDM 0Dh.1",
        (0xD, 1, "eax", 3 << 3), (0xD, 1, "ecx", 0xFFFFFFFF), (0xD, 1, "edx", 0xFFFFFFFF)),
    ("CET, PKS, ENQCMD, UINTR", "MSRs, and state of XSAVES", "SDM 7, 7.1, 0Dh",
        (7, 0, "ecx", 1 << 7 | 1 << 29 | 1 << 31), (7, 0, "edx", 1 << 5 | 1 << 20),
        (7, 1, "edx", 1 << 15 | 1 << 18), (0xD, 11), (0xD, 12), (0xD, 14)),
    ("Key Locker, HRESET, FRED, MSRLIST, PCONFIG, hybrid", "MSRs", "SDM 7, 7.1, 19h, 1Ah, 1Bh, 20h",
        (7, 0, "ecx", 1 << 23), (7, 0, "edx", 1 << 15 | 1 << 18),
        (7, 1, "eax", 1 << 17 | 1 << 22 | 1 << 27),
        (0x19, None), (0x1A, None), (0x1B, None), (0x20, None)),
    ("OSVW, WDT, NodeId, PPIN", "MSRs", "APM 80000001h, 80000008h",
        (0x80000001, 0, "ecx", 1 << 9 | 1 << 13 | 1 << 19), (0x80000008, 0, "ebx", 1 << 23)),
    ("serial number, DCA, xTPR", "the host's", "SDM 1, 3, 9",
        (1, 0, "edx", 1 << 18), (1, 0, "ecx", 1 << 14 | 1 << 18), (3, None), (9, None)),
    ("SEV, memory encryption", "the tender reads the guest's memory", "APM 8000001Fh, 80000023h",
        (0x8000001F, None), (0x80000023, None)),
    ("HTT, number of CPUs, APIC ID", "a guest has one CPU, and does not learn on which it was made",
        "SDM 1, 4, 0Bh, 1Fh",
        (1, 0, "edx", 1 << 28), (1, 0, "ebx", 0xFFFF0000), (4, None, "eax", 0xFFFFC000),
        (0xB, None), (0x1F, None)),
    ("CmpLegacy, TopologyExtensions", "the same", "APM 80000001h, 80000008h, 8000001Dh, 1Eh, 26h",
        (0x80000001, 0, "ecx", 1 << 1 | 1 << 22), (0x80000008, 0, "ecx", 0xFFFFFFFF),
        (0x8000001D, None), (0x8000001E, None), (0x80000026, None)),
)  # fmt: skip

# What a hypervisor says of itself. KVM's own leaves offer clocks and queues that the host's kernel
# writes into the guest's memory, past the tender (KVM: x86/cpuid.rst, x86/msr.rst); Hyper-V's and
# Xen's do as well. In their place: who we are, and that there is nothing more.
HYPERVISOR, HYPERVISOR_END = 0x40000000, 0x50000000
SIGNATURE_KVM = b"ptender kvm\0"

# The MSRs that a guest may read and write: first, count, what, why. All others are refused with
# #GP, the CPU's own answer to an MSR that it does not have. Each of these is a register of the vCPU
# and is swapped with it: nothing of the host is behind it. Numbers: SDM volume 4, table 2-2.
MSRS = (
    (0x10, 1, "TSC", "RDTSC reads the same, and a write moves the guest's own clock only"),
    (0x174, 3, "SYSENTER_CS, _ESP, _EIP", "the guest's own way into its ring 0"),
    (0x277, 1, "PAT", "the meaning of bits in the guest's page tables"),
    (0xC0000080, 5, "EFER, STAR, LSTAR, CSTAR, FMASK", "NX, and SYSCALL as above; where CPUID "
        "shows no SVM, KVM does not let EFER.SVME be set"),
    (0xC0000100, 4, "FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX", "thread-local storage, RDTSCP"),
)  # fmt: skip


def msrs() -> Iterator[int]:
    """The number of each MSR that a guest may read and write."""
    for first, count, *_ in MSRS:
        yield from range(first, first + count)


def hypervisor(signature: bytes) -> tuple[int, int, int, int]:
    """EAX to EDX of the leaf HYPERVISOR: the last leaf of its kind, and 12 letters."""
    letters = [int.from_bytes(signature[at : at + 4], "little") for at in (0, 4, 8)]
    return HYPERVISOR, letters[0], letters[1], letters[2]


def shown(supported: Iterable[Entry]) -> list[Entry]:
    """What a guest gets of what KVM_GET_SUPPORTED_CPUID reports."""
    gone, less = _places()
    entries = [
        _without(entry, less[entry[0]]) if entry[0] in less else entry
        for entry in supported
        if (entry[0], None) not in gone
        and (entry[0], entry[1]) not in gone
        and not HYPERVISOR <= entry[0] < HYPERVISOR_END
    ]
    return [*entries, (HYPERVISOR, 0, 0, *hypervisor(SIGNATURE_KVM))]


def _places() -> tuple[set[tuple[int, int | None]], dict[int, list[tuple[int | None, int, int]]]]:
    """HIDDEN by its places: the leaves that go, and by leaf what others lose."""
    gone: set[tuple[int, int | None]] = set()
    less: dict[int, list[tuple[int | None, int, int]]] = {}
    for row in HIDDEN:
        for place in row[3:]:
            leaf, subleaf, *rest = place
            if rest:
                register, bits = rest
                less.setdefault(leaf, []).append((subleaf, _REGISTERS[register], ~bits))
            else:
                gone.add((leaf, subleaf))
    return gone, less


def _without(entry: Entry, less: list[tuple[int | None, int, int]]) -> Entry:
    values = list(entry)
    for subleaf, register, kept in less:
        if subleaf is None or subleaf == entry[1]:
            values[register] &= kept
    leaf, index, flags, eax, ebx, ecx, edx = values
    return leaf, index, flags, eax, ebx, ecx, edx
