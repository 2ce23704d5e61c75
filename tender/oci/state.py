"""What is kept of a container between the commands of its runtime: a folder of its own.

The folder is made first and removed last, so an identifier is never given twice, and what a killed
command leaves behind is found. Sources: the runtime specification, runtime.md; proc(5).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from contextlib import contextmanager, suppress
from errno import ENOTDIR

from tender import checks
from tender.dataclass import dataclass, field
from tender.errors import ConfigError, HostError, InvalidValue, UsageError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

STATE, FIFO = "ptender.json", "start"
PID_MAX = 1 << 22  # PID_MAX_LIMIT of linux/threads.h


def _text(name: str, value: Any) -> str:
    if checks.plain_text(value) is None:
        raise InvalidValue(name, value, "a text")
    return str(value)


def _paths(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise InvalidValue(name, value, "a list of paths")
    return tuple(checks.as_path(name, each) for each in value)


@dataclass
class Container:
    """A container that was created. Raises UsageError where a field is not what it should be."""

    id: str = field(_text)
    bundle: str = field(checks.as_path)
    created: str = field(_text)
    cgroups: tuple[str, ...] = field(_paths)
    pid: int = field(checks.whole(0, PID_MAX), default=0)  # until `create` has made the process
    # Field 22 of /proc/PID/stat: a PID alone may be another process by now.
    pid_started: str = field(_text, default="")


class States:
    """The containers of one folder: `root`, by default the runtime's own."""

    def __init__(self, root: str | None) -> None:
        # Root in a user namespace, as under rootless podman, has no /run of its own.
        own = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
        runtime = "/run" if os.access("/run", os.W_OK) else own
        self.root = root or os.path.join(runtime, "ptender-oci")
        self._check_root()

    def _check_root(self) -> None:
        """What is in there is killed and removed: it must be this user's word, or root's."""
        try:
            info = os.stat(self.root)
        except OSError:
            return  # it is made, or what opens it says why
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{self.root}: others may write to it: containers are kept in a folder of this "
                "user's own"
            )

    def path(self, id: str, name: str = "") -> str:
        """A file of the container's folder. Raises ConfigError for an ID that is malformed."""
        if not re.fullmatch(r"[A-Za-z0-9_+.-]{1,255}", id) or id in (".", ".."):
            raise ConfigError(f"{shown(id)} is not a container's ID: letters, digits, _ + - .")
        return os.path.join(self.root, id, name)

    def has(self, id: str) -> bool:
        """Whether a container of this ID is ours, if only in part."""
        return any(os.path.exists(self.path(id, name)) for name in (STATE, FIFO))

    def is_free(self, id: str) -> bool:
        """Whether no runtime has anything there, or one of ours has only begun to."""
        try:
            return not os.listdir(self.path(id))
        except OSError:
            return True

    def ids(self) -> list[str]:
        """The containers that are there. Raises HostError."""
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HostError(self.root, "opendir", error.errno or 0) from None
        return [id for id in names if os.path.exists(self.path(id, STATE))]

    def make(self, id: str) -> int:
        """Make the container's folder; a descriptor of it. Raises ConfigError where it is there."""
        try:
            os.makedirs(self.root, 0o700, exist_ok=True)
            os.mkdir(self.path(id), 0o700)
            folder = os.open(self.path(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.mkfifo(FIFO, 0o600, dir_fd=folder)
            except BaseException:
                self.give_up(folder, id)
                os.close(folder)
                raise
            return folder
        except FileExistsError:
            if not os.path.isdir(self.root):
                raise HostError(self.root, "mkdir", ENOTDIR) from None
            raise ConfigError(f"container with ID {id} exists already") from None
        except OSError as error:
            raise HostError(self.path(id), "mkdir", error.errno or 0) from None

    def remove(self, id: str) -> None:
        """Remove the folder; one that is gone is no error.

        The state goes last: whoever is killed before that has left a container to delete.
        """
        try:
            for name in (FIFO, f"{STATE}.new", STATE):
                with suppress(FileNotFoundError):
                    os.unlink(self.path(id, name))
            with suppress(FileNotFoundError):
                os.rmdir(self.path(id))
        except OSError as error:
            raise HostError(f"cannot remove {self.path(id)}", None, error.errno or 0) from None

    def save(self, folder: int, container: Container) -> None:
        """Write the state into its folder: whole, or not at all.

        Raises ConfigError where it was deleted meanwhile: the ID may be another container's by now.
        """
        new = f"{STATE}.new"
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600, dir_fd=folder), "w") as file:
                json.dump(container.__dict__, file)
            os.replace(new, STATE, src_dir_fd=folder, dst_dir_fd=folder)
        except FileNotFoundError:
            raise ConfigError(f"container with ID {container.id} was deleted meanwhile") from None
        finally:
            fcntl.flock(folder, fcntl.LOCK_UN)

    def give_up(self, folder: int, id: str) -> None:
        """Remove a folder that was made, unless somebody else has."""
        fcntl.flock(folder, fcntl.LOCK_EX)
        if self._is(folder, id):
            self.remove(id)
        fcntl.flock(folder, fcntl.LOCK_UN)

    def load(self, id: str) -> Container:
        """The state of a container. Raises ConfigError where there is none."""
        try:
            with open(self.path(id, STATE)) as file:
                value = json.load(file)
            container = Container(**value)
            if container.id != id:
                raise ValueError
        except FileNotFoundError:
            raise ConfigError(f"container with ID {id} does not exist") from None
        except OSError as error:
            raise HostError(self.path(id, STATE), None, error.errno or 0) from None
        except (ValueError, TypeError, RecursionError, UsageError):
            raise ConfigError(
                f"{self.path(id, STATE)}: not the state of a container: delete --force removes it"
            ) from None
        return container

    def status(self, container: Container) -> str:
        """One of runtime.md: "creating", "created", "running" or "stopped"."""
        if not container.pid:
            return "creating"
        if started(container.pid) != container.pid_started:
            return "stopped"
        return "created" if os.path.exists(self.path(container.id, FIFO)) else "running"

    @contextmanager
    def locked(self, id: str) -> Iterator[None]:
        """One command at a time for a container. Raises ConfigError where there is none."""
        try:
            fd = os.open(self.path(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise ConfigError(f"container with ID {id} does not exist") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not self._is(fd, id):
                raise ConfigError(f"container with ID {id} does not exist")
            yield
        finally:
            os.close(fd)

    def _is(self, fd: int, id: str) -> bool:
        """Whether this folder is still the container's, and not one that was deleted meanwhile."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path(id)))
        except OSError:
            return False


def started(pid: int) -> str | None:
    """When a process began, in clock ticks of this boot; None where it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
