"""The pytest plugin: fixtures and options; nothing to import.

The rule here: this file is loaded by every pytest of an environment that has ptender, so it
imports nothing of the harness before a test asks for it, but for what the header says. What a
failed test leaves is decided by tender/testing/report.py.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from typing_extensions import Unpack

    from tender.embed.interfaces import NetSpec
    from tender.testing.disk import DiskImage
    from tender.testing.lab import Lab
    from tender.testing.net.switch import Switch
    from tender.testing.unikernel import GuestOptions, Unikernel

_LAB: pytest.StashKey[Lab] = pytest.StashKey()
_CPU: pytest.StashKey[tuple[str, str]] = pytest.StashKey()
_CAUGHT: pytest.StashKey[bool] = pytest.StashKey()
_PASSED: pytest.StashKey[bool] = pytest.StashKey()
PATIENCE_S = 60.0
SECONDS_MAX = 1e6  # what poll(2) and its like can be told, and more than any test takes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < SECONDS_MAX:  # which nan is not either
        raise ArgumentTypeError(f"{text!r} is not a number of seconds, as 60")
    return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptender", "unikernels in tests")
    group.addoption(
        "--ptender-cpu",
        choices=("auto", "kvm", "soft"),
        default="auto",
        help="what guests run on (default: auto, or what PTENDER_CPU says)",
    )
    group.addoption(
        "--ptender-timeout",
        type=_seconds,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="of everything that waits and has no timeout of its own; in virtual time, how much "
        f"real time each wait may take (default: {PATIENCE_S:g})",
    )
    group.addoption(
        "--ptender-artifacts",
        metavar="DIR",
        help="where failed tests leave console, packets, trace and outcome, each in a folder of "
        "its own (default: ptender/ in pytest's temporary folder)",
    )
    group.addoption(
        "--ptender-seed",
        help="what the chance of faults comes from (default: the name of each test)",
    )
    group.addoption(
        "--ptender-no-trace",
        action="store_true",
        help="do not write down hypercalls, which is faster where guests are on KVM",
    )
    group.addoption(
        "--ptender-interactive",
        action="store_true",
        help="a Python shell with the guests alive where a test fails or calls unikernel.shell()",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ptender-interactive") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--ptender-interactive needs one process: leave out -n")


def pytest_report_header(config: pytest.Config) -> str:
    return f"ptender: guests run on {_cpu(config)[1]}"


def _cpu(config: pytest.Config) -> tuple[str, str]:
    """The CPU of guests that name none, and what it is for people; found out once."""
    if _CPU not in config.stash:
        from tender.testing.cpu import choose

        config.stash[_CPU] = choose(config.getoption("--ptender-cpu"))
    return config.stash[_CPU]


@pytest.fixture
def _ptender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    from tender.testing.lab import Lab

    option = request.config.getoption
    given = option("--ptender-artifacts")

    def artifacts() -> Path:
        if given:
            return Path(request.config.invocation_params.dir, given)
        return tmp_path_factory.getbasetemp() / "ptender"

    lab = Lab(
        request.node.nodeid,
        [request.path.parent, request.config.rootpath, Path()],
        artifacts,
        lambda: tmp_path_factory.mktemp("ptender-guests"),
        cpu=_cpu(request.config)[0],
        patience=option("--ptender-timeout"),
        seed=option("--ptender-seed"),
        trace=not option("--ptender-no-trace"),
    )
    if given:
        lab.forget()
    request.node.stash[_LAB] = lab
    yield lab
    lab.close()
    if lab.deaths and request.node.stash.get(_PASSED, False):
        told = "\n".join(lab.deaths)
        pytest.fail(f"{told}\nand the test did not ask for its outcome", pytrace=False)
    lab.clean()  # else the report needs it first


class UnikernelFactory:
    """The fixture `unikernel`."""

    def __init__(self, lab: Lab, shell: Callable[[dict[str, Any]], None], folder: Path) -> None:
        self._lab = lab
        self._shell = shell
        self._folder = folder

    def __call__(
        self,
        kernel: str | Path,
        *args: str,
        net: Mapping[str, NetSpec] | None = None,
        start: bool = True,
        patience: float | None = None,
        **options: Unpack[GuestOptions],
    ) -> Unikernel:
        """Start a guest; it is stopped when the test ends.

        `kernel` is a path relative to the test's folder or to pytest's root, `args` the guest's
        command line, and `options` those of tender.Guest: block, mem_mib, cpu, clock...
        With start=False it is only made: `guest.start()`, or `with guest:`. `patience` is how many
        seconds its verbs wait that have no timeout.
        """
        return self._lab.start(kernel, *args, net=net, start=start, patience=patience, **options)

    def build(
        self,
        *sources: str | Path,
        manifest: str | Path | None = None,
        output: str | Path | None = None,
        target: str | None = None,
        cc: str | None = None,
        cflags: Sequence[str] = (),
        fp: bool = False,
    ) -> Path:
        """Build an image as `ptender build` does, in the test's temporary folder; its path."""
        from tender.image.build import build

        found = [str(self._lab.find(source)) for source in sources]
        described = None if manifest is None else str(self._lab.find(manifest))
        image = self._folder / (output or Path(found[0]).with_suffix(".hvt").name)
        build(found, described, str(image), target=target, cc=cc, cflags=cflags, fp=fp)
        return image

    @property
    def guests(self) -> list[Unikernel]:
        """All that this test has started."""
        return list(self._lab.guests)

    def shell(self) -> None:
        """With --ptender-interactive: a Python shell with the test's names; else nothing."""
        frame = sys._getframe(1)
        self._shell({**frame.f_globals, **frame.f_locals})


