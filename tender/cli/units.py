"""Numbers for people: amounts of bytes, and durations."""

from __future__ import annotations


def amount(count: int) -> str:
    """Bytes in at most 5 letters: `812`, `4.2K`, `512M`."""
    if count < 1000:
        return str(count)
    value = float(count)
    for unit in "KMGTPE":
        value /= 1024
        if value < 999.5 or unit == "E":
            break
    return f"{value:.1f}{unit}" if value < 9.95 and value != int(value) else f"{value:.0f}{unit}"


def duration(seconds: float) -> str:
    """In at most 8 letters: `0:07`, `3:04:05`, `12d03h`, `4000d`."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days >= 1000:
        return f"{days}d"
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
