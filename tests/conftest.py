"""What all tests share."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.waiting import children, kill, marked, state_of, wait_until

# In the environment of what the tests start, and of what one of them does. A guest's server keeps
# the variables of the locale.
SUITE, TEST = "LC_PTENDER_SUITE", "LC_PTENDER_ONE_TEST"

# A slow machine is no failure, and a failure is the same one on the next run.
settings.register_profile("ptender", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ptender")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu",
        choices=("all", "kvm", "native", "soft"),
        default="all",
        help="what the guests of tests/guest run on (default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Signals as a terminal has them: a shell's `&` and nohup have some ignored, for children too.

    A handler, unlike SIG_IGN, is not inherited by a program that is executed.
    """
    os.environ.setdefault(SUITE, uuid.uuid4().hex)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signo in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(signo) == signal.SIG_IGN:
            signal.signal(signo, lambda *_: None)
    for signo in (signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signo, signal.SIG_DFL)
    if is_controller(config):  # SIGTERM is an end in good order too
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Nothing that the tests have started is left running."""
    if is_controller(config):
        for pid in marked(SUITE, os.environ[SUITE]):
            kill(pid)


def is_controller(config: pytest.Config) -> bool:
    """Whether this process is no worker of pytest-xdist."""
    return not hasattr(config, "workerinput")


@pytest.fixture(autouse=True)
def nothing_of_a_failed_test_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """A guest of it that never ends would take the CPU from the tests after it."""
    before, failed = set(children(os.getpid())), request.session.testsfailed
    os.environ[TEST] = value = uuid.uuid4().hex
    yield
    if request.session.testsfailed > failed:
        left = {*children(os.getpid()), *marked(TEST, value)} - before
        for pid in left:
            kill(pid)
        wait_until(lambda: all(state_of(pid) in ("", "Z") for pid in left))
