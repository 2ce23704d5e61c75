"""What tests without guests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tender.testing.net.switch import Switch


@pytest.fixture(params=[False, True], ids=["real", "virtual"])
def switch(request: pytest.FixtureRequest) -> Iterator[Switch]:
    """A switch, in real and in virtual time."""
    with Switch(seed="test", patience=60, virtual=request.param) as value:
        yield value
