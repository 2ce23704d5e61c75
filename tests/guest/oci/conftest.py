"""`ptender-oci` as an engine calls it: its command line, and bundles that the test makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, Build, Namespace, open_namespace
from tests.needs import needs
from tests.waiting import kill, marked, state_of, wait_until

OCI = PTENDER.with_name("ptender-oci")
KERNEL = "/unikernel/kernel.hvt"
URUNC = "com.urunc.unikernel."
CGROUPS = Path("/sys/fs/cgroup")
HAS_CGROUPS = os.geteuid() == 0 and os.access(CGROUPS / "memory", os.W_OK)  # of version 1


class Runtime:
    """The runtime with a folder of its own for its states; `log` is the engine's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.root = folder / "states"
        self.cgroup = f"ptender-test-{os.getpid()}" if HAS_CGROUPS else None
        self.format = "json"
        self.prefix: list[str] = []  # a command that runs it
        # No runc: what is not ours must be an error.
        self.environment = {**os.environ, "PATH": str(folder / "bin"), "OCI_TEST": str(folder)}

    def command(self, *words: object) -> list[str]:
        options = ["--root", self.root, "--log", self.log, "--log-format", self.format]
        return [*self.prefix, str(OCI), *map(str, [*options, *words])]

    def __call__(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"env": self.environment, "check": True, "timeout": 100}
        if "stdout" not in options:
            settings["capture_output"] = True
        return subprocess.run(self.command(*words), text=True, **(settings | options))

    def refuses(self, *words: object) -> str:
        """Run a command that must fail: its one line of error, which is in the log as well."""
        self.log.unlink(missing_ok=True)
        done = self(*words, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = self.log.read_text().splitlines()
        entry = json.loads(line)
        assert entry["level"] == "error"
        assert done.stderr == f"ptender-oci: {entry['msg']}\n"
        return str(entry["msg"])

    def create(self, bundle: Path, id: str = "one", output: str = "output") -> int:
        """Create a container whose guest writes to this file; its PID."""
        pid_file = self.folder / "pid"
        with open(self.folder / output, "w") as file:
            options = ["--bundle", bundle, "--pid-file", pid_file]
            self("create", *options, id, stdout=file, stderr=file)
        return int(pid_file.read_text())

    def status(self, id: str = "one") -> str:
        return str(json.loads(self("state", id).stdout)["status"])


@pytest.fixture
def runtime(tmp_path: Path, any_cpu: str) -> Iterator[Runtime]:
    value = Runtime(tmp_path)
    yield value

    def left() -> list[int]:
        pids = marked("OCI_TEST", str(tmp_path))
        return [pid for pid in pids if state_of(pid) not in ("Z", "")]

    try:
        wait_until(lambda: not left())
    finally:
        for pid in left():
            kill(pid)
    assert not list(value.root.glob("*"))
    assert not list(CGROUPS.glob(f"*/{value.cgroup}"))


@pytest.fixture
def make(runtime: Runtime, tmp_path: Path, guest: Build) -> Any:
    """Make a bundle of a guest; `changes` are put into config.json, by path."""

    def make(name: str, *args: str, **changes: object) -> Path:
        bundle = tmp_path / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        (bundle / "rootfs/unikernel").mkdir(parents=True)
        shutil.copy(guest(name), bundle / f"rootfs{KERNEL}")
        config: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": [KERNEL, *args], "env": ["PATH=/bin"], "cwd": "/"},
            "linux": {"cgroupsPath": runtime.cgroup},
        }
        for path, value in changes.items():
            place = config
            *parts, last = path.split("__")
            for part in parts:
                place = place.setdefault(part, {})
            place[last] = value
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle

    return make


def disk(path: Path, size: int = 1 << 16) -> Path:
    path.write_bytes(bytes(size))
    return path


@pytest.fixture
def namespaces(any_cpu: str) -> Iterator[tuple[Namespace, Namespace]]:
    """The host's end of a container's network, and the container's."""
    for host in open_namespace():
        for inside in open_namespace():
            pid = inside.enter[1].split("/")[2]
            host.ip(f"link add veth0 type veth peer name eth0 netns {pid}")
            host.ip("addr add 10.9.0.1/24 dev veth0")
            host.ip("link set veth0 up")
            inside.ip("addr add 10.9.0.2/24 dev eth0")
            inside.ip("link set eth0 mtu 1400 up")
            inside.ip("route add default via 10.9.0.1")
            yield host, inside


def run_with_passt(runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace]) -> None:
    """Run the web server where no tap can be made, until it listens."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed: apt install passt")
    runtime.prefix = [str(shutil.which("setpriv")), "--bounding-set=-net_admin"]
    needs(*runtime.prefix)
    runtime.environment["PATH"] = os.environ["PATH"]
    path = namespaces[1].enter[1].partition("=")[2]
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}unikernelType": "ptender", "ptender.ports": "80"}
    bundle = make("web", linux__namespaces=[{"type": "network", "path": path}], annotations=values)
    runtime.create(bundle)
    runtime("start", "one")
    wait_until(lambda: "listening" in (runtime.folder / "output").read_text())
