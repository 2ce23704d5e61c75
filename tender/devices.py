"""What a user names, opened: the image, and the devices that its manifest declares."""

from __future__ import annotations

from tender._native import lib
from tender.backends import Descriptor
from tender.dataclass import dataclass, replace
from tender.errors import ImageError
from tender.host import keep_descriptors
from tender.image.elf import TARGETS
from tender.image.file import ImageFile
from tender.image.manifest import Attached
from tender.modules import counters_value
from tender.modules.assign import assign, check_all_attached
from tender.modules.block import Block
from tender.modules.net import Net
from tender.outcome import NetCounters
from tender.sandbox import fdtable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeAlias, TypeVar

    from tender.backends import BlockValue, NetValue
    from tender.cleanup import Cleanup
    from tender.clock import HostClock
    from tender.config import Config
    from tender.image.manifest import Manifest
    from tender.modules import Warn
    from tender.modules.block import BlockDevice, OverlayFile
    from tender.modules.net import NetDevice
    from tender.modules.rendezvous import Rendezvous
    from tender.outcome import Counters
    from tender.replay.file import Record
    from tender.sandbox.sandbox import Sandbox
    from tender.snapshot.restore import SnapshotFile
    from tender.stop import Stop

    Held: TypeAlias = BlockDevice | NetDevice | OverlayFile
    Given: TypeAlias = tuple[tuple[str | None, Any], ...]
    T = TypeVar("T")


@dataclass
class Inputs:
    """What a user passes, opened: descriptors of devices, others by label, and the image.

    With a record that is to be replayed, or a snapshot that is to go on, `config` and image are
    those that it has.
    """

    config: Config
    nets: Given
    blocks: Given
    fds: Mapping[str, int]
    file: Any  # an ImageFile or a SnapshotFile
    restored: SnapshotFile | None = None  # the same, where it is a snapshot
    record: Record | None = None


def open_inputs(config: Config, cleanup: Cleanup, sandbox: Sandbox | None = None) -> Inputs:
    """Keep the user's descriptors, then open and check the image; raises TenderError."""
    # First of all the descriptors: a number that was not passed must not be open by then.
    nets = keep_descriptors(config.net, "Could not attach interface", cleanup)
    blocks = keep_descriptors(config.block, "Could not open block device", cleanup)
    fds = {"console": config.console_fd, "stderr": 2}
    if isinstance(config.trace, int):
        from tender.observe import trace

        fds["trace"] = trace.keep(config.trace, cleanup)
    if config.pidfile is not None:
        from tender.observe import pidfile

        fds["pidfile"] = pidfile.hold(config.pidfile, cleanup)
    record = None
    if config.replay is not None:
        from tender.replay.file import Record

        record = _read(lambda: Record(str(config.replay)), sandbox)
        cleanup.callback(record.close)
        fds["replay"] = record.fd
        config = record.config(config)

    def read_snapshot() -> SnapshotFile:
        from tender.snapshot.restore import SnapshotFile

        return SnapshotFile(config.kernel, config.kernel_fd, clone=config.clone)

    if config.restore:
        restored = _read(read_snapshot, sandbox)
        cleanup.callback(restored.close)
        return Inputs(restored.config(config), nets, blocks, fds, restored, restored)
    file = _read(lambda: ImageFile(config.kernel, config.kernel_fd), sandbox)
    cleanup.callback(file.close)
    target = TARGETS[file.image.target]
    if config.target not in (None, target):
        raise ImageError(
            f"{config.kernel}: Executable is not for the solo5-{config.target} target "
            f"(it is for {target})"
        )
    return Inputs(config, nets, blocks, fds, file, record=record)


def _read(read: Callable[[], T], sandbox: Sandbox | None) -> T:
    return sandbox.read_image(read) if sandbox else read()


