"""What a tender holds while its guest runs: which descriptors, where, under which policies. Pure.

The rule here: a descriptor has the same number in every run of one command line, so that one
command line has one filter, and `ptender policy` can show it without opening anything.
"""

from __future__ import annotations

from tender.config import BlockFile, BlockRemote, Descriptor, StreamNet, Tap, UserNet
from tender.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from tender.config import BlockValue, NetValue

SLOTS = {
    "console": 1, "stderr": 2, "vcpu": 3, "kick": 4, "core": 5, "pagemap": 6, "keeper": 7,
    "trace": 8, "report": 9, "sync": 10,
}  # fmt: skip
FIRST_DEVICE = 16  # and its handle in the manifest
SLOTS_END = FIRST_DEVICE + 64
FIRST_JAIL = 11  # namespaces that are still to be joined

# Files of seccomp/ that are for what is held under the same name, the busiest first.
_DEVICES = ("net", "net-stream", "block", "block-remote")
_SINGLE = ("sync", "core", "trace", "report")


def slot(handle: int) -> int:
    """The descriptor of the device with this handle."""
    return FIRST_DEVICE + handle


def held_as(spec: NetValue | BlockValue) -> tuple[str, ...]:
    """What the policies call the descriptor of a device that is attached to this."""
    if isinstance(spec, (StreamNet, UserNet)):
        return ("net-stream",)
    if isinstance(spec, BlockRemote):
        return ("block-remote",)
    if isinstance(spec, (Tap, Descriptor)):
        return ("net",)
    overlay = isinstance(spec, BlockFile) and spec.overlay
    return ("block",) if spec.readonly or overlay else ("block", "block-writable")


@dataclass
class Plan:
    """`cpu` is "kvm" or "soft"; `single` names the descriptors of which there is one, and `devices`
    has by handle what the policies call those of the guest's devices."""

    cpu: str
    single: tuple[str, ...]
    devices: Mapping[int, tuple[str, ...]]

    def held(self) -> dict[str, list[int]]:
        """What a policy means by `@name`."""
        numbers = {name: [SLOTS[name]] for name in self.single}
        for handle, names in sorted(self.devices.items()):
            for name in names:
                numbers.setdefault(name, []).append(slot(handle))
        return numbers

    def policies(self) -> list[str]:
        """The files of seccomp/ that the guest's thread is under."""
        names = self.held()
        modules = [self.cpu, "console", "poll", *(name for name in _DEVICES if name in names)]
        return [*modules, *(name for name in _SINGLE if name in names), "base"]

    def thread_policies(self) -> list[str]:
        """... and the thread of the network ring, where there is one."""
        return ["ring"] if "kick" in self.single else []
