"""What a plain run imports: a module that is not in this list costs every start of every guest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import _cffi_backend
import pytest

from tests.guest.conftest import ROOT, Build

PLAIN = {
    # the standard library's
    "__future__", "_collections_abc", "_stat", "_struct", "_thread", "errno", "fcntl", "gc",
    "genericpath", "itertools", "mmap", "os", "os.path", "posixpath", "stat", "struct",
    # the compiled part
    "_cffi_backend", "tender._native",
    # ours
    "tender", "tender.accel", "tender.backends", "tender.boot", "tender.boot.bootinfo",
    "tender.checks", "tender.boot.layout", "tender.boot.x86_64", "tender.cleanup", "tender.cli",
    "tender.cli.commandline", "tender.cli.main", "tender.cli.options", "tender.cli.values",
    "tender.clock", "tender.config", "tender.cpu",
    "tender.cpu.vcpu", "tender.dataclass", "tender.devices", "tender.engine",
    "tender.engine.engine",
    "tender.errors", "tender.host", "tender.hypercalls", "tender.image", "tender.image.elf",
    "tender.image.file", "tender.image.manifest", "tender.loop", "tender.machine",
    "tender.memory", "tender.modules", "tender.modules.assign",
    "tender.modules.block", "tender.modules.console", "tender.modules.net", "tender.modules.poll",
    "tender.modules.time", "tender.observe", "tender.observe.counters", "tender.outcome",
    "tender.sandbox", "tender.sandbox.confine", "tender.sandbox.fdtable", "tender.sandbox.policy",
    "tender.sandbox.sandbox", "tender.sandbox.seccomp", "tender.stop",
}  # fmt: skip

CODE = """
import os, sys
before = set(sys.modules)
sys.path += [{root!r}, {backend!r}]
from tender.cli.main import main
status = main(["ptender", *{words!r}])
new = set(sys.modules) - before
new = {{name for name in new if not name.endswith(".lib")}}
os.write(2, ("\\n" + " ".join(sorted(new))).encode())
os._exit(status)  # as the command does: it is in the sandbox
"""


def imported(*words: str) -> set[str]:
    backend = str(Path(_cffi_backend.__file__).parent)
    code = CODE.format(root=str(ROOT), backend=backend, words=list(words))
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stderr.splitlines()[-1].split())


OF_CPU = {
    "kvm": {"tender.cpu.cpuid", "tender.kvm"},
    "native": {
        "_signal", "tender.cpu.exceptions", "tender.cpu.instruction", "tender.cpu.native",
        "tender.cpu.native_state", "tender.cpu.privileged", "tender.cpu.x86_64",
    },
}  # fmt: skip


def test_a_plain_run(guest: Build, tmp_path: Path, cpu: str) -> None:
    if cpu == "soft":
        pytest.skip("unicorn's own imports, and its code of 20 MiB, cost more than all of ours")
    plain = PLAIN | OF_CPU[cpu]
    new = imported(f"--cpu={cpu}", "--mem=8", str(guest("exit")))
    assert new - plain == set(), "these cost every start"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    new = imported(f"--cpu={cpu}", "--mem=8", "--block", str(image), str(guest("block")))
    assert new - plain == {"tender.host.block", "tender.host.lock"}, (
        "the others cost every start with a disk"
    )
