"""The descriptors that a tender holds while its guest runs, and the policies that follow. Pure.

The rule here: a descriptor has the same number in every run of one command line, so that one
command line has one filter, and `ptender policy` can show it without attaching anything.
"""

from __future__ import annotations

from tender.backends import BlockFile, BlockRemote, Descriptor, Tap, UserNet
from tender.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tender.backends import BlockDescriptor, BlockValue, NetValue

FIXED = {
    "console": 1, "stderr": 2, "vcpu": 3, "kick": 4, "core": 5, "pagemap": 6, "core-helper": 7,
    "trace": 8, "report": 9, "sync": 10, "stats": 11, "report-file": 12, "pidfile": 13,
    "snapshot": 14, "snapshot-helper": 15,
    "guest-program": 0, "guest-shared": 3, "guest-memory": 4, "guest-process": 3,
    "memory-file": 6, "epoll": 3, "timer": 4,
    "gdb": 0, "gdb-listen": 144, "gdb-in": 145, "gdb-out": 146,
    "notify": 147, "record": 148, "replay": 148,
}  # fmt: skip
START_LABELS = ("guest-program", "guest-shared", "guest-memory")  # closed before the guest runs
MFT_MAX_ENTRIES = 64
FIRST_DEVICE = 16  # the device with handle 0; the overlays of all disks follow
FIRST_PCAP = FIRST_DEVICE + 2 * MFT_MAX_ENTRIES + 5  # the packets of the device with handle 0
FDS_END = FIRST_PCAP + MFT_MAX_ENTRIES
FIRST_NAMESPACE = FDS_END  # namespaces that are still to be joined

# Files of seccomp/ that have the name of a label, the busiest first.
_DEVICES = ("net", "block", "block-remote", "block-fsync")
_FIXED = ("pcap", "sync", "core", "snapshot", "trace", "report", "report-file", "notify", "record",
          "replay")  # fmt: skip


def device_fd(handle: int) -> int:
    """The descriptor of the device with this handle."""
    return FIRST_DEVICE + handle


def pcap_fd(handle: int) -> int:
    """The descriptor that the packets of the device with this handle are written to."""
    return FIRST_PCAP + handle


def sizes(
    devices: Mapping[int, tuple[str, ...]],
    capacities: Mapping[int, int],
    files: Mapping[str, int],
) -> dict[int, int]:
    """FdTable.sizes for disks with these capacities by handle, and for `files` by their labels."""
    found = {
        device_fd(handle): capacities[handle]
        for handle, labels in devices.items()
        if "block-writable" in labels
    }
    return found | {FIXED[label]: length for label, length in files.items()}


def device_labels(spec: NetValue | BlockValue) -> tuple[str, ...]:
    """The labels of the descriptor of a device that is attached to this."""
    if isinstance(spec, BlockRemote):
        return ("block-remote",)
    if isinstance(spec, (Tap, Descriptor, UserNet)):
        return ("net",)
    overlay = isinstance(spec, BlockFile) and spec.overlay
    return ("block",) if spec.readonly or overlay else _writable(spec)


def _writable(spec: BlockFile | BlockDescriptor) -> tuple[str, ...]:
    synced = ("block-fsync",) if spec.sync == "fsync" else ()
    return ("block", "block-writable", *synced)


def labels(specs: Mapping[int, NetValue | BlockValue]) -> dict[int, tuple[str, ...]]:
    """The labels of what a guest with these devices holds, by handle; those of the files of
    overlays by `overlay_handle`."""
    overlays = {
        overlay_handle(handle): _writable(spec)
        for handle, spec in specs.items()
        if isinstance(spec, BlockFile) and isinstance(spec.overlay, str)
    }
    return {handle: device_labels(spec) for handle, spec in specs.items()} | overlays


@dataclass
class FdTable:
    """`cpu` is "kvm", "native", "soft" or "spt"; `fixed` has labels of FIXED, `devices` those of
    each device by its handle. `@LABEL` in a policy means the descriptors with that label. `sizes`
    has the maximum length in bytes of each file that the tender writes to, logs excepted, by
    descriptor; for an spt guest, the length of each disk, and `block_sizes` that of its blocks.
    `pcaps` are the handles of devices whose packets are recorded."""

    cpu: str
    fixed: tuple[str, ...]
    devices: Mapping[int, tuple[str, ...]]
    sizes: Mapping[int, int]
    block_sizes: Mapping[int, int] = {}
    pcaps: tuple[int, ...] = ()

    def by_label(self) -> dict[str, list[int]]:
        """The descriptors with each label."""
        numbers = {label: [FIXED[label]] for label in self.fixed}
        for handle, labels in sorted(self.devices.items()):
            for label in labels:
                numbers.setdefault(label, []).append(device_fd(handle))
        if self.pcaps:
            numbers["pcap"] = [pcap_fd(handle) for handle in sorted(self.pcaps)]
        return numbers

    def policies(self) -> list[str]:
        """The files of seccomp/ for the guest's thread."""
        labels = self.by_label()
        if self.cpu == "spt":
            overlay = ["spt-overlay"] if "overlay-memory" in labels else []
            ends = {"core": "spt-core", "report-file": "spt-report"}
            end = [name for label, name in ends.items() if label in labels]
            return ["spt", *overlay, *(["spt-end", *end] if end else ["spt-exit"])]
        modules = [self.cpu, "console", "poll", *(name for name in _DEVICES if name in labels)]
        gdb = ["gdb"] if "gdb-listen" in labels or "gdb-in" in labels else []
        gdb += [f"gdb-{self.cpu}"] if gdb and self.cpu != "soft" else []
        return [*modules, *(name for name in _FIXED if name in labels), *gdb, "base"]

    def ring_policies(self) -> list[str]:
        """The files of seccomp/ for the thread of the network ring; empty: there is none."""
        return ["ring"] if "kick" in self.fixed else []


def overlay_handle(handle: int) -> int:
    """The place of the memory or file of a disk's overlay: behind those of all devices."""
    return handle + MFT_MAX_ENTRIES


def spt_table(
    labels: tuple[str, ...],
    nets: Iterable[int],
    disks: Mapping[int, tuple[int, int, int]],
    core: int | None = None,
) -> FdTable:
    """What an spt guest holds: `disks` has the capacity, block size and the size of the overlay's
    memory (0: it has none) of each, by handle; `core` is the length of a core file."""
    devices: dict[int, tuple[str, ...]] = dict.fromkeys(nets, ("net",))
    sizes, block_sizes = {}, {}
    for handle, (capacity, block_size, overlay) in disks.items():
        devices[handle] = ("overlay-image",) if overlay else ("block",)
        sizes[device_fd(handle)], block_sizes[device_fd(handle)] = capacity, block_size
        if overlay:
            memory = overlay_handle(handle)
            devices[memory] = ("overlay-memory",)
            sizes[device_fd(memory)], block_sizes[device_fd(memory)] = overlay, block_size
    if core is not None:
        sizes[FIXED["core"]] = core
    return FdTable("spt", labels, devices, sizes, block_sizes)
