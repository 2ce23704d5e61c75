"""The pytest plugin: fixtures and options.

The rule here: every pytest run in an environment with ptender loads this file, so it imports the
rest of tender.testing only when a test uses a fixture; cpu.py is imported for pytest's header.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import Any

    from tender.embed.interfaces import Cpu
    from tender.testing.fixtures import BlockImageFactory, SubtestFactory, UnikernelFactory
    from tender.testing.net.switch import Switch
    from tender.testing.session import Session

_SESSION: pytest.StashKey[Session] = pytest.StashKey()
_CPU: pytest.StashKey[tuple[Cpu, str]] = pytest.StashKey()
_CAUGHT: pytest.StashKey[bool] = pytest.StashKey()
_PASSED: pytest.StashKey[bool] = pytest.StashKey()
PATIENCE_S = 60.0
SECONDS_MAX = 1e6  # poll(2) takes it as milliseconds in an int


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
    for name in ("--ptender-interactive", "--ptender-gdb"):
        if config.getoption(name) and config.getoption("numprocesses", None):
            raise pytest.UsageError(f"{name} cannot be used with -n: leave one out")


def pytest_report_header(config: pytest.Config) -> str:
    return f"ptender: guests run on {_cpu(config)[1]}"


def _cpu(config: pytest.Config) -> tuple[Cpu, str]:
    """The `cpu` of guests that are given none, and its description; determined once."""
    if _CPU not in config.stash:
        from tender.testing.cpu import choose

        config.stash[_CPU] = choose(config.getoption("--ptender-cpu"))
    return config.stash[_CPU]


@pytest.fixture
def _ptender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    from tender.testing.session import Session

    option = request.config.getoption
    given, gdb = option("--ptender-artifacts"), option("--ptender-gdb")

    def artifacts() -> Path:
        if given:
            return Path(request.config.invocation_params.dir, given)
        return tmp_path_factory.getbasetemp() / "ptender"

    session = Session(
        request.node.nodeid,
        [request.path.parent, request.config.rootpath, Path()],
        artifacts,
        lambda: tmp_path_factory.mktemp("ptender-guests"),
        cpu=_cpu(request.config)[0],
        patience=SECONDS_MAX if gdb else option("--ptender-timeout"),
        seed=option("--ptender-seed"),
        trace=not option("--ptender-no-trace"),
        gdb=gdb,
        say=lambda text: _say(request.config, text),
    )
    if given:
        session.remove_artifacts()
    request.node.stash[_SESSION] = session
    yield session
    session.close()
    if session.bad_ends and request.node.stash.get(_PASSED, False):
        ends = "\n".join(session.bad_ends)
        pytest.fail(f"{ends}\nand the test did not ask for its outcome", pytrace=False)
    session.clean()  # after a failure: when the report is made


@pytest.fixture
def unikernel(
    _ptender: Session, request: pytest.FixtureRequest, tmp_path: Path
) -> UnikernelFactory:
    """Start unikernels: `unikernel("ping.hvt", net={"service": switch.port()})`."""
    from tender.testing.fixtures import UnikernelFactory

    def shell(names: dict[str, Any]) -> None:
        if request.config.getoption("--ptender-interactive"):
            _interact(request.config, f"unikernel.shell() in {request.node.nodeid}", names)

    return UnikernelFactory(_ptender, shell, tmp_path)


@pytest.fixture
def switch(_ptender: Session) -> Switch:
    """An Ethernet switch: `switch.port()` for guests, `switch.host("10.0.0.1/24")`, faults.

    `switch.another()` makes a further one, for a second network.
    """
    return _ptender.switch()


@pytest.fixture
def virtual_switch(_ptender: Session) -> Switch:
    """A switch in virtual time: its guests run on the software CPU, and every run is the same."""
    return _ptender.switch(virtual=True)


@pytest.fixture
def blockimage(_ptender: Session) -> BlockImageFactory:
    """Make a disk from a size, bytes, or a file (copied): `blockimage(1 << 20)`."""
    from tender.testing.fixtures import BlockImageFactory

    return BlockImageFactory(_ptender)


@pytest.fixture
def subtest(_ptender: Session) -> SubtestFactory:
    """A part of a test: `with subtest("it boots"): ...`.

    It is printed and reported. If it fails, the test ends; with go_on=True the test goes on, and
    fails at its end.
    """
    from tender.testing.fixtures import SubtestFactory

    return SubtestFactory(_ptender)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    session = item.stash.get(_SESSION, None)
    if session is not None and session.failures:
        failures = "\n".join(session.failures)
        pytest.fail(f"{len(session.failures)} sub-test(s) failed:\n{failures}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if _SESSION in item.stash and call.excinfo is not None:
        _hide_frames(call.excinfo)
    report = yield
    session = item.stash.get(_SESSION, None)
    if report.when == "call" and report.passed:
        item.stash[_PASSED] = True
    if session is None or not report.failed or item.stash.get(_CAUGHT, False):
        return report
    item.stash[_CAUGHT] = True
    if item.config.getoption("--ptender-interactive") and call.excinfo is not None:
        title = f"{item.nodeid} failed: {call.excinfo.exconly()}"
        _interact(item.config, title, _names(item, call))
    try:
        sections = session.keep_artifacts()
        report.sections += [(f"ptender: {title}", text) for title, text in sections]
    except Exception as error:  # the other tests go on
        text = f"this part of the report could not be made: {type(error).__name__}: {error}"
        report.sections.append(("ptender", text))
    session.clean()
    return report


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


def _names(item: pytest.Item, call: pytest.CallInfo[None]) -> dict[str, Any]:
    """The names for a shell after a failure: the fixtures, and those of the test's frame."""
    names: dict[str, Any] = dict(getattr(item, "funcargs", {}))
    if call.excinfo is not None:
        code = getattr(getattr(item, "function", None), "__code__", None)
        for entry in call.excinfo.traceback:
            if entry.frame.raw.f_code is code:
                names = {**entry.frame.f_globals, **names, **entry.frame.f_locals}
    return names


def _interact(config: pytest.Config, title: str, names: dict[str, Any]) -> None:
    """Open a Python shell on the terminal; the test goes on when it ends (Ctrl-D)."""
    import code

    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    try:
        code.interact(
            f"\n{title}\nThe guests still run. Names: {', '.join(sorted(_own(names)))}\n"
            "Press Ctrl-D to go on.",
            local=names,
            exitmsg="",
        )
    except SystemExit:
        pass  # exit() ends the shell, not the test
    finally:
        if capture is not None:
            capture.resume_global_capture()


def _say(config: pytest.Config, text: str) -> None:
    """Print a line where it is seen now."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        print(text, flush=True)
        return
    with capture.global_and_fixture_disabled():
        print(f"\n{text}", flush=True)


def _own(names: dict[str, Any]) -> list[str]:
    return [name for name in names if not name.startswith(("_", "@"))]
