"""A run of the bench: its tenders, its folder, its guests, its network namespace.

The rule here: everything that is made for a run is gone after it, however it ends. If the bench
is killed, the kernel ends its guests and the holder of its namespace, and the next run removes its
folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from bench.tenders import Tender, environment

ROOT = Path(__file__).parents[1]
BINDINGS = ROOT / "guest-bindings"
HELLO = ROOT / "tender/guests/hello-x86_64.hvt"
DISK_BYTES = 16 << 20
PREFIX = "ptender-bench-"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SOURCES = {  # by the name of a guest; the first has its manifest beside it
    "ping": (BINDINGS / "samples/ping.c", BINDINGS / "samples/net.c"),
    "web": (BINDINGS / "samples/web.c", BINDINGS / "samples/tcp.c", BINDINGS / "samples/net.c"),
    "disk": (BINDINGS / "samples/disk.c",),
    "sleep": (BINDINGS / "tests/sleep.c",),
    "count": (BINDINGS / "tests/count.c",),
    "readall": (ROOT / "bench/guests/readall.c",),
}


class Unavailable(Exception):
    """A row cannot be measured here; the text says why."""


class Session:
    """The tenders to compare, how often, and what they need on this machine."""

    def __init__(self, tenders: list[Tender], ptender: Path, pairs: int, quick: bool) -> None:
        self.tenders = tenders
        self.pairs = pairs
        self.quick = quick
        self.ptender = ptender
        parent = _in_memory()
        _remove_left_behind(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
        self._namespace: Namespace | None = None

    @property
    def on_kvm(self) -> list[Tender]:
        """Those that the stand-in for KVM_RUN can measure."""
        return [tender for tender in self.tenders if tender.kvm]

    def close(self) -> None:
        if self._namespace:
            self._namespace.close()
        shutil.rmtree(self.folder)

    @property
    def namespace(self) -> Namespace:
        if self._namespace is None:
            self._namespace = Namespace()
        return self._namespace

    def guest(self, name: str, target: str = "hvt") -> Path:
        """The image of a guest by its name, built once."""
        image = self.folder / f"{name}.{target}"
        if not image.exists():
            sources = SOURCES[name]
            command = [str(self.ptender), "build", *map(str, sources), "-o", str(image)]
            command += ["--target", target] if target != "hvt" else []
            manifest = sources[0].with_suffix(".json")
            command += ["--manifest", str(manifest)] if manifest.exists() else []
            check(command)
        return image

    def disk(self) -> Path:
        path = self.folder / "disk.img"
        if not path.exists():
            path.write_bytes(bytes(DISK_BYTES))
        return path


def _in_memory() -> Path:
    """A folder in memory, so that the speed of the machine's disk does not count."""
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def _remove_left_behind(parent: Path) -> None:
    """The folders of runs that were killed."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a tender that runs until it is ended; `stdout` has its output and its errors."""
    return subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check(command: list[str]) -> str:
    """Run a command; returns its output, raises Unavailable where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    if done.returncode:
        *_, last = ["", *(done.stderr or done.stdout).strip().splitlines()]
        raise Unavailable(f"{' '.join(command)}: {last}")
    return done.stdout


class Namespace:
    """A network namespace with two taps: "quiet", without traffic, and "talking", 10.0.0.1."""

    def __init__(self) -> None:
        if os.geteuid() or not os.path.exists("/dev/net/tun"):
            raise Unavailable("taps and network namespaces need root and /dev/net/tun")
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "echo; read end"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout
        self._holder.stdout.readline()
        self.enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]
        for name in ("all", "default"):
            setting = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
            self.run("sh", "-c", f"[ ! -e {setting} ] || echo 1 > {setting}")
        for command in (
            "tuntap add quiet mode tap",
            "tuntap add talking mode tap",
            "addr add 10.0.0.1/24 dev talking",
            "link set quiet up",
            "link set talking up",
        ):
            self.run("ip", *command.split())

    def run(self, *command: str) -> str:
        return check([*self.enter, *command])

    def close(self) -> None:
        self._holder.communicate()
