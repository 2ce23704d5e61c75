"""The pytest plugin as its users have it: inner pytest runs, with guests and failures."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.guest.conftest import BINDINGS, PTENDER, Build
from tests.guest.inner import PLUGINS, run, run_beside
from tests.guest.ordinary import ordinary
from tests.needs import needs

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("any_cpu", "no_other_plugins")

EXAMPLE = """
def test_answers_ping(unikernel, switch):
    guest = unikernel("ping.hvt", net={"service0": switch.port()})
    host = switch.host("10.0.0.1/24")
    assert host.ping("10.0.0.2", count=100).received == 100
    switch.drop(every=3)
    assert host.ping("10.0.0.2", count=9).received == 6
    assert guest.stop().status == 0
"""

SHORT = EXAMPLE.replace("service0", "service").replace("100", "5")  # for the sample guest


def service0(folder: Path) -> None:
    """A ping.hvt whose network device is called service0."""
    sources = folder / "sources"
    shutil.copytree(BINDINGS / "samples", sources)
    for name in ("ping.c", "ping.json"):
        text = (sources / name).read_text()
        (sources / name).write_text(text.replace('"service"', '"service0"'))
    words = [PTENDER, "build", sources / "ping.c", sources / "net.c"]
    words += ["--manifest", sources / "ping.json", "-o", folder / "ping.hvt"]
    subprocess.run([str(word) for word in words], check=True)


def test_the_example_of_the_readme(pytester: pytest.Pytester) -> None:
    service0(pytester.path)
    run(pytester, EXAMPLE).assert_outcomes(passed=1)


def test_nothing_is_imported_by_a_pytest_without_guests(pytester: pytest.Pytester) -> None:
    source = """
        import sys
        def test_nothing():
            assert not [name for name in sys.modules if name.startswith("tender.testing.")
                        and name not in ("tender.testing.plugin", "tender.testing.plugin_fixtures",
                                         "tender.testing.cpu")]
    """
    run_beside(pytester, source).assert_outcomes(passed=1, warnings=0)


FAILING = """
def test_fails(unikernel, switch, blockimage):
    ping = unikernel("ping.hvt", net={"service": switch.port("wire")}, mem_mib=8)
    disk = unikernel("disk.hvt", "a note", block={"storage": blockimage(1 << 20)}, mem_mib=8)
    assert disk.wait().status == 0
    host = switch.host("10.0.0.1/24")
    assert host.ping("10.0.0.2", count=2).received == 3
"""


def test_a_failed_test_leaves_what_it_needs_to_be_understood(
    pytester: pytest.Pytester, images: Path
) -> None:
    result = run(pytester, FAILING, "--ptender-artifacts=left")
    result.assert_outcomes(failed=1)
    (folder,) = (images / "left").iterdir()
    assert folder.name.endswith("test_fails")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "disk0.log.txt",
        "guest0-ping.console.txt",
        "guest0-ping.outcome.txt",
        "guest0-ping.trace.jsonl",
        "guest1-disk.console.txt",
        "guest1-disk.outcome.txt",
        "guest1-disk.trace.jsonl",
        "switch0.pcapng",
    ]
    assert "ended: halted, status 0" in (folder / "guest1-disk.outcome.txt").read_text()
    assert "NET_WRITE" in (folder / "guest0-ping.trace.jsonl").read_text()
    output = result.stdout.str()
    for text in (
        "ptender: guest 0",
        "ended: stopped, status 0",
        "listening on 10.0.0.2/24",
        " NET_READ, service, ret 0",
        "10.0.0.1 > 10.0.0.2 ping seq 2",
        "write 512 bytes at 0",
        str(folder),
        "--ptender-seed",
    ):
        assert text in output, text


def test_a_report_has_no_empty_parts(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        def test_fails(unikernel, switch, blockimage):
            switch.port()
            blockimage(512)
            assert False

        def test_silent(unikernel, switch):
            unikernel("hello.hvt", mem_mib=8).wait()
            assert False
    """
    result = run(pytester, source, "--ptender-artifacts=left")
    result.assert_outcomes(failed=2)
    assert result.stdout.str().count("ptender: artifacts") == 1
    result.stdout.no_fnmatch_line("*ptender: switch*")
    result.stdout.no_fnmatch_line("*ptender: disk*")
    (folder,) = (images / "left").iterdir()
    assert folder.name.endswith("test_silent")
    assert not list(folder.glob("*.pcapng"))


