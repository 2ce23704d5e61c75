"""Which device of the manifest gets what: by name, or the only one of its kind."""

from __future__ import annotations

from tender._native import lib
from tender.errors import DeviceError, setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeVar

    from tender.backends import Rate
    from tender.config import Config
    from tender.image.manifest import Device, Manifest

    Value = TypeVar("Value")

_OPTION = {"NET_BASIC": "--net {}=TAP", "BLOCK_BASIC": "--block {}=FILE"}
_ARGUMENT = {
    "NET_BASIC": 'net={{"{}": Tap("tap0")}}',
    "BLOCK_BASIC": 'block={{"{}": BlockFile("disk.img")}}',
}


def assign(
    manifest: Manifest, number: int, given: Iterable[tuple[str | None, Value]]
) -> dict[int, Value]:
    """Which device gets which value, by handle; `number` is the device type.

    Raises DeviceError for a name that is not declared, one that is named twice, and a value
    without a name where it is not clear what it is for.
    """
    given = list(given)
    declared = manifest.of_type(number)
    assigned: dict[int, Value] = {}
    for name, value in given:
        if name is not None:
            _put(assigned, _declared(declared, name), value)
    for name, value in given:
        if name is None:
            _put(assigned, _only(declared, assigned, number), value)
    return assigned


def assign_pcaps(manifest: Manifest, given: Iterable[tuple[str | None, str]]) -> dict[int, str]:
    """Which network device's packets go to which file, by handle; raises DeviceError."""
    return _assign_option("--pcap", manifest, lib.MFT_DEV_NET_BASIC, given)


def assign_rates(manifest: Manifest, config: Config) -> tuple[dict[int, Rate], dict[int, Rate]]:
    """The rate limits of networks and disks, by handle; raises DeviceError."""
    return (
        _assign_option("--net-rate", manifest, lib.MFT_DEV_NET_BASIC, config.net_rate),
        _assign_option("--block-rate", manifest, lib.MFT_DEV_BLOCK_BASIC, config.block_rate),
    )


def _assign_option(
    option: str, manifest: Manifest, number: int, given: Iterable[tuple[str | None, Value]]
) -> dict[int, Value]:
    try:
        return assign(manifest, number, given)
    except DeviceError as error:
        name = setting(option, option.lstrip("-").replace("-", "_"))
        raise DeviceError(f"{name}: {error}") from None


def _put(assigned: dict[int, Value], device: Device, value: Value) -> None:
    if device.handle in assigned:
        raise DeviceError(f"'{device.name}' is attached twice")
    assigned[device.handle] = value


def _declared(declared: list[Device], name: str) -> Device:
    for device in declared:
        if device.name == name:
            return device
    names = ", ".join(device.name for device in declared)
    hint = f"it declares {names}" if names else "it declares no device of this kind"
    raise DeviceError(f"Resource not declared in manifest: '{name}' ({hint})")


def _only(declared: list[Device], assigned: dict[int, Value], number: int) -> Device:
    kind, option = ("network", "net") if number == lib.MFT_DEV_NET_BASIC else ("block", "block")
    free = [device for device in declared if device.handle not in assigned]
    if len(free) == 1:
        return free[0]
    if not declared:
        raise DeviceError(f"the guest's manifest declares no {kind} device")
    if not free:
        raise DeviceError(f"every {kind} device of the guest has something attached to it already")
    names = ", ".join(device.name for device in free)
    raise DeviceError(
        f"the guest has several {kind} devices ({names}): "
        f"name one, as in --{option} {free[0].name}=..."
    )


def check_all_attached(manifest: Manifest, handles: Iterable[int]) -> None:
    """Raise DeviceError unless every declared device is among `handles`."""
    attached = set(handles)
    missing = [device for device in manifest.devices if device.handle not in attached]
    if missing:
        names = ", ".join(f"'{device.name}' of type {device.type_name}" for device in missing)
        add = setting(
            " ".join(_OPTION[device.type_name].format(device.name) for device in missing),
            " and ".join(_ARGUMENT[device.type_name].format(device.name) for device in missing),
        )
        raise DeviceError(f"All declared devices must be attached; missing: {names}: add {add}")
