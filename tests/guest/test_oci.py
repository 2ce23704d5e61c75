"""`ptender-oci` as an engine calls it: by its command line, on bundles that the test makes."""

from __future__ import annotations

import array
import base64
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, Build, Namespace, builder, open_namespace
from tests.waiting import children, marked, state_of, wait_until

OCI = PTENDER.with_name("ptender-oci")
KERNEL = "/unikernel/kernel.hvt"
URUNC = "com.urunc.unikernel."


class Runtime:
    """The runtime with a folder of its own for its states; `log` is the engine's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.root = folder / "states"
        # No runc: what is not ours must be an error.
        self.environment = {**os.environ, "PATH": str(folder / "bin"), "OCI_TEST": str(folder)}

    def command(self, *words: object) -> list[str]:
        options = ["--root", self.root, "--log", self.log, "--log-format", "json"]
        return [str(OCI), *map(str, [*options, *words])]

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
    left = marked("OCI_TEST", str(tmp_path))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not [pid for pid in left if state_of(pid) not in ("Z", "")]
    assert not list(value.root.glob("*"))


@pytest.fixture
def make(tmp_path: Path, guest: Build) -> Any:
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


def test_a_container_runs(runtime: Runtime, make: Any) -> None:
    done = runtime("run", "--bundle", make("hello", "foo", "bar"), "one")
    assert "My command line: foo bar" in done.stdout
    assert runtime("run", "--bundle", make("exit", "42"), "one", check=False).returncode == 42
    assert not runtime.log.exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="spt guests are for x86_64")
def test_an_spt_guest_runs(runtime: Runtime, make: Any, tmp_path: Path) -> None:
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}hypervisor": "spt"}
    bundle = make("hello", "foo", annotations=values)
    kernel = builder(tmp_path / "spt", "--target=spt")("hello")
    shutil.copy(kernel, bundle / f"rootfs{KERNEL}")
    done = runtime("run", "--bundle", bundle, "one")
    assert "spt ABI 2" in done.stdout
    assert "My command line: foo" in done.stdout


def test_its_life(runtime: Runtime, make: Any) -> None:
    bundle = make("loop")
    pid = runtime.create(bundle)
    state = json.loads(runtime("state", "one").stdout)
    assert (state["id"], state["status"], state["pid"]) == ("one", "created", pid)
    assert state["bundle"] == str(bundle)
    assert runtime.refuses("create", "--bundle", bundle, "one").endswith("exists already")
    assert (runtime.folder / "output").read_text() == ""
    runtime("start", "one")
    assert runtime.status() == "running"
    assert "cannot start a container that is running" in runtime.refuses("start", "one")
    assert "cannot delete a container that is running" in runtime.refuses("delete", "one")
    assert pid in json.loads(runtime("ps", "--format", "json", "one").stdout)
    assert runtime("list", "-q").stdout == "one\n"
    listed = subprocess.run([PTENDER, "ps", "--json"], capture_output=True, text=True, check=True)
    assert [each["name"] for each in json.loads(listed.stdout) if each["pid"] == pid] == ["one"]
    assert "no processes beside its own" in runtime.refuses("exec", "--tty", "one", "sh")
    runtime("kill", "one", "TERM")
    wait_until(lambda: runtime.status() == "stopped")
    assert "that is stopped" in runtime.refuses("kill", "one", "9")
    runtime("kill", "--all", "one", "9")
    runtime("delete", "one")
    runtime("delete", "--force", "one")
    for command in ("state", "start", "kill", "delete"):
        assert "container with ID one does not exist" in runtime.refuses(command, "one")
    assert json.loads(runtime("list", "--format", "json").stdout) == []


@pytest.mark.parametrize("force", [["--force"], []])
def test_a_created_container_is_deleted(runtime: Runtime, make: Any, force: list[str]) -> None:
    pid = runtime.create(make("hello"))
    runtime("delete", *force, "one")
    assert state_of(pid) in ("Z", "")
    assert (runtime.folder / "output").read_text() == ""


def test_its_process_is_killed(runtime: Runtime, make: Any) -> None:
    os.kill(runtime.create(make("hello")), signal.SIGKILL)
    wait_until(lambda: runtime.status() == "stopped")
    assert "cannot start a container that is stopped" in runtime.refuses("start", "one")
    runtime("delete", "one")


def test_create_is_killed(runtime: Runtime, make: Any) -> None:
    """A hook holds it; its identifier is taken until the engine deletes it by force."""
    begun = runtime.folder / "begun"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f": >{begun}; exec /bin/sleep 3600"]}
    bundle = make("hello", hooks={"createRuntime": [{**hook, "env": ["PATH=/bin"]}]})
    command = runtime.command("create", "--bundle", bundle, "one")
    with subprocess.Popen(command, env=runtime.environment) as process:
        wait_until(begun.exists)
        inside = children(process.pid)
        process.kill()
    for pid in inside:
        os.kill(pid, signal.SIGKILL)
    assert "exists already" in runtime.refuses("create", "--bundle", bundle, "one")
    assert "does not exist" in runtime.refuses("start", "one")
    runtime("delete", "--force", "one")


def test_hooks(runtime: Runtime, make: Any) -> None:
    said = runtime.folder / "said"
    steps = ("prestart", "createRuntime", "startContainer", "poststart", "poststop")
    hooks = {
        step: [
            {"path": "/bin/sh", "args": ["sh", "-c", f"echo {step} >>{said}; /bin/cat >>{said}"]}
        ]
        for step in steps
    }
    runtime("run", "--bundle", make("hello", hooks=hooks), "one")
    text = said.read_text()
    assert [step for step in steps if step in text] == list(steps)
    assert text.count('"id": "one"') == len(steps)
    hooks["prestart"] = [{"path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 3"]}]
    error = runtime.refuses("create", "--bundle", make("hello", hooks=hooks), "one")
    assert error == "create: hook prestart: /bin/sh: status 3: no"


def test_what_is_no_unikernel_goes_to_runc(runtime: Runtime, make: Any) -> None:
    bundle = make("hello", process__args=["/bin/pause"])
    assert "neither runc nor crun" in runtime.refuses("create", "--bundle", bundle, "two")
    fake = runtime.folder / "bin" / "runc"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    for words in (["create", "--bundle", bundle, "two"], ["state", "two"], ["exec", "two", "sh"]):
        assert runtime(*words).stdout.split()[-len(words) :] == list(map(str, words))


# Its disks.


def disk(path: Path, size: int = 1 << 16) -> Path:
    path.write_bytes(bytes(size))
    return path


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


@pytest.mark.parametrize("path", ["../outside", "/../outside", "link", "folder/../../../outside"])
def test_no_path_of_an_image_leaves_its_root(
    runtime: Runtime, make: Any, tmp_path: Path, path: str
) -> None:
    values = {f"{URUNC}binary": KERNEL, "ptender.block.storage": path}
    bundle = make("disk", annotations=values)
    outside = disk(bundle / "outside")
    (bundle / "rootfs/folder").mkdir()
    (bundle / "rootfs/link").symlink_to(outside)
    error = runtime.refuses("create", "-b", bundle, "one")
    assert "in the root file system: No such file or directory" in error


BAD = [
    ({"root": {}}, "root.path: missing"),
    ({"root": []}, "root: not an object"),
    ({"root__path": "a\0b"}, "root.path: 'a\\x00b' is not a text"),
    ({"process__args": [1]}, "process.args.0: 1 is not a text"),
    ({"process__args": "x"}, "process.args: 'x' is not a list"),
    ({"process__terminal": True}, "process.terminal takes --console-socket"),
    ({"mounts": [{"source": "x"}]}, "mounts[0].destination: missing"),
    ({"annotations": {"x": None}}, "annotations.x: missing"),
    (
        {"annotations": {f"{URUNC}binary": "/nowhere"}},
        "'/nowhere' in the root file system: No such",
    ),
    (
        {"annotations": {f"{URUNC}binary": "/unikernel"}},
        "'/unikernel' in the root file system: not",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, f"{URUNC}hypervisor": "qemu"}},
        "hypervisor: 'qemu' is not hvt",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, f"{URUNC}unikernelType": "--block"}},
        "unikernelType: '--block' is not one of mirage,",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, "ptender.mem": "512 --sandbox=off"}},
        "ptender.mem: '512 --sandbox=off' is not a number of MiB",
    ),
    ({"linux": {"resources": {"memory": {"limit": "1"}}}}, "memory.limit: '1' is not an integer"),
    ({"linux": {"resources": {"memory": {"limit": 1 << 20}}}}, "memory limit is too low"),
    (
        {"linux": {"namespaces": [{"type": "network", "path": "/nowhere"}]}},
        "network namespace /nowhere: No such file",
    ),
    ({"linux": {"cgroupsPath": "a:b:c"}}, "systemd's groups are not supported"),
    ({"hooks": {"prestart": [{}]}}, "hooks.prestart[0].path: missing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_malformed_bundle(
    runtime: Runtime, make: Any, changes: dict[str, Any], message: str
) -> None:
    assert message in runtime.refuses("create", "-b", make("hello", **changes), "one")


def test_files_that_are_no_bundle(runtime: Runtime, make: Any) -> None:
    bundle = make("hello")
    (bundle / "config.json").write_text("[" * 100_000)
    assert "config.json: not JSON" in runtime.refuses("create", "-b", bundle, "one")
    (bundle / "config.json").unlink()
    assert "config.json: No such file" in runtime.refuses("create", "-b", bundle, "one")
    for id in ("..", "a/b", ""):
        assert "is not a container's ID" in runtime.refuses("create", "-b", bundle, id)


def test_an_annotation_is_no_option(runtime: Runtime, make: Any) -> None:
    """What the image says of its command line is the guest's."""
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}cmdline": "--sandbox=off @3"}
    bundle = make("hello", annotations=values, process__args=[])
    assert "My command line: --sandbox=off @3" in runtime("run", "-b", bundle, "one").stdout


