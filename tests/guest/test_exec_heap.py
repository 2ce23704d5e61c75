"""Code in a guest's data: executed on KVM; elsewhere an exception, but with --x-exec-heap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tender import Guest
from tests.guest.conftest import Build, Run

THREE = {
    "x86_64": b"\xb8\3\0\0\0\xc3",  # mov $3, %eax; ret
    "aarch64": 0x52800060.to_bytes(4, "little") + 0xD65F03C0.to_bytes(4, "little"),
}


def disk(tmp_path: Path, machine: str = "x86_64") -> Path:
    """The disk of guest-bindings/tests/execheap.c: a function that returns 3."""
    image = tmp_path / "code.img"
    image.write_bytes(THREE[machine].ljust(512, b"\0"))
    return image


@pytest.mark.parametrize("words", [[], ["data"], ["--x-exec-heap"], ["--x-exec-heap", "data"]])
def test_a_call_of_data(
    ptender: Run, guest: Build, tmp_path: Path, cpu: str, words: list[str]
) -> None:
    options, arguments = (words[:1], words[1:]) if "--" in "".join(words) else ([], words)
    block = f"--block={disk(tmp_path)}"
    done = ptender("--mem=8", block, *options, guest("execheap"), *arguments)
    if cpu == "kvm" or words == ["--x-exec-heap"]:
        assert (done.returncode, "SUCCESS" in done.stdout, done.stderr) == (0, True, ""), done
        return
    assert (done.returncode, done.stderr) == (255, ""), done
    called = re.search(r"^calling (0x\w+)$", done.stdout, re.MULTILINE)
    trap = rf"trap #PF: error=0x11 rip={called and called[1]} .*cr2={called and called[1]}\n"
    assert re.search(trap, done.stdout), done


def test_a_program_allows_it(guest: Build, tmp_path: Path, cpu: str) -> None:
    running = Guest(guest("execheap"), mem_mib=8, block={"storage": disk(tmp_path)}, exec_heap=True)
    assert running.run().status == 0, running.console.text
