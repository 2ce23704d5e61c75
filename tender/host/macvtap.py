"""macvtap: a tap that is a link of its own on an interface of the host.

It is read and written at /dev/tapN, where N is the index of the link. Sources: Linux,
drivers/net/tap.c and drivers/net/macvtap.c.
"""

from __future__ import annotations

import fcntl
import os
import struct
from errno import EACCES

from tender.errors import DeviceError, reason, setting
from tender.host import tap
from tender.host.lock import holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cleanup import Cleanup

_NOT_ATTACHED = "Could not attach interface"


def attach(
    name: str, mac: bytes | None, where: str, cleanup: Cleanup
) -> tuple[int, int | None, bytes]:
    """Open the link: its descriptor, MTU and MAC address, which is the guest's."""
    where = f"{where}: {_NOT_ATTACHED} '{name}'"
    tap.check_up(name, where)
    path = f"/dev/tap{tap.index(name)}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DeviceError(
            f"{where}: there is no {path}: a macvtap link has it, not a macvlan"
        ) from None
    except OSError as error:
        hint = f" (chown USER {path})" if error.errno == EACCES else ""
        raise DeviceError(f"{where}: {path}: {reason(error.errno or 0)}{hint}") from None
    cleanup.callback(lambda: os.close(fd))
    try:  # the kernel would share its frames among all who have it open
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DeviceError(f"{where}: it is in use by {holder(fd)}") from None
    found, mtu = _set_up(fd, where)
    if found != name or mtu is None:
        raise DeviceError(
            f"{where}: {path} is '{found}' of another network namespace; open the right device "
            "and pass its descriptor"
        )
    return fd, mtu, check_mac(fd, found, mac, where)


def adopt(fd: int, mac: bytes | None, where: str) -> tuple[int | None, bytes]:
    """Check and set up an open /dev/tapN: its MTU, None where that is not known, and its MAC."""
    where = f"{where}: {_NOT_ATTACHED}"
    name, mtu = _set_up(fd, where)
    return mtu, check_mac(fd, name, mac, where)


def _set_up(fd: int, where: str) -> tuple[str, int | None]:
    """Plain frames, without a vnet header and without aggregates: the link's name and MTU."""
    ifreq = bytearray(tap.IFREQ_SIZE)
    try:
        fcntl.ioctl(fd, tap.TUNSETIFF, struct.pack("16xH22x", tap.IFF_TAP | tap.IFF_NO_PI))
        fcntl.ioctl(fd, tap.TUNSETOFFLOAD, 0)
        fcntl.ioctl(fd, tap.TUNGETIFF, ifreq)
    except OSError:
        raise DeviceError(f"{where}: neither a tap nor a socket") from None
    name = ifreq[:16].rstrip(b"\0")
    return os.fsdecode(bytes(name)), tap.mtu_if_here(fd, bytes(name))


def check_mac(fd: int, name: str, mac: bytes | None, where: str) -> bytes:
    """The link's MAC address; raises DeviceError where the guest is to have another one.

    A macvtap gives its reader the frames to its own address, and no others.
    """
    links = tap.mac(fd, os.fsencode(name))
    if links is None:
        raise DeviceError(f"{where}: '{name}' has no MAC address")
    if mac not in (None, links):
        leave_out = setting("leave out mac=", "leave out mac")
        raise DeviceError(
            f"{where}: a macvtap has the MAC address of its link, {links.hex(':')}: {leave_out}, "
            f"or ip link set {name} address {mac.hex(':')}"
        )
    return links
