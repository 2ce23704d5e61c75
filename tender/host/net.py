"""Network devices: taps, sockets and passt of the host, opened and checked."""

from __future__ import annotations

import os
import stat
from _socket import (
    AF_NETLINK,
    SO_ACCEPTCONN,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
)

from tender.backends import Tap, UserNet
from tender.checks import MTU
from tender.errors import DeviceError
from tender.host import random_mac
from tender.modules.net import NetDevice

MACVLAN = b"macvlan"  # the driver of a macvtap as well, as ethtool names it
MISC_MAJOR = 10  # of /dev/net/tun; macvtaps have another one

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.backends import NetValue
    from tender.cleanup import Cleanup
    from tender.image.manifest import Device
    from tender.modules import Warn


def attach(device: Device, net: NetValue, cleanup: Cleanup, warn: Warn) -> NetDevice:
    """Open and set up a network of the host; raises DeviceError."""
    where = f"network device '{device.name}'"
    if isinstance(net, UserNet):
        from tender.host import passt

        started = passt.start(net, where)
        cleanup.callback(lambda: os.close(started.device.fd))
        for line in started.chosen:
            warn(f"net {device.name}: {line}")
        net = started.device
    mtu: int | None
    if isinstance(net, Tap):
        fd, mtu, mac = _open_tap(net, where, cleanup)
    else:
        fd, (mtu, mac) = net.fd, _adopt(net.fd, net.mac, where)
        mtu = net.mtu or mtu
    is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    return NetDevice(
        device.name,
        device.handle,
        fd,
        random_mac() if mac is None else mac,
        mtu or MTU,
        warn,
        is_socket=is_socket,
    )


def _open_tap(net: Tap, where: str, cleanup: Cleanup) -> tuple[int, int | None, bytes | None]:
    """The descriptor, MTU and MAC address of a tap or macvtap; None for a random address."""
    from tender.host import tap

    if not net.create and tap.driver(net.name) == MACVLAN:
        from tender.host import macvtap

        return macvtap.attach(net.name, net.mac, where, cleanup)
    return *tap.attach(net, where, cleanup), net.mac


def _adopt(fd: int, mac: bytes | None, where: str) -> tuple[int | None, bytes | None]:
    """Check an open descriptor: the MTU of a tap, and the MAC address, None for a random one."""
    info = os.fstat(fd)
    mtu = None
    if stat.S_ISSOCK(info.st_mode):
        _check_socket(fd, where)
    elif stat.S_ISCHR(info.st_mode) and os.major(info.st_rdev) != MISC_MAJOR:
        from tender.host import macvtap

        mtu, mac = macvtap.adopt(fd, mac, where)
    elif stat.S_ISCHR(info.st_mode):
        from tender.host import tap

        mtu = tap.check(fd, where)
    else:
        raise DeviceError(f"{where}: Could not attach interface: neither a tap nor a socket")
    os.set_blocking(fd, False)
    return mtu, mac


def _check_socket(fd: int, where: str) -> None:
    where = f"{where}: Could not attach interface"
    copy = socket(fileno=os.dup(fd))
    try:
        listening = copy.getsockopt(SOL_SOCKET, SO_ACCEPTCONN)
        if listening or copy.family == AF_NETLINK:
            raise DeviceError(f"{where}: not a socket for frames")
        if copy.type not in (SOCK_DGRAM, SOCK_SEQPACKET):
            raise DeviceError(
                f"{where}: a stream socket does not keep frames apart; use a datagram or "
                "seqpacket socket"
            )
    finally:
        copy.close()
