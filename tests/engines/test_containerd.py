"""containerd with ptender-oci under runc's shim: `ctr run`."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.containerd import OCI, Ctr, containerd, load
from tests.waiting import wait_until

CONFIG = 'disabled_plugins = ["io.containerd.grpc.v1.cri"]'
PREFIX = "docker.io/library/"
RUN = ("run", "--rm", "--runc-binary", OCI)


@pytest.fixture
def ctr(tmp_path: Path) -> Iterator[Ctr]:
    with containerd(tmp_path, CONFIG, "default", []) as ctr:
        yield ctr


def test_run(ctr: Ctr, tmp_path: Path) -> None:
    load(ctr, tmp_path, "hello")
    load(ctr, tmp_path, "exit")
    kernel = "/unikernel/hello.hvt"
    assert "My command line: a b" in ctr(*RUN, f"{PREFIX}hello:1", "one", kernel, "a", "b").stdout
    done = ctr(*RUN, f"{PREFIX}exit:1", "two", "/unikernel/exit.hvt", "42", check=False)
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
            wait_until(
                lambda: ctr("image", "label", f"{PREFIX}fill:1", "a=b") and events.read_text()
            )
            disk.truncate(256 << 20)
            mount = f"type=bind,src={disk.name},dst=/storage,options=rbind:rw"
            limit = f"--memory-limit={64 << 20}"
            done = ctr(*RUN, limit, "--mount", mount, f"{PREFIX}fill:1", "full", check=False)
            assert done.returncode == 137
            wait_until(lambda: "/tasks/oom" in events.read_text())
        finally:
            listener.kill()
