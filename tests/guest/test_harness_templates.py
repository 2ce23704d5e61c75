"""Templates of the pytest plugin: a guest that is booted once, and clones of it for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guest.conftest import Build
from tests.guest.inner import run

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("any_cpu", "no_other_plugins")

TEMPLATE = """
import pytest

@pytest.fixture(scope="module")
def template(module_unikernel, module_switch):
    net = {"service": module_switch.port()}
    guest = module_unikernel("ping.hvt", "--limit=2", net=net, mem_mib=8, snapshots=True)
    return guest.ready("listening")

@pytest.fixture
def guest(template, switch):
    return template.clone(net={"service": switch.port()})

made = []

@pytest.mark.parametrize("count", [1, 2])
def test_each_has_its_own(template, guest, switch, count):
    assert not template.running
    assert all(not each.running for each in made)  # with its test
    made.append(guest)
    assert switch.host("10.0.0.1/24").ping("10.0.0.2", count=count).received == count
    if count == 2:
        assert guest.wait().status == 0  # the limit is not that of the test before

def test_two_at_once(template, switch):
    other = switch.another()
    guests = [template.clone(net={"service": each.port()}) for each in (switch, other)]
    assert guests[0].pid != guests[1].pid
    for each in (switch, other):
        assert each.host("10.0.0.1/24").ping("10.0.0.2").received == 1

def test_a_clone_that_is_not_started(template, switch):
    guest = template.clone(net={"service": switch.port()}, start=False)
    assert not guest.running
    with guest:
        assert switch.host("10.0.0.1/24").ping("10.0.0.2").received == 1

def test_a_clone_ends_with_a_test(template):
    with pytest.raises(RuntimeError, match="let the test use `unikernel`"):
        template.clone()

def test_no_template(unikernel, switch):
    guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
    with pytest.raises(RuntimeError, match="no template: call ready"):
        guest.clone()
"""


DISKS = """
import pytest
from tender import BlockFile

@pytest.fixture(scope="module")
def disk(module_blockimage):
    return module_blockimage(4096)

@pytest.fixture(scope="module")
def template(module_unikernel, disk):
    block = {"storage": disk}
    return module_unikernel("visits.hvt", block=block, mem_mib=8, snapshots=True).ready("ready")

def go(disk):
    return disk.data[:512] + b"x" + disk.data[513:]

@pytest.mark.parametrize("number", [1, 2])
def test_a_copy(template, disk, blockimage, number):
    own = blockimage(go(disk))
    guest = template.clone(block={"storage": own})
    guest.console.wait_for("visit 1")
    assert guest.wait().status == 0
    assert own.data[0] == 1 and disk.data[0] == 0

@pytest.mark.parametrize("number", [1, 2])
def test_an_overlay(template, disk, tmp_path_factory, unikernel, number):
    file = tmp_path_factory.getbasetemp() / "disk.img"
    file.write_bytes(go(disk))
    guest = template.clone(block={"storage": BlockFile(file, overlay=True)})
    guest.console.wait_for("visit 1")
    assert guest.wait().status == 0
    assert file.read_bytes()[0] == 0
"""


def test_each_test_has_its_own_disk(pytester: pytest.Pytester, guest: Build) -> None:
    shutil.copy(guest("visits"), pytester.path)
    run(pytester, DISKS).assert_outcomes(passed=4)


def test_each_test_has_its_own_guest(pytester: pytest.Pytester, images: Path) -> None:
    run(pytester, TEMPLATE).assert_outcomes(passed=6)


def test_a_test_that_fails_shows_its_clone(pytester: pytest.Pytester, images: Path) -> None:
    source = TEMPLATE.split("made = []")[0] + "def test_it(guest):\n    assert False\n"
    result = run(pytester, source)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ping.hvt*"])
