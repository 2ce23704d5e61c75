"""Ctrl-C at each moment at which CPython may take it.

It looks for signals when a Python function begins and when a call of a C function has come back
(and in loops); here the profiler raises there, so that no test depends on when a signal arrives.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

from tests.waiting import PATIENCE_S


def interrupted(number: int, function: Callable[[], object]) -> bool:
    """Call `function` with Ctrl-C at the `number`th of these moments; False: it had fewer."""
    left = number

    def look(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if not left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(look)
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0


def at_every_moment(prepare: Callable[[], Callable[[], object]], check: Callable[[], None]) -> None:
    """Interrupt what `prepare` gives once at each moment; `check` looks at what is left."""
    for number in count(1):
        more = interrupted(number, prepare())
        check()
        if not more:
            break


def comes_back(function: Callable[[], object]) -> bool:
    """Whether `function`, called by another thread, comes back."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not thread.is_alive()
