"""Limits as files of control groups, in hierarchies that the test makes of ordinary files.

Version 2 by its documentation: Linux, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tender.errors import HostError
from tender.oci import cgroups

ALL = "cpuset cpu io memory pids"
FILES = ["memory.max", "memory.low", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight"]
FILES += ["cpuset.cpus", "cpuset.mems", "cgroup.procs"]


def mounts(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> None:
    path = folder / "mountinfo"
    path.write_text("".join(f"30 1 0:26 / {folder}/{line}\n" for line in lines))
    monkeypatch.setattr(cgroups, "MOUNTS", str(path))


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The group /pod/one of version 2, with the files that a kernel makes."""
    mounts(monkeypatch, tmp_path, "v2 rw,nosuid - cgroup2 cgroup2 rw")
    group = tmp_path / "v2/pod/one"
    group.mkdir(parents=True)
    for folder in (group, group.parent, group.parent.parent):
        (folder / "cgroup.controllers").write_text(ALL)
        (folder / "cgroup.subtree_control").touch()
    for name in FILES:
        (group / name).touch()
    return group


@pytest.mark.parametrize(
    ("limits", "files"),
    [
        ({}, {}),
        (
            {"memory.limit": 1 << 26, "memory.swap": 1 << 27, "memory.reservation": 1 << 25},
            {
                "memory.max": "67108864",
                "memory.swap.max": "67108864",
                "memory.low": "33554432",
            },
        ),
        (
            {"memory.limit": 1 << 26, "memory.swap": 1 << 26},
            {"memory.max": "67108864", "memory.swap.max": "0"},
        ),
        (
            {"memory.limit": -1, "memory.swap": -1, "pids.limit": -1},
            {"memory.max": "max", "memory.swap.max": "max", "pids.max": "max"},
        ),
        ({"cpu.quota": 50000, "cpu.period": 200000}, {"cpu.max": "50000 200000"}),
        ({"cpu.quota": -1}, {"cpu.max": "max 100000"}),
        ({"cpu.shares": 2}, {"cpu.weight": "1"}),
        ({"cpu.shares": 1024}, {"cpu.weight": "39"}),
        ({"cpu.shares": 262144}, {"cpu.weight": "10000"}),
        ({"cpu.cpus": "0-1", "cpu.mems": "0"}, {"cpuset.cpus": "0-1", "cpuset.mems": "0"}),
        ({"pids.limit": 50}, {"pids.max": "50"}),
    ],
)
def test_limits_of_version_2(group: Path, limits: Any, files: dict[str, str]) -> None:
    groups = cgroups.find("/pod/one")
    assert [each.folder for each in groups] == [str(group)]
    cgroups.make(groups, limits)
    written = {name: (group / name).read_text() for name in FILES}
    assert {name: text for name, text in written.items() if text} == files
    cgroups.join((str(group),))
    assert cgroups.processes((str(group),)) == [os.getpid()]


def test_each_ancestor_passes_the_controllers_on(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group itself does not: then it could have no process."""
    (group.parent / "cgroup.controllers").write_text("memory pids")
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(cgroups, "_write", lambda path, value: written.append((path, value)))
    cgroups.make(cgroups.find("/pod/one"), {})
    top, pod = (str(folder / "cgroup.subtree_control") for folder in group.parents[1::-1])
    expected = [(top, f"+{name}") for name in ("memory", "cpu", "cpuset", "pids")]
    assert written == [*expected, (pod, "+memory"), (pod, "+pids")]


def test_a_controller_that_is_not_there(group: Path) -> None:
    (group / "pids.max").unlink()
    with pytest.raises(HostError) as error:
        cgroups.make(cgroups.find("/pod/one"), {"pids.limit": 50})
    assert str(error.value) == f"{group}/pids.max: 50: No such file or directory"
    (group / "memory.swap.max").unlink()  # of a kernel without swap
    cgroups.make(cgroups.find("/pod/one"), {"memory.limit": 1 << 26, "memory.swap": 1 << 27})
    with pytest.raises(HostError, match="less than memory.limit"):
        cgroups.make(cgroups.find("/pod/one"), {"memory.limit": 1 << 26, "memory.swap": 1})


def test_version_1_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts(
        monkeypatch,
        tmp_path,
        "unified rw - cgroup2 cgroup2 rw",
        "cpu rw - cgroup cgroup rw,cpu,cpuacct",
        "systemd rw - cgroup cgroup rw,name=systemd",
        "pids rw shared:9 - cgroup cgroup rw,pids",
    )
    groups = cgroups.find("one")
    assert [Path(each.folder).parent.name for each in groups] == ["cpu", "pids"]
    for each in groups:
        Path(each.folder).mkdir(parents=True)
    for name in ("cpu/one/cpu.shares", "cpu/one/cpu.cfs_quota_us", "pids/one/pids.max"):
        (tmp_path / name).touch()
    cgroups.make(groups, {"cpu.shares": 512, "cpu.quota": -1, "pids.limit": -1})
    assert (tmp_path / "cpu/one/cpu.shares").read_text() == "512"
    assert (tmp_path / "cpu/one/cpu.cfs_quota_us").read_text() == "-1"
    assert (tmp_path / "pids/one/pids.max").read_text() == "max"


@pytest.mark.parametrize("path", ["", "/", "..", "/pod/../..", "../v2-beside"])
def test_no_path_leaves_the_hierarchy(group: Path, path: str) -> None:
    with pytest.raises(HostError, match="not below"):
        cgroups.find(path)
