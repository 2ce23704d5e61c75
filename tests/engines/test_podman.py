"""podman with ptender as its runtime: what its users do, with a store and a network of the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, Namespace, builder, open_namespace
from tests.waiting import wait_until

OCI = PTENDER.with_name("ptender-oci")
CONFIG = f"""
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "ptender"
runtime_supports_json = ["ptender", "runc"]
[engine.runtimes]
ptender = ["{OCI}"]
"""


class Podman:
    """podman in a network namespace, with folders of its own."""

    def __init__(self, folder: Path, namespace: Namespace) -> None:
        self.folder = folder
        self.namespace = namespace
        config = folder / "containers.conf"
        config.write_text(CONFIG)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(config)}  # conmon gets none
        places = [f"--root={folder}/root", f"--runroot={folder}/run", f"--tmpdir={folder}/tmp"]
        places += [f"--network-config-dir={folder}/networks", "--storage-driver=vfs"]
        self._command = [*namespace.enter, "podman", *places]

    def __call__(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"capture_output": True, "timeout": 100} | options
        check = settings.pop("check", True)
        command = [*self._command, *map(str, words)]
        done = subprocess.run(command, text=True, env=self._environment, **settings)
        assert not check or done.returncode == 0, done.stderr
        return done

    def image(self, kernel: Path, *options: object) -> str:
        """Make the image of a guest and load it; its name."""
        name = kernel.stem
        archive = self.folder / f"{name}.tar"
        words = [PTENDER, "image", kernel, "-t", f"{name}:1", "-o", archive, *options]
        subprocess.run([*map(str, words)], check=True)
        self("load", "-q", "-i", archive)
        return f"localhost/{name}:1"

    def page(self, port: int) -> str:
        return page(self.namespace, port)

    def wait_until_listening(self, name: str, times: int = 1) -> str:
        """Return what the web server has printed, once it has been started so often."""
        wait_until(lambda: self("logs", name).stdout.count("listening on") == times)
        return self("logs", name).stdout

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name).stdout)[0]


def page(namespace: Namespace, port: int) -> str:
    """What a web server answers there on a port of 127.0.0.1."""
    return namespace.run("curl", "-s", "--max-time", "60", f"http://127.0.0.1:{port}/").stdout


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: ./check --engines installs it")
    folder = Path(tempfile.mkdtemp(prefix="podman-"))  # podman takes paths of 50 characters
    for namespace in open_namespace():
        podman = Podman(folder, namespace)
        yield podman
        podman("rm", "--all", "--force", "--time=0")
        podman("pod", "rm", "--all", "--force")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return builder(tmp_path_factory.mktemp("guests"))


def test_run(podman: Podman, build: Any) -> None:
    hello = podman.image(build("hello"), "--", "by", "default")
    none = "--network=none"
    assert "My command line: by default" in podman("run", "--rm", none, hello).stdout
    assert "My command line: a b" in podman("run", "--rm", none, hello, "a", "b").stdout
    assert "My command line: a b" in podman("run", "--rm", "-t", none, hello, "a", "b").stdout
    exit = podman.image(build("exit"))
    assert podman("run", "--rm", none, exit, "42", check=False).returncode == 42
    assert podman("ps", "--all", "--quiet").stdout == ""


def test_a_page_through_a_mapped_port(podman: Podman, build: Any) -> None:
    web = podman.image(build("web"))
    podman("run", "-d", "--name=web", "-p", "8080:80", web)
    printed = podman.wait_until_listening("web")
    assert "Hello from a unikernel" in podman.page(8080)
    state = podman.inspect("web")
    assert state["State"]["Status"] == "running"
    address = state["NetworkSettings"]["Networks"]["podman"]["IPAddress"]
    mac = state["NetworkSettings"]["Networks"]["podman"]["MacAddress"]
    assert f"listening on {address}/16, mac {mac}" in printed
    done = podman("exec", "web", "sh", check=False)
    assert "a unikernel has no processes beside its own" in done.stderr
    podman("restart", "--time=5", "web")
    podman.wait_until_listening("web", times=2)
    assert "this is request 1." in podman.page(8080)
    podman("stop", "--time=60", "web")
    assert podman.inspect("web")["State"]["ExitCode"] == 1  # as the tender ends by SIGTERM
    podman("start", "web")
    podman("kill", "web")
    assert podman("wait", "web").stdout == "137\n"
    podman("rm", "web")


def test_the_hosts_network(podman: Podman, build: Any) -> None:
    """The guest has a network of its own behind it, and its ports are the host's."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")
    host = podman.namespace
    host.ip("link add up0 type veth")
    host.ip("addr add 10.6.0.1/24 dev up0")
    host.ip("link set up0 up")
    host.ip("route add default via 10.6.0.2 dev up0")
    host.run("sh", "-c", "echo 80 >/proc/sys/net/ipv4/ip_unprivileged_port_start")
    web = podman.image(build("web"), "--expose=80")
    podman("run", "-d", "--name=host", "--network=host", web)
    assert "listening on 10.0.0.2/24" in podman.wait_until_listening("host")
    assert "Hello from a unikernel" in podman.page(80)
    podman("rm", "--force", "--time=0", "host")
    host.ip("link del up0")


