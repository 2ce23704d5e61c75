"""containerd with ptender-oci under runc's shim: `ctr run`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
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


RUN = ("run", "--rm", "--runc-binary", OCI)


def load(ctr: Ctr, folder: Path, name: str) -> None:
    """Make the image of a guest and import it."""
    archive = folder / f"{name}.tar"
    guest = builder(folder / "guests")(name)
    words = [PTENDER, "image", guest, "-t", f"{name}:1", "-o", archive]
    subprocess.run([*map(str, words)], check=True)
    ctr("image", "import", archive)


def test_run(ctr: Ctr, tmp_path: Path) -> None:
    load(ctr, tmp_path, "hello")
    load(ctr, tmp_path, "exit")
    kernel = "/unikernel/hello.hvt"
    assert "My command line: a b" in ctr(*RUN, "hello:1", "one", kernel, "a", "b").stdout
    done = ctr(*RUN, "exit:1", "two", "/unikernel/exit.hvt", "42", check=False)
    assert done.returncode == 42
    assert ctr("container", "list", "--quiet").stdout == ""


def test_out_of_memory(ctr: Ctr, tmp_path: Path) -> None:
    """What the guest writes to a disk on a tmpfs is the container's memory."""
    load(ctr, tmp_path, "fill")
    events = tmp_path / "events"
    command = ["ctr", f"--address={tmp_path}/socket", "events"]
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm") as disk,
        open(events, "w") as output,
        subprocess.Popen(command, stdout=output) as listener,
    ):
        try:
            wait_until(lambda: ctr("image", "label", "fill:1", "a=b") and events.read_text())
            disk.truncate(256 << 20)
            mount = f"type=bind,src={disk.name},dst=/storage,options=rbind:rw"
            limit = f"--memory-limit={64 << 20}"
            done = ctr(*RUN, limit, "--mount", mount, "fill:1", "full", check=False)
            assert done.returncode == 137
            wait_until(lambda: "/tasks/oom" in events.read_text())
        finally:
            listener.kill()
