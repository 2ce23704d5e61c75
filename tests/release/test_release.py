"""What ./release makes: that it is whole, works where it is installed, and is the same when made
again."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tender import __version__

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEM = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # Debian's tools, with its Python


def released(*, umask: int = 0o022, zone: str = "UTC") -> dict[str, str]:
    """Run ./release: the SHA-256 of each file that it makes."""
    shutil.rmtree(DIST, ignore_errors=True)
    environment = {**os.environ, "TZ": zone, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [ROOT / "release"], env=environment, umask=umask, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(DIST.iterdir())
    }


@pytest.fixture(scope="module", autouse=True)
def files() -> dict[str, str]:
    return released()


def only(pattern: str) -> Path:
    (path,) = DIST.glob(pattern)
    return path


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The source distribution, as a user unpacks it."""
    with tarfile.open(only("*.orig.tar.gz")) as archive:
        archive.extractall(tmp_path)
    return tmp_path / f"ptender-{__version__}"


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # What marks the processes of these tests would have the tests of a release end them.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LC_PTENDER")}
    command = list(map(str, words))
    done = subprocess.run(command, cwd=cwd, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def test_made_twice_it_is_the_same(files: dict[str, str]) -> None:
    assert released(umask=0o077, zone="Asia/Tokyo") == files


def test_no_build_warns() -> None:
    text = (ROOT / "build/setup.log").read_text()
    begin = text.rindex("-m build --sdist")
    end = text.index("$ env -C", begin)  # Debian's own tools follow
    ours = [
        line
        for line in text[begin:end].splitlines()
        if "warning" in line.lower()
        and not line.startswith("WARNING:auditwheel.wheel_abi:ignoring")
    ]
    assert ours == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_source_distribution_is_the_checkout(unpacked: Path) -> None:
    tracked = set(run("git", "ls-files", cwd=ROOT).stdout.splitlines())
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if not path.is_dir()}
    made = {each for each in packed if each.startswith("ptender.egg-info/")}
    assert packed - made - {"PKG-INFO", "setup.cfg"} == tracked
    for name in ("check", "quickstart", "release", "debian/rules", ".ci/run"):
        assert os.access(unpacked / name, os.X_OK)


@pytest.fixture
def from_source(unpacked: Path) -> Path:
    """The Python of an environment with the unpacked package and what its tests import."""
    python = unpacked / ".venv/bin/python"
    folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run(sys.executable, "-m", "venv", python.parents[1])
    theirs = run(python, "-c", folder).stdout.strip()
    Path(theirs, "ours.pth").write_text(run(sys.executable, "-c", folder).stdout)
    run(python, "-m", "pip", "install", "--no-deps", "-e", ".", cwd=unpacked)
    return python


def test_its_tests_run_where_it_is_unpacked(from_source: Path) -> None:
    folder = from_source.parents[2]
    where = "import tender; print(tender.__file__)"
    assert run(from_source, "-c", where, cwd=folder).stdout.startswith(str(folder))
    names = ("unit/test_packaging", "unit/test_pages", "guest/test_demo")
    files = [f"tests/{name}.py" for name in names]
    done = run(from_source, "-m", "pytest", "-q", *files, cwd=folder)
    assert " passed" in done.stdout


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_on(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""]).returncode:
        pytest.skip(f"Python {version} is not installed")
    run(python, "-m", "venv", tmp_path / "venv")
    bin = tmp_path / "venv/bin"
    run(bin / "python", "-m", "pip", "install", only(f"*_{platform.machine()}.whl"))
    assert "Solo5: solo5_exit(0) called\n" in run(bin / "ptender", "demo").stdout
    program = (
        "import tender; from pathlib import Path; kernel = next("
        "Path(tender.__file__).parent.glob('guests/*x86_64.hvt')); "
        "print(tender.Guest(kernel).run().reason)"
    )
    assert run(bin / "python", "-I", "-c", program).stdout.endswith("halted\n")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_has_what_its_machine_runs(machine: str) -> None:
    elf_machine = {"x86_64": 62, "aarch64": 183}[machine]
    with zipfile.ZipFile(only(f"*-cp310-abi3-manylinux_*_{machine}.whl")) as wheel:
        names = set(wheel.namelist())
        for name in ("tender/_native.abi3.so", "tender/_soft.abi3.so", "tender/host/frame-filter"):
            header = wheel.read(name)[:20]
            assert header[:4] == b"\x7fELF"
            assert int.from_bytes(header[18:20], "little") == elf_machine, name
        assert ("tender/cpu/native-guest" in names) == (machine == "x86_64")
        metadata = wheel.read(f"ptender-{__version__}.dist-info/METADATA").decode()
    for line in (
        f"Version: {__version__}",
        "Author: The ptender authors",
        "License-Expression: ISC",
    ):
        assert f"\n{line}\n" in metadata
    assert "\nProject-URL: " in metadata


def test_the_debian_package(tmp_path: Path) -> None:
    lintian = shutil.which("lintian", path=SYSTEM["PATH"])
    package = only("*.deb")
    if lintian:
        words = [lintian, "--allow-root", str(only("*.dsc")), str(package)]
        done = subprocess.run(words, env=SYSTEM, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")
    run("dpkg-deb", "-x", package, tmp_path)
    for path in (
        "usr/bin/ptender",
        "usr/bin/solo5-hvt.2",
        "usr/bin/solo5-spt",
        "usr/bin/ptender-oci",
        "usr/share/man/man1/ptender.1.gz",
        "usr/share/bash-completion/completions/ptender.bash",
        "usr/share/zsh/vendor-completions/_ptender",
        "usr/share/fish/vendor_completions.d/ptender.fish",
    ):
        assert (tmp_path / path).exists(), path
    (unit,) = tmp_path.glob("**/systemd/system/ptender@.service")
    assert "\nExecStart=/usr/bin/ptender " in unit.read_text()
    (modules,) = tmp_path.glob("usr/lib/python3*/dist-packages")
    command = (
        f"import sys; sys.path.insert(0, {str(modules)!r}); from tender.cli.main import main; "
        "import os; os._exit(main(['ptender', 'demo']))"
    )
    assert "solo5_exit(0) called" in run(sys.executable, "-IS", "-c", _with_cffi(command)).stdout


def _with_cffi(command: str) -> str:
    import _cffi_backend

    return f"import sys; sys.path.append({str(Path(_cffi_backend.__file__).parent)!r}); {command}"
