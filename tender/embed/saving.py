"""Saving a guest, and guests that go on from there: a part of tender.Guest."""

from __future__ import annotations

import os
from math import inf

from tender.config import Config, guest_name
from tender.dataclass import replace
from tender.embed import validation
from tender.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from typing_extensions import Self, Unpack

    from tender.embed.interfaces import (
        BlockSpec,
        ClockResume,
        CloneOptions,
        GuestOptions,
        NetSpec,
    )
    from tender.embed.lifecycle import Lifecycle
    from tender.embed.snapshots import Snapshot

SAVE_S = 10.0


class Saving:
    """A mixin of Guest."""

    config: Config
    _life: Lifecycle
    _snapshot: Snapshot | None = None  # that it goes on from

    if TYPE_CHECKING:

        def __init__(
            self,
            kernel: str | os.PathLike[str] | bytes | int,
            *,
            net: Mapping[str, NetSpec] | None = None,
            **options: Unpack[GuestOptions],
        ) -> None: ...

    def snapshot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float = SAVE_S,
        stop: bool = False,
    ) -> Snapshot:
        """Save it at its next hypercall; then it goes on.

        Args:
            path: A file for the snapshot as well, which only its user can read.
            timeout: Seconds; a guest that makes no hypercall for so long is not saved.
            stop: End the guest there, in the place of letting it go on.

        Returns:
            The snapshot, in memory.

        Raises:
            TimeoutError: it made no hypercall within `timeout`.
            GuestEnded: it has ended.
            TenderError: it can't be saved, or the file can't be written.
            RuntimeError: as `wait`.
        """
        seconds = validation.seconds("timeout", timeout)
        saved = self._life.save(
            guest_name(self.config), inf if seconds is None else seconds, stop=stop
        )
        if path is not None:
            saved.save(path)
        return saved

    @classmethod
    def restore(
        cls,
        snapshot: str | os.PathLike[str] | Snapshot,
        *,
        net: Mapping[str, NetSpec] | None = None,
        clone: bool = False,
        clock_resume: ClockResume = "continue",
        **options: Unpack[GuestOptions],
    ) -> Self:
        """A guest that goes on where another was saved. It is not started yet.

        Args:
            snapshot: The file, or a Snapshot.
            net, options: Those of Guest, but for what a guest is started with: its command line,
                mem_mib, clock, exec_heap. Devices of the same names, sizes, MAC and MTU as the
                saved guest had; `cpu` may be another.
            clone: Also where a guest was restored from it before: the two have the same secrets
                and take the same steps (docs/guide-snapshots.md).
            clock_resume: What became of the time since then: "continue", no time has passed for the
                guest, or "catch-up".

        Raises:
            UsageError: an argument is wrong, or a Snapshot was restored before. What is wrong with
                a file is found out by `start`.
        """
        for name in ("mem_mib", "clock", "exec_heap"):
            if name in options:
                raise UsageError(f"{name}: a restored guest has that of the saved one")
        if isinstance(snapshot, (str, os.PathLike)):
            guest = cls(snapshot, net=net, **options)
            changes: dict[str, Any] = {}
        else:
            snapshot.take(clone=clone)
            guest = cls(snapshot.fd, net=net, **options)
            guest._snapshot = snapshot  # which has the descriptor
            name = guest.config.name or snapshot.name
            changes = {"kernel": f"the snapshot of {snapshot.name}", "name": name}
            clone = True  # that was looked at here
        guest.config = replace(
            guest.config, restore=True, clone=clone, clock_resume=clock_resume, **changes
        )
        return guest

    def fork(
        self,
        n: int = 1,
        *,
        net: Callable[[int], Mapping[str, NetSpec]] | None = None,
        block: Callable[[int], Mapping[str, BlockSpec]] | None = None,
        timeout: float = SAVE_S,
        **options: Unpack[CloneOptions],
    ) -> list[Self]:
        """Clones of it as it is at its next hypercall. They are not started yet; it goes on.

        Args:
            n: How many.
            net, block: Called with the number of each clone, from 0: what its devices are attached
                to, which is its own.
            timeout: As of `snapshot`.
            options: As of `restore`.

        Raises:
            TenderError, TimeoutError, RuntimeError: as `snapshot` and `restore`.
        """
        saved = self.snapshot(timeout=timeout)
        clones = []
        for number in range(n):
            clones.append(
                self.restore(
                    saved,
                    net=net(number) if net else None,
                    block=block(number) if block else None,
                    clone=True,
                    **options,
                )
            )
        return clones
