"""What a test needs of the machine: where it is not there, the test is skipped with the reason."""

from __future__ import annotations

import functools
import subprocess

import pytest


def needs(*command: str) -> None:
    """Skip where this command can't run another one, as `unshare --mount` in a chroot."""
    why = _refusal(command)
    if why:
        pytest.skip(f"not allowed here: {why}")


@functools.cache
def _refusal(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return f"{command[0]}: not installed"
    return (
        (done.stderr.strip() or f"{command[0]}: status {done.returncode}")
        if done.returncode
        else ""
    )
