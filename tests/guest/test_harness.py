"""The harness as its users have it: pytest runs of their own, with guests and failures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import BINDINGS, PTENDER, Build

pytest_plugins = "pytester"
pytestmark = pytest.mark.usefixtures("cpu")

EXAMPLE = """
def test_answers_ping(unikernel, switch):
    guest = unikernel("ping.hvt", net={"service0": switch.port()})
    host = switch.host("10.0.0.1/24")
    assert host.ping("10.0.0.2", count=100).received == 100
    switch.drop(every=3)
    assert host.ping("10.0.0.2", count=9).received == 6
    assert guest.stop().status == 0
"""


@pytest.fixture
def images(pytester: pytest.Pytester, guest: Build) -> Path:
    """The folder of the inner tests, with images beside them."""
    for name in ("ping", "talk", "web", "hello", "disk", "exception", "loop", "block"):
        shutil.copy(guest(name), pytester.path)
    return pytester.path


def run(pytester: pytest.Pytester, source: str, *words: str) -> pytest.RunResult:
    """One test file, run by a pytest of its own."""
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *words)


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
                        and name != "tender.testing.plugin"]
    """
    run(pytester, source).assert_outcomes(passed=1)
