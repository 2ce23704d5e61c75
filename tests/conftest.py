"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# A slow machine is no failure, and a failure is the same one on the next run.
settings.register_profile("ptender", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ptender")
