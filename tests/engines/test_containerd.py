"""containerd with ptender-oci under runc's shim: `ctr run`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
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
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/socket.ttrpc"
"""
Ctr = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ctr(tmp_path: Path) -> Iterator[Ctr]:
    if shutil.which("containerd") is None:
        pytest.skip("containerd is not installed: ./check --engines installs it")
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    config, address = tmp_path / "config.toml", tmp_path / "socket"
    config.write_text(CONFIG.format(folder=tmp_path))
    environment = {**os.environ, "PTENDER_CPU": "soft"}

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", address, *words]
        settings: dict[str, Any] = {"capture_output": True, "check": True, "timeout": 100}
        return subprocess.run([*map(str, command)], text=True, **(settings | options))

    with open(tmp_path / "log", "w") as log:
        command = ["containerd", "--config", str(config)]
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_until(lambda: run("version", check=False).returncode == 0)
            yield run
        finally:
            daemon.terminate()
            daemon.wait()
            subprocess.run(["umount", "--recursive", "--quiet", str(tmp_path)], check=False)


def test_run(ctr: Ctr, tmp_path: Path) -> None:
    guest = builder(tmp_path / "guests")
    for name in ("hello", "exit"):
        archive = tmp_path / f"{name}.tar"
        words = [PTENDER, "image", guest(name), "-t", f"{name}:1", "-o", archive]
        subprocess.run([*map(str, words)], check=True)
        ctr("image", "import", archive)
    run = ("run", "--rm", "--runc-binary", OCI)
    kernel = "/unikernel/hello.hvt"
    assert "My command line: a b" in ctr(*run, "hello:1", "one", kernel, "a", "b").stdout
    done = ctr(*run, "exit:1", "two", "/unikernel/exit.hvt", "42", check=False)
    assert done.returncode == 42
    assert ctr("container", "list", "--quiet").stdout == ""
