"""Unikernels in tests: the types of the fixtures, for annotations; the switch for other programs.

The rule here: importing this costs nothing, and a name is imported when it is used. Tests need none
of it: the fixtures come by the pytest plugin (docs/guide-testing.md).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.testing.disk import DiskFault as DiskFault
    from tender.testing.disk import DiskImage as DiskImage
    from tender.testing.net.faults import Fault as Fault
    from tender.testing.net.host import Host as Host
    from tender.testing.net.host import Ping as Ping
    from tender.testing.net.host import UdpPort as UdpPort
    from tender.testing.net.packets import Datagram as Datagram
    from tender.testing.net.port import GuestPort as GuestPort
    from tender.testing.net.switch import Switch as Switch
    from tender.testing.net.tcp import Connection as Connection
    from tender.testing.net.tcp import Listener as Listener
    from tender.testing.plugin import BlockImageFactory as BlockImageFactory
    from tender.testing.plugin import SubtestFactory as SubtestFactory
    from tender.testing.plugin import UnikernelFactory as UnikernelFactory
    from tender.testing.unikernel import Console as Console
    from tender.testing.unikernel import Unikernel as Unikernel

_HOMES = {
    "BlockImageFactory": "plugin",
    "Connection": "net.tcp",
    "Console": "unikernel",
    "Datagram": "net.packets",
    "DiskFault": "disk",
    "DiskImage": "disk",
    "Fault": "net.faults",
    "GuestPort": "net.port",
    "Host": "net.host",
    "Listener": "net.tcp",
    "Ping": "net.host",
    "SubtestFactory": "plugin",
    "Switch": "net.switch",
    "UdpPort": "net.host",
    "Unikernel": "unikernel",
    "UnikernelFactory": "plugin",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
