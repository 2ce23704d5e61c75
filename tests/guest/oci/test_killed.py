"""kill -9 of each process of a container at each step: `delete --force` leaves nothing.

What a command changes, it changes by these system calls; strace kills it as it enters each.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Namespace
from tests.guest.oci.conftest import Runtime, run_with_passt
from tests.waiting import marked, wait_until

CREATE = ("mkdir", "mknodat", "write", "rename", "clone", "sendto")
START = ("unlink", "write")
DELETE = ("pidfd_send_signal", "rmdir", "unlink")


def killed(runtime: Runtime, call: str, nth: int, *words: object, child: bool = False) -> bool:
    """Run a command that gets SIGKILL as it enters a call; whether it was.

    `child`: the process that it makes gets it instead, and only that has the call.
    """
    trace = runtime.folder / "trace"
    strace = [str(shutil.which("strace")), "-q", "-o", str(trace), "-e", f"trace={call}"]
    strace += ["-e", f"inject={call}:signal=KILL:when={nth}", *(["-f"] if child else [])]
    with open(runtime.folder / "output", "w") as output:
        subprocess.run(
            [*strace, *runtime.command(*words)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=runtime.environment,
            check=False,
            timeout=100,
        )
    return "killed by SIGKILL" in trace.read_text()


def test_create(runtime: Runtime, make: Any) -> None:
    bundle = make("hello", linux__resources={"pids": {"limit": 50}})
    create = ("create", "--bundle", bundle, "--pid-file", runtime.folder / "pid", "one")
    steps = 0
    for call in CREATE:
        nth = 1
        while killed(runtime, call, nth, *create):
            runtime("delete", "--force", "one")
            nth += 1
        steps += nth - 1
        assert runtime.status() == "created"
        runtime("delete", "one")
    assert steps >= 10  # it was killed


@pytest.mark.parametrize(("call", "nth"), [("setsid", 1), ("sendto", 1), ("sendto", 2)])
def test_the_process_that_create_makes(runtime: Runtime, make: Any, call: str, nth: int) -> None:
    """It is the first to call these. That it was killed is the error of `create`."""
    create = ("create", "--bundle", make("hello"), "one")
    assert killed(runtime, call, nth, *create, child=True)
    error = "the container's process ended before it was ready"
    assert error in (runtime.folder / "output").read_text()


@pytest.mark.parametrize("is_started", [False, True])
def test_the_process_of_a_container(runtime: Runtime, make: Any, is_started: bool) -> None:
    pid = runtime.create(make("loop"))
    if is_started:
        runtime("start", "one")
        wait_until(lambda: "looping" in (runtime.folder / "output").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: runtime.status() == "stopped")
    runtime("delete", "one")


def test_run(runtime: Runtime, make: Any) -> None:
    """Its guest runs on, as one that was started: it can be deleted."""
    output = runtime.folder / "output"
    with open(output, "w") as file:
        command = runtime.command("run", "--bundle", make("loop"), "one")
        with subprocess.Popen(command, stdout=file, env=runtime.environment) as process:
            wait_until(lambda: "looping" in output.read_text())
            process.kill()
    assert runtime.status() == "running"
    runtime("delete", "--force", "one")


@pytest.mark.parametrize("name", ["passt", "frame-filter"])
def test_a_process_of_its_network(
    runtime: Runtime, make: Any, namespaces: tuple[Namespace, Namespace], name: str
) -> None:
    run_with_passt(runtime, make, namespaces)
    (pid,) = (
        pid
        for pid in marked("OCI_TEST", str(runtime.folder))
        if Path(f"/proc/{pid}/comm").read_text().startswith(name)
    )
    os.kill(pid, signal.SIGKILL)
    runtime("delete", "--force", "one")


@pytest.mark.parametrize(("command", "calls"), [("start", START), ("delete", DELETE)])
def test_a_later_command(runtime: Runtime, make: Any, command: str, calls: tuple[str, ...]) -> None:
    bundle = make("loop")
    steps = 0
    for call in calls:
        nth = 1
        runtime.create(bundle)
        while killed(runtime, call, nth, command, "one"):
            runtime("delete", "--force", "one")
            runtime.create(bundle)
            nth += 1
        steps += nth - 1
        runtime("delete", "--force", "one")
    assert steps >= 2