class BlockImageFactory:
    """The fixture `blockimage`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def __call__(
        self,
        content: int | bytes | bytearray | str | os.PathLike[str],
        *,
        readonly: bool = False,
        sector_size: int = 512,
    ) -> DiskImage:
        """Make a disk of a size (1 << 20, "1M"), of bytes, or of a file, of which it is a copy."""
        return self._lab.disk(content, readonly, sector_size)


class SubtestFactory:
    """The fixture `subtest`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def __call__(self, name: str, go_on: bool = False) -> AbstractContextManager[None]:
        """A part of the test. One that fails ends the test, or with `go_on` fails it at its end."""
        return self._lab.subtest(name, go_on)


@pytest.fixture
def unikernel(_ptender: Lab, request: pytest.FixtureRequest, tmp_path: Path) -> UnikernelFactory:
    """Start unikernels: `unikernel("ping.hvt", net={"service": switch.port()})`."""

    def shell(names: dict[str, Any]) -> None:
        if request.config.getoption("--ptender-interactive"):
            _interact(request.config, f"unikernel.shell() in {request.node.nodeid}", names)

    return UnikernelFactory(_ptender, shell, tmp_path)


@pytest.fixture
def switch(_ptender: Lab) -> Switch:
    """An Ethernet switch: `switch.port()` for guests, `switch.host("10.0.0.1/24")`, faults.

    `switch.another()` is a further one, for a second network.
    """
    return _ptender.switch()


@pytest.fixture
def virtual_switch(_ptender: Lab) -> Switch:
    """The same in virtual time: its guests run on the software CPU, each run is the same."""
    return _ptender.switch(virtual=True)


@pytest.fixture
def blockimage(_ptender: Lab) -> BlockImageFactory:
    """Make a disk of a size, of bytes, or of a file (a copy): `blockimage(1 << 20)`."""
    return BlockImageFactory(_ptender)


@pytest.fixture
def subtest(_ptender: Lab) -> SubtestFactory:
    """A part of a test: `with subtest("it boots"): ...`.

    It is printed and reported. One that fails ends the test, or with go_on=True the test goes
    on, and fails at its end.
    """
    return SubtestFactory(_ptender)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    lab = item.stash.get(_LAB, None)
    if lab is not None and lab.failures:
        told = "\n".join(lab.failures)
        pytest.fail(f"{len(lab.failures)} sub-test(s) failed:\n{told}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if _LAB in item.stash and call.excinfo is not None:
        _hide_frames(call.excinfo)
    report = yield
    lab = item.stash.get(_LAB, None)
    if report.when == "call" and report.passed:
        item.stash[_PASSED] = True
    if lab is None or not report.failed or item.stash.get(_CAUGHT, False):
        return report
    item.stash[_CAUGHT] = True
    if item.config.getoption("--ptender-interactive") and call.excinfo is not None:
        title = f"{item.nodeid} failed: {call.excinfo.exconly()}"
        _interact(item.config, title, _names(item, call))
    try:
        report.sections += [(f"ptender: {title}", text) for title, text in lab.keep()]
    except Exception as error:  # the session goes on
        text = f"this part of the report could not be made: {type(error).__name__}: {error}"
        report.sections.append(("ptender", text))
    lab.clean()
    return report


def _hide_frames(error: pytest.ExceptionInfo[BaseException]) -> None:
    """Let the traceback end in the test, where the harness says what is wrong there."""
    for entry in error.traceback:
        names = entry.frame.f_globals
        if _is_ours(names.get("__name__", "")):
            names.setdefault("__tracebackhide__", _is_told)  # pytest's word for that


def _is_told(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """Of any other error the frames are needed: it is a bug of the harness."""
    told = OSError, ValueError, TypeError, EOFError, RuntimeError
    return isinstance(error.value, told) or _is_ours(type(error.value).__module__)


def _is_ours(module: str) -> bool:
    return module == "tender" or module.startswith("tender.")


def _names(item: pytest.Item, call: pytest.CallInfo[None]) -> dict[str, Any]:
    """What a shell after a failure knows: the fixtures, and the names where the test was."""
    names: dict[str, Any] = dict(getattr(item, "funcargs", {}))
    if call.excinfo is not None:
        code = getattr(getattr(item, "function", None), "__code__", None)
        for entry in call.excinfo.traceback:
            if entry.frame.raw.f_code is code:
                names = {**entry.frame.f_globals, **names, **entry.frame.f_locals}
    return names


def _interact(config: pytest.Config, title: str, names: dict[str, Any]) -> None:
    """A Python shell on the terminal; the test goes on when it ends (Ctrl-D)."""
    import code

    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    try:
        code.interact(
            f"\n{title}\nThe guests are alive. Names: {', '.join(sorted(_own(names)))}\n"
            "Ctrl-D goes on.",
            local=names,
            exitmsg="",
        )
    except SystemExit:
        pass  # exit() leaves the shell, not the test
    finally:
        if capture is not None:
            capture.resume_global_capture()


def _own(names: dict[str, Any]) -> list[str]:
    return [name for name in names if not name.startswith(("_", "@"))]