def test_a_terminal(runtime: Runtime, make: Any) -> None:
    path = runtime.folder / "console"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        bundle = make("hello", "on", "a", "terminal", process__terminal=True)
        runtime("create", "-b", bundle, "--console-socket", path, "one")
        connection, _ = server.accept()
        with connection:
            size = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
            _, ancillary, *_ = connection.recvmsg(100, size)
        terminal = array.array("i", ancillary[0][2])[0]
    runtime("start", "one")
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:
        pass  # EIO: the guest has ended
    os.close(terminal)
    assert b"My command line: on a terminal\r\n" in said
    runtime("delete", "one")


# Its limits and its network.


def test_its_cgroup(runtime: Runtime, make: Any) -> None:
    if os.geteuid() != 0 or not os.access("/sys/fs/cgroup/memory", os.W_OK):
        pytest.skip("no cgroups of version 1 to write to")
    name = f"ptender-test-{os.getpid()}"
    limits = {"memory": {"limit": 100 << 20}, "cpu": {"shares": 512}, "pids": {"limit": 50}}
    bundle = make("loop", linux={"cgroupsPath": f"/{name}", "resources": limits})
    pid = runtime.create(bundle)
    group = Path("/sys/fs/cgroup/memory", name)
    assert (group / "memory.limit_in_bytes").read_text() == f"{100 << 20}\n"
    assert str(pid) in (group / "cgroup.procs").read_text().split()
    runtime("start", "one")
    runtime("delete", "--force", "one")
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{name}"))


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
        page = host.run("curl", "-s", "--max-time", "60", "http://10.9.0.2/").stdout
        assert "Hello from a unikernel" in page
        runtime("delete", "--force", "one")
        assert "ptender0" not in inside.ip("link")


def test_a_network_without_an_interface(
    runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace]
) -> None:
    pytest.importorskip("pyroute2")
    bundle = make("web", linux={"namespaces": [{"type": "network"}]})
    error = runtime.refuses("create", "-b", bundle, "one")
    assert error == "create: the guest has the network service, the container no interface"
