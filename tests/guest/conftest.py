"""Real guests on a real CPU, run as a user runs them: by the installed command."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tender.cpu import native
from tests.guest.ordinary import NOBODY
from tests.needs import needs

ROOT = Path(__file__).parents[2]
BINDINGS = ROOT / "guest-bindings"
PTENDER = Path(sys.executable).with_name("ptender")
CPUS = ("kvm", "native", "soft")
NEEDS_FP = {"fp"}  # guests that are built with floating point
NEEDS = {
    "ping": ["net"],
    "ping2": ["net"],
    "ping6": ["net"],
    "talk": ["net"],
    "web": ["net", "tcp"],
}  # sources beside their own

Run = Callable[..., subprocess.CompletedProcess[str]]
Build = Callable[[str], Path]


def builder(folder: Path, *options: str) -> Build:
    """Build a guest of guest-bindings/tests or /samples by its name, once; its path."""
    folder.mkdir(parents=True, exist_ok=True)

    def build(name: str) -> Path:
        output = folder / f"{name}.hvt"
        with open(folder / f"{name}.lock", "w") as lock:  # one of the workers builds it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                _build(name, output, options)
        return output

    return build


def _build(name: str, output: Path, options: tuple[str, ...]) -> None:
    home = "samples" if (BINDINGS / "samples" / f"{name}.c").exists() else "tests"
    source = BINDINGS / home / f"{name}.c"
    more = [BINDINGS / "samples" / f"{part}.c" for part in NEEDS.get(name, ())]
    words = [str(PTENDER), "build", *options, *map(str, [source, *more]), "-o", str(output)]
    manifest = source.with_suffix(".json")
    words += ["--manifest", str(manifest)] if manifest.exists() else []
    words += ["--fp"] if name in NEEDS_FP else []
    subprocess.run(words, check=True)


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this run that all its workers share."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a guest by its name, once; its path.

    PTENDER_TEST_GUESTS names a folder where they are kept: a slow machine (`./check --amdv`) runs
    what a fast one has built.
    """
    kept = os.environ.get("PTENDER_TEST_GUESTS")
    return builder(Path(kept) if kept else shared_folder(tmp_path_factory, "guests"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--cpu")
        metafunc.parametrize("cpu", CPUS if wanted == "all" else [wanted], indirect=True)


def missing(cpu: str) -> str:
    """Why this machine has no such CPU for guests; "" if it has."""
    if cpu == "kvm":
        return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no access to /dev/kvm"
    if cpu == "soft":
        has_unicorn = importlib.util.find_spec("unicorn") is not None
        return "" if has_unicorn else "the software CPU needs unicorn"
    reason = native.missing()
    return f"no native CPU: {reason}" if reason else ""


@pytest.fixture
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU that guests run on in this test: every test runs once on each."""
    name: str = request.param
    if reason := missing(name):
        pytest.skip(reason)
    monkeypatch.setenv("PTENDER_CPU", name)
    return name


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the user's of tests/guest/ordinary.py."""
    folder = Path(tempfile.mkdtemp(prefix="ptender-"))
    folder.chmod(0o755)
    home = folder / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, int(NOBODY), int(NOBODY))
    yield home
    shutil.rmtree(folder)


@pytest.fixture
def any_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU of a test that does not depend on it, which runs once: the one that starts faster."""
    wanted: str = request.config.getoption("--cpu")
    best = next((name for name in ("native", "soft") if not missing(name)), "kvm")
    name = best if wanted == "all" else wanted
    if name == "kvm" and (reason := missing(name)):
        pytest.skip(reason)
    monkeypatch.setenv("PTENDER_CPU", name)
    return name


@pytest.fixture
def kvm(cpu: str) -> None:
    """An older name of `cpu`, where it does not matter which."""


@pytest.fixture
def ptender(cpu: str) -> Run:
    """Run the command to its end: `ptender("--mem=4", path).stdout`."""

    def run(
        *words: object, timeout: float = 100, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
        return subprocess.run(
            [str(PTENDER), *map(str, words)], timeout=timeout, **(settings | options)
        )

    return run


class Namespace:
    """A network namespace that ends with the test."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "echo; exec sleep 3600"], stdout=subprocess.PIPE
        )
        assert self._holder.stdout
        self._holder.stdout.readline()
        self.enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]
        self.ip("link set lo up")

    def ip(self, words: str) -> str:
        return self.run("ip", *words.split()).stdout

    def run(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [*self.enter, *map(str, words)]
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=100)

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [*self.enter, *map(str, words)]
        return subprocess.Popen(command, text=True, **(settings | options))

    def tap(self, name: str, *words: str) -> None:
        self.ip(f"tuntap add {name} mode tap")
        for word in words:
            self.ip(f"addr add {word} dev {name}")
        self.ip(f"link set {name} up")

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout
        self._holder.stdout.close()


@pytest.fixture
def namespace(cpu: str) -> Iterator[Namespace]:
    yield from open_namespace()


def open_namespace() -> Iterator[Namespace]:
    """A network namespace for one test, where there can be one."""
    if os.geteuid() != 0:
        pytest.skip("taps and network namespaces need root")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun")
    needs("unshare", "--net", "sh", "-c", "ip link set lo up && ip tuntap add tap0 mode tap")
    value = Namespace()
    yield value
    value.close()


@pytest.fixture
def images(pytester: pytest.Pytester, guest: Build) -> Path:
    """The folder of the inner tests, with images beside them."""
    for name in ("ping", "ping2", "talk", "web", "hello", "disk", "abort", "badgpa"):
        shutil.copy(guest(name), pytester.path)
    return pytester.path


@pytest.fixture
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner runs load those that they name, and no others."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
