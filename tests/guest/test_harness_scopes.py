"""Guests of module and session scope: one boot, many tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.inner import run, run_beside

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("any_cpu", "no_other_plugins")

CONFTEST = """
import pytest

@pytest.fixture(scope="session")
def disk(session_unikernel, session_blockimage):
    disk = session_blockimage(1 << 20)
    assert session_unikernel("disk.hvt", block={"storage": disk}, mem_mib=8).wait().status == 0
    return disk
"""

ONE_BOOT = """
import pytest

@pytest.fixture(scope="module")
def host(module_switch):
    return module_switch.host("10.0.0.1/24")

@pytest.fixture(scope="module")
def ping(module_unikernel, module_switch):
    net = {"service": module_switch.port()}
    with module_unikernel("ping.hvt", "--limit=3", net=net, mem_mib=8) as guest:
        yield guest
    print("the guest of the module:", guest.outcome)

@pytest.mark.parametrize("number", [1, 2])
def test_one_boot(ping, host, number):
    assert host.ping("10.0.0.2").received == 1
    assert ping.running

def test_with_a_guest_of_its_own(ping, host, module_switch, unikernel, disk):
    own = unikernel("ping.hvt", "--ipv4=10.0.0.3/24", net={"service": module_switch.port()},
                    mem_mib=8)
    assert host.ping("10.0.0.3").received == 1
    assert b"Started" in disk.data or disk.writes

def test_the_switch_is_still_there(ping, host):
    assert host.ping("10.0.0.2").received == 1  # the third
    assert ping.wait().status == 0
"""


def test_one_boot_many_tests(pytester: pytest.Pytester, images: Path) -> None:
    pytester.makeconftest(CONFTEST)
    run(pytester, ONE_BOOT, "-s").assert_outcomes(passed=4)


def test_a_failed_test_shows_the_guests_that_it_shares(
    pytester: pytest.Pytester, images: Path
) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="module")
        def host(module_unikernel, module_switch):
            module_unikernel("ping.hvt", net={"service": module_switch.port()}, mem_mib=8)
            return module_switch.host("10.0.0.1/24")

        def test_fails(host, unikernel):
            unikernel("hello.hvt", mem_mib=8).wait()
            assert host.ping("10.0.0.2").received == 2

        def test_passes(host):
            assert host.ping("10.0.0.2").received == 1

        def test_shares_nothing(unikernel):
            assert unikernel("hello.hvt", mem_mib=8).wait().status == 1
    """
    result = run(pytester, source, "--ptender-artifacts=left")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*ptender: guest 0: */ping.hvt*", "still running", "*ptender: guest 1: */hello.hvt*"]
    )
    fails, shares_nothing = sorted((images / "left").iterdir())
    assert fails.name.endswith("test_fails")
    assert {path.name for path in fails.iterdir()} > {
        "guest0-ping.trace.jsonl",
        "guest0-ping.console.txt",
        "guest1-hello.outcome.txt",
        "switch0.pcapng",
    }
    assert not list(shares_nothing.glob("*ping*"))
    run(pytester, source, "--ptender-artifacts=left", "-k", "passes").assert_outcomes(passed=1)


def test_a_shared_guest_that_fails_unnoticed(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="module")
        def guest(module_unikernel):
            return module_unikernel("abort.hvt", mem_mib=8)

        def test_first(guest):
            guest.wait_until(lambda: not guest.running)

        def test_second(guest):
            pass
    """
    result = run(pytester, source)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "guest 0 (*/abort.hvt) has ended by itself: aborted, status 255",
            "and no test asked for its outcome",
            "*ptender: guest 0: */abort.hvt*",
        ]
    )
    unused = """
        import pytest

        @pytest.fixture(scope="module")
        def until_the_end(module_unikernel):
            guest = module_unikernel("abort.hvt", mem_mib=8, start=False)
            yield
            guest.start().wait_until(lambda: not guest.running)

        def test_passes(until_the_end):
            pass
    """
    result = run_beside(pytester, unused)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["guest 0 (*/abort.hvt) has ended by itself: aborted*"])


def test_shared_guests_in_virtual_time(pytester: pytest.Pytester, images: Path) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="session")
        def host(session_unikernel, session_virtual_switch):
            net = {"service": session_virtual_switch.port()}
            session_unikernel("ping.hvt", net=net, mem_mib=8)
            return session_virtual_switch.host("10.0.0.1/24")

        @pytest.mark.parametrize("hour", [0, 1, 2])
        def test_an_hour(host, session_virtual_switch, hour):
            assert session_virtual_switch.now // 3600 == hour
            session_virtual_switch.sleep(3600)
            assert host.ping("10.0.0.2").received == 1
    """
    run(pytester, source).assert_outcomes(passed=3)


def test_a_guest_that_does_not_start_is_an_error_of_its_tests(
    pytester: pytest.Pytester, images: Path
) -> None:
    source = """
        import pytest

        @pytest.fixture(scope="session")
        def guest(session_unikernel):
            return session_unikernel("none.hvt")

        def test_it(guest):
            pass
    """
    result = run(pytester, source)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"E*there is no image 'none.hvt' in {images}*"])
