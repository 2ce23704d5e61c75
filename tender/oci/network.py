"""The container's network interface, taken over by the guest; passt where that can't be.

The engine makes a network namespace with an interface, an address and routes. A tap is put beside
the interface, and the traffic of each is redirected to the other, so that the guest is the machine
that the engine set up; port forwarding and services then work by themselves. The address stays on
the interface: no frame reaches the namespace's own stack any more, and a container that is started
again in this namespace finds it. Sources: tc-u32(8), tc-mirred(8), tuntap.rst of Linux.
"""

from __future__ import annotations

import os
import shutil
import sys

from tender._native import lib
from tender.backends import Tap, UserNet
from tender.cleanup import Cleanup
from tender.dataclass import dataclass
from tender.errors import ConfigError, DeviceError, HostError
from tender.host import passt, tap
from tender.sandbox import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

TAP = "ptender0"
PASST_MIB = 32  # it took 21 MiB after 300 connections, whatever they sent
IFF_UP, IFF_LOOPBACK = 0x1, 0x8  # linux/if.h
AF_INET = 2
INGRESS, ALL_PROTOCOLS = 0xFFFF0000, 0x0003  # linux/pkt_sched.h, linux/if_ether.h
TC_H_ROOT_OF_U32 = 0x10000  # any class: the action takes the frame


@dataclass
class Network:
    """The guest's network."""

    device: str  # as the tender's --net has it, after NAME=
    address: str  # with its prefix length; empty where the interface has none
    gateway: str  # empty where there is none
    overhead_mib: int = 0  # of memory, for processes that serve it


def enter(namespace: str) -> None:
    """Join the network namespace at this path; "": a new one. Raises HostError."""
    try:
        if not namespace:
            confine.call(lib.SYS_unshare, lib.CLONE_NEWNET)
            return
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            confine.call(lib.SYS_setns, fd, lib.CLONE_NEWNET)
        finally:
            os.close(fd)
    except OSError as error:
        what = f"network namespace {namespace}".rstrip()
        raise HostError(what, "setns" if namespace else "unshare", error.errno or 0) from None


def of_container(ports: Sequence[str]) -> Network | None:
    """The network of this namespace; None where it has no interface.

    Without a tap it is one through passt, which has the guest's `ports` on the interface, and one
    line says so. Raises DeviceError, or ConfigError where another unikernel has it.
    """
    try:
        return _take_over()
    except DeviceError as error:
        if shutil.which(passt.COMMAND) is None:
            more = "passt, which takes no tap, is not installed: apt install passt"
            raise DeviceError(f"{error}; {more}") from None
        print(f"ptender-oci: {error}: the guest's network is passt", file=sys.stderr, flush=True)
    try:  # passt is no root
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w") as file:
            file.write("0")
    except OSError:
        pass  # then it has no port below 1024, and says so
    return through_passt(ports)


def through_passt(ports: Sequence[str]) -> Network:
    """A network of the guest's own, whose ports are on all addresses of this namespace."""
    forwards = []
    for each in ports:
        number, _, protocol = each.partition("/")
        forwards.append(f"{protocol or 'tcp'}:0.0.0.0:{number}:{number}")
    net = UserNet()
    device = ",".join(["user", *forwards]).replace(",", ":", 1)
    return Network(device, net.address, str(net.gateway), PASST_MIB)


def _take_over() -> Network | None:
    """Redirect this namespace's interface to a new tap."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError:
        raise DeviceError("the container's network needs pyroute2: pip install pyroute2") from None
    with IPRoute() as ipr:
        link = _interface(ipr)
        if link is None:
            return None
        if ipr.link_lookup(ifname=TAP):
            raise ConfigError("the container's network is another unikernel's: a pod has one")
        index, mtu, mac = link["index"], link.get_attr("IFLA_MTU"), link.get_attr("IFLA_ADDRESS")
        with Cleanup() as cleanup:
            try:
                _remove_redirect(ipr, index)  # of a container that had this namespace before
                fd, _ = tap.attach(Tap(TAP, create=True, mtu=mtu), "container", cleanup)
                (tap_index,) = ipr.link_lookup(ifname=TAP)
                cleanup.callback(lambda: _remove_redirect(ipr, index))
                _redirect(ipr, index, tap_index)
                _redirect(ipr, tap_index, index)
            except NetlinkError as error:
                reason = os.strerror(error.code)
                raise DeviceError(f"the container's network: traffic control: {reason}") from None
            cleanup.forget()
        os.set_inheritable(fd, True)
        device = f"@{fd},mtu={mtu},mac={mac}"
        return Network(device, _address(ipr, index), _gateway(ipr, index))


def _interface(ipr: Any) -> Any:
    """The interface that the engine made: the first that is no loopback, eth0 before others."""
    links = [link for link in ipr.get_links() if not link["flags"] & IFF_LOOPBACK]
    links.sort(key=lambda link: (link.get_attr("IFLA_IFNAME") != "eth0", link["index"]))
    return next((link for link in links if link["flags"] & IFF_UP), None)


def _remove_redirect(ipr: Any, index: int) -> None:
    for qdisc in ipr.get_qdiscs(index):
        if qdisc.get_attr("TCA_KIND") == "ingress":
            ipr.tc("del", "ingress", index, INGRESS)


def _redirect(ipr: Any, index: int, to: int) -> None:
    ipr.tc("add", "ingress", index, INGRESS)
    ipr.tc(
        "add-filter",
        "u32",
        index,
        parent=INGRESS,
        protocol=ALL_PROTOCOLS,
        prio=1,
        target=TC_H_ROOT_OF_U32,
        keys=["0x0/0x0+0"],
        action=[{"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": to}],
    )


def _address(ipr: Any, index: int) -> str:
    for address in ipr.get_addr(index=index, family=AF_INET):
        return f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
    return ""


def _gateway(ipr: Any, index: int) -> str:
    for route in ipr.get_default_routes(family=AF_INET):
        if route.get_attr("RTA_OIF") == index:
            return route.get_attr("RTA_GATEWAY") or ""
    return ""
