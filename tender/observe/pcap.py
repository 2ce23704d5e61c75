"""A guest's packets in a pcapng file, one for each network device that is named.

The rule here: the guest does not wait for whoever reads them. A FIFO that is full loses packets,
and the next one that is written says how many; an error of the file ends it, with one line.
"""

from __future__ import annotations

import os
import stat

from tender._native import ffi, lib
from tender.errors import ConfigError, HostError
from tender.modules import DeviceErrors
from tender.observe import pcapng
from tender.observe.output import open_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tender.cleanup import Cleanup
    from tender.clock import HostClock
    from tender.modules import Warn


class Pcap:
    """An open file. `cell` is the struct pcap, which engine.c writes to as well."""

    def __init__(self, fd: int, name: str, clock: HostClock, warn: Warn) -> None:
        self.cell = ffi.new("struct pcap *", {"fd": fd})
        self._clock = clock
        self._errors = DeviceErrors(f"packets of network device '{name}'", warn)

    @property
    def fd(self) -> int:
        """Its descriptor; the sandbox gives it another number."""
        return int(self.cell.fd)

    @fd.setter
    def fd(self, fd: int) -> None:
        self.cell.fd = fd

    def write(self, flags: int, frame: memoryview) -> None:
        """Record one frame, now; `flags` are PCAP_INBOUND or PCAP_OUTBOUND, and PCAP_DROPPED."""
        time_ns = self._clock.observed_ns()
        if lib.pcap_write(self.cell, time_ns, flags, ffi.from_buffer(frame), len(frame)):
            self.report()

    def report(self) -> None:
        """Warn of the error that has ended it."""
        error, self.cell.error = self.cell.error, 0
        if error:
            self._errors.warn_once(f"they end here: {HostError('write', 'write', error)}")


def open_pcaps(
    files: Mapping[str, str],
    inputs: Iterable[os.stat_result],
    clock: HostClock,
    warn: Warn,
    cleanup: Cleanup,
) -> dict[str, Pcap]:
    """Open `files`, one for each device by its name, and write their heads; raises ConfigError.

    None of them may be one of `inputs`, which the guest reads, or be given twice.
    """
    taken = list(inputs)
    pcaps = {}
    for name, path in files.items():
        fd = open_output(path, "packets", taken, cleanup)
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode):
            taken.append(info)
        os.set_blocking(fd, False)
        try:
            os.write(fd, pcapng.section() + pcapng.interface(name))
        except OSError as error:
            raise ConfigError(
                f"Could not open packets: {path}: {os.strerror(error.errno or 0)}"
            ) from None
        pcaps[name] = Pcap(fd, name, clock, warn)
    return pcaps
