"""The life of a container, by the commands of the runtime."""

from __future__ import annotations

import array
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, builder
from tests.guest.oci.conftest import KERNEL, URUNC, Runtime
from tests.waiting import state_of, wait_until


def test_a_container_runs(runtime: Runtime, make: Any) -> None:
    done = runtime("run", "--bundle", make("hello", "foo", "bar"), "one")
    assert "My command line: foo bar" in done.stdout
    assert runtime("run", "--bundle", make("exit", "42"), "one", check=False).returncode == 42
    assert not runtime.log.exists()


def test_a_signal_to_run_is_for_its_guest(runtime: Runtime, make: Any) -> None:
    output = runtime.folder / "output"
    command = runtime.command("run", "--bundle", make("loop"), "one")
    with (
        open(output, "w") as file,
        subprocess.Popen(command, stdout=file, env=runtime.environment) as process,
    ):
        wait_until(lambda: "looping" in output.read_text())
        process.terminate()
    assert process.returncode == 1  # as the tender ends by SIGTERM


@pytest.mark.skipif(platform.machine() != "x86_64", reason="spt guests are for x86_64")
def test_an_spt_guest_runs(runtime: Runtime, make: Any, tmp_path: Path) -> None:
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}hypervisor": "spt"}
    bundle = make("hello", "foo", annotations=values)
    kernel = builder(tmp_path / "spt", "--target=spt")("hello")
    shutil.copy(kernel, bundle / f"rootfs{KERNEL}")
    done = runtime("run", "--bundle", bundle, "one")
    assert "spt ABI 2" in done.stdout
    assert "My command line: foo" in done.stdout


def test_a_rumprun_guest_is_told_as_json(runtime: Runtime, make: Any) -> None:
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}unikernelType": "rumprun"}
    done = runtime("run", "-b", make("hello", "redis", "a b", annotations=values), "one")
    config = """{"cmdline":"redis 'a b'","env":"PATH=/bin"}"""
    assert f"My command line: {config}\n" in done.stdout


def test_its_life(runtime: Runtime, make: Any) -> None:
    bundle = make("loop")
    pid = runtime.create(bundle)
    state = json.loads(runtime("state", "one").stdout)
    assert (state["id"], state["status"], state["pid"]) == ("one", "created", pid)
    assert state["bundle"] == str(bundle)
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert words[0].endswith(b"/ptender-oci"), "not Python's"
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
    """A hook holds it, and ends with it. Its identifier is taken until it is deleted by force."""
    begun = runtime.folder / "begun"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f": >{begun}; exec /bin/sleep 3600"]}
    bundle = make("hello", hooks={"createRuntime": [{**hook, "env": ["PATH=/bin"]}]})
    command = runtime.command("create", "--bundle", bundle, "one")
    with subprocess.Popen(command, env=runtime.environment) as process:
        wait_until(begun.exists)
        process.kill()
    assert "exists already" in runtime.refuses("create", "--bundle", bundle, "one")
    assert runtime.status() == "creating"
    for word in ("start", "kill", "delete"):
        assert f"cannot {word} a container that is creating" in runtime.refuses(word, "one")
    runtime("delete", "--force", "one")


def test_hooks(runtime: Runtime, make: Any) -> None:
    said = runtime.folder / "said"
    steps = ["prestart", "createRuntime", "createContainer", "startContainer"]
    steps += ["poststart", "poststop"]
    script = f"echo $1 >>{said}; /bin/cat >>{said}; echo >>{said}"
    hooks = {
        step: [{"path": "/bin/sh", "args": ["sh", "-c", script, "sh", step]}] for step in steps
    }
    runtime("run", "--bundle", make("hello", hooks=hooks), "one")
    text = said.read_text()
    assert [step for step in steps if step in text] == steps
    assert text.count('"id": "one"') == len(steps)
    pids = [json.loads(line)["pid"] for line in text.splitlines() if line.startswith("{")]
    assert set(pids[:-1]) == {pids[0]}
    assert pids[-1] == 0
    hooks["prestart"] = [{"path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 3"]}]
    error = runtime.refuses("create", "--bundle", make("hello", hooks=hooks), "one")
    assert error == "create: hook prestart: /bin/sh: status 3: no"
    hooks["prestart"] = [{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $$"]}]
    error = runtime.refuses("create", "--bundle", make("hello", hooks=hooks), "one")
    assert error == "create: hook prestart: /bin/sh: killed by signal 9"


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace takes root")
def test_a_hook_makes_the_network(runtime: Runtime, make: Any) -> None:
    """As docker's does: it finds the namespace by the PID, before the guest takes it over."""
    pytest.importorskip("pyroute2")
    enter = 'sed "s/.*\\"pid\\": \\([0-9]*\\).*/\\1/" | xargs -I{} nsenter --net=/proc/{}/ns/net '
    script = f"{enter} sh -c 'ip link add eth0 type veth && ip addr add 10.8.0.2/24 dev eth0 && "
    script += "ip link set eth0 up && ip link set veth0 up'"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": [f"PATH={os.environ['PATH']}"]}
    bundle = make("web", linux__namespaces=[{"type": "network"}], hooks={"prestart": [hook]})
    runtime.create(bundle)
    runtime("start", "one")
    wait_until(lambda: "listening on 10.8.0.2/24" in (runtime.folder / "output").read_text())
    runtime("delete", "--force", "one")


def test_what_is_no_unikernel_goes_to_runc(runtime: Runtime, make: Any) -> None:
    bundle = make("hello", process__args=["/bin/pause"])
    assert "neither runc nor crun" in runtime.refuses("create", "--bundle", bundle, "two")
    fake = runtime.folder / "bin" / "runc"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    for words in (["create", "--bundle", bundle, "two"], ["state", "two"], ["exec", "two", "sh"]):
        assert runtime(*words).stdout.split()[-len(words) :] == list(map(str, words))
    # One that is not there is not runc's to delete, which would take what is made meanwhile.
    delete = ("delete", "--force", "two")
    assert runtime(*delete).stdout == ""
    (runtime.root / "two").mkdir(parents=True)
    assert runtime(*delete).stdout == ""
    (runtime.root / "two").mkdir()
    (runtime.root / "two/state.json").touch()
    assert runtime(*delete).stdout.split()[-3:] == list(delete)
    shutil.rmtree(runtime.root / "two")


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
