"""The manifest: which devices a guest declares, as bytes, as a value and as JSON.

Pure. A manifest is either valid in every byte or a ManifestError. A device's handle is its index;
entry 0 is reserved, so the first device has handle 1.
"""

from __future__ import annotations

from tender._native import ffi, lib
from tender.dataclass import dataclass
from tender.errors import ManifestError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER_SIZE = ffi.sizeof("struct mft_header")
ENTRY_SIZE = ffi.sizeof("struct mft_entry")
MAX_SIZE = HEADER_SIZE + lib.MFT_MAX_ENTRIES * ENTRY_SIZE
MAX_DEVICES = lib.MFT_MAX_ENTRIES - 1

TYPE_NAMES = {lib.MFT_DEV_BLOCK_BASIC: "BLOCK_BASIC", lib.MFT_DEV_NET_BASIC: "NET_BASIC"}
TYPE_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}


@dataclass
class Device:
    """One declared device: its name (1..67 of [A-Za-z0-9]), its type and its handle."""

    name: str
    type: int  # lib.MFT_DEV_BLOCK_BASIC or lib.MFT_DEV_NET_BASIC
    handle: int

    @property
    def type_name(self) -> str:
        """ "NET_BASIC" or "BLOCK_BASIC", as manifest.json has it."""
        return TYPE_NAMES[self.type]


@dataclass
class Manifest:
    """The devices of a guest, in the order of their handles (1, 2, ...)."""

    devices: tuple[Device, ...] = ()

    def of_type(self, number: int) -> list[Device]:
        """The devices of one type (MFT_DEV_*), in the order of their handles."""
        return [device for device in self.devices if device.type == number]


@dataclass
class Attached:
    """What the guest is told of a device that is attached; the fields of its kind are used."""

    capacity: int = 0
    block_size: int = 0
    mac: bytes = bytes(6)
    mtu: int = 0
    hostfd: int = 0  # of an spt guest, which uses the descriptor itself


def is_name(name: str) -> bool:
    """Whether `name` can name a device."""
    return 0 < len(name) <= lib.MFT_NAME_MAX and name.isascii() and name.isalnum()


def parse(data: bytes) -> Manifest:
    """Read a manifest as an image's MFT1 note carries it."""
    if len(data) < HEADER_SIZE:
        raise ManifestError(f"manifest is {len(data)} bytes, shorter than its header")
    header = ffi.from_buffer("struct mft_header *", data)
    if header.version != lib.MFT_VERSION:
        raise ManifestError(f"manifest version is {header.version}, not {lib.MFT_VERSION}")
    count = header.entries
    if not 1 <= count <= lib.MFT_MAX_ENTRIES:
        raise ManifestError(f"manifest has {count} entries, not 1 to {lib.MFT_MAX_ENTRIES}")
    if len(data) != HEADER_SIZE + count * ENTRY_SIZE:
        raise ManifestError(f"manifest of {count} entries is {len(data)} bytes")
    entries = ffi.cast("struct mft_entry *", header + 1)
    _check_reserved(entries[0])
    return _checked(_parse_entry(entries[index], index) for index in range(1, count))


def _check_reserved(entry: Any) -> None:
    if entry.type != lib.MFT_RESERVED_FIRST or _name_of(entry, 0) or entry.attached:
        raise ManifestError("manifest entry 0 is not the reserved one")


def _parse_entry(entry: Any, index: int) -> Device:
    name = _name_of(entry, index)
    if not is_name(name):
        raise ManifestError(f"manifest entry {index}: {name!r} is not a device name")
    if entry.type not in TYPE_NAMES:
        raise ManifestError(f"manifest entry {index} ({name}): unknown type {entry.type:#x}")
    if entry.attached:
        raise ManifestError(f"manifest entry {index} ({name}) is attached already")
    return Device(name, entry.type, index)


def _name_of(entry: Any, index: int) -> str:
    raw = bytes(ffi.buffer(entry.name))
    end = raw.find(0)
    if end < 0:
        raise ManifestError(f"manifest entry {index}: name does not end")
    return raw[:end].decode("latin-1")


def _checked(devices: Any) -> Manifest:
    manifest = Manifest(tuple(devices))
    seen: set[str] = set()
    for device in manifest.devices:
        if device.name in seen:
            raise ManifestError(f"manifest declares '{device.name}' twice")
        seen.add(device.name)
    return manifest


def encode(manifest: Manifest, attached: dict[int, Attached] | None = None) -> bytes:
    """The manifest as bytes; with `attached` (by handle), as a running guest finds it.

    The tender's private field of an entry stays 0 for hvt.
    """
    header = ffi.new(
        "struct mft_header *", {"version": lib.MFT_VERSION, "entries": len(manifest.devices) + 1}
    )
    entries = ffi.new("struct mft_entry[]", len(manifest.devices) + 1)
    entries[0].type = lib.MFT_RESERVED_FIRST
    for device in manifest.devices:
        _encode_entry(entries[device.handle], device, (attached or {}).get(device.handle))
    return bytes(ffi.buffer(header)) + bytes(ffi.buffer(entries))


def _encode_entry(entry: Any, device: Device, attached: Attached | None) -> None:
    entry.name = device.name.encode()
    entry.type = device.type
    if attached is None:
        return
    entry.attached = 1
    entry.host_private = attached.hostfd
    if device.type == lib.MFT_DEV_BLOCK_BASIC:
        entry.u.block_basic.capacity = attached.capacity
        entry.u.block_basic.block_size = attached.block_size
    else:
        entry.u.net_basic.mac = list(attached.mac)
        entry.u.net_basic.mtu = attached.mtu


def parse_json(text: str, source: str) -> Manifest:
    """Read a manifest.json; `source` names the file in errors."""
    import json

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: not JSON: {error}") from None
    try:
        return _from_json(value)
    except ManifestError as error:
        raise ManifestError(f"{source}: {error}") from None


def _from_json(value: object) -> Manifest:
    if not isinstance(value, dict) or value.get("type") != "solo5.manifest":
        raise ManifestError('not a manifest: expected an object with "type": "solo5.manifest"')
    if value.get("version") != lib.MFT_VERSION:
        raise ManifestError(f'"version" is {shown(value.get("version"))}, not {lib.MFT_VERSION}')
    devices = value.get("devices")
    if not isinstance(devices, list):
        raise ManifestError('"devices" is not a list')
    if len(devices) > MAX_DEVICES:
        raise ManifestError(f"too many entries, maximum {MAX_DEVICES}")
    return _checked(_device_from_json(item, index) for index, item in enumerate(devices, 1))


def _device_from_json(item: object, index: int) -> Device:
    if not isinstance(item, dict):
        raise ManifestError(f"device {index} is not an object")
    name, kind = item.get("name"), item.get("type")
    if not isinstance(name, str) or not is_name(name):
        raise ManifestError(f"device {index}: name {shown(name)} is not 1 to 67 letters and digits")
    if not isinstance(kind, str) or kind not in TYPE_NUMBERS:
        expected = "BLOCK_BASIC, NET_BASIC"
        raise ManifestError(f"device {index} ({name}): type {shown(kind)} is not {expected}")
    return Device(name, TYPE_NUMBERS[kind], index)
