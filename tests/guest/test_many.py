"""Many guests of one program: all answer, each takes little, and nothing of them is left."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from bench.memory import guest_memory, parse_smaps
from tender import Guest
from tender.embed import program
from tender.observe import counters
from tender.testing.net.switch import Switch
from tests.descriptors import open_descriptors
from tests.guest.conftest import Build
from tests.waiting import children, wait_until

MANY = 200
STARTERS = 4  # threads
MEM_MIB = 14  # odd enough to be found among the mappings of a process
EACH_KIB = 2560


def own_kib(pid: int) -> int:
    """PSS of a process, without the memory of its guest."""
    mappings = parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
    guest = guest_memory(mappings, MEM_MIB << 20)
    return sum(each.pss_kib for each in mappings) - sum(each.pss_kib for each in guest)


def files() -> set[str]:
    return set(os.listdir(counters.folder()))


def test_two_hundred_guests_on_one_switch(any_cpu: str, guest: Build) -> None:
    kernel = guest("ping")
    Guest(guest("exit"), "0", mem_mib=8).run()  # which starts the server
    server = program.program_here().server.pid
    own, of_server = open_descriptors(), open_descriptors(server)
    guests: list[Guest] = []
    with Switch(patience=300, neigh_suppress=True) as switch:
        host = switch.host("10.0.0.1/16")
        addresses = iter([f"10.0.1.{number}" for number in range(MANY)])

        def start() -> None:
            for address in addresses:
                words = f"--ipv4={address}/16"
                net = {"service": switch.port()}
                guests.append(Guest(kernel, words, mem_mib=MEM_MIB, net=net).start())

        threads = [threading.Thread(target=start) for _ in range(STARTERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(guests) == MANY
        for number in range(MANY):
            assert host.ping(f"10.0.1.{number}", timeout=300).lost == 0
        announced = [
            line for line in switch.lines() if "-> port" in line and "tell 10.0.1." in line
        ]
        assert not announced, "to other guests"
        pids = [each.pid for each in guests if each.pid]
        if any_cpu != "soft" and not os.geteuid():
            everything = [each for pid in pids for each in (pid, *children(pid))]
            wait_until(lambda: sum(map(own_kib, everything)) < MANY * EACH_KIB)
        for each in guests:
            assert each.stop().reason == "stopped"
    assert not [name for name in files() if int(name.split(".")[-2]) in pids]
    wait_until(lambda: not set(children(server)) & set(pids))
    wait_until(lambda: open_descriptors() <= own)
    wait_until(lambda: len(open_descriptors(server) - of_server) <= 1)  # a child in reserve
