"""The report on a guest's end: one JSON object (Outcome.as_dict) in a file of its own.

It is opened before lockdown, and imports what it writes with.
"""

from __future__ import annotations

import os
from json import dumps

from tender.errors import HostError
from tender.host import write_all
from tender.observe.output import open_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tender.cleanup import Cleanup
    from tender.modules import Warn
    from tender.outcome import Outcome


def open_report(path: str, inputs: Iterable[os.stat_result], cleanup: Cleanup) -> int:
    """Open the file, empty; raises ConfigError."""
    return open_output(path, "report", inputs, cleanup)


def write_report(fd: int, outcome: Outcome, warn: Warn) -> None:
    """Write how the guest ended. `warn` gets a line where the host can't take it."""
    data = f"{dumps(outcome.as_dict())}\n".encode()
    try:
        write_all(fd, data)
    except OSError as error:
        warn(f"report: {HostError('write', 'write', error.errno or 0)}")
