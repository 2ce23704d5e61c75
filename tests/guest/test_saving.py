"""`Guest.snapshot`, `restore` and `fork`: guests that are saved and go on, in the sandbox."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tender import Guest, GuestEnded, VirtualTime
from tender.errors import ConfigError, DeviceError, SnapshotError, TenderError, UsageError
from tender.testing.net.switch import Switch
from tests.guest.conftest import Build, missing
from tests.waiting import children

if TYPE_CHECKING:
    from tender.embed.interfaces import Cpu

MEM_MIB = 8
LAST = 199  # the step of a guest that counts
SLACK = 64 << 10  # bytes of a file beside the pages that a guest has touched


@pytest.fixture
def counting(guest: Build, cpu: Cpu) -> Iterator[Guest]:
    """A guest that counts, one in 5 ms, and can be saved."""
    words = (str(LAST + 1), "5")
    with Guest(guest("count"), *words, mem_mib=MEM_MIB, cpu=cpu, snapshots=True) as one:
        one.console.wait_for("count 3 ")
        yield one


def counted(guest: Guest) -> list[int]:
    return [int(each) for each in re.findall(r"^count (\d+) ", guest.console.text, re.M)]


def check_end(guest: Guest, cpu: str) -> None:
    """It ends by itself; and its time has not leapt, unless this is a KVM that can't set it."""
    outcome = guest.run()
    assert outcome.reason == "halted"
    assert outcome.status == 0 or cpu == "kvm", guest.console.text


