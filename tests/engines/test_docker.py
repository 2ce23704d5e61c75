"""docker with ptender-oci as a runtime, in a network namespace; ./check does not install docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tender.oci import cgroups
from tests.engines.test_podman import page
from tests.guest.conftest import PTENDER, Namespace, builder, open_namespace
from tests.waiting import wait_until

OCI = PTENDER.with_name("ptender-oci")
Docker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    yield from open_namespace()


@pytest.fixture
def docker(namespace: Namespace) -> Iterator[Docker]:
    missing = [each for each in ("dockerd", "docker", "skopeo") if shutil.which(each) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("docker needs root")
    folder = Path(tempfile.mkdtemp(prefix="docker-"))  # the path of a socket is short
    address = f"unix://{folder}/socket"

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [*namespace.enter, "docker", "--host", address, *map(str, words)]
        settings: dict[str, Any] = {"capture_output": True, "check": True, "timeout": 100}
        return subprocess.run(command, text=True, **(settings | options))

    options = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--host={address}"]
    options += [f"--pidfile={folder}/pid", "--exec-opt=native.cgroupdriver=cgroupfs"]
    options += [f"--cgroup-parent=/{folder.name}", "--storage-driver=vfs"]
    options += ["--default-ulimit=nofile=1024:1024"]
    options += [f"--add-runtime=ptender={OCI}", "--default-runtime=ptender"]
    command = [*namespace.enter, "unshare", "--mount", "dockerd", *options]
    with open(folder / "log", "w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: run("version", check=False).returncode == 0)
        yield run
        names = run("ps", "--all", "--quiet").stdout.split()
        run("rm", "--force", *names, check=False)
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(folder)
        for group in Path("/sys/fs/cgroup").glob(f"*/{folder.name}"):
            cgroups.remove((str(group),))
            assert not group.exists()


def load(docker: Docker, folder: Path, name: str) -> str:
    """Make the image of a guest and load it, in the form that docker takes; its name."""
    kernel = builder(folder / "guests")(name)
    archive, other = folder / f"{name}.tar", folder / f"{name}-docker.tar"
    words = [PTENDER, "image", kernel, "-t", f"{name}:1", "-o", archive]
    subprocess.run([*map(str, words)], check=True)
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", f"oci-archive:{archive}"]
    subprocess.run([*copy, f"docker-archive:{other}:{name}:1"], check=True)
    docker("load", "--quiet", "--input", other)
    return f"{name}:1"


def test_run(docker: Docker, namespace: Namespace, tmp_path: Path) -> None:
    none = "--network=none"
    hello, exit = (load(docker, tmp_path, name) for name in ("hello", "exit"))
    assert "My command line: a b" in docker("run", "--rm", none, hello, "a", "b").stdout
    assert docker("run", "--rm", none, exit, "42", check=False).returncode == 42
    done = docker("run", "--rm", none, "--memory=20m", hello, check=False)
    assert "the container's memory limit is too low" in done.stderr
    docker("run", "--detach", "--name=web", "-p", "8080:80", load(docker, tmp_path, "web"))
    wait_until(lambda: "listening" in docker("logs", "web").stdout)
    assert "Hello from a unikernel" in page(namespace, 8080)
    docker("restart", "--time=5", "web")
    wait_until(lambda: docker("logs", "web").stdout.count("listening") == 2)
    assert "this is request 1." in page(namespace, 8080)
    docker("stop", "--time=60", "web")
