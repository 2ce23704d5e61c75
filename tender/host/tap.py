"""Taps: attaching to one, and making one for a guest.

Attaching to a tap that exists takes a few ioctls and imports nothing; only `_set_up` imports
pyroute2. A tap that is made belongs to the tender's own descriptor, so the kernel removes it when
that is closed, however the tender ends. Sources: Linux, Documentation/networking/tuntap.rst,
linux/if.h, linux/if_tun.h, linux/ethtool.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from _socket import AF_INET, SOCK_DGRAM, socket

from tender._native import ffi
from tender.errors import DeviceError, setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.backends import Tap
    from tender.cleanup import Cleanup

IFREQ_SIZE = 40

IFF_UP, IFF_RUNNING = 0x1, 0x40
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x2, 0x1000, 0x4000, 0x8000
TUNSETIFF, TUNGETIFF, TUNSETOFFLOAD = 0x400454CA, 0x800454D2, 0x400454D0
SIOCGIFINDEX = 0x8933
SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFHWADDR, SIOCETHTOOL = 0x8913, 0x8921, 0x8927, 0x8946
ETHTOOL_GDRVINFO, ETHTOOL_SGSO, ETHTOOL_SGRO = 0x3, 0x24, 0x2C


def attach(tap: Tap, where: str, cleanup: Cleanup) -> tuple[int, int]:
    """Open the tap, making it first if asked to: its descriptor and MTU."""
    where = f"{where}: Could not attach interface '{tap.name}'"
    exists = _interface(tap.name, SIOCGIFFLAGS)
    if tap.create:
        if exists is not None:
            raise DeviceError(f"{where}: it exists already; leave out 'create' to attach to it")
        return _create(tap, where, cleanup)
    check_up(tap.name, where)
    fd = _open(tap.name, 0, where, cleanup)
    _no_aggregates(tap.name)
    return fd, _mtu(tap.name, where)


def check_up(name: str, where: str) -> None:
    """Raise DeviceError for an interface that does not exist or is down."""
    flags = _interface(name, SIOCGIFFLAGS)
    if flags is None:
        add = setting("add ',create'", "give create=True")
        raise DeviceError(f"{where}: no such interface; {add} to have it made")
    if not flags & (IFF_UP | IFF_RUNNING):
        raise DeviceError(f"{where}: it is down; bring it up: ip link set {name} up")


def driver(name: str) -> bytes:
    """The driver of an interface, as ethtool names it; empty where that is not known."""
    info = ffi.new("char[196]", struct.pack("=I", ETHTOOL_GDRVINFO))
    _ethtool(name, info)
    return bytes(ffi.buffer(info, 36))[4:].rstrip(b"\0")


def check(fd: int, where: str) -> int | None:
    """Check that the open descriptor is a usable tap: its MTU, None where that is not known."""
    where = f"{where}: Could not attach interface"
    ifreq = bytearray(IFREQ_SIZE)
    try:
        fcntl.ioctl(fd, TUNGETIFF, ifreq)
    except OSError:
        raise DeviceError(f"{where}: neither a tap nor a socket") from None
    name, flags = struct.unpack_from("16sH", ifreq)
    if not flags & IFF_TAP or not flags & IFF_NO_PI or flags & IFF_VNET_HDR:
        raise DeviceError(f"{where}: not a tap with IFF_TAP and IFF_NO_PI, without IFF_VNET_HDR")
    mtu = mtu_if_here(fd, name)
    if mtu is not None:
        _no_aggregates(os.fsdecode(name.rstrip(b"\0")))
    return mtu


def mtu_if_here(fd: int, name: bytes) -> int | None:
    """The MTU of an open tap with this name; None where it is in another network namespace.

    There, the name may be that of another interface here.
    """
    if mac(fd, name) != _mac_of_interface(name):
        return None
    return _interface(os.fsdecode(name.rstrip(b"\0")), SIOCGIFMTU)


def mac(fd: int, name: bytes) -> bytes | None:
    ifreq = bytearray(struct.pack("16s24x", name))
    try:
        fcntl.ioctl(fd, SIOCGIFHWADDR, ifreq)
    except OSError:
        return None
    return bytes(ifreq[18:24])


def _mac_of_interface(name: bytes) -> bytes | None:
    control = socket(AF_INET, SOCK_DGRAM)
    try:
        return mac(control.fileno(), name)
    finally:
        control.close()


def _open(name: str, flags: int, where: str, cleanup: Cleanup) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"{where}: /dev/net/tun: {os.strerror(error.errno or 0)}") from None
    cleanup.callback(lambda: os.close(fd))
    request = struct.pack("16sH22x", os.fsencode(name), IFF_TAP | IFF_NO_PI | flags)
    try:
        fcntl.ioctl(fd, TUNSETIFF, request)
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    except OSError as error:
        raise DeviceError(f"{where}: {_tap_error(error.errno or 0)}") from None
    return fd


def _tap_error(error: int) -> str:
    hints = {
        errno.EBUSY: "it is in use already",
        errno.EINVAL: "it is not a tap interface, or one of several queues",
        errno.EPERM: "not permitted: it belongs to another user, or making one needs CAP_NET_ADMIN",
    }
    return hints.get(error, os.strerror(error))


def _create(tap: Tap, where: str, cleanup: Cleanup) -> tuple[int, int]:
    fd = _open(tap.name, IFF_TUN_EXCL, where, cleanup)
    _set_up(tap, where)
    _no_aggregates(tap.name)
    return fd, _mtu(tap.name, where)


def _set_up(tap: Tap, where: str) -> None:
    """Give the new tap its MTU, addresses and bridge, and bring it up."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError:
        raise DeviceError(f"{where}: making a tap needs pyroute2: pip install pyroute2") from None
    step = "link"
    try:
        with IPRoute() as ipr:
            (index,) = ipr.link_lookup(ifname=tap.name)
            if tap.mtu is not None:
                step = f"mtu={tap.mtu}"
                ipr.link("set", index=index, mtu=tap.mtu)
            for addr in tap.addr:
                step = f"addr={addr}"
                address, _, prefix = addr.partition("/")
                ipr.addr("add", index=index, address=address, prefixlen=int(prefix))
            if tap.bridge is not None:
                step = f"bridge={tap.bridge}"
                ipr.link("set", index=index, master=_bridge(ipr, tap.bridge, where))
            step = "up"
            ipr.link("set", index=index, state="up")
    except NetlinkError as error:
        raise DeviceError(f"{where}: {step}: {os.strerror(error.code)}") from None
    except (OSError, ValueError) as error:
        raise DeviceError(f"{where}: {step}: {error}") from None