def test_a_guest_is_saved_and_both_go_on(counting: Guest, cpu: str, tmp_path: Path) -> None:
    file = tmp_path / "saved"
    saved = counting.snapshot(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_blocks * 512 <= saved.size + SLACK < 1 << 20
    assert os.listdir(tmp_path) == ["saved"]
    restored = Guest.restore(file)
    assert not restored.running
    check_end(restored, cpu)
    assert counting.wait().status == 0
    first = counted(restored)[0]
    assert first > 3
    assert counted(restored) == list(range(first, LAST + 1))  # no step is lost, or made twice
    assert counted(counting) == list(range(LAST + 1))


def test_a_guest_is_restored_once_unless_it_is_a_clone(
    counting: Guest, cpu: str, tmp_path: Path
) -> None:
    file = tmp_path / "saved"
    saved = counting.snapshot(file, stop=True)
    outcome = counting.wait()
    assert (outcome.reason, outcome.status) == ("stopped", 0)
    check_end(Guest.restore(file), cpu)
    with pytest.raises(ConfigError, match=r"restored before.*clone="):
        Guest.restore(file).start()
    check_end(Guest.restore(file, clone=True), cpu)
    check_end(Guest.restore(saved), cpu)
    with pytest.raises(UsageError, match=r"restored before.*clone=True"):
        Guest.restore(saved)
    saved.close()
    saved.close()
    with pytest.raises(UsageError, match="closed"):
        Guest.restore(saved, clone=True)


def test_forks_have_a_life_of_their_own(guest: Build, cpu: Cpu) -> None:
    options: dict[str, Any] = {"mem_mib": MEM_MIB, "cpu": cpu, "snapshots": True}
    with Guest(guest("count"), "100000", "5", **options) as one:
        one.console.wait_for("count 3 ")
        clones = one.fork(3, deadline=600.0)
        assert not any(each.running for each in clones)
        for each in clones:
            each.start()
        assert len({one.pid, *(each.pid for each in clones)}) == 4
        assert clones[0].kill().reason == "killed"
        for each in (one, *clones[1:]):
            last = counted(each)[-1] if counted(each) else 0
            each.console.wait_for(f"count {last + 20} ")
        assert {each.stop().reason for each in clones[1:]} == {"stopped"}
    if "random 0" not in one.console.text:  # this CPU has RDRAND
        drawn = [set(re.findall(r"random (\w+)", each.console.text)) for each in clones[1:]]
        assert not drawn[0] & drawn[1]


def writable(pid: int) -> set[tuple[str, int]]:
    """The files that a process can write to by a descriptor or a shared mapping."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        flags = re.search(
            r"^flags:\s+(\d+)$", Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text(), re.M
        )
        assert flags
        if int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY:
            found.add((os.readlink(fd), fd.stat().st_ino))
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        _, protection, _, _, inode, *path = line.split(maxsplit=5)
        if protection[1::2] == "ws":
            found.add((path[0], int(inode)))
    # All vCPUs, of whatever VM, have one anonymous inode.
    return {each for each in found if not each[0].startswith(("/dev/null", "anon_inode:"))}


def test_clones_share_nothing_that_one_can_write_to(guest: Build, cpu: Cpu) -> None:
    with Guest(guest("sleep"), "600000", mem_mib=4, cpu=cpu, snapshots=True) as first:
        clones = first.fork(2, cpu=cpu)
        with clones[0], clones[1]:
            groups = []
            for each in (first, *clones):
                assert each.pid
                pids = [each.pid, *children(each.pid)]
                groups.append({file for pid in pids for file in writable(pid)})
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups)), groups


def test_clones_in_virtual_time_draw_other_numbers(guest: Build, any_cpu: str) -> None:
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    clock = VirtualTime()
    with Guest(guest("count"), "100000", mem_mib=MEM_MIB, clock=clock, snapshots=True) as one:
        one.console.wait_for("count 3 ")
        first, second = one.fork(2)
        with first, second:
            lines = [each.console.wait_for(r"count \d+ random \w+")[0] for each in (first, second)]
    assert lines[0].split()[1] == lines[1].split()[1]
    assert lines[0] != lines[1]


def test_each_fork_has_its_own_network(guest: Build, cpu: str) -> None:
    home, switches = Switch(), [Switch(), Switch()]
    first = home.port()
    options: dict[str, Any] = {"mem_mib": MEM_MIB, "cpu": cpu, "snapshots": True}
    with Guest(guest("ping"), net={"service": first}, **options) as one:
        one.console.wait_for("listening")

        def net(number: int) -> dict[str, Any]:
            return {"service": switches[number].port(mac=first.mac)}

        with pytest.raises(DeviceError, match="service"):
            one.fork(1)[0].start()
        with pytest.raises(DeviceError, match="MAC"):
            one.fork(1, net=lambda _: {"service": home.port()})[0].start()
        clones = one.fork(2, net=net)
        for each in clones:
            each.start()
        for switch in (home, *switches):
            assert switch.host("10.0.0.1/24").ping("10.0.0.2", count=3).received == 3
        for each in clones:
            each.stop()
    for switch in (home, *switches):
        switch.close()


def test_from_cpu_to_cpu(guest: Build, tmp_path: Path) -> None:
    every: tuple[Cpu, ...] = ("kvm", "native", "soft")
    cpus = [each for each in every if not missing(each)]
    for one in cpus:
        options: dict[str, Any] = {"mem_mib": MEM_MIB, "snapshots": True, "cpu": one}
        with Guest(guest("count"), "100", "5", **options) as first:
            first.console.wait_for("count 3 ")
            saved = first.snapshot()
        clones = [Guest.restore(saved, cpu=other, clone=True) for other in cpus]
        for other, each in zip(cpus, clones, strict=True):
            check_end(each, other)
            assert counted(each)[-1] == 99
        saved.close()


def test_what_can_not_be_saved(guest: Build, any_cpu: str) -> None:
    with (
        Guest(guest("count"), "1000000", mem_mib=MEM_MIB) as one,
        pytest.raises(UsageError, match="snapshots=True"),
    ):
        one.snapshot()
    with Guest(guest("loop"), mem_mib=MEM_MIB, snapshots=True) as one:
        one.console.wait_for("looping")
        with pytest.raises(TimeoutError, match=r"no hypercall within 0\.1 s"):
            one.snapshot(timeout=0.1)
    with pytest.raises(GuestEnded, match="not saved"):
        one.snapshot()
    new = Guest(guest("hello"), snapshots=True)
    with pytest.raises(RuntimeError, match="not started"):
        new.snapshot()


def test_what_can_not_be_restored(guest: Build, tmp_path: Path, any_cpu: str) -> None:
    for content, why in ((b"", "not a snapshot"), (b"PTENDSNP", "damaged")):
        file = tmp_path / "wrong"
        file.write_bytes(content)
        with pytest.raises(SnapshotError, match=why):
            Guest.restore(file).start()
    with pytest.raises(TenderError, match="missing"):
        Guest.restore(tmp_path / "missing").start()
    with pytest.raises(UsageError, match="mem_mib"):
        Guest.restore(file, mem_mib=8)