def test_a_report_does_not_control_the_terminal(pytester: pytest.Pytester, images: Path) -> None:
    source = r"""
        def test_fails(unikernel):
            unikernel("hello.hvt", "\x1b[2J\x1b]0;title\x07\ttab", mem_mib=8).wait()
            assert False
    """
    result = run(pytester, source, "--color=no")
    result.assert_outcomes(failed=1)
    output = result.stdout.str()
    assert r"\x1b[2J\x1b]0;title\x07" in output
    assert not {"\x1b", "\x07"} & {*output}


def test_a_traceback_ends_in_the_test(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        def test_address(switch):
            switch.host("10.0.0.1")

        def test_no_answer(switch):
            switch.host("10.0.0.1/24").arp("10.0.0.2", timeout=0.1)

        def test_it_ends(unikernel):
            unikernel("hello.hvt", mem_mib=8).console.wait_for("Goodbye")

        def test_a_bug(switch):
            host = switch.host("10.0.0.1/24")
            host._tcp = None
            host.listen(80)

        def test_no_report(switch):
            switch.timeline = None
            assert False
    """
    result = run(pytester, source)
    result.assert_outcomes(failed=5)
    for name in ("address", "no_answer", "it_ends"):
        output = result.stdout.str().split(f" test_{name} _")[1].split("_____ test_")[0]
        assert f"def test_{name}(" in output
        assert "tender/testing/" not in output
        assert "tender/embed/" not in output
    output = result.stdout.str()
    assert "INTERNALERROR" not in output
    result.stdout.fnmatch_lines(["*tender/testing/net/host.py:*: AttributeError"])
    assert "could not be made: AttributeError: " in output.split(" test_no_report _")[1]
    output = run(pytester, source, "--full-trace", "-k", "address").stdout.str()
    assert "tender/testing/net/switch.py" in output


def test_the_header_says_which_cpu_guests_have(
    pytester: pytest.Pytester, images: Path, monkeypatch: pytest.MonkeyPatch, cpu: str
) -> None:
    source = """
        def test_fails(unikernel):
            guest = unikernel("hello.hvt", mem_mib=8)
            guest.wait()
            assert guest.warnings

        def test_only_in_software(unikernel):
            assert unikernel("hello.hvt", mem_mib=8, instructions=10**9).wait().status == 0
    """
    name = {"soft": "the software CPU", "native": "the native CPU", "kvm": "KVM"}[cpu]
    lines = [f"ptender: guests run on {name} (PTENDER_CPU)"]
    run(pytester, source).stdout.fnmatch_lines(lines)
    lines = ["ptender: guests run on the software CPU (--ptender-cpu)"]
    run(pytester, source, "--ptender-cpu=soft").stdout.fnmatch_lines(lines)
    monkeypatch.delenv("PTENDER_CPU")
    result = run(pytester, source)
    result.assert_outcomes(failed=1, passed=1)  # no guest warns about its CPU
    assert result.stdout.str().count("ptender: guests run on ") == 1


def test_a_test_that_passes_leaves_nothing(pytester: pytest.Pytester, images: Path) -> None:
    run(pytester, FAILING, "--ptender-artifacts=left").assert_outcomes(failed=1)
    assert list((images / "left").iterdir())
    good = FAILING.replace("received == 3", "received == 2")
    run(pytester, good, "--ptender-artifacts=left").assert_outcomes(passed=1)
    assert not list((images / "left").iterdir())


def test_tests_with_similar_names_have_folders_of_their_own(
    pytester: pytest.Pytester, images: Path
) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("name", ["a b", "a/b", "a" * 200 + "b", "c" + "a" * 200 + "b"])
        def test_x(unikernel, name):
            unikernel("ping.hvt", start=False, mem_mib=8)
            assert name in ("a/b", "c" + "a" * 200 + "b")

        def test_y(unikernel):
            assert False
    """
    result = run(pytester, source, "--ptender-artifacts=left")
    result.assert_outcomes(passed=2, failed=3)
    left = sorted(folder.name for folder in (images / "left").iterdir())
    assert len(left) == 2, left  # test_y has nothing to leave
    assert all((images / "left" / name / "guest0-ping.outcome.txt").exists() for name in left)
    for name in left:
        result.stdout.fnmatch_lines([f"*/left/{name}"])


def test_the_default_folder_is_that_of_pytest(pytester: pytest.Pytester, images: Path) -> None:
    result = run(pytester, FAILING, f"--basetemp={images}/temp")
    result.assert_outcomes(failed=1)
    assert list(images.glob("temp/ptender/*test_fails/switch0.pcapng"))


@pytest.mark.parametrize(
    ("folder", "why"),
    [("a-file/left", "Not a directory"), ("full", "No space left on device")],
)
def test_files_that_can_not_be_written_are_a_line_of_the_report(
    pytester: pytest.Pytester, images: Path, folder: str, why: str
) -> None:
    (images / "a-file").write_text("")
    (images / "full").mkdir()
    words = [sys.executable, "-m", "pytest", *PLUGINS, "-v"]
    pytester.makepyfile(FAILING + "\ndef test_next():\n    pass\n")
    words.append(f"--ptender-artifacts={folder}")
    if folder == "full":
        if os.geteuid() != 0:
            pytest.skip("a file system of a few pages needs root")
        needs("unshare", "--mount")
        mount = f"mount -t tmpfs -o size=8k tmpfs {images / folder} && exec {shlex.join(words)}"
        words = ["unshare", "--mount", "sh", "-c", mount]
    result = pytester.run(*words)
    result.assert_outcomes(failed=1, passed=1)
    (line,) = (line for line in result.outlines if line.startswith("artifacts: "))
    assert line.startswith(f"artifacts: could not keep them in {images / folder}/")
    assert line.endswith(f": {why}")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    result.stdout.fnmatch_lines(["*ptender: guest 0*", "ended: stopped, status 0"])


def test_in_parallel(pytester: pytest.Pytester, images: Path) -> None:
    source = SHORT
    more = source.replace("test_answers_ping", "test_again")
    words = ["-p", "xdist", "-n2", "--ptender-artifacts=left"]
    result = run_beside(pytester, source + more + FAILING, *words)
    result.assert_outcomes(passed=2, failed=1)
    assert list(images.glob("left/*/switch0.pcapng"))
    result.stdout.fnmatch_lines(["*ptender: guest 0*"])


def test_errors_name_the_remedy(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import pytest
        from tender.errors import DeviceError, GuestEnded, ImageError

        def test_no_image(unikernel):
            with pytest.raises(FileNotFoundError, match="there is no image 'nothing.hvt' in /"):
                unikernel("nothing.hvt")

        def test_no_file(unikernel, blockimage):
            with pytest.raises(FileNotFoundError, match="^there is no file /no/where.hvt$"):
                unikernel("/no/where.hvt")
            with pytest.raises(FileNotFoundError, match="^there is no file /no/where.img$"):
                blockimage("/no/where.img")
            with pytest.raises(FileNotFoundError, match="no file 'a.img' in /.*; nor is it a size"):
                blockimage("a.img")

        def test_sizes_of_disks(blockimage, request):
            assert blockimage("64K").capacity == 64 << 10
            assert blockimage("1").capacity == 1 << 20
            (request.path.parent / "1M").write_bytes(bytes(512))
            assert blockimage("1M").capacity == 512

        def test_no_device(unikernel):
            with pytest.raises(DeviceError, match="All declared devices must be attached"):
                unikernel("ping.hvt")

        def test_one_port_two_guests(unikernel, switch):
            port = switch.port("p")
            unikernel("ping.hvt", net={"service": port}, mem_mib=8)
            with pytest.raises(DeviceError, match="p of the switch is attached to a guest"):
                unikernel("ping.hvt", net={"service": port}, mem_mib=8)

        def test_it_ends_without_a_word(unikernel):
            guest = unikernel("hello.hvt", mem_mib=8)
            with pytest.raises(GuestEnded, match="did not say 'Goodbye'"):
                guest.console.wait_for("Goodbye")

        def test_it_waits_for_ever(unikernel, switch):
            guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            guest.console.wait_for("listening on (.*)/24")
            with pytest.raises(TimeoutError, match="still runs after 0.1 s"):
                guest.wait(timeout=0.1)
            with pytest.raises(TimeoutError, match="did not say 'Goodbye' within 0.1 s"):
                guest.console.wait_for("Goodbye", timeout=0.1)
            with pytest.raises(TimeoutError, match="never was still not true"):
                def never():
                    return False
                guest.wait_until(never, timeout=0.1)

        def test_it_is_not_for_virtual_time(unikernel, switch, virtual_switch):
            with pytest.raises(DeviceError, match="runs on the software CPU, not on cpu='kvm'"):
                unikernel("ping.hvt", net={"service": virtual_switch.port()}, cpu="kvm")
            with pytest.raises(DeviceError, match="switches of different times"):
                unikernel("ping.hvt", net={"a": virtual_switch.port(), "b": switch.port()})
    """
    run(pytester, source).assert_outcomes(passed=8)


def test_the_methods_of_a_guest(pytester: pytest.Pytester, images: Path, cpu: str) -> None:
    source = """
        def test_methods(unikernel, switch):
            guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            host = switch.host("10.0.0.1/24")
            assert guest.console.wait_for(r"mac ([0-9a-f:]+)")[1] == host.arp("10.0.0.2")
            assert host.ping("10.0.0.2", count=3).received == 3
            guest.block_link()
            assert host.ping("10.0.0.2", count=2, timeout=0.2, interval=0.1).received == 0
            guest.unblock_link()
            assert host.ping("10.0.0.2", count=3).received == 3
            assert guest.wait_until(lambda: guest.console.lines()[-1]).startswith("listening")
            assert guest.crash().reason in ("killed", "stopped")
            assert not guest.running
            assert host.ping("10.0.0.2", timeout=0.1).received == 0
            again = unikernel("ping.hvt", net={"service": guest.switch_ports[0]}, mem_mib=8)
            assert host.ping("10.0.0.2", count=3).received == 3
            assert unikernel.guests == [guest, again]

        def test_a_guest_for_later(unikernel, switch):
            guest = unikernel("ping.hvt", net={"service": switch.port()}, start=False)
            assert not guest.running
            with guest:
                assert guest.running
            unikernel("hello.hvt", start=False)

        def test_the_web(unikernel, switch):
            guest = unikernel("web.hvt", "--limit=2", net={"service": switch.port()}, mem_mib=16)
            host = switch.host("10.0.0.1/24")
            status, body = host.http_get("10.0.0.2")
            assert (status, b"Hello from a unikernel" in body) == (200, True)
            switch.drop(probability=0.2)
            switch.delay(0.001, jitter=0.001)
            assert host.http_get("10.0.0.2", timeout=30)[0] == 200
            assert guest.wait().status == 0
    """
    run(pytester, source).assert_outcomes(passed=3)


def test_a_guest_that_fails_unnoticed_fails_its_test(
    pytester: pytest.Pytester, images: Path, cpu: str
) -> None:
    source = """
        import pytest
        from tender.errors import GuestEnded

        def until_it_has_ended(guest):
            guest.wait_until(lambda: not guest.running)

        @pytest.mark.parametrize("kernel", ["abort.hvt", "badgpa.hvt"])
        def test_unnoticed(unikernel, kernel):
            unikernel("hello.hvt", mem_mib=8)
            until_it_has_ended(unikernel(kernel, mem_mib=8))

        def test_unnoticed_in_a_block(unikernel):
            with unikernel("abort.hvt", mem_mib=8, start=False) as guest:
                until_it_has_ended(guest)

        @pytest.mark.parametrize("verb", ["wait", "stop", "kill", "crash"])
        def test_asked(unikernel, verb):
            guest = unikernel("abort.hvt", mem_mib=8)
            until_it_has_ended(guest)
            assert getattr(guest, verb)().status == 255

        def test_its_outcome(unikernel):
            guest = unikernel("badgpa.hvt", mem_mib=8)
            guest.wait_until(lambda: guest.outcome)

        def test_waited_for(unikernel):
            with pytest.raises(GuestEnded):
                unikernel("abort.hvt", mem_mib=8).console.wait_for("never")

        def test_no_failure(unikernel, switch):
            unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            until_it_has_ended(unikernel("hello.hvt", mem_mib=8))

        def test_skips(unikernel):
            until_it_has_ended(unikernel("abort.hvt", mem_mib=8))
            pytest.skip("not today")
    """
    result = run(pytester, source, "--ptender-artifacts=left")
    result.assert_outcomes(passed=10, errors=3, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_unnoticed?abort.hvt?*",
            "guest 1 (*/abort.hvt) has ended by itself: aborted, status 255",
            "and the test did not ask for its outcome",
            "*ptender: guest 1*",
            "guest 1 (*/badgpa.hvt) has ended by itself: fault, status 1: *",
        ]
    )
    assert len(list((images / "left").glob("*/guest*abort.trace.jsonl"))) == 2


def test_a_guest_on_two_networks(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("kind", ["switch", "virtual_switch"])
        def test_two(unikernel, request, kind):
            inside = request.getfixturevalue(kind)
            outside = inside.another()
            guest = unikernel(
                "ping2.hvt", net={"service0": inside.port(), "service1": outside.port()}, mem_mib=8
            )
            near, far = inside.host("10.0.0.1/24"), outside.host("10.1.0.1/24")
            assert near.ping("10.0.0.2", count=3).received == 3
            outside.cut()
            assert far.ping("10.1.0.2", timeout=0.2).received == 0
            assert near.ping("10.0.0.2").received == 1
            outside.restore()
            assert far.ping("10.1.0.2", count=3).received == 3
            assert inside.now == pytest.approx(outside.now, abs=1)
            macs = {port.mac for port in guest.switch_ports} | {near.mac, far.mac}
            assert len(macs) == 4
            assert "10.1.0.2" not in "".join(inside.lines())
            assert far.ping("10.1.0.2").received == 2

        def test_macs_are_of_one_switch(switch, virtual_switch):
            assert switch.port().mac != virtual_switch.port().mac
    """
    result = run(pytester, source, "--ptender-artifacts=left")
    result.assert_outcomes(passed=1, failed=2)
    for kind in ("switch", "virtual_switch"):
        (folder,) = (images / "left").glob(f"*test_two_{kind}-*")
        assert (folder / "switch0.pcapng").exists()
        assert b"\x0a\x01\x00\x02" in (folder / "switch1.pcapng").read_bytes()
    result.stdout.fnmatch_lines(["*ptender: switch 1*"])


def test_faults_of_a_disk(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import time
        from pathlib import Path

        def starts(unikernel, disk, *note):
            guest = unikernel("disk.hvt", *note, block={"storage": disk}, mem_mib=8)
            guest.wait()
            return guest

        def test_a_disk(unikernel, blockimage):
            disk = blockimage(1 << 20)
            assert starts(unikernel, disk, "water", "the plants").console.wait_for("Started 1")
            assert b"water the plants" in disk.data
            assert "told: water the plants" in starts(unikernel, disk).console.text
            assert (disk.reads, disk.writes) == (4, 2)

        def test_errors(unikernel, blockimage):
            disk = blockimage(bytes(1 << 16))
            with disk.fail_read(nth=1) as fault:
                assert "the first block can't be read" in starts(unikernel, disk).console.text
            assert fault.hits == 1
            with disk.fail_read(nth=2):  # that of what was written
                assert "the first block can't be written" in starts(unikernel, disk).console.text
            with disk.fail_write():
                assert "the first block can't be written" in starts(unikernel, disk).console.text
            with disk.enospc():
                assert "the first block can't be written" in starts(unikernel, disk).console.text
            with disk.enospc(after=512):
                guest = starts(unikernel, disk)
                assert guest.wait().status == 0
                assert "first block can't be written" in starts(unikernel, disk).console.text
            assert any("No space left" in line for line in disk.log)

        def test_warnings_go_to_the_test_and_not_to_the_terminal(unikernel, blockimage, capfd):
            disk = blockimage(1 << 16)
            disk.fail_read()
            guest = starts(unikernel, disk)
            assert any("Input/output error" in text for text in guest.warnings)
            assert capfd.readouterr().err == ""

        def test_slowness(unikernel, blockimage):
            disk = blockimage(1 << 16)
            began = time.monotonic()
            with disk.slow(0.2):
                starts(unikernel, disk)
            assert time.monotonic() - began >= 0.6

        def test_a_file_stays_as_it_was(unikernel, blockimage):
            path = Path(__file__).with_name("disk.img")
            path.write_bytes(bytes(8192))
            disk = blockimage("disk.img")
            starts(unikernel, disk, "a note")
            assert b"a note" in disk.data
            assert path.read_bytes() == bytes(8192)
    """
    run(pytester, source).assert_outcomes(passed=5)


def test_sub_tests(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        def test_stops(unikernel, subtest):
            with subtest("it boots"):
                guest = unikernel("hello.hvt", mem_mib=8)
                guest.console.wait_for("Hello")
            with subtest("it is polite"):
                assert "please" in guest.console.text
            with subtest("never"):
                assert 0

        def test_goes_on(subtest):
            with subtest("one", go_on=True):
                assert 1 == 2
            with subtest("two", go_on=True):
                assert 3 == 3
    """
    result = run(pytester, source)
    result.assert_outcomes(failed=2)
    output = result.stdout.str()
    assert "it boots: passed" in output
    assert "it is polite: FAILED" in output
    assert "sub-test: never" not in output
    assert "1 sub-test(s) failed" in output
    assert "two: passed" in output


def test_a_shell_where_a_test_fails(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        def test_fails(unikernel, switch):
            guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            host = switch.host("10.0.0.1/24")
            unikernel.shell()
            assert host.ping("10.0.0.2", count=2).received == 3
    """
    pytester.makepyfile(source)
    typed = b'print("SHELL", host.ping("10.0.0.2", count=4).received, guest.running)\n'
    words = [sys.executable, "-m", "pytest", *PLUGINS, "--ptender-interactive"]
    stdin = typed + b"raise SystemExit\n" + typed
    result = pytester.run(*words, stdin=stdin)
    output = result.stdout.str()
    result.assert_outcomes(failed=1)
    assert "unikernel.shell() in test_a_shell" in result.stderr.str()
    assert output.count("SHELL 4 True") == 2
    result = run_beside(pytester, source, "--ptender-interactive", "-p", "xdist", "-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_build_of_a_guest(pytester: pytest.Pytester) -> None:
    shutil.copytree(BINDINGS / "samples", pytester.path / "src")
    source = """
        def test_ping(unikernel, switch):
            image = unikernel.build("src/ping.c", "src/net.c", manifest="src/ping.json")
            unikernel(image, "--ipv4=10.0.0.7/24", net={"service": switch.port()}, mem_mib=8)
            assert switch.host("10.0.0.1/24").ping("10.0.0.7").received == 1
    """
    run(pytester, source).assert_outcomes(passed=1)


VIRTUAL = """
import hashlib
import os
import pytest

@pytest.mark.parametrize("run", range(5))
@pytest.mark.parametrize("seed", ["a", "b"])
def test_two_guests_on_a_bad_network(unikernel, virtual_switch, run, seed):
    switch = virtual_switch
    switch.seed = seed
    switch.drop(probability=0.2)
    switch.delay(0.003, jitter=0.003)
    switch.reorder(every=5)
    host = switch.host("10.0.0.9/24")
    one = unikernel("talk.hvt", "--ipv4=10.0.0.2/24", "--peer=10.0.0.3",
                    net={"service": switch.port("one")}, mem_mib=8)
    two = unikernel("talk.hvt", "--ipv4=10.0.0.3/24", "--peer=10.0.0.2",
                    net={"service": switch.port("two")}, mem_mib=8)
    one.console.wait_for("heard 3")
    host.ping("10.0.0.2", count=5)
    assert one.wait().status == two.wait().status == 0
    assert switch.now > 1
    digest = hashlib.sha256(switch.packets() + one.console.data + two.console.data).hexdigest()
    with open(f"digest-{seed}-{run}", "w") as file:
        file.write(digest)
"""


def test_virtual_time_is_the_same_on_every_run(pytester: pytest.Pytester, images: Path) -> None:
    run_beside(pytester, VIRTUAL, "-p", "xdist", "-n2").assert_outcomes(passed=10)
    digests = {
        seed: {path.read_text() for path in images.glob(f"digest-{seed}-*")} for seed in "ab"
    }
    assert [len(each) for each in digests.values()] == [1, 1]
    assert digests["a"] != digests["b"]


def test_methods_in_virtual_time(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import pytest
        from tender.testing.net import icmp, packets as p

        def test_an_hour(unikernel, virtual_switch):
            switch = virtual_switch
            guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            host = switch.host("10.0.0.1/24")
            assert host.ping("10.0.0.2", count=100).received == 100
            switch.drop(every=3)
            assert host.ping("10.0.0.2", count=9).received == 6
            now = switch.now
            with pytest.raises(TimeoutError, match="3600 s of virtual time"):
                guest.console.wait_for("never", timeout=3600)
            assert switch.now - now == pytest.approx(3600)
            guest.block_link()
            assert host.ping("10.0.0.2", count=2).received == 0
            guest.unblock_link()
            switch.clear_faults()
            guest.crash()
            assert host.ping("10.0.0.2", count=2).received == 0
            net = {"service": guest.switch_ports[0]}
            again = unikernel("ping.hvt", "--limit=1", net=net, mem_mib=8)
            assert host.ping("10.0.0.2").received == 1
            assert again.wait().status == 0
            assert "answered 1" in again.console.text

        def test_a_burst_is_not_lost(unikernel, virtual_switch):
            switch = virtual_switch
            guest = unikernel("ping.hvt", net={"service": switch.port()}, mem_mib=8)
            host = switch.host("10.0.0.1/24")
            to = host.resolve("10.0.0.2")
            for seq in range(2000):
                echo = icmp.Echo(icmp.ECHO_REQUEST, 1, seq, bytes(1000))
                packet = p.build_ipv4(icmp.build_echo(echo, "10.0.0.1", "10.0.0.2"))
                host.send(p.build_frame(p.Frame(to, host.mac, p.IPV4, packet)))
            def is_ipv4(frame):
                return frame[12:14] == b"\\x08\\x00"

            for seq in range(2000):
                answer = p.parse_ipv4(host.expect(is_ipv4, timeout=5)[14:])
                assert icmp.parse_echo(answer).seq == seq
    """
    run(pytester, source).assert_outcomes(passed=2)


POLLS = """
#include <solo5.h>
#include <stdio.h>

int solo5_app_main(const struct solo5_start_info *info)
{
    solo5_handle_t handle;
    struct solo5_net_info net;
    (void)info;
    solo5_net_acquire("service", &handle, &net);
    puts("polling");
    for (;;)
        solo5_yield(0, NULL);
}
"""


def test_a_guest_that_polls_without_sleeping_ends_its_test(pytester: pytest.Pytester) -> None:
    (pytester.path / "polls.c").write_text(POLLS)
    shutil.copy(BINDINGS / "samples" / "ping.json", pytester.path / "polls.json")
    source = """
        def test_polls(unikernel, virtual_switch):
            image = unikernel.build("polls.c", manifest="polls.json")
            guest = unikernel(image, net={"service": virtual_switch.port()}, mem_mib=8)
            guest.wait(timeout=2)
    """
    result = run(pytester, source, "--ptender-timeout=3")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Stuck: virtual time is too slow: * 3 s of real time, *"])


def test_a_timeout_that_is_no_number_of_seconds(pytester: pytest.Pytester) -> None:
    for seconds in ("0", "-1", "nan", "inf", "1e300", "soon"):
        result = run(pytester, "def test_nothing(): pass", f"--ptender-timeout={seconds}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        error = f"*--ptender-timeout: '{seconds}' is not a number of seconds, as 60"
        result.stderr.fnmatch_lines([error])


def test_an_ordinary_user_without_kvm(guest: Build) -> None:
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        shutil.copy(guest("ping"), folder)
        source = f"import os\n{SHORT}    assert os.geteuid() != 0\n"
        (folder / "test_ping.py").write_text(source)
        words = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pytest", *PLUGINS]
        words += [f"--rootdir={folder}", "--ptender-cpu=soft", str(folder / "test_ping.py")]
        command = ordinary(folder / "mount", words)
        result = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert "1 passed" in result.stdout, result.stdout + result.stderr
