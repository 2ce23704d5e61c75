"""The life of a container after `create`. Source: the runtime specification, runtime.md."""

from __future__ import annotations

import os
import signal
import time
from errno import ENXIO, EPIPE, ESRCH

from tender.errors import ConfigError, HostError, TenderError
from tender.oci import bundle as bundles
from tender.oci import cgroups, hooks
from tender.oci.hooks import VERSION
from tender.oci.state import FIFO, started

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.oci.state import Container, States


def start(states: States, id: str) -> None:
    """Let a created container run."""
    with states.locked(id):
        container = states.load(id)
        status = states.status(container)
        if status != "created":
            raise ConfigError(f"cannot start a container that is {status}: {id}")
        bundle = bundles.load(container.bundle)
        hooks.run(bundle, "startContainer", id, "created", container.pid)
        fifo = states.path(id, FIFO)
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.unlink(fifo)
                os.write(fd, b"!")
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (ENXIO, EPIPE):  # nobody reads it any more
                raise ConfigError(f"cannot start {id}: its process has ended") from None
            raise HostError(fifo, "open", error.errno or 0) from None
    hooks.run(bundle, "poststart", id, "running", container.pid)


def state(states: States, id: str) -> dict[str, object]:
    """The container's state, as runtime.md has it."""
    container = states.load(id)
    status = states.status(container)
    value: dict[str, object] = {
        "ociVersion": VERSION,
        "id": id,
        "status": status,
        "bundle": container.bundle,
        "rootfs": os.path.join(container.bundle, "rootfs"),
        "created": container.created,
        "owner": "",
    }
    value["pid"] = container.pid if status in ("created", "running") else 0
    try:
        value["annotations"] = dict(bundles.load(container.bundle).annotations)
    except ConfigError:
        pass  # the bundle is gone: then this is all there is
    return value


def kill(states: States, id: str, signo: int, everything: bool) -> None:
    """Send a signal to the container's process. Raises ConfigError where it has ended."""
    container = states.load(id)
    if not _send(container, signo) and not everything:
        status = states.status(container)
        raise ConfigError(f"cannot kill a container that is {status}: {id}")


def _send(container: Container, signo: int) -> bool:
    if not container.pid:
        return False
    try:
        fd = os.pidfd_open(container.pid)
    except OSError as error:
        if error.errno == ESRCH:
            return False
        raise HostError(f"PID {container.pid}", "pidfd_open", error.errno or 0) from None
    try:
        if started(container.pid) != container.pid_started:
            return False  # the PID is another process's by now
        signal.pidfd_send_signal(fd, signo)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def delete(states: States, id: str, force: bool) -> None:
    """Remove what is left of a container. `force`: end it first, and be content if it is gone."""
    try:
        with states.locked(id):
            try:
                container = states.load(id)
            except ConfigError:
                if not force:
                    raise
                return states.remove(id)  # `create` was killed at its first step
            status = states.status(container)
            if status in ("creating", "running") and not force:
                raise ConfigError(f"cannot delete a container that is {status}: {id}")
            _end(container)
            cgroups.remove(container.cgroups)
            states.remove(id)
    except ConfigError:
        if not force or states.has(id):
            raise
        return None
    try:
        hooks.run(bundles.load(container.bundle), "poststop", id, "stopped", 0)
    except TenderError:
        if not force:  # the engine may have removed the bundle
            raise
    return None


END_S = 10  # for what was killed to be gone, on a busy machine


def _end(container: Container) -> None:
    deadline = time.monotonic() + END_S
    while _send(container, signal.SIGKILL):
        if time.monotonic() > deadline:
            raise HostError(f"PID {container.pid} does not end")
        time.sleep(0.001)


def processes(states: States, id: str) -> list[int]:
    """The PIDs of the container: the tender and what it has started."""
    container = states.load(id)
    if states.status(container) not in ("created", "running"):
        return []
    return cgroups.processes(container.cgroups) or [container.pid]
