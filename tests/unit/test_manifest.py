"""A manifest survives the way through bytes and JSON, or is refused by name."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender._native import lib
from tender.errors import ManifestError
from tender.image import manifest
from tender.image.manifest import Attached, Device, Manifest

NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=67)
TYPES = st.sampled_from([lib.MFT_DEV_BLOCK_BASIC, lib.MFT_DEV_NET_BASIC])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(NAMES, max_size=63, unique=True))
    return Manifest(tuple(Device(name, draw(TYPES), index) for index, name in enumerate(names, 1)))


@given(manifests())
def test_bytes_and_json_say_the_same(value: Manifest) -> None:
    data = manifest.encode(value)
    assert len(data) == 8 + 104 * (len(value.devices) + 1)
    assert manifest.parse(data) == value
    devices = [{"name": device.name, "type": device.type_name} for device in value.devices]
    text = json.dumps({"type": "solo5.manifest", "version": 1, "devices": devices})
    assert manifest.parse_json(text, "manifest.json") == value


@given(manifests(), st.data())
def test_any_change_is_accepted_or_a_manifest_error(value: Manifest, data: st.DataObject) -> None:
    raw = bytearray(manifest.encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = manifest.parse(bytes(raw))
    except ManifestError:
        return
    assert len(parsed.devices) == len(value.devices)
    assert all(manifest.is_name(device.name) for device in parsed.devices)


@given(st.binary(max_size=300))
def test_any_bytes_are_accepted_or_a_manifest_error(raw: bytes) -> None:
    try:
        manifest.parse(raw)
    except ManifestError as error:
        assert "\n" not in str(error)


ONE = manifest.encode(Manifest((Device("a" * 67, 1, 1),)))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\x02", "version is 2"),
        (4, b"\x00", "0 entries"),
        (4, b"\x41", "65 entries"),
        (4, b"\x03", "of 3 entries is"),
        (8, b"x", "entry 0 is not the reserved one"),
        (8 + 96, b"\x01", "entry 0"),
        (112 + 67, b"b", "name does not end"),
        (112, b"\x00", "not a device name"),
        (112, b"-", "not a device name"),
        (112 + 68, b"\x03", "unknown type 0x3"),
        (112 + 96, b"\x01", "attached already"),
    ],
)
def test_each_field_is_checked(at: int, value: bytes, message: str) -> None:
    raw = bytearray(ONE)
    raw[at : at + len(value)] = value
    with pytest.raises(ManifestError, match=message):
        manifest.parse(bytes(raw))


def test_two_devices_of_one_name_are_refused() -> None:
    twice = Manifest((Device("a", 1, 1), Device("a", 2, 2)))
    with pytest.raises(ManifestError, match="'a' twice"):
        manifest.parse(manifest.encode(twice))


def test_a_running_guest_finds_its_devices_attached() -> None:
    value = Manifest((Device("disk", 1, 1), Device("net", 2, 2)))
    data = manifest.encode(
        value,
        {1: Attached(capacity=1 << 40, block_size=512), 2: Attached(mac=b"\2abcde", mtu=9000)},
    )
    disk, net = data[112:216], data[216:]
    assert disk[72:82] == (1 << 40).to_bytes(8, "little") + (512).to_bytes(2, "little")
    assert net[72:80] == b"\2abcde" + (9000).to_bytes(2, "little")
    assert (disk[96], net[96]) == (1, 1)
    assert disk[88:96] == net[88:96] == bytes(8)


def device(name: object = "a", kind: object = "NET_BASIC") -> dict[str, object]:
    return {"name": name, "type": kind}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "not a manifest"),
        ({"type": "other"}, "not a manifest"),
        ({"type": "solo5.manifest", "version": 2}, '"version" is 2'),
        ({"type": "solo5.manifest", "version": 1}, '"devices" is not a list'),
        ([device()] * 64, "too many entries, maximum 63"),
        ([device("")], "not 1 to 67 letters and digits"),
        ([device("a" * 68)], "not 1 to 67 letters and digits"),
        ([device("ä")], "not 1 to 67 letters and digits"),
        ([device(None)], "not 1 to 67 letters and digits"),
        ([device(kind="DISK")], "'DISK' is not BLOCK_BASIC, NET_BASIC"),
        ([device(kind=[])], "is not BLOCK_BASIC, NET_BASIC"),
        ([device(), device()], "'a' twice"),
        (["a"], "device 1 is not an object"),
    ],
)
def test_json_errors_name_the_file_and_the_place(value: object, message: str) -> None:
    if isinstance(value, list) and value:
        value = {"type": "solo5.manifest", "version": 1, "devices": value}
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(ManifestError, match=message) as raised:
        manifest.parse_json(text, "my/manifest.json")
    assert str(raised.value).startswith("my/manifest.json: ")
    assert "\n" not in str(raised.value)
