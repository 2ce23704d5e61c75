"""The programs that an engine has run at the steps of a container's life."""

from __future__ import annotations

import json

from tender._native import lib
from tender.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.oci.bundle import Bundle, Hook

VERSION = "1.1.0"  # of the runtime specification


def run(bundle: Bundle, step: str, id: str, status: str, pid: int) -> None:
    """Run the programs of this step with the container's state on standard input.

    Raises ConfigError at the first that fails.
    """
    for hook in bundle.hooks[step]:
        _run(bundle, hook, step, id, status, pid)


def _run(bundle: Bundle, hook: Hook, step: str, id: str, status: str, pid: int) -> None:
    import subprocess  # few containers have hooks

    state = {
        "ociVersion": VERSION,
        "id": id,
        "status": status,
        "pid": pid,
        "bundle": bundle.folder,
        "annotations": dict(bundle.annotations),
    }
    try:
        done = subprocess.run(
            hook.args or [hook.path],
            executable=hook.path,
            input=json.dumps(state).encode(),
            env=dict(each.partition("=")[::2] for each in hook.env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=hook.timeout_s,
            preexec_fn=lib.host_end_with_parent,  # it holds up a command: it ends with that
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"hook {step}: {hook.path}: {error}") from None
    if done.returncode:
        status = f"status {done.returncode}"
        if done.returncode < 0:
            status = f"killed by signal {-done.returncode}"
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(": ".join(filter(None, [f"hook {step}", hook.path, status, said])))
