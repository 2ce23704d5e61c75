"""A latch wakes all who wait for it, and outlives Ctrl-C in any of its methods."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tender.embed.latch import Latch
from tests.unit.interrupts import at_every_moment, comes_back
from tests.waiting import PATIENCE_S


def test_all_who_wait_are_woken() -> None:
    latch, results = Latch(), []
    threads = [
        threading.Thread(target=lambda: results.append(latch.wait(PATIENCE_S)), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert not latch.wait(0)
    assert not latch.is_set
    latch.set()
    latch.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == [True] * 8
    assert latch.is_set
    assert latch.wait(0)
    assert latch.wait()


def test_ctrl_c_in_a_wait() -> None:
    latch = Latch()
    at_every_moment(lambda: lambda: latch.wait(0.001), lambda: None)
    assert comes_back(latch.set)
    assert latch.wait(PATIENCE_S)


def test_ctrl_c_in_set() -> None:
    latches = [Latch()]

    def prepare() -> Callable[[], object]:
        latches.append(Latch())
        return latches[-1].set

    def check() -> None:
        assert comes_back(latches[-1].set)
        assert latches[-1].wait(PATIENCE_S)

    at_every_moment(prepare, check)