def _bridge(ipr: Any, name: str, where: str) -> int:
    found: list[int] = list(ipr.link_lookup(ifname=name, kind="bridge"))
    if not found:
        raise DeviceError(f"{where}: there is no bridge '{name}'")
    return found[0]


def index(name: str) -> int:
    """The index of an interface of this network namespace; 0 where there is none."""
    ifreq = bytearray(struct.pack("16s24x", os.fsencode(name)))
    return int(struct.unpack_from("16xi", ifreq)[0]) if _ioctl(SIOCGIFINDEX, ifreq) else 0


def _interface(name: str, request: int) -> int | None:
    """The flags or the MTU of an interface of this network namespace; None where there is none."""
    ifreq = bytearray(struct.pack("16s24x", os.fsencode(name)))
    if not _ioctl(request, ifreq):
        return None
    layout = "16xH" if request == SIOCGIFFLAGS else "16xi"
    return int(struct.unpack_from(layout, ifreq)[0])


def _ioctl(request: int, ifreq: bytes | bytearray) -> bool:
    """Make an ioctl on an interface of this network namespace; whether it succeeded."""
    control = socket(AF_INET, SOCK_DGRAM)
    try:
        fcntl.ioctl(control.fileno(), request, ifreq)
    except OSError:
        return False
    finally:
        control.close()
    return True


def _mtu(name: str, where: str) -> int:
    mtu = _interface(name, SIOCGIFMTU)
    if mtu is None:
        raise DeviceError(f"{where}: it is gone")
    return mtu


def _no_aggregates(name: str) -> None:
    """GRO and GSO off: a 64 KiB aggregate would be cut at the guest's buffer.

    Best effort, as solo5-hvt has it: without CAP_NET_ADMIN the host's setting stays.
    """
    for command in (ETHTOOL_SGRO, ETHTOOL_SGSO):
        _ethtool(name, ffi.new("uint32_t[2]", [command, 0]))


def _ethtool(name: str, value: Any) -> None:
    pointer = int(ffi.cast("uintptr_t", value))
    _ioctl(SIOCETHTOOL, struct.pack("16sQ16x", os.fsencode(name), pointer))
