"""What images and engines give that is wrong: one line of error, and nothing is left."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tender.image.manifest import Manifest
from tests.guest.oci.conftest import KERNEL, URUNC, Runtime, disk
from tests.unit import elves


@pytest.mark.parametrize("path", ["../outside", "/../outside", "link", "folder/../../../outside"])
def test_no_path_of_an_image_leaves_its_root(
    runtime: Runtime, make: Any, tmp_path: Path, path: str
) -> None:
    values = {f"{URUNC}binary": KERNEL, "ptender.block.storage": path}
    bundle = make("disk", annotations=values)
    outside = disk(bundle / "outside")
    (bundle / "rootfs/folder").mkdir()
    (bundle / "rootfs/link").symlink_to(outside)
    error = runtime.refuses("create", "-b", bundle, "one")
    assert "in the root file system: No such file or directory" in error


@pytest.mark.parametrize("path", ["fifo", "folder", "folder/loop", "@3", "--block=x", "d.img,ro"])
def test_a_disk_of_an_image_is_a_file_of_it(runtime: Runtime, make: Any, path: str) -> None:
    values = {f"{URUNC}binary": KERNEL, "ptender.block.storage": path}
    bundle = make("disk", annotations=values)
    disk(bundle / "rootfs/d.img")
    os.mkfifo(bundle / "rootfs/fifo")
    (bundle / "rootfs/folder").mkdir()
    (bundle / "rootfs/folder/loop").symlink_to("loop")
    error = runtime.refuses("create", "-b", bundle, "one")
    assert error.startswith(f"create: '{path}' in the root file system: ")


BAD = [
    ({"root": {}}, "root.path: missing"),
    ({"root": []}, "root: not an object"),
    ({"root__path": "a\0b"}, "root.path: 'a\\x00b' is not a text"),
    ({"process__args": [1]}, "process.args.0: 1 is not a text"),
    ({"process__args": "x"}, "process.args: 'x' is not a list"),
    ({"process__terminal": True}, "process.terminal takes --console-socket"),
    ({"mounts": [{"source": "x"}]}, "mounts[0].destination: missing"),
    ({"annotations": {"x": None}}, "annotations.x: missing"),
    (
        {"annotations": {f"{URUNC}binary": "/nowhere"}},
        "'/nowhere' in the root file system: No such",
    ),
    (
        {"annotations": {f"{URUNC}binary": "/unikernel"}},
        "'/unikernel' in the root file system: not",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, f"{URUNC}hypervisor": "qemu"}},
        "hypervisor: 'qemu' is not hvt",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, f"{URUNC}unikernelType": "--block"}},
        "unikernelType: '--block' is not one of mirage,",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, "ptender.mem": "512 --sandbox=off"}},
        "ptender.mem: '512 --sandbox=off' is not a number of MiB",
    ),
    (
        {"annotations": {f"{URUNC}binary": KERNEL, "ptender.ports": "80 8080:host"}},
        "ptender.ports: '80 8080:host' is not a list as '80 53/udp'",
    ),
    ({"linux": {"resources": {"memory": {"limit": "1"}}}}, "memory.limit: '1' is not an integer"),
    ({"linux": {"resources": {"memory": {"limit": 1 << 20}}}}, "memory limit is too low"),
    (
        {"linux": {"namespaces": [{"type": "network", "path": "/nowhere"}]}},
        "network namespace /nowhere: No such file",
    ),
    ({"linux": {"cgroupsPath": "a:b:c"}}, "systemd's groups are not supported"),
    ({"hooks": {"prestart": [{}]}}, "hooks.prestart[0].path: missing"),
    (
        {"hooks": {"prestart": [{"path": "/bin/true", "env": ["=x"]}]}},
        "hooks.prestart[0].env: '=x' is not NAME=VALUE",
    ),
    ({"hooks": {"prestart": [{"path": "/nowhere"}]}}, "hook prestart: /nowhere: "),
    ({"process__oomScoreAdj": 1001}, "oomScoreAdj: 1001 is not between -1000 and 1000"),
    ({"process__args": ["\ud800"]}, "process.args.0: '\\ud800' is not a text"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_malformed_bundle(
    runtime: Runtime, make: Any, changes: dict[str, Any], message: str
) -> None:
    assert message in runtime.refuses("create", "-b", make("hello", **changes), "one")


STATE = {"id": "one", "bundle": "/b", "created": "", "cgroups": [], "pid": 0, "pid_started": ""}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps({**STATE, "self": 1}),
        json.dumps({**STATE, "x" * 100_000: 1}),
        json.dumps({**STATE, "pid": "1"}),
        json.dumps({**STATE, "pid": -1}),
        json.dumps({**STATE, "pid": 1 << 40}),
        json.dumps({**STATE, "cgroups": "/sys"}),
        json.dumps({**STATE, "cgroups": ["/a\0b"]}),
        json.dumps({**STATE, "id": "two"}),
    ],
)
def test_a_state_that_is_damaged(runtime: Runtime, text: str) -> None:
    folder = runtime.root / "one"
    folder.mkdir(parents=True)
    runtime.root.chmod(0o700)
    (folder / "ptender.json").write_text(text)
    for words in (["state", "one"], ["start", "one"], ["kill", "one"], ["delete", "one"]):
        assert runtime.refuses(*words) == (
            f"{words[0]}: {folder}/ptender.json: not the state of a container: delete --force "
            "removes it"
        )
    assert runtime("list", "-q").stdout == ""
    runtime("delete", "--force", "one")


def test_states_that_others_may_have_made(runtime: Runtime) -> None:
    """They name what is killed and removed."""
    runtime.root.mkdir()
    runtime.root.chmod(0o1777)
    for words in (["list"], ["state", "one"], ["delete", "--force", "one"]):
        assert f"{runtime.root}: others may write to it: " in runtime.refuses(*words)


def test_what_is_listed_is_one_line(runtime: Runtime) -> None:
    folder = runtime.root / "one"
    folder.mkdir(parents=True)
    runtime.root.chmod(0o700)
    (folder / "ptender.json").write_text(json.dumps({**STATE, "bundle": "/\x1b[2J\n/\udcff"}))
    _, line = runtime("list").stdout.splitlines()
    assert line.split() == ["one", "0", "creating", r"/\x1b[2J\n/\udcff"]
    runtime("delete", "--force", "one")


def test_the_log_of_an_engine(runtime: Runtime, make: Any) -> None:
    """The error is in its format; `refuses` has read the other."""
    bundle = make("hello", root={})
    runtime.format = "text"
    done = runtime("create", "-b", bundle, "one", check=False)
    message = f"create: {bundle}/config.json: root.path: missing"
    assert done.stderr == f"ptender-oci: {message}\n"
    line = runtime.log.read_text()
    assert re.fullmatch(rf'time=\S+ level=error msg="{re.escape(message)}"\n', line)


def test_options_of_an_engine(runtime: Runtime, make: Any) -> None:
    bundle = make("hello", process__terminal=True)
    error = runtime.refuses("create", "-b", bundle, "--console-socket", "/nowhere", "one")
    assert error == "create: --console-socket /nowhere: No such file or directory"
    bundle = make("hello")
    error = runtime.refuses("create", "-b", bundle, "--pid-file", "/nowhere/pid", "one")
    assert error == "create: --pid-file /nowhere/pid: No such file or directory"
    assert "is not a signal" in runtime.refuses("kill", "one", "SIGNONE")
    runtime.root = bundle / "config.json"
    assert runtime.refuses("list") == f"list: {runtime.root}: Not a directory"
    assert "Not a directory" in runtime.refuses("create", "-b", bundle, "one")
    runtime.root = runtime.folder / "states"


def test_an_image_of_another_target(runtime: Runtime, make: Any) -> None:
    """It is refused where it is named as one; an entry point that is no image goes to runc."""
    values = {f"{URUNC}binary": KERNEL}
    virtio = elves.image(notes=[elves.abi_note(target=3), elves.manifest_note(Manifest())])
    for data, message in (
        (virtio, "Executable is not for the solo5-hvt or solo5-spt target"),
        (b"#!/bin/sh\n", f"{KERNEL}: "),
        (b"", f"{KERNEL}: "),
    ):
        bundle = make("hello", annotations=values)
        (bundle / f"rootfs{KERNEL}").write_bytes(data)
        assert message in runtime.refuses("create", "-b", bundle, "one")
        bundle = make("hello")
        (bundle / f"rootfs{KERNEL}").write_bytes(data)
        assert "neither runc nor crun is in PATH" in runtime.refuses("create", "-b", bundle, "one")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": "!"}', "[" * 100_000, '{"a": "AAAA"}', '{"a": "/w=="}']
)
def test_a_malformed_root_file(runtime: Runtime, make: Any, text: str) -> None:
    bundle = make("hello")
    (bundle / "rootfs/urunc.json").write_text(text)
    assert runtime.refuses("create", "-b", bundle, "one").startswith("create: /urunc.json: ")


def test_files_that_are_no_bundle(runtime: Runtime, make: Any) -> None:
    bundle = make("hello")
    (bundle / "config.json").write_text("[" * 100_000)
    assert "config.json: not JSON" in runtime.refuses("create", "-b", bundle, "one")
    (bundle / "config.json").unlink()
    assert "config.json: No such file" in runtime.refuses("create", "-b", bundle, "one")
    for id in ("..", "a/b", ""):
        assert "is not a container's ID" in runtime.refuses("create", "-b", bundle, id)


def test_an_annotation_is_no_option(runtime: Runtime, make: Any) -> None:
    """What the image says of its command line is the guest's."""
    values = {f"{URUNC}binary": KERNEL, f"{URUNC}cmdline": "--sandbox=off @3"}
    bundle = make("hello", annotations=values, process__args=[])
    assert "My command line: --sandbox=off @3" in runtime("run", "-b", bundle, "one").stdout
