"""The devices of a guest: what its manifest declares, attached to what the user named."""

from __future__ import annotations

from tender._native import lib
from tender.backends import Descriptor
from tender.dataclass import dataclass
from tender.image.manifest import Attached
from tender.modules.assign import assign, check_all_attached
from tender.modules.block import Block
from tender.modules.net import Net
from tender.sandbox import fdtable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypeAlias

    from tender.backends import BlockValue, NetValue
    from tender.cleanup import Cleanup
    from tender.clock import HostClock
    from tender.image.manifest import Manifest
    from tender.modules import Warn
    from tender.modules.block import BlockDevice, OverlayFile
    from tender.modules.net import NetDevice
    from tender.rendezvous import Rendezvous
    from tender.stop import Stop

    Held: TypeAlias = BlockDevice | NetDevice | OverlayFile
    Given: TypeAlias = tuple[tuple[str | None, Any], ...]


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

    def rendezvous(self, fds: Mapping[str, int], clock: HostClock, stop: Stop) -> Rendezvous | None:
        """Where this guest's virtual time is agreed on with others, if it is; `fds` by label."""
        if "sync" not in fds:
            return None
        from tender.rendezvous import open_rendezvous

        rendezvous = open_rendezvous(fds["sync"], clock, stop)
        for port in self.net.devices.values():
            port.wait_for_room = rendezvous.wait_for_room
        return rendezvous


def open_devices(
    manifest: Manifest, nets: Given, blocks: Given, stop: Stop, warn: Warn, cleanup: Cleanup
) -> Devices:
    """Open the devices that the manifest declares, all of them."""
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

        ports[handle] = net.attach(by_handle[handle], net_spec, cleanup, warn)
    return Devices(
        Block(disks),
        Net(ports),
        fdtable.labels(specs),
        {"sync": synchronised[-1]} if synchronised else {},
    )
