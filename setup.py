"""The compiled modules; all the rest of the packaging is in pyproject.toml."""

import platform
import sys

from setuptools import setup

NAMES = ["abi", "host", "soft"]
if sys.platform == "linux":
    NAMES += ["sandbox"]
if sys.platform == "linux" and platform.machine() == "x86_64":
    NAMES += ["kvm", "engine"]  # as in abi/ffi_build.py; elsewhere guests run in software

setup(
    cffi_modules=[f"abi/ffi_build.py:{name}" for name in NAMES],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
