"""The interfaces of devices and console sinks that a program writes in Python.

They are for annotations and for type checkers; a device need not inherit from them. They stand in
a file of their own because only a program that names one pays for the import of `typing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

from tender.backends import BlockDescriptor, BlockFile, BlockRemote, Descriptor, Rate, Tap, UserNet

if TYPE_CHECKING:
    from tender.config import VirtualTime


class NetSender(Protocol):
    """A network device in Python that receives each frame which the guest sends.

    Optional attributes are `mtu` (int, bytes; 1500 without it), `mac` (the guest's address, 6 bytes
    or a string like "02:00:00:00:00:01"; random without it) and `close()`, which is called once
    the guest has ended.
    """

    def send(self, frame: bytes) -> bytes | Iterable[bytes] | None:
        """Take one frame from the guest, with its Ethernet header.

        It is called on a thread of its own and may block; frames that the guest sends meanwhile
        are queued, and dropped when the queue is full.

        Args:
            frame: 14 bytes of header and at most `mtu` bytes of data.

        Returns:
            A frame, or several, for the guest; None for no answer.

        Raises:
            Exception: reported to `warn` of the guest; the device goes on.
        """


class NetReceiver(Protocol):
    """A network device in Python that is asked for the frames which the guest receives.

    The optional attributes are those of NetSender. A device may have both `send` and `receive`.
    """

    def receive(self) -> bytes | None:
        """Give the next frame for the guest.

        It is called on a thread of its own, again as soon as the guest has room, and may block.

        Returns:
            A frame with its Ethernet header; None when there will be no more.

        Raises:
            Exception: reported to `warn` of the guest; `receive` is called again after 0.1 s.
        """


class BlockDevice(Protocol):
    """A block device in Python.

    Its size in bytes is `capacity`, `size` or `len()`. An optional `write(offset, data)` makes it
    writable, unless its attribute `readonly` is true. The optional `sector_size` is in bytes (512
    without it). Calls are made on a thread of its own, one after the other.
    """

    def read(self, offset: int, length: int) -> bytes:
        """Read from the device.

        Args:
            offset: Where to start, in bytes.
            length: How many bytes, 64 KiB at most.

        Returns:
            Exactly `length` bytes.

        Raises:
            Exception: an error for the guest, and reported to its `warn`; the device goes on.
        """


class NetAttachable(Protocol):
    """An object that provides a network device when a guest starts.

    An optional `detach()` is called once the guest has ended.
    """

    def attach(self) -> Tap | Descriptor:
        """Provide the device.

        Returns:
            What the guest is attached to. A descriptor in it belongs to the guest from then on.

        Raises:
            DeviceError: the guest does not start, and this is the reason.
        """


class BlockAttachable(Protocol):
    """An object that provides a block device when a guest starts.

    An optional `detach()` is called once the guest has ended.
    """

    def attach(self) -> BlockFile | BlockDescriptor | BlockRemote:
        """Provide the device.

        Returns:
            What the guest is attached to. A descriptor in it belongs to the guest from then on.

        Raises:
            DeviceError: the guest does not start, and this is the reason.
        """


class ConsoleSink(Protocol):
    """A stream that receives the console output of a guest: a file, or an object with `write`."""

    def write(self, data: Any, /) -> object:
        """Take a piece of output; it may block, and the guest waits then.

        Args:
            data: bytes; str where the stream is one of text (io.TextIOBase, or any with an
                attribute `encoding`).
        """


NetSpec: TypeAlias = str | Tap | Descriptor | UserNet | NetAttachable | NetSender | NetReceiver
BlockSpec: TypeAlias = (
    str
    | os.PathLike[str]
    | BlockFile
    | BlockDescriptor
    | BlockRemote
    | BlockAttachable
    | BlockDevice
)
Sink: TypeAlias = Callable[[bytes], object] | ConsoleSink | int | None
Cpu: TypeAlias = Literal["auto", "kvm", "native", "soft"]
ClockResume: TypeAlias = Literal["continue", "catch-up"]
SandboxMode: TypeAlias = Literal["on", "require", "off"]


class CloneOptions(TypedDict, total=False):
    """The options of Guest, except its devices."""

    net_rate: Mapping[str, Rate] | None
    block_rate: Mapping[str, Rate] | None
    mem_mib: int
    console: Sink
    console_limit: int | None
    dumpcore: str | os.PathLike[str] | None
    trace: str | os.PathLike[str] | None
    record: str | os.PathLike[str] | None
    pcap: Mapping[str, str | os.PathLike[str]] | None
    warn: Callable[[str], None]
    cpu: Cpu
    clock: VirtualTime | None
    instructions: int | None
    exec_heap: bool
    deadline: float | None
    sandbox: SandboxMode
    user: str | int | None
    name: str | None
    on_end: Callable[[Any], object] | None
    fresh: bool
    snapshots: bool


class GuestOptions(CloneOptions, total=False):
    """The options of Guest, except `net`."""

    block: Mapping[str, BlockSpec] | None
