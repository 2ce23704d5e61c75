"""The compiled modules; all the rest of the packaging is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["abi/ffi_build.py:native", "abi/ffi_build.py:soft"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
