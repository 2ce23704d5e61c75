"""The compiled modules; all the rest of the packaging is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[f"abi/ffi_build.py:{name}" for name in ("abi", "host", "soft", "kvm")],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
