"""The pytest plugin: options, hooks and reports. Its fixtures are in plugin_fixtures.py.

The rule here: every pytest run in an environment with ptender loads these two files, so they import
the rest of tender.testing only when a test uses a fixture; cpu.py is imported for pytest's header.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from tender.testing import plugin_fixtures
from tender.testing.plugin_fixtures import (
    PASSED,
    SECONDS_MAX,
    SESSION,
    SHARED,
    TEMPORARY,
    cpu_of,
    sessions_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from tender.testing.session import Session

_CAUGHT: pytest.StashKey[bool] = pytest.StashKey()
PATIENCE_S = 60.0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < SECONDS_MAX:  # also false for nan
        raise ArgumentTypeError(f"{text!r} is not a number of seconds, as 60")
    return seconds


def _gdb(text: str) -> int | str:
    if not text.isdigit() and "/" not in text:
        raise ArgumentTypeError(f"{text!r} is not a port, nor the path of a socket (with a /)")
    return int(text) if text.isdigit() else text


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptender", "unikernels in tests")
    group.addoption(
        "--ptender-cpu",
        choices=("auto", "kvm", "native", "soft"),
        default="auto",
        help="the CPU of guests (default: auto, or the value of PTENDER_CPU)",
    )
    group.addoption(
        "--ptender-timeout",
        type=_seconds,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="timeout of every wait that is given none; in virtual time, the limit of real time "
        f"for each wait (default: {PATIENCE_S:g})",
    )
    group.addoption(
        "--ptender-artifacts",
        metavar="DIR",
        help="where failed tests leave console, packets, trace and outcome, in one folder per "
        "test (default: ptender/ in pytest's temporary folder)",
    )
    group.addoption(
        "--ptender-seed",
        help="seed of all random faults (default: the name of each test)",
    )
    group.addoption(
        "--ptender-no-trace",
        action="store_true",
        help="do not record hypercalls, which makes guests on KVM faster",
    )
    group.addoption(
        "--ptender-record",
        action="store_true",
        help="record the runs of all guests, which are on the software CPU then; those of failed "
        "tests are kept, for ptender --replay",
    )
    group.addoption(
        "--ptender-gdb",
        nargs="?",
        const="1234",
        type=_gdb,
        metavar="PORT|PATH",
        help="each guest waits for gdb before its first instruction, at this port of 127.0.0.1 "
        "(default: 1234) or Unix socket; further guests of a test at the next one. Waits have no "
        "timeout",
    )
    group.addoption(
        "--ptender-interactive",
        action="store_true",
        help="open a Python shell, with the guests still running, where a test fails or calls "
        "unikernel.shell()",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(plugin_fixtures, "ptender-fixtures")
    for name in ("--ptender-interactive", "--ptender-gdb"):
        if config.getoption(name) and config.getoption("numprocesses", None):
            raise pytest.UsageError(f"{name} cannot be used with -n: leave one out")


def pytest_report_header(config: pytest.Config) -> str:
    return f"ptender: guests run on {cpu_of(config)[1]}"


# ---- The course of a test ----


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    if item.config.getoption("--ptender-artifacts") and not set(SHARED.values()).isdisjoint(
        getattr(item, "fixturenames", ())
    ):
        from tender.testing.session import remove_artifacts

        remove_artifacts(_artifacts(item.config), item.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    session = item.stash.get(SESSION, None)
    if session is not None and session.failures:
        failures = "\n".join(session.failures)
        pytest.fail(f"{len(session.failures)} sub-test(s) failed:\n{failures}", pytrace=False)
    shared = [each for each in sessions_of(item) if each is not session]
    if ends := [end for each in shared for end in each.take_bad_ends()]:
        pytest.fail("\n".join([*ends, "and no test asked for its outcome"]), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    sessions = sessions_of(item)
    if sessions and call.excinfo is not None:
        _hide_frames(call.excinfo)
    report = yield
    if report.when == "call" and report.passed:
        item.stash[PASSED] = True
    if not sessions or not report.failed or item.stash.get(_CAUGHT, False):
        return report
    item.stash[_CAUGHT] = True
    if item.config.getoption("--ptender-interactive") and call.excinfo is not None:
        from tender.testing.terminal import interact, names_at_failure

        title = f"{item.nodeid} failed: {call.excinfo.exconly()}"
        interact(item.config, title, names_at_failure(item, call))
    report.sections += [(f"ptender: {title}", text) for title, text in _keep(item, sessions)]
    return report


def _keep(item: pytest.Item, sessions: list[Session]) -> list[tuple[str, str]]:
    """End the guests of a failed test and keep its artifacts; sections for its report."""
    from tender.testing.session import keep_artifacts

    own = item.stash.get(SESSION, None)
    try:
        return keep_artifacts(_artifacts(item.config), item.nodeid, sessions, own)
    except Exception as error:  # the other tests go on
        text = f"this part of the report could not be made: {type(error).__name__}: {error}"
        return [("report", text)]
    finally:
        for session in sessions:
            if session.closed:
                session.clean()


def _artifacts(config: pytest.Config) -> Path:
    """The folder for the files of failed tests."""
    if given := config.getoption("--ptender-artifacts"):
        return Path(config.invocation_params.dir, given)
    return config.stash[TEMPORARY].getbasetemp() / "ptender"


def _hide_frames(error: pytest.ExceptionInfo[BaseException]) -> None:
    """Let the traceback of an error that the test has caused end in the test."""
    for entry in error.traceback:
        names = entry.frame.f_globals
        if _is_ours(names.get("__name__", "")):
            names.setdefault("__tracebackhide__", _is_caused_by_test)


def _is_caused_by_test(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Other errors are bugs of this package, and their frames are shown."""
    caused = OSError, ValueError, TypeError, EOFError, RuntimeError
    return isinstance(error.value, caused) or _is_ours(type(error.value).__module__)


def _is_ours(module: str) -> bool:
    return module == "tender" or module.startswith("tender.")
