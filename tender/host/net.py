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
    mac = random_mac() if net.mac is None else net.mac
    if isinstance(net, Tap):
        from tender.host import tap

        fd, mtu = tap.attach(net, where, cleanup)
        return NetDevice(device.name, device.handle, fd, mac, mtu, warn, is_socket=False)
    found_mtu, is_socket = _adopt(net.fd, where)
    mtu = net.mtu or found_mtu or MTU
    return NetDevice(device.name, device.handle, net.fd, mac, mtu, warn, is_socket=is_socket)


def _adopt(fd: int, where: str) -> tuple[int | None, bool]:
    """Check an open descriptor: the MTU of a tap, and whether it is a socket."""
    mode = os.fstat(fd).st_mode
    mtu = None
    if stat.S_ISSOCK(mode):
        _check_socket(fd, where)
    elif stat.S_ISCHR(mode):
        from tender.host import tap

        mtu = tap.check(fd, where)
    else:
        raise DeviceError(f"{where}: Could not attach interface: neither a tap nor a socket")
    os.set_blocking(fd, False)
    return mtu, stat.S_ISSOCK(mode)


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
