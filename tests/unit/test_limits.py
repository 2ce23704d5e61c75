"""Limits of a step of the start: it can't take more, and they are gone behind it."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import pytest

from tender.sandbox import confine

BOTH = (resource.RLIMIT_AS, resource.RLIMIT_CPU)


def test_a_step_gets_so_much_memory() -> None:
    before = [resource.getrlimit(each) for each in BOTH]
    assert confine.limited(lambda: len(bytearray(1 << 20)), 64 << 20, 10) == 1 << 20
    with pytest.raises(MemoryError):
        confine.limited(lambda: bytearray(1 << 28), 64 << 20, 10)
    assert [resource.getrlimit(each) for each in BOTH] == before


def test_a_step_gets_so_much_time() -> None:
    code = """if True:
        from tender.sandbox import confine
        def loop():
            while True: pass
        confine.limited(loop, 1 << 30, 1)
    """
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGXCPU
