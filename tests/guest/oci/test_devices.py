"""What a container gives its guest: disks, limits, a network."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Namespace
from tests.guest.oci.conftest import (
    CGROUPS,
    HAS_CGROUPS,
    KERNEL,
    URUNC,
    Runtime,
    disk,
    run_with_passt,
)
from tests.waiting import wait_until


def test_a_mounted_file_is_a_disk(runtime: Runtime, make: Any, tmp_path: Path) -> None:
    image = disk(tmp_path / "image")
    mount = {"destination": "/storage", "source": str(image), "type": "bind"}
    assert "Started 1 time" in runtime("run", "-b", make("disk", mounts=[mount]), "one").stdout
    assert image.read_bytes().strip(b"\0")
    mount["options"] = ["ro"]  # type: ignore[assignment]
    done = runtime("run", "-b", make("disk", mounts=[mount]), "one", check=False)
    assert "can't be written" in done.stdout
    error = runtime.refuses("create", "-b", make("disk"), "one")
    assert error == "create: nothing is attached to the disk storage: mount a file at /storage"


@pytest.mark.parametrize("where", ["annotations", "urunc.json"])
def test_a_disk_of_the_image(runtime: Runtime, make: Any, where: str) -> None:
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}hypervisor": "hvt", f"{URUNC}block": "/d.img"}
    if where == "annotations":
        bundle = make("disk", annotations=values)
    else:
        bundle = make("disk")
        coded = {name: base64.b64encode(text.encode()).decode() for name, text in values.items()}
        (bundle / "rootfs/urunc.json").write_text(json.dumps(coded))
    disk(bundle / "rootfs/d.img")
    assert "Started 1 time" in runtime("run", "-b", bundle, "one").stdout
    assert "Started 2 times" in runtime("run", "-b", bundle, "one").stdout


@pytest.mark.skipif(not HAS_CGROUPS, reason="no cgroups of version 1 to write to")
def test_its_cgroup(runtime: Runtime, make: Any) -> None:
    limits = {"memory": {"limit": 100 << 20}, "cpu": {"shares": 512}, "pids": {"limit": 50}}
    pid = runtime.create(make("loop", linux__resources=limits))
    group = CGROUPS / "memory" / str(runtime.cgroup)
    assert (group / "memory.limit_in_bytes").read_text() == f"{100 << 20}\n"
    assert str(pid) in (group / "cgroup.procs").read_text().split()
    runtime("start", "one")
    runtime("delete", "--force", "one")
    assert not group.exists()


@pytest.mark.skipif(not HAS_CGROUPS, reason="no cgroups of version 1 to write to")
def test_a_limit_that_the_kernel_refuses(runtime: Runtime, make: Any) -> None:
    bundle = make("hello", linux__resources={"cpu": {"cpus": "1000"}})
    error = runtime.refuses("create", "-b", bundle, "one")
    file = CGROUPS / "cpuset" / str(runtime.cgroup) / "cpuset.cpus"
    assert error.startswith(f"create: {file}: 1000: ")


def test_the_guest_takes_over_the_network(
    runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace]
) -> None:
    pytest.importorskip("pyroute2")
    host, inside = namespaces
    output = runtime.folder / "output"
    path = inside.enter[1].partition("=")[2]
    bundle = make("web", linux={"namespaces": [{"type": "network", "path": path}]})
    mac = json.loads(inside.ip("-j link show eth0"))[0]["address"]
    for _ in range(2):  # the second finds what the first has left
        runtime.create(bundle)
        runtime("start", "one")
        wait_until(lambda: "listening" in output.read_text())
        assert f"listening on 10.9.0.2/24, mac {mac}, mtu 1400" in output.read_text()
        error = runtime.refuses("create", "-b", bundle, "two")
        assert error == "create: the container's network is another unikernel's: a pod has one"
        page = host.run("curl", "-s", "--max-time", "60", "http://10.9.0.2/").stdout
        assert "Hello from a unikernel" in page
        runtime("delete", "--force", "one")
        assert "ptender0" not in inside.ip("link")


def test_passt_where_there_is_no_tap(
    runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace]
) -> None:
    """Without CAP_NET_ADMIN no tap can be made; passt has the guest's port on the interface."""
    run_with_passt(runtime, make, namespaces)
    said = (runtime.folder / "output").read_text()
    assert "CAP_NET_ADMIN: the guest's network is passt\n" in said
    assert "listening on 10.0.0.2/24" in said
    page = namespaces[0].run("curl", "-s", "--max-time", "60", "http://10.9.0.2/").stdout
    assert "Hello from a unikernel" in page
    runtime("delete", "--force", "one")


def test_memory_for_passt(runtime: Runtime, make: Any) -> None:
    """It is in the container's group; on the host's network it is what a guest gets."""
    limit = {"linux__resources": {"memory": {"limit": 65 << 20}}}
    error = runtime.refuses("create", "-b", make("web", **limit), "one")
    assert error.endswith("a guest of 2 MiB takes 66 MiB with its tender and passt")
    assert "32 MiB" in runtime("run", "-b", make("hello", **limit), "one").stdout


def test_a_network_without_an_interface(
    runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace]
) -> None:
    pytest.importorskip("pyroute2")
    bundle = make("web", linux={"namespaces": [{"type": "network"}]})
    error = runtime.refuses("create", "-b", bundle, "one")
    assert error == "create: the guest has the network service, the container no interface"
