"""The memory that the children of a fork server share with it."""

from __future__ import annotations

import subprocess
import sys

FORKED = """
import os
from tender._native import lib
from tender.embed import heap
from tender.stop import Stop

def copied_kib():
    mappings = open("/proc/self/smaps").read().split("VmFlags:")
    kept = [each for each in mappings if "memfd:ptender-heap" in each]
    return sum(int(each.partition("Anonymous:")[2].split()[0]) for each in kept)

used = [str(number) for number in range(100_000)]
changed = [bytearray(1000) for _ in range(1000)]
block = bytearray(8 << 20)  # of malloc's own mapping
heap.keep()
if os.fork():
    print(os.waitstatus_to_exitcode(os.wait()[1]))
    assert used[-1] == "99999" and changed[7] == bytes(1000)
else:
    before = copied_kib()
    for each in used:
        each.isdigit()
    for number, each in enumerate(changed):
        each[500:502] = number.to_bytes(2, "little")
    made = [str(-number) for number in range(10_000)]
    copied = copied_kib() - before
    copies = heap.Copies(Stop())
    copies.open()
    block[5000] = 1
    copies.note()
    del block  # it is unmapped
    given = lib.heap_give_back(0)
    kept = copied_kib() - before
    assert used == [str(number) for number in range(100_000)]
    assert all(int.from_bytes(each[500:502], "little") == n for n, each in enumerate(changed))
    assert made == [str(-number) for number in range(10_000)]
    print("child", copied, kept, given, flush=True)
    os._exit(3)
"""


def test_a_child_gives_back_the_pages_that_it_has_only_used() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    child, parent = done.stdout.splitlines()
    copied, kept, given = map(int, child.split()[1:])
    assert (parent, done.stderr) == ("3", "")
    assert copied > 5000 + kept, "100,000 strings take 5 MiB"
    assert 4 * given >= copied - kept - 500


IN_ANOTHER_PLACE = """
import ctypes, mmap, os
from tender._native import ffi, lib
from tender.embed import heap
from tender.stop import Stop

SIZE, PAGE = 8 << 20, 4096
WIPE_ON_FORK = 18
block = bytearray(b"\\xff") * SIZE  # of malloc's own mapping
at = ctypes.addressof(ctypes.c_char.from_buffer(block)) + PAGE & -PAGE
secret = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
secret.madvise(WIPE_ON_FORK)
secret[:6] = b"secret"
heap.keep()
if os.fork():
    print(os.waitstatus_to_exitcode(os.wait()[1]), secret[:6])
else:
    assert secret[:6] == bytes(6)
    copies = heap.Copies(Stop())
    copies.open()
    for place in range(0, SIZE, PAGE):
        block[place] = 255
    copies.note()
    place = ffi.cast("void *", at)
    fd = os.memfd_create("another")
    os.truncate(fd, 1 << 20)
    assert lib.host_map_private(place, 1 << 20, fd, 0) == 0
    ffi.memmove(place, b"\\xff" * (1 << 20), 1 << 20)
    assert lib.heap_give_back(0) >= 512
    assert bytes(ffi.buffer(place, 1 << 20)) == b"\\xff" * (1 << 20)
    os._exit(3)
"""


def test_what_is_mapped_in_the_place_of_a_block_or_wiped_by_a_fork_stays_so() -> None:
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PLACE], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3 b'secret'\n", "")
