"""The same guests, run by a program."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tender import BlockDescriptor, BlockFile, Descriptor, Guest, open_image
from tender.errors import DeviceError, GuestFault, ImageError, TenderError
from tests.descriptors import open_descriptors
from tests.guest.conftest import Build
from tests.waiting import PATIENCE_S, wait_until, wait_until_asleep

pytestmark = pytest.mark.usefixtures("cpu")


def run(kernel: Any, *args: str, **options: Any) -> tuple[Any, bytes]:
    """A guest on this thread: its outcome and its output."""
    reader, writer = os.pipe()
    outcome = Guest(kernel, *args, mem_mib=8, console=writer, **options).run()
    os.close(writer)
    with open(reader, "rb") as output:
        return outcome, output.read()


def test_an_image_is_described(guest: Build) -> None:
    image = open_image(guest("badhandle"))
    assert [device.name for device in image.manifest.devices] == ["storage", "service"]
    with pytest.raises(ImageError, match="Could not open"):
        open_image("/nonexistent")


def test_kernels_from_memory_and_descriptors(guest: Build) -> None:
    path = guest("hello")
    for kernel in (path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        assert b"some words" in run(kernel, "some", "words")[1]
    with open(path, "rb") as file:
        for _ in range(2):
            assert b"some words" in run(file.fileno(), "some", "words")[1]
        assert file.tell() == 0
    before = open_descriptors()
    reader, writer = os.pipe()
    os.close(writer)
    for wrong, message in (
        (b"no image", "the kernel in memory: .*not an ELF"),
        (b"", "the kernel in memory: "),
        (reader, "descriptor .*: not a regular file"),
        (os.open(path, os.O_WRONLY), "descriptor .*: Bad file descriptor"),
        (os.open("/", os.O_RDONLY), "kernel=.*: a directory"),
        (os.open("/proc/self/mem", os.O_RDONLY), "descriptor .*: Input/output error"),
        (999, "kernel=999: no such descriptor"),
    ):
        with pytest.raises(TenderError, match=f"^{message}"):
            Guest(wrong, mem_mib=8).start()
        if wrong != 999 and isinstance(wrong, int):
            os.close(wrong)
    assert open_descriptors() <= before


def test_a_kernel_that_is_changed_while_its_guest_runs(guest: Build, any_cpu: str) -> None:
    fd = os.memfd_create("kernel")
    os.write(fd, guest("count").read_bytes())
    with Guest(fd, "50", "5", mem_mib=8) as one:
        one.console.wait_for("count 3 ")
        os.ftruncate(fd, 100)
        os.pwrite(fd, b"\xff" * 100, 0)
        assert one.wait().status == 0
    with pytest.raises(TenderError, match="not an ELF"):
        Guest(fd, mem_mib=8).start()
    os.close(fd)


def test_a_callback_at_the_end(guest: Build) -> None:
    ended: list[tuple[Guest, object]] = []
    done = threading.Event()
    warnings: list[str] = []

    def on_end(guest: Guest) -> None:
        ended.append((guest, guest.wait()))
        done.set()
        raise ValueError("of its own")

    one = Guest(guest("exit"), "5", mem_mib=8, on_end=on_end, warn=warnings.append)
    outcome = one.run()
    assert done.wait(PATIENCE_S)
    assert ended == [(one, outcome)]
    wait_until(lambda: warnings)
    assert re.fullmatch(r"on_end: ValueError: of its own \(.*test_library.py:\d+\)", warnings[0])
    with pytest.raises(DeviceError):
        Guest(guest("disk"), mem_mib=8, on_end=on_end, warn=warnings.append).start()
    killed = Guest(guest("loop"), mem_mib=8, on_end=lambda _: done.set())
    done.clear()
    with killed:
        killed.kill()
        assert done.wait(PATIENCE_S)
    assert len(ended) == 1, "a guest that could not start has not ended"


def test_a_guest_halts(guest: Build) -> None:
    outcome, output = run(guest("exit"), "7")
    assert (outcome.reason, outcome.status, outcome.error) == ("halted", 7, None)
    assert b"Solo5:" in output


def test_a_trap_has_its_registers(guest: Build) -> None:
    outcome, _ = run(guest("exception"), "ud2")
    assert outcome.status == 255
    assert outcome.trap["rip"] >= 0x100000


def test_a_fault_has_its_facts(guest: Build) -> None:
    outcome, _ = run(guest("badgpa"))
    assert (outcome.reason, outcome.status) == ("fault", 1)
    error = outcome.error
    assert isinstance(error, GuestFault)
    assert (error.gpa, error.hypercall) == (8 << 20, 2)


def test_devices_and_their_statistics(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    outcome, output = run(guest("block"), block={"storage": BlockFile(str(image))})
    assert b"SUCCESS" in output
    assert outcome.stats.block["storage"].bytes >= 8192
    with pytest.raises(DeviceError, match="All declared devices must be attached"):
        Guest(guest("block")).run()


def test_errors_name_the_arguments_of_guest(guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    with open(image, "rb") as file:
        wrong: list[tuple[Guest, str]] = [
            (Guest(guest("disk")), r'block=\{"storage": BlockFile\("disk.img"\)\}$'),
            (Guest(guest("ping")), r'net=\{"service": Tap\("tap0"\)\}$'),
            (
                Guest(guest("disk"), block={"storage": BlockDescriptor(file.fileno())}),
                "to attach it read-only, give readonly=True",
            ),
            (Guest(guest("exit"), cpu="kvm", instructions=5), "instructions is for .* cpu='soft'"),
        ]
        for each, text in wrong:
            with pytest.raises(TenderError, match=text) as raised:
                each.run()
            assert "--" not in str(raised.value)


def test_a_guest_of_asyncio(guest: Build) -> None:
    async def main() -> None:
        assert (await Guest(guest("exit"), "3", mem_mib=8).run_async()).status == 3
        hello = Guest(guest("hello"), "a", mem_mib=8)
        await hello.start_async()
        lines = [line async for line in hello.console]
        assert lines == hello.console.lines() == list(hello.console)
        async with Guest(guest("ping"), mem_mib=8, net={"service": Drain()}) as ping:
            assert (await ping.console.wait_for_async("listening", 60)).group() == "listening"
            assert (await ping.kill_async()).reason == "killed"
        running = asyncio.create_task(ping_again.run_async())
        while ping_again.pid is None:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await ping_again.wait_async(60)).reason == "killed"
        with pytest.raises(RuntimeError, match="started already"):
            await ping_again.run_async()

    class Drain:
        def send(self, frame: bytes) -> None: ...

    ping_again = Guest(guest("ping"), mem_mib=8, net={"service": Drain()})
    asyncio.run(main())


def test_lines_are_read_while_the_guest_runs(guest: Build) -> None:
    with Guest(guest("flood"), mem_mib=8) as running:
        numbers = []
        for line in running.console:
            if line.startswith("flood "):
                numbers.append(int(line.split()[1]))
            if len(numbers) == 100:
                break
    assert numbers == list(range(numbers[0], numbers[0] + 100))


def test_a_guest_runs_beside_the_program(guest: Build) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    null = os.open("/dev/null", os.O_WRONLY)
    with Guest(
        guest("ping"), mem_mib=8, net={"service": Descriptor(theirs.fileno())}, console=null
    ) as running:
        assert ours.recv(2000)[12:14] == b"\x08\x06"
        assert running.running
        with pytest.raises(TimeoutError):
            running.wait(timeout=0.05)
        outcome = running.stop()
    assert (outcome.reason, outcome.status, outcome.signo) == ("stopped", 0, 0)
    assert not running.running
    assert outcome.stats.net["service"].sent.calls >= 1
    os.close(null)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("name", "words"), [("loop", []), ("sleep", ["100000"]), ("flood", [])])
def test_stop_ends_any_guest(guest: Build, name: str, words: list[str]) -> None:
    reader, writer = os.pipe()
    running = Guest(guest(name), *words, mem_mib=8, console=writer).start()
    os.read(reader, 1)
    if name != "loop":
        assert running.pid
        wait_until_asleep(running.pid)
    assert running.stop().reason == "stopped"
    assert running.stop().reason == "stopped"
    os.close(reader)
    os.close(writer)


def test_a_guest_that_is_stopped_at_once(guest: Build) -> None:
    for delay in range(20):
        running = Guest(guest("loop"), mem_mib=8, console=2).start()
        time.sleep(delay * 0.001)
        assert running.stop().reason == "stopped"


def test_an_error_at_the_start_reaches_the_program() -> None:
    running = Guest("/nonexistent.hvt")
    with pytest.raises(ImageError, match="Could not open"):
        running.start()
    with pytest.raises(ImageError, match="Could not open"):
        running.wait()
    assert not running.running
    with pytest.raises(ImageError), Guest("/nonexistent.hvt"):
        pass
    with pytest.raises(RuntimeError, match="not started"):
        Guest("/nonexistent.hvt").wait()


def test_nothing_is_left_of_many_guests(guest: Build) -> None:
    def once() -> None:
        run(guest("exit"), "0")

    once()
    descriptors, threads = open_descriptors(), threading.active_count()
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(10):
        once()
    wait_until(lambda: open_descriptors() <= descriptors)
    wait_until(lambda: threading.active_count() <= threads)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= mappings + 5


def test_guests_side_by_side(guest: Build) -> None:
    null = os.open("/dev/null", os.O_WRONLY)
    guests = [Guest(guest("sleep"), "300", mem_mib=8, console=null).start() for _ in range(8)]
    assert {running.wait(timeout=60).status for running in guests} == {0}
    os.close(null)


def test_run_can_be_stopped_from_another_thread(guest: Build) -> None:
    running = Guest(guest("loop"), mem_mib=8, console=2)

    def stop() -> None:
        wait_until(lambda: running.running)
        running.stop()

    threading.Thread(target=stop).start()
    assert running.run().reason == "stopped"


def test_an_interrupted_wait_leaves_the_guest_to_be_stopped(guest: Build) -> None:
    with Guest(guest("loop"), mem_mib=8, console=2) as running:

        def wait() -> None:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            running.wait(timeout=PATIENCE_S)

        with pytest.raises(KeyboardInterrupt):
            wait()
        assert running.running
    assert running.stop().reason == "stopped"


def test_a_program_may_forget_a_guest(guest: Build) -> None:
    code = f"from tender import Guest; Guest({str(guest('loop'))!r}, mem_mib=8, console=2).start()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_console_is_kept_open(guest: Build, tmp_path: Path) -> None:
    running = Guest(guest("exit"), mem_mib=8, console=open(tmp_path / "log", "wb"))  # noqa: SIM115
    assert running.run().status == 0
    assert b"Solo5:" in (tmp_path / "log").read_bytes()


def test_a_guest_cannot_wait_for_itself(guest: Build, tmp_path: Path) -> None:
    told = []

    def warn(text: str) -> None:
        told.append(text)
        with pytest.raises(RuntimeError, match="own thread"):
            running.stop()

    running = Guest(guest("exit"), mem_mib=9, console=2, warn=warn)
    assert running.run().status == 0
    assert told == [f"adjusting memory to {8 << 20} bytes"]
