"""What a plain run imports: a module that is not in this list costs every start of every guest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import _cffi_backend
import pytest

from tender.cli import freeze
from tests.guest.conftest import ROOT, Build

PLAIN = {
    # the standard library's
    "_stat", "_struct", "_thread", "errno", "fcntl", "gc", "itertools", "mmap",
    # the compiled part
    "_cffi_backend", "tender._native",
    # ours
    "tender", "tender.accel", "tender.assemble", "tender.backends", "tender.boot",
    "tender.boot.bootinfo", "tender.boot.load",
    "tender.boot.layout", "tender.boot.x86_64", "tender.checks", "tender.cleanup", "tender.cli",
    "tender.cli.commandline", "tender.cli.main", "tender.cli.options", "tender.cli.values",
    "tender.clock", "tender.config", "tender.cpu", "tender.cpu.vcpu", "tender.dataclass",
    "tender.devices", "tender.engine", "tender.engine.engine", "tender.errors", "tender.host",
    "tender.hypercalls", "tender.image", "tender.image.elf", "tender.image.file",
    "tender.image.manifest", "tender.loop", "tender.machine", "tender.memory",
    "tender.modules", "tender.modules.assign", "tender.modules.block", "tender.modules.console",
    "tender.modules.net", "tender.modules.poll", "tender.modules.time", "tender.observe",
    "tender.observe.counters", "tender.outcome", "tender.sandbox", "tender.sandbox.confine",
    "tender.sandbox.fdtable", "tender.sandbox.policy", "tender.sandbox.sandbox",
    "tender.sandbox.seccomp", "tender.stop",
}  # fmt: skip
OF_CPU = {
    "kvm": {"tender.cpu.cpuid", "tender.kvm"},
    "native": {
        "tender.cpu.exceptions", "tender.cpu.instruction", "tender.cpu.native",
        "tender.cpu.native_state", "tender.cpu.privileged", "tender.cpu.x86_64",
    },
}  # fmt: skip
OF_DISK = {"tender.host.block", "tender.host.lock"}

CODE = """
import posix, sys
before, leave = set(sys.modules), posix._exit
def end(status):
    new = set(sys.modules) - before
    new = {{name for name in new if not name.endswith(".lib")}}
    loaders = {{name: getattr(sys.modules[name], '__loader__', None) for name in new}}
    found = {{name for name in new if type(loaders[name]).__module__ == 'tender.cli.frozen'}}
    for names in new, found:
        posix.write(2, ("\\n" + " ".join(sorted(names))).encode())
    leave(status)
posix._exit = end
sys.path += [{root!r}, {backend!r}]
sys.argv = ["-c", "ptender", *{words!r}]
exec(compile(open({script!r}).read(), "start", "exec"), {{}})
"""


def imported(*words: str, root: Path = ROOT) -> tuple[set[str], set[str]]:
    """What a run imports, and which of it from the file of tender/cli/frozen.py."""
    backend = str(Path(_cffi_backend.__file__).parent)
    script = str(ROOT / "bin" / "start.py")
    code = CODE.format(root=str(root), backend=backend, script=script, words=list(words))
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    new, found = done.stderr.split("\n")[-2:]
    return set(new.split()), set(found.split())


def test_a_plain_run(guest: Build, tmp_path: Path, cpu: str) -> None:
    if cpu == "soft":
        pytest.skip("unicorn's own imports, and its code of 20 MiB, cost more than all of ours")
    new, _ = imported(f"--cpu={cpu}", "--mem=8", str(guest("exit")))
    assert new - PLAIN - OF_CPU[cpu] == set(), "these cost every start"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    new, _ = imported(f"--cpu={cpu}", "--mem=8", "--block", str(image), str(guest("block")))
    assert new - PLAIN - OF_CPU[cpu] == OF_DISK, "the others cost every start with a disk"


def test_the_file_of_a_plain_run(guest: Build, tmp_path: Path, any_cpu: str) -> None:
    """All is found in it but what has changed, and nothing in that of another Python."""
    if any_cpu == "soft":
        pytest.skip("the file has the modules of a plain run, and not those of the software CPU")
    package = tmp_path / "tender"
    shutil.copytree(ROOT / "tender", package)
    (tmp_path / "seccomp").symlink_to(ROOT / "seccomp")
    freeze.write(str(package), str(package), in_place=True)
    run = (f"--cpu={any_cpu}", "--mem=8", str(guest("exit")))
    new, found = imported(*run, root=tmp_path)
    assert found == {name for name in new if name.startswith("tender") and name != "tender._native"}
    os.utime(package / "loop.py", (0, 0))
    with (package / "errors.py").open("a") as source:
        source.write("# changed")
    _, fewer = imported(*run, root=tmp_path)
    assert found - fewer == {"tender.errors", "tender.loop"}
    file = package / freeze.NAME
    file.write_bytes(b"else" + file.read_bytes()[4:])
    assert imported(*run, root=tmp_path)[1] == set()
