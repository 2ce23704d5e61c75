"""Unikernels in tests: the types of the fixtures, for annotations, and the switch for programs.

Tests need no import: the pytest plugin provides the fixtures (docs/guide-testing.md).

The rule here: a name is imported when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.embed.console import Console as Console
    from tender.testing.disk import DiskFault as DiskFault
    from tender.testing.disk import DiskImage as DiskImage
    from tender.testing.fixtures import BlockImageFactory as BlockImageFactory
    from tender.testing.fixtures import SubtestFactory as SubtestFactory
    from tender.testing.fixtures import UnikernelFactory as UnikernelFactory
    from tender.testing.net.bridge import Bridge as Bridge
    from tender.testing.net.dhcp import DhcpServer as DhcpServer
    from tender.testing.net.faults import Fault as Fault
    from tender.testing.net.host import Host as Host
    from tender.testing.net.host import Ping as Ping
    from tender.testing.net.http import Response as Response
    from tender.testing.net.nameserver import NameServer as NameServer
    from tender.testing.net.packets import Datagram as Datagram
    from tender.testing.net.port import GuestPort as GuestPort
    from tender.testing.net.switch import Switch as Switch
    from tender.testing.net.tcp import Connection as Connection
    from tender.testing.net.tcp import Listener as Listener
    from tender.testing.net.udp import UdpPort as UdpPort
    from tender.testing.unikernel import Unikernel as Unikernel

_MODULES = {
    "Bridge": "tender.testing.net.bridge",
    "BlockImageFactory": "tender.testing.fixtures",
    "Connection": "tender.testing.net.tcp",
    "Console": "tender.embed.console",
    "Datagram": "tender.testing.net.packets",
    "DhcpServer": "tender.testing.net.dhcp",
    "DiskFault": "tender.testing.disk",
    "DiskImage": "tender.testing.disk",
    "Fault": "tender.testing.net.faults",
    "GuestPort": "tender.testing.net.port",
    "Host": "tender.testing.net.host",
    "Listener": "tender.testing.net.tcp",
    "NameServer": "tender.testing.net.nameserver",
    "Ping": "tender.testing.net.host",
    "Response": "tender.testing.net.http",
    "SubtestFactory": "tender.testing.fixtures",
    "Switch": "tender.testing.net.switch",
    "UdpPort": "tender.testing.net.udp",
    "Unikernel": "tender.testing.unikernel",
    "UnikernelFactory": "tender.testing.fixtures",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
