"""Faults of a network: loss, delay, duplication, damage, reordering.

A fault turns the deliveries of one frame into others.

The rule here: no clock and no I/O. Each direction of each link has a counter and a seeded random
generator of its own, so that other links, and their timing, have no effect.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tender.checks import one_of
from tender.errors import InvalidValue, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import RLock
    from typing import Any

HEADER_SIZE = 14  # of Ethernet, which `corrupt` leaves intact: a switch drops such frames
REORDER_HOLD_S = 0.1
as_direction = one_of(("to", "from", "both"))


@dataclass
class Delivery:
    """A frame that is to arrive after `delay_ns`; `note` says what faults did to it.

    `done`: it has arrived, or was replaced by another delivery.
    """

    frame: bytes
    delay_ns: int = 0
    note: str = ""
    done: bool = False

    def noted(self, note: str) -> Delivery:
        self.note = f"{self.note}, {note}" if self.note else note
        return self


class Chance:
    """Which frames a fault hits: every Nth, each with a probability, or all."""

    def __init__(self, every: int | None, probability: float | None) -> None:
        if every is not None and probability is not None:
            raise UsageError("a fault hits every=N frames or with a probability, not both")
        if every is not None and (not isinstance(every, int) or every is True or every < 1):
            share = f"; for a share of them: probability={every}" if 0 < every < 1 else ""
            raise InvalidValue("every", every, f"a whole number of frames from 1{share}")
        if probability is not None and not 0 <= probability <= 1:
            raise InvalidValue("probability", probability, "a number from 0 to 1")
        self.every = every
        self.probability = probability

    def hits(self, count: int, rng: random.Random) -> bool:
        """Whether it hits frame number `count`; the first is 1."""
        if self.every is not None:
            return count % self.every == 0
        return self.probability is None or rng.random() < self.probability

    def __str__(self) -> str:
        if self.every is not None:
            return f"every={self.every}"
        return "" if self.probability is None else f"probability={self.probability:g}"


class Effect:
    """One fault on one direction of one link."""

    def __init__(self, fault: Fault, link: str) -> None:
        self._fault = fault
        self._rng = random.Random(f"{fault.seed}/{link}")
        self._count = 0
        self._held: Delivery | None = None

    def apply(self, delivery: Delivery) -> list[Delivery]:
        """The deliveries that a delivery becomes; none if it is lost."""
        self._count += 1
        fault = self._fault
        fault.seen += 1
        if not fault.chance.hits(self._count, self._rng):
            return self._after(delivery)
        fault.hits += 1
        return getattr(self, f"_{fault.kind}")(delivery)  # type: ignore[no-any-return]

    def _after(self, delivery: Delivery) -> list[Delivery]:
        """This frame, and after it the one that `reorder` held back."""
        held, self._held = self._held, None
        if held is None or held.done:
            return [delivery]
        held.done = True
        return [delivery, Delivery(held.frame, delivery.delay_ns, held.note)]

    def _drop(self, _: Delivery) -> list[Delivery]:
        return []

    def _delay(self, delivery: Delivery) -> list[Delivery]:
        fault = self._fault
        late_s = fault.seconds + (self._rng.random() * 2 - 1) * fault.jitter
        delivery.delay_ns += max(0, round(late_s * 1e9))
        return [delivery.noted("delayed")]

    def _duplicate(self, delivery: Delivery) -> list[Delivery]:
        return [delivery, Delivery(delivery.frame, delivery.delay_ns, delivery.note).noted("copy")]

    def _corrupt(self, delivery: Delivery) -> list[Delivery]:
        data = bytearray(delivery.frame)
        if len(data) > HEADER_SIZE:
            at = self._rng.randrange(HEADER_SIZE, len(data))
            data[at] ^= 1 << self._rng.randrange(8)
            delivery.noted(f"corrupted at byte {at}")
        delivery.frame = bytes(data)
        return [delivery]

    def _reorder(self, delivery: Delivery) -> list[Delivery]:
        """Hold it back until the next one has passed, or for `fault.seconds` if none comes."""
        before = self._after(delivery)[1:]
        self._held = Delivery(
            delivery.frame, delivery.delay_ns + round(self._fault.seconds * 1e9), delivery.note
        ).noted("reordered")
        return [*before, self._held]


ORDER = ("drop", "corrupt", "duplicate", "delay", "reorder")  # in which they act on a link


class Fault:
    """A fault of links, in force until `clear()` or the end of its `with` block.

    `seen` counts the frames that passed it, `hits` those that it changed.
    """

    def __init__(
        self,
        kind: str,
        chance: Chance,
        seed: str,
        clear: Callable[[Fault], None],
        *,
        seconds: float = 0.0,
        jitter: float = 0.0,
        direction: str = "to",
    ) -> None:
        if seconds < 0 or jitter < 0:
            raise UsageError(f"a delay of {seconds} s with jitter {jitter} s is negative")
        self.kind = kind
        self.chance = chance
        self.seed = seed
        self.seconds = seconds
        self.jitter = jitter
        self.direction = as_direction("direction", direction)
        self.seen = 0
        self.hits = 0
        self._clear = clear
        self._effects: dict[str, Effect] = {}

    def effect(self, link: str) -> Effect:
        if link not in self._effects:
            self._effects[link] = Effect(self, link)
        return self._effects[link]

    def clear(self) -> None:
        """Remove the fault; frames that are delayed already still arrive late."""
        self._clear(self)

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __str__(self) -> str:
        return f"{self.kind}({self.chance})"


class Faulty:
    """Base of what can have faults: a switch (for all its guests' ports), and a port.

    `direction` is relative to the port's owner: frames "to" it, "from" it or "both". A fault
    without `every` (the Nth, 2Nth, ... frame) or `probability` hits every frame. Counters and
    random generators are separate for each direction of each port. Each method returns a Fault:
    `clear()` it, or use it in a `with` block. All raise UsageError for impossible values.
    """

    def __init__(self, lock: RLock) -> None:
        self.faults: list[Fault] = []
        self._lock = lock
        self._made = 0  # faults so far: each has a chance of its own

    def _seed(self) -> str:
        raise NotImplementedError

    def drop(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Lose frames."""
        return self._add("drop", every, probability, seed, direction=direction)

    def delay(
        self,
        seconds: float,
        jitter: float = 0.0,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Delay frames by `seconds`, or by `seconds - jitter` to `seconds + jitter`."""
        return self._add(
            "delay", every, probability, seed, seconds=seconds, jitter=jitter, direction=direction
        )

    def duplicate(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Deliver frames twice."""
        return self._add("duplicate", every, probability, seed, direction=direction)

    def reorder(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        hold: float = REORDER_HOLD_S,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Deliver frames after the next one, or after `hold` seconds if none follows."""
        return self._add("reorder", every, probability, seed, seconds=hold, direction=direction)

    def corrupt(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Flip one bit after the Ethernet header."""
        return self._add("corrupt", every, probability, seed, direction=direction)

    def clear_faults(self) -> None:
        """Remove all its faults; a cut link stays cut."""
        with self._lock:
            self.faults.clear()

    def _add(
        self,
        kind: str,
        every: int | None,
        probability: float | None,
        seed: object,
        **more: Any,
    ) -> Fault:
        with self._lock:
            self._made += 1
            text = f"{self._seed()}/{kind}{self._made}" if seed is None else str(seed)
            fault = Fault(kind, Chance(every, probability), text, self._remove, **more)
            self.faults.append(fault)
            return fault

    def _remove(self, fault: Fault) -> None:
        with self._lock:
            if fault in self.faults:
                self.faults.remove(fault)


def apply(faults: list[Fault], link: str, frame: bytes) -> tuple[list[Delivery], str]:
    """The deliveries of a frame on a link; if there are none, the reason."""
    deliveries = [Delivery(frame)]
    for fault in sorted(faults, key=lambda fault: ORDER.index(fault.kind)):
        effect = fault.effect(link)
        deliveries = [after for each in deliveries for after in effect.apply(each)]
        if not deliveries:
            return [], f"dropped by {fault}"
    return deliveries, ""
