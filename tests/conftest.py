"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A slow machine is no failure, and a failure is the same one on the next run.
settings.register_profile("ptender", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ptender")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu",
        choices=("both", "kvm", "soft"),
        default="both",
        help="what the guests of tests/guest run on (default: both)",
    )
