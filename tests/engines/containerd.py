"""A containerd of the test, with folders of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, builder
from tests.waiting import wait_until

OCI = PTENDER.with_name("ptender-oci")
CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/socket.ttrpc"
"""
Ctr = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def containerd(folder: Path, config: str, namespace: str, enter: list[str]) -> Iterator[Ctr]:
    """Run it, by the command `enter`; what it gives is `ctr` in this namespace of containerd's."""
    if shutil.which("containerd") is None:
        pytest.skip("containerd is not installed: ./check --engines installs it")
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    path, address = folder / "config.toml", folder / "socket"
    path.write_text(CONFIG.format(folder=folder) + config)
    environment = {**os.environ, "PTENDER_CPU": "soft"}

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", address, "--namespace", namespace, *words]
        settings: dict[str, Any] = {"capture_output": True, "check": True, "timeout": 100}
        return subprocess.run([*map(str, command)], text=True, **(settings | options))

    with open(folder / "log", "w") as log:
        command = [*enter, "containerd", "--config", str(path)]
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_until(lambda: run("version", check=False).returncode == 0)
            yield run
        finally:
            daemon.terminate()
            daemon.wait()
            subprocess.run(["umount", "--recursive", "--quiet", str(folder)], check=False)


def load(ctr: Ctr, folder: Path, name: str) -> None:
    """Make the image of a guest and import it."""
    archive = folder / f"{name}.tar"
    guest = builder(folder / "guests")(name)
    words = [PTENDER, "image", guest, "-t", f"docker.io/library/{name}:1", "-o", archive]
    subprocess.run([*map(str, words)], check=True)
    ctr("image", "import", archive)
