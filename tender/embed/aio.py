"""What asyncio tasks wait for when another thread is to wake them."""

from __future__ import annotations

import asyncio


class Flag:
    """Not set, and from its `set` on set. Made and waited for in one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake all tasks that wait; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody waits
            pass

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set; False: it is not after `timeout_s` (None: no limit)."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True
