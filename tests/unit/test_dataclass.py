"""`@record` is a frozen dataclass without the import."""

from __future__ import annotations

import inspect

import pytest

from tender.dataclass import dataclass, replace


@dataclass
class Point:
    x: int
    y: int = 2


def test_values() -> None:
    assert Point(1) == Point(1, 2) == Point(x=1, y=2)
    assert Point(1) != Point(2)
    assert hash(Point(1)) == hash(Point(1, 2))
    assert repr(Point(1)) == "Point(x=1, y=2)"
    assert replace(Point(1), y=5) == Point(1, 5)
    match Point(3, 4):
        case Point(x, y):
            assert (x, y) == (3, 4)


def test_frozen() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 5  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x


def test_its_signature_can_be_read() -> None:
    assert str(inspect.signature(Point)) == "(x: 'int', y: 'int' = 2)"
    with pytest.raises(TypeError, match=r"Point\(x, y\): no 'z'"):
        Point(1, z=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Point\(x, y\): no value for x"):
        Point(y=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1})])
def test_wrong_calls(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*args, **kwargs)
