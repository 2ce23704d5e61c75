"""A container image of a unikernel, as the image specification of the Open Container Initiative
has it (version 1.0).

The same input gives the same bytes, so the layer is a plain tar file: what a compressor makes
depends on its version, and engines compress a layer when they push it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

from tender.errors import BuildError
from tender.image.elf import TARGETS
from tender.image.file import open_regular
from tender.image.output import put_in_place, work_folder
from tender.oci.annotations import ROOT_FILE, Unikernel, root_file, to_annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import IO, Any

    from typing_extensions import Buffer

    from tender.image.elf import Image

FOLDER = "unikernel"  # of the root file system: the kernel and its disks
SHOWN_FROM = 256 << 20  # bytes of a file that takes long enough to say so
PLATFORMS = {"x86_64": "amd64", "aarch64": "arm64"}
_TYPE = "application/vnd.oci.image"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"[a-zA-Z0-9.-]+(?::[0-9]+)?/"
_TAG = r":[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_REFERENCE = re.compile(rf"(?:{_HOST})?{_PART}(?:/{_PART})*({_TAG})?")


def check_reference(text: str) -> str:
    """NAME or NAME:TAG as an image's name, with `:latest` where it has no tag.

    Raises BuildError.
    """
    match = _REFERENCE.fullmatch(text) if len(text) < 256 else None
    if not match:
        raise BuildError(f"{text}: not the name of an image: NAME or NAME:TAG, NAME in lower case")
    return text if match[1] else f"{text}:latest"


def describe(
    image: Image,
    kernel: str,
    guest: str,
    args: tuple[str, ...],
    disks: Mapping[str, str],
    mem_mib: int | None,
    ports: tuple[str, ...],
) -> Unikernel:
    """What the container image of the unikernel `image` in the file `kernel` says of it.

    `disks` are files, by the name of the device. Raises BuildError for one that the manifest does
    not declare.
    """
    devices = tuple((device.name, device.type_name) for device in image.manifest.devices)
    for name in disks:
        if (name, "BLOCK_BASIC") not in devices:
            known = ", ".join(each for each, kind in devices if kind == "BLOCK_BASIC") or "no disk"
            raise BuildError(f"--block {name}=FILE: the manifest declares {known}")
    return Unikernel(
        guest,
        TARGETS[image.target],
        f"/{FOLDER}/{os.path.basename(kernel)}",
        args,
        {name: f"/{FOLDER}/{name}.img" for name in disks},
        devices,
        mem_mib,
        ports,
    )


def write(
    unikernel: Unikernel,
    machine: str,
    files: Mapping[str, str],
    reference: str,
    output: str,
    progress: Callable[[str], None],
) -> str:
    """Write the image to `output`: an archive, or a layout where that is a folder. Its digest.

    `machine` is "x86_64" or "aarch64". `files` are what the image has of `unikernel`: the path of
    each on this machine, by its path in the image. Raises BuildError, and leaves nothing then.
    """
    is_folder = output.endswith("/") or os.path.isdir(output)
    output = output.rstrip("/") or "/"
    if is_folder and os.path.exists(output) and os.listdir(output):
        raise BuildError(f"{output}: the folder is not empty: name a new one")
    with work_folder(output) as folder:
        layout = folder / "layout"
        try:
            digest = _make_layout(unikernel, machine, files, reference, layout, progress)
            if is_folder:
                os.replace(layout, output)
                return digest
            archive = folder / "archive.tar"
            with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
                for path in sorted(layout.rglob("*")):
                    if path.is_file():
                        with path.open("rb") as file:
                            _add_file(tar, str(path.relative_to(layout)), file)
        except OSError as error:
            raise BuildError(f"can't write {output}: {error.strerror}") from None
        put_in_place(archive, output)
    return digest


def _make_layout(
    unikernel: Unikernel,
    machine: str,
    files: Mapping[str, str],
    reference: str,
    layout: Path,
    progress: Callable[[str], None],
) -> str:
    """The folder `layout`, which is made; the digest of the image's manifest."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    values = to_annotations(unikernel)
    layer = layout / "layer"
    layer_digest = _write_layer(layer, files, root_file(values), progress)
    layer_size = layer.stat().st_size
    layer.rename(blobs / layer_digest)

    def blob(kind: str, value: Any, **more: Any) -> dict[str, Any]:
        data = json.dumps(value, sort_keys=True).encode()
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return _descriptor(kind, name, len(data), **more)

    platform = {"architecture": PLATFORMS[machine], "os": "linux"}
    container: dict[str, Any] = {
        "Entrypoint": [unikernel.binary],
        "Cmd": list(unikernel.args),
        "WorkingDir": "/",
        "Labels": values,
    }
    if unikernel.ports:
        container["ExposedPorts"] = {
            each if "/" in each else f"{each}/tcp": {} for each in unikernel.ports
        }
    config = blob(
        "config.v1+json",
        {
            **platform,
            "created": "1970-01-01T00:00:00Z",
            "config": container,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        },
    )
    manifest = blob(
        "manifest.v1+json",
        {
            "schemaVersion": 2,
            "mediaType": f"{_TYPE}.manifest.v1+json",
            "config": config,
            "layers": [_descriptor("layer.v1.tar", layer_digest, layer_size)],
            "annotations": values,
        },
        platform=platform,
        annotations={"org.opencontainers.image.ref.name": reference},
    )
    index = {"schemaVersion": 2, "manifests": [manifest]}
    (layout / "index.json").write_text(json.dumps(index, sort_keys=True))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(manifest["digest"])


def _descriptor(kind: str, digest: str, size: int, **more: Any) -> dict[str, Any]:
    return {"mediaType": f"{_TYPE}.{kind}", "digest": f"sha256:{digest}", "size": size, **more}


class _HashedFile(io.BufferedWriter):
    """A new file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Buffer) -> int:
        self.sha256.update(data)
        return super().write(data)


def _write_layer(
    path: Path, files: Mapping[str, str], root: bytes, progress: Callable[[str], None]
) -> str:
    """The root file system: `files`, and the annotations in ROOT_FILE. Its SHA-256."""
    with _HashedFile(path) as output:
        form = tarfile.GNU_FORMAT
        with tarfile.open(fileobj=output, mode="w|", bufsize=1 << 20, format=form) as tar:
            folder = tarfile.TarInfo(FOLDER)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
            for inside, source in sorted(files.items()):
                with open(open_regular(source), "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size >= SHOWN_FROM:
                        progress(f"{source}: {size >> 20} MiB")
                    _add_file(tar, inside.lstrip("/"), file)
            info = tarfile.TarInfo(ROOT_FILE)
            info.size, info.mode = len(root), 0o644
            tar.addfile(info, io.BytesIO(root))
    return output.sha256.hexdigest()


def _add_file(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    """Add a file with nothing of its owner and its times."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = os.fstat(file.fileno()).st_size, 0o755
    tar.addfile(info, file)