@dataclass
class Devices:
    """The guest's devices, attached. `labels` is what the policies call them, by handle; `fds` are
    descriptors that belong to no single device, by label."""

    block: Block
    net: Net
    labels: Mapping[int, tuple[str, ...]]
    fds: Mapping[str, int]

    def by_handle(self) -> dict[int, BlockDevice | NetDevice]:
        """All of them."""
        return {**self.block.devices, **self.net.devices}

    def held(self) -> dict[int, Held]:
        """What has descriptors: the devices by handle, files of overlays by `overlay_handle`."""
        return {**self.by_handle(), **self._overlays()}

    def capacities(self) -> dict[int, int]:
        """The length in bytes of each disk, and the maximum of an overlay's file, as in `held`."""
        disks = {**self.block.devices, **self._overlays()}
        return {handle: disk.capacity for handle, disk in disks.items()}

    def _overlays(self) -> dict[int, OverlayFile]:
        return {
            fdtable.overlay_handle(handle): disk.overlay_file
            for handle, disk in self.block.devices.items()
            if disk.overlay_file
        }

    def attached(self) -> dict[int, Attached]:
        """What the guest's manifest has of each, by handle."""
        return {
            handle: Attached(capacity=disk.capacity, block_size=disk.sector_size)
            for handle, disk in self.block.devices.items()
        } | {
            handle: Attached(mac=port.mac, mtu=port.mtu)
            for handle, port in self.net.devices.items()
        }

    def limit(self, config: Config, manifest: Manifest, stop: Stop) -> None:
        """Give the devices the rate limits of `config`; raises DeviceError."""
        if not config.net_rate and not config.block_rate:
            return
        from tender.modules.assign import assign_rates
        from tender.modules.rate import RateLimit

        nets, blocks = assign_rates(manifest, config)
        for handle, rate in nets.items():
            port = self.net.devices[handle]
            port.rate_in, port.rate_out = RateLimit(rate, stop), RateLimit(rate, stop)
        for handle, rate in blocks.items():
            self.block.devices[handle].rate = RateLimit(rate, stop)

    def statistics(self) -> tuple[dict[str, Counters], dict[str, NetCounters]]:
        """What the disks and the networks have done until now, by name."""
        return (
            {disk.name: counters_value(disk.counters) for disk in self.block.devices.values()},
            {
                port.name: NetCounters(counters_value(port.received), counters_value(port.sent))
                for port in self.net.devices.values()
            },
        )

    def rendezvous(self, fds: Mapping[str, int], clock: HostClock, stop: Stop) -> Rendezvous | None:
        """Where this guest's virtual time is agreed on with others, if it is; `fds` by label."""
        if "sync" not in fds:
            return None
        from tender.modules.rendezvous import open_rendezvous

        rendezvous = open_rendezvous(fds["sync"], clock, stop)
        for port in self.net.devices.values():
            port.wait_for_room = rendezvous.wait_for_room
        return rendezvous


def attach_devices(inputs: Inputs, stop: Stop, warn: Warn, cleanup: Cleanup) -> Devices:
    """The devices of a guest; none where it is replayed, the saved ones where it is restored."""
    if inputs.record:
        return Devices(Block({}), Net({}), {}, {})
    manifest, restored = inputs.file.image.manifest, inputs.restored
    macs = restored.macs() if restored else None
    devices = open_devices(manifest, inputs.nets, inputs.blocks, stop, warn, cleanup, macs)
    if restored:
        restored.check_devices(devices.attached())
    return devices


def open_devices(
    manifest: Manifest,
    nets: Given,
    blocks: Given,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    macs: Mapping[int, bytes] | None = None,
) -> Devices:
    """Open the devices that the manifest declares, all of them.

    `macs` has the MAC addresses, by handle, of those networks that the user gives none.
    """
    by_handle = {device.handle: device for device in manifest.devices}
    net_specs: dict[int, NetValue] = assign(manifest, lib.MFT_DEV_NET_BASIC, nets)
    block_specs: dict[int, BlockValue] = assign(manifest, lib.MFT_DEV_BLOCK_BASIC, blocks)
    specs: dict[int, NetValue | BlockValue] = {**net_specs, **block_specs}
    check_all_attached(manifest, specs)
    synchronised = [
        spec.sync_fd
        for spec in net_specs.values()
        if isinstance(spec, Descriptor) and spec.sync_fd is not None
    ]
    disks, ports = {}, {}
    for handle, block_spec in block_specs.items():
        from tender.host import block

        disks[handle] = block.attach(by_handle[handle], block_spec, cleanup, stop, warn)
    for handle, net_spec in net_specs.items():
        from tender.host import net

        if macs and net_spec.mac is None:
            net_spec = replace(net_spec, mac=macs[handle])
        ports[handle] = net.attach(by_handle[handle], net_spec, cleanup, warn)
    return Devices(
        Block(disks),
        Net(ports),
        fdtable.labels(specs),
        {"sync": synchronised[-1]} if synchronised else {},
    )
