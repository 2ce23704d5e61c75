"""`ptender image`: the archive or layout that it makes, as the image specification has it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tender._native import lib
from tender.cli import image as cli
from tender.errors import BuildError, ImageError, UsageError
from tender.image.elf import BINDINGS_NOTE
from tender.image.manifest import Device, Manifest
from tests.unit import elves

DEVICES = (
    Device("service", lib.MFT_DEV_NET_BASIC, 1),
    Device("storage", lib.MFT_DEV_BLOCK_BASIC, 2),
)
DISK = bytes(range(256)) * 2


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("web.hvt").write_bytes(elves.image(devices=DEVICES))
    Path("disk").write_bytes(DISK)


class Layout:
    """What an engine reads: everything by way of index.json, and each digest checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        assert json.loads((folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        (self.descriptor,) = json.loads((folder / "index.json").read_text())["manifests"]
        self.manifest = json.loads(self.blob(self.descriptor))
        self.config = json.loads(self.blob(self.manifest["config"]))
        (layer,) = self.manifest["layers"]
        self.blob(layer)
        assert self.config["rootfs"] == {"type": "layers", "diff_ids": [layer["digest"]]}
        self.root = folder / "root"
        with tarfile.open(self._path(layer)) as tar:
            tar.extractall(self.root)

    def _path(self, descriptor: Any) -> Path:
        algorithm, name = str(descriptor["digest"]).split(":")
        return self.folder / "blobs" / algorithm / name

    def blob(self, descriptor: Any) -> bytes:
        data = self._path(descriptor).read_bytes()
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == descriptor["digest"]
        assert len(data) == descriptor["size"]
        return data


def unpacked(archive: str) -> Layout:
    with tarfile.open(archive) as tar:
        tar.extractall("unpacked")
    return Layout(Path("unpacked"))


def test_an_archive() -> None:
    said = cli.main(
        ["web.hvt", "-t", "shop/web:1", "--block", "storage=disk", "--mem=64"]
        + ["--expose=80", "--expose=53/udp", "--", "--x", "y z"]
    )
    image = unpacked("web.tar")
    assert said == f"web.tar: shop/web:1 {image.descriptor['digest']}"
    names = image.descriptor["annotations"]
    assert names == {"org.opencontainers.image.ref.name": "shop/web:1"}
    assert image.descriptor["platform"] == {"architecture": "amd64", "os": "linux"}
    assert (image.config["architecture"], image.config["os"]) == ("amd64", "linux")
    assert image.config["config"]["Entrypoint"] == ["/unikernel/web.hvt"]
    assert image.config["config"]["Cmd"] == ["--x", "y z"]
    assert image.config["config"]["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}
    assert (image.root / "unikernel/web.hvt").read_bytes() == Path("web.hvt").read_bytes()
    assert (image.root / "unikernel/storage.img").read_bytes() == DISK
    annotations = {
        "com.urunc.unikernel.unikernelType": "mirage",
        "com.urunc.unikernel.hypervisor": "hvt",
        "com.urunc.unikernel.binary": "/unikernel/web.hvt",
        "com.urunc.unikernel.cmdline": "--x y z",
        "com.urunc.unikernel.block": "/unikernel/storage.img",
        "ptender.block.storage": "/unikernel/storage.img",
        "ptender.devices": "service:NET_BASIC storage:BLOCK_BASIC",
        "ptender.mem": "64",
        "ptender.ports": "80 53/udp",
    }
    assert image.manifest["annotations"] == annotations
    assert image.config["config"]["Labels"] == annotations
    in_root = json.loads((image.root / "urunc.json").read_text())
    assert {name: base64.b64decode(in_root[name]).decode() for name in in_root} == annotations


def test_a_layout() -> None:
    assert cli.main(["web.hvt", "-t", "web", "-o", "new/"]).startswith("new: web:latest sha256:")
    Path("there").mkdir()
    cli.main(["web.hvt", "-t", "web", "-o", "there"])
    assert Layout(Path("new")).descriptor == Layout(Path("there")).descriptor


def test_the_same_input_gives_the_same_bytes() -> None:
    cli.main(["web.hvt", "-t", "web"])
    before = Path("web.tar").read_bytes()
    os.utime("web.hvt", (0, 0))
    os.chmod("web.hvt", 0o600)
    cli.main(["web.hvt", "-t", "web"])
    assert Path("web.tar").read_bytes() == before


def test_how_a_guest_takes_its_address(capfd: pytest.CaptureFixture[str]) -> None:
    def kind(*arguments: str) -> str:
        cli.main(["web.hvt", "-t", "web", *arguments])
        annotations = unpacked("web.tar").manifest["annotations"]
        return str(annotations["com.urunc.unikernel.unikernelType"])

    assert kind() == "mirage"
    assert capfd.readouterr().err.count("\n") == 1
    assert kind("--guest=rumprun") == "rumprun"
    notes = [elves.abi_note(), elves.manifest_note(Manifest()), BINDINGS_NOTE]
    Path("web.hvt").write_bytes(elves.image(notes=notes))
    assert kind() == "ptender"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "Web"], "Web: not the name of an image"),
        (["-t", "web:a b"], "web:a b: not the name of an image"),
        (["-t", "web", "--block", "storage"], "--block=storage: NAME=FILE names"),
        (
            ["-t", "web", "--block", "service=disk"],
            "--block service=FILE: the manifest declares st",
        ),
        (
            ["-t", "web", "--block", "storage=/nowhere"],
            "/nowhere: Could not open: No such",
        ),
        (["-t", "web", "--block", "storage=/dev/zero"], "/dev/zero: not a regular file"),
        (["-t", "web", "--block", "storage=."], r"\.: not a regular file"),
        (["-t", "web", "--mem=0"], "argument --mem: invalid"),
        (["-t", "web", "-o", "/"], "/: the folder is not empty"),
        (["-t", "web", "-o", "no/such/file"], "no/such/file: No such file or directory"),
        (["-t", "web", "-o", "/dev/full"], "/dev/full: No space left on device"),
        ([], "required: -t/--tag"),
    ],
)
def test_bad_input_leaves_nothing(arguments: list[str], message: str) -> None:
    before = sorted(os.listdir())
    with pytest.raises((BuildError, ImageError, UsageError), match=message) as raised:
        cli.main(["web.hvt", *arguments])
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir()) == before


def test_no_kernel() -> None:
    with pytest.raises(ImageError, match="disk: "):
        cli.main(["disk", "-t", "web"])


def test_a_signal_leaves_nothing() -> None:
    """A FIFO as the output holds the command until it is ended."""
    os.mkfifo("fifo")
    before = sorted(os.listdir())
    command = [sys.executable, "-m", "tender", "image", "web.hvt", "-t", "web", "-o", "fifo"]
    environment = {**os.environ, "TMPDIR": os.getcwd()}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not any(name.startswith(".ptender") for name in os.listdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.stderr
        assert "Exiting on signal 15" in process.stderr.read()
    assert process.returncode == 1
    assert sorted(os.listdir()) == before
