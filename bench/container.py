"""A container from `podman run` to its end, beside a static program under runc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from bench.results import Result
from bench.rows import Row, in_turn
from bench.session import HELLO, Session, Unavailable, check
from bench.start import spawn_ms
from bench.tenders import Tender, environment, installed

SOURCE = '#include <stdio.h>\nint main(void) { return puts("Hello") < 0; }\n'
CONFIG = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
RUNC, OURS = "runc", "ptender-oci"
IMAGES = {RUNC: ["localhost/static:1", "/hello"], OURS: ["localhost/hello:1"]}


def measure_container(session: Session) -> list[Result]:
    podman, runc = shutil.which("podman"), shutil.which("runc")
    if podman is None or runc is None:
        raise Unavailable("podman and runc are not installed")
    runtimes = {RUNC: runc, OURS: str(installed().with_name("ptender-oci"))}
    folder = Path(tempfile.mkdtemp(prefix="podman-"))  # podman takes paths of 50 characters
    try:
        config = folder / "containers.conf"
        config.write_text(CONFIG)
        env = environment() | {"CONTAINERS_CONF": str(config)}
        places = [f"--root={folder}/root", f"--runroot={folder}/run", f"--tmpdir={folder}/tmp"]
        command = [podman, *places, "--cgroup-manager=cgroupfs"]
        for name in runtimes:
            archive = _archive(session.folder, name)
            load = ["load", "-q", "-i"] if name == OURS else ["import", "-q"]
            reference = [] if name == OURS else [IMAGES[name][0]]
            words = [*command, *load, str(archive), *reference]
            subprocess.run(words, check=True, env=env, stdout=subprocess.DEVNULL)

        def one(tender: Tender) -> float:
            words = ["run", "--rm", "--network=none"]
            words += (
                ["localhost/hello:1"] if tender.name == OURS else ["localhost/static:1", "/hello"]
            )
            return spawn_ms([*command, f"--runtime={runtimes[tender.name]}", *words], env)

        sides = [Tender(name, (), None) for name in runtimes]
        for side in sides:
            one(side)
        return [Result("container", "ms", in_turn(sides, session.pairs, one))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _archive(folder: Path, name: str) -> Path:
    archive = folder / f"{name}.tar"
    if name == OURS:
        check([str(installed()), "image", str(HELLO), "-t", "hello:1", "-o", str(archive)])
        return archive
    source, program = folder / "hello.c", folder / "hello"
    source.write_text(SOURCE)
    check([os.environ.get("CC", "cc"), "-O2", "-static", str(source), "-o", str(program)])
    with tarfile.open(archive, "w") as tar:
        tar.add(program, "hello")
    return archive


ROWS = [Row("container", "`podman run` to exit, beside a static program", measure_container)]
