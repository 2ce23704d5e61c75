"""containerd with ptender-oci as the runtime of a RuntimeClass: the calls that a kubelet makes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tender.oci import cgroups
from tests.engines.containerd import OCI, Ctr, containerd, load
from tests.engines.cri import Fields, Message, Runtime, decode
from tests.guest.conftest import Namespace, open_namespace
from tests.waiting import wait_until

PLUGINS = Path("/usr/lib/cni")
PAUSE = Path("/usr/libexec/podman/catatonit")
LIBRARY = "docker.io/library"
CONFIG = """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{library}/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "ptender"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.ptender]
    runtime_type = "io.containerd.runc.v2"
    pod_annotations = ["com.urunc.unikernel.*", "ptender.*"]
    container_annotations = ["com.urunc.unikernel.*", "ptender.*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.ptender.options]
      BinaryName = "{oci}"
"""
RUNNING, EXITED = 1, 2


def network(folder: Path) -> str:
    """A bridge whose addresses are in this folder, for CNI."""
    ipam: dict[str, Any] = {"type": "host-local", "dataDir": str(folder)}
    ipam |= {"ranges": [[{"subnet": "10.22.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]})


def pause_image(path: Path) -> None:
    """The image of a pod's infrastructure container: a program that waits, for runc."""
    files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        files[f"blobs/sha256/{digest}"] = data
        kind = f"application/vnd.oci.image.{kind}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    layer = blob("layer.v1.tar", archive({"pause": PAUSE.read_bytes()}))
    config = {"architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["/pause", "-P"]}}
    config["rootfs"] = {"type": "layers", "diff_ids": [layer["digest"]]}
    manifest: dict[str, Any] = {"schemaVersion": 2, "layers": [layer]}
    manifest["config"] = blob("config.v1+json", json.dumps(config).encode())
    described = blob("manifest.v1+json", json.dumps(manifest).encode())
    described["annotations"] = {"io.containerd.image.name": f"{LIBRARY}/pause:1"}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [described]}).encode()
    path.write_bytes(archive(files))


def archive(files: dict[str, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return output.getvalue()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    yield from open_namespace()


@pytest.fixture
def ctr(tmp_path: Path, namespace: Namespace) -> Iterator[Ctr]:
    if not PAUSE.exists() or not (PLUGINS / "bridge").exists():
        pytest.skip("catatonit and containernetworking-plugins: ./check --engines installs them")
    (tmp_path / "cni").mkdir()
    (tmp_path / "cni/pods.conflist").write_text(network(tmp_path / "addresses"))
    config = CONFIG.format(folder=tmp_path, plugins=PLUGINS, oci=OCI, library=LIBRARY)
    with containerd(tmp_path, config, "k8s.io", namespace.enter) as ctr:
        pause_image(tmp_path / "pause.tar")
        ctr("image", "import", tmp_path / "pause.tar")
        yield ctr


class Pod:
    """A pod whose RuntimeClass is ptender."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime = runtime
        metadata = [(1, "pod"), (2, "uid"), (3, "default")]
        self._group = f"ptender-pod-{os.getpid()}"
        linux = [(1, f"/{self._group}")]
        self._config: Message = [(1, metadata), (3, str(folder)), (8, linux)]
        answer = runtime("RunPodSandbox", (1, self._config), (2, "ptender"))
        self.id = answer[1][0].decode()

    def address(self) -> str:
        status = self._runtime("PodSandboxStatus", (1, self.id))[1][0]
        return str(decode(decode(status)[5][0])[1][0].decode())

    def start(self, name: str, *fields: tuple[int, Any], memory: int = 64 << 20) -> str:
        """Start a container of the image of this name; its ID."""
        limits = [(2, 50_000), (1, 100_000), (4, memory)]
        config: list[tuple[int, Any]] = [
            (1, [(1, name)]),
            (2, [(1, f"{LIBRARY}/{name}:1")]),
            (11, f"{name}.log"),
        ]
        config += [(15, [(1, limits)]), *fields]
        answer = self._runtime("CreateContainer", (1, self.id), (2, config), (3, self._config))
        id = str(answer[1][0].decode())
        self._runtime("StartContainer", (1, id))
        return id

    def status(self, id: str) -> Fields:
        return decode(self._runtime("ContainerStatus", (1, id))[1][0])

    def remove(self) -> None:
        self._runtime("StopPodSandbox", (1, self.id))
        self._runtime("RemovePodSandbox", (1, self.id))
        for group in Path("/sys/fs/cgroup").glob(f"*/{self._group}"):
            cgroups.remove((str(group),))
            assert not group.exists()


def test_a_pod(ctr: Ctr, namespace: Namespace, tmp_path: Path) -> None:
    for name in ("web", "exit", "fill"):
        load(ctr, tmp_path, name)
    runtime = Runtime(tmp_path / "socket")
    pod = Pod(runtime, tmp_path)
    try:
        web = pod.start("web")
        log = tmp_path / "web.log"
        wait_until(lambda: "listening" in log.read_text())
        assert f"listening on {pod.address()}/24" in log.read_text()
        page = namespace.run("curl", "-s", "--max-time", "60", f"http://{pod.address()}/").stdout
        assert "Hello from a unikernel" in page
        assert pod.status(web)[3] == [RUNNING]
        runtime("StopContainer", (1, web), (2, 60))
        assert pod.status(web)[3] == [EXITED]
        exit = pod.start("exit", (4, "42"))
        wait_until(lambda: pod.status(exit)[3] == [EXITED])
        assert pod.status(exit)[7] == [42]
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as disk:
            disk.truncate(256 << 20)
            fill = pod.start("fill", (7, [(1, "/storage"), (2, disk.name)]))
            wait_until(lambda: pod.status(fill)[3] == [EXITED])
        wait_until(lambda: pod.status(fill)[10] == [b"OOMKilled"])  # two events, in any order
    finally:
        pod.remove()
        runtime.close()
    assert ctr("container", "list", "--quiet").stdout == ""