def test_a_pod_has_an_ordinary_container(podman: Podman, build: Any) -> None:
    web = podman.image(build("web"))
    if shutil.which("runc") is None or not Path("/usr/libexec/podman/catatonit").exists():
        pytest.skip("a pod takes runc and catatonit")
    podman("pod", "create", "--name=pod", "-p", "8081:80")
    podman("run", "-d", "--pod=pod", "--name=web", web)
    podman.wait_until_listening("web")
    assert "Hello from a unikernel" in podman.page(8081)
    podman("pod", "rm", "--force", "--time=0", "pod")


def test_disks(podman: Podman, build: Any) -> None:
    image = podman.folder / "disk"
    image.write_bytes(bytes(1 << 16))
    inside = podman.image(build("disk"), "--block", f"storage={image}")
    run = ("run", "--network=none")
    podman(*run, "--name=kept", inside)
    podman("start", "kept")
    wait_until(lambda: "Started 2 times" in podman("logs", "kept").stdout)
    assert not image.read_bytes().strip(b"\0")
    mount = f"{image}:/storage"
    assert "Started 1 time" in podman(*run, "--rm", "-v", mount, inside).stdout
    assert image.read_bytes().strip(b"\0")
    done = podman(*run, "--rm", "-v", f"{mount}:ro", inside, check=False)
    assert "can't be written" in done.stdout
    assert done.returncode == 1


def test_limits(podman: Podman, build: Any) -> None:
    memory = podman.image(build("hello"))
    run = ("run", "--rm", "--network=none")
    assert "hvt ABI 2, 32 MiB" in podman(*run, "--memory=64m", memory).stdout
    done = podman(*run, "--memory=20m", memory, check=False)
    assert "the container's memory limit is too low" in done.stderr
    podman("run", "-d", "--name=loop", "--network=none", "--cpus=0.5", podman.image(build("loop")))
    pid = podman.inspect("loop")["State"]["Pid"]
    groups = dict(
        re.findall(r"^\d+:(\S*):(\S+)$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE)
    )
    cpu = next(path for names, path in groups.items() if "cpu" in names.split(","))
    assert Path(f"/sys/fs/cgroup/cpu{cpu}/cpu.cfs_quota_us").read_text() == "50000\n"
    podman("rm", "--force", "--time=0", "loop")
    assert not Path(f"/sys/fs/cgroup/cpu{cpu}").exists()


def test_out_of_memory(podman: Podman, build: Any) -> None:
    """What the guest writes to a disk on a tmpfs is the container's memory.

    conmon before 2.1.13 notes it in podman's working folder, and podman looks in the container's.
    """
    fill = podman.image(build("fill"))
    options = ("--network=none", "--memory=64m", "--name=full")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as disk:
        disk.truncate(256 << 20)
        podman("create", *options, "-v", f"{disk.name}:/storage", fill)
        [folder] = (podman.folder / "root").glob(f"*-containers/{podman.inspect('full')['Id']}")
        podman("start", "--attach", "full", cwd=folder / "userdata", check=False)
    state = podman.inspect("full")["State"]
    assert (state["OOMKilled"], state["ExitCode"]) == (True, 137)
    podman("rm", "full")


def test_restart_on_failure(podman: Podman, build: Any) -> None:
    exit = podman.image(build("exit"))
    options = ("--restart=on-failure:2", "--network=none", "--name=again")
    podman("run", "-d", *options, exit, "3")

    def has_given_up() -> bool:
        state = podman.inspect("again")
        return bool(state["RestartCount"] == 2 and state["State"]["Status"] == "exited")

    wait_until(has_given_up)
    podman("rm", "--force", "--time=0", "again")
