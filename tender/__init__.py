"""ptender, a Solo5-compatible tender: runs unikernels built for Solo5's hvt target.

The rule here: importing `tender` costs nothing; a name is imported when it is used.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.backends import BlockDescriptor as BlockDescriptor
    from tender.backends import BlockFile as BlockFile
    from tender.backends import Descriptor as Descriptor
    from tender.backends import Rate as Rate
    from tender.backends import Tap as Tap
    from tender.backends import UserNet as UserNet
    from tender.config import VirtualTime as VirtualTime
    from tender.embed.block_memory import BlockMemory as BlockMemory
    from tender.embed.console import Console as Console
    from tender.embed.interfaces import BlockAttachable as BlockAttachable
    from tender.embed.interfaces import BlockDevice as BlockDevice
    from tender.embed.interfaces import ConsoleSink as ConsoleSink
    from tender.embed.interfaces import NetAttachable as NetAttachable
    from tender.embed.interfaces import NetReceiver as NetReceiver
    from tender.embed.interfaces import NetSender as NetSender
    from tender.embed.snapshots import Snapshot as Snapshot
    from tender.errors import GuestEnded as GuestEnded
    from tender.errors import TenderError as TenderError
    from tender.guest import Guest as Guest
    from tender.image.elf import Image as Image
    from tender.image.file import open_image as open_image
    from tender.outcome import Counters as Counters
    from tender.outcome import NetCounters as NetCounters
    from tender.outcome import Outcome as Outcome
    from tender.outcome import Statistics as Statistics

_MODULES = {
    "BlockAttachable": "tender.embed.interfaces",
    "BlockDescriptor": "tender.backends",
    "BlockDevice": "tender.embed.interfaces",
    "BlockFile": "tender.backends",
    "BlockMemory": "tender.embed.block_memory",
    "Console": "tender.embed.console",
    "ConsoleSink": "tender.embed.interfaces",
    "Counters": "tender.outcome",
    "Descriptor": "tender.backends",
    "Guest": "tender.guest",
    "GuestEnded": "tender.errors",
    "Image": "tender.image.elf",
    "NetAttachable": "tender.embed.interfaces",
    "NetCounters": "tender.outcome",
    "NetReceiver": "tender.embed.interfaces",
    "NetSender": "tender.embed.interfaces",
    "Outcome": "tender.outcome",
    "Rate": "tender.backends",
    "Snapshot": "tender.embed.snapshots",
    "Statistics": "tender.outcome",
    "Tap": "tender.backends",
    "TenderError": "tender.errors",
    "UserNet": "tender.backends",
    "VirtualTime": "tender.config",
    "open_image": "tender.image.file",
}

__all__ = [  # noqa: RUF022 - the order of the guide
    "Guest",
    "Outcome",
    "Statistics",
    "Counters",
    "NetCounters",
    "Console",
    "Snapshot",
    "Tap",
    "Descriptor",
    "UserNet",
    "BlockFile",
    "BlockMemory",
    "BlockDescriptor",
    "Rate",
    "VirtualTime",
    "NetSender",
    "NetReceiver",
    "NetAttachable",
    "BlockDevice",
    "BlockAttachable",
    "ConsoleSink",
    "Image",
    "open_image",
    "TenderError",
    "GuestEnded",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'tender' has no attribute {name!r}")
    from importlib import import_module

    try:
        value: object = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tender._"):
            raise
        raise ImportError(
            f"{__path__[0]} is not compiled: run ./quickstart beside it and use .venv/bin/python; "
            "or, where ptender is installed, start Python in another folder: this one hides it"
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
