"""`--log json`: the tender's own messages as lines of JSON."""

from __future__ import annotations

import time
from json import dumps

LEVELS = {3: "error", 4: "warning", 6: "info"}  # by the numbers of syslog(3)
_NANOSECONDS = 1_000_000_000


class JsonLines:
    """Makes the lines of one guest, each at most `most` bytes long."""

    def __init__(self, guest: str, most: int) -> None:
        self._guest = guest
        self._most = most
        time.gmtime()  # the C library reads its time zone once, which it can't after lockdown

    def line(self, level: int, event: str, text: str, fields: dict[str, object]) -> bytes:
        """One message; `event` and `fields` are what a program reads instead of `text`."""
        while True:
            line = {
                "time": _now(), "level": LEVELS[level], "guest": self._guest, "event": event,
                "message": text, **fields,
            }  # fmt: skip
            data = dumps(line).encode()
            if len(data) <= self._most:
                return data
            text, fields = text[: len(text) // 2], fields if text else {}


def _now() -> str:
    """The time in UTC (RFC 3339)."""
    seconds, ns = divmod(time.time_ns(), _NANOSECONDS)
    year, month, day, hour, minute, second, *_ = time.gmtime(seconds)
    date = f"{year:04}-{month:02}-{day:02}"
    return f"{date}T{hour:02}:{minute:02}:{second:02}.{ns // 1000:06}Z"
