"""The fixtures of the pytest plugin, for a test, a module and pytest's session.

The rule here is that of plugin.py: the rest of tender.testing is imported when a test uses a
fixture.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _pytest.nodes import Node

    from tender.embed.interfaces import Cpu
    from tender.testing.fixtures import BlockImageFactory, SubtestFactory, UnikernelFactory
    from tender.testing.net.switch import Switch
    from tender.testing.session import Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()
PASSED: pytest.StashKey[bool] = pytest.StashKey()
TEMPORARY: pytest.StashKey[pytest.TempPathFactory] = pytest.StashKey()
SHARED = {
    "session": "_session_ptender",
    "module": "_module_ptender",
    "function": "_ptender",
}  # what the fixtures of a scope share
SECONDS_MAX = 1e6  # poll(2) takes it as milliseconds in an int
_CPU: pytest.StashKey[tuple[Cpu, str]] = pytest.StashKey()


def cpu_of(config: pytest.Config) -> tuple[Cpu, str]:
    """The `cpu` of guests that are given none, and its description; determined once."""
    if _CPU not in config.stash:
        from tender.testing.cpu import choose

        config.stash[_CPU] = choose(config.getoption("--ptender-cpu"))
    return config.stash[_CPU]


# ---- What fixtures share ----


def sessions_of(node: Node) -> list[Session]:
    """The sessions of the fixtures that a test uses, the widest scope first."""
    names = getattr(node, "fixturenames", SHARED.values())
    used = [(each.stash.get(SESSION, None), SHARED[_scope(each)]) for each in node.listchain()]
    return [session for session, name in used if session is not None and name in names]


def _scope(node: Node) -> str:
    if isinstance(node, pytest.Session):
        return "session"
    return "module" if isinstance(node, pytest.Module) else "function"


def _open_session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    from tender.testing.session import Session
    from tender.testing.terminal import say

    option = request.config.getoption
    gdb = option("--ptender-gdb")
    node, is_test = request.node, request.scope == "function"
    beside = [] if request.scope == "session" else [request.path.parent]
    session = Session(
        node.nodeid or "session",
        [*beside, request.config.rootpath, Path()],
        lambda: tmp_path_factory.mktemp("ptender-guests"),
        cpu=cpu_of(request.config)[0],
        patience=SECONDS_MAX if gdb else option("--ptender-timeout"),
        seed=option("--ptender-seed"),
        trace=not option("--ptender-no-trace"),
        record=option("--ptender-record"),
        gdb=gdb,
        say=lambda text: say(request.config, text),
        wider=lambda: [each for each in sessions_of(node) if each is not session],
        is_test=is_test,
    )
    node.stash[SESSION] = session
    request.config.stash[TEMPORARY] = tmp_path_factory
    yield session
    session.close()
    if session.bad_ends and (not is_test or node.stash.get(PASSED, False)):
        who = "the test did not ask" if is_test else "no test asked"
        pytest.fail("\n".join([*session.bad_ends, f"and {who} for its outcome"]), pytrace=False)
    session.clean()  # after a failure: when the report is made


@pytest.fixture
def _ptender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    yield from _open_session(request, tmp_path_factory)


@pytest.fixture(scope="module")
def _module_ptender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    yield from _open_session(request, tmp_path_factory)


@pytest.fixture(scope="session")
def _session_ptender(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    yield from _open_session(request, tmp_path_factory)


def _factory(
    session: Session, request: pytest.FixtureRequest, folder: Path | None = None
) -> UnikernelFactory:
    from tender.testing.fixtures import UnikernelFactory

    def shell(names: dict[str, Any]) -> None:
        if request.config.getoption("--ptender-interactive"):
            from tender.testing.terminal import interact

            interact(request.config, f"unikernel.shell() in {session.name}", names)

    return UnikernelFactory(session, shell, folder or session.scratch())


# ---- Fixtures ----


@pytest.fixture
def unikernel(
    _ptender: Session, request: pytest.FixtureRequest, tmp_path: Path
) -> UnikernelFactory:
    """Start unikernels: `unikernel("ping.hvt", net={"service": switch.port()})`."""
    return _factory(_ptender, request, tmp_path)


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


@pytest.fixture(scope="module")
def module_unikernel(_module_ptender: Session, request: pytest.FixtureRequest) -> UnikernelFactory:
    """`unikernel` for fixtures of module scope: its guests run until the last test of the file."""
    return _factory(_module_ptender, request)


@pytest.fixture(scope="module")
def module_switch(_module_ptender: Session) -> Switch:
    """`switch` for fixtures of module scope."""
    return _module_ptender.switch()


@pytest.fixture(scope="module")
def module_virtual_switch(_module_ptender: Session) -> Switch:
    """`virtual_switch` for fixtures of module scope."""
    return _module_ptender.switch(virtual=True)


@pytest.fixture(scope="module")
def module_blockimage(_module_ptender: Session) -> BlockImageFactory:
    """`blockimage` for fixtures of module scope."""
    from tender.testing.fixtures import BlockImageFactory

    return BlockImageFactory(_module_ptender)


@pytest.fixture(scope="session")
def session_unikernel(
    _session_ptender: Session, request: pytest.FixtureRequest
) -> UnikernelFactory:
    """`unikernel` for fixtures of session scope: its guests run until the last test.

    Paths are relative to pytest's root.
    """
    return _factory(_session_ptender, request)


@pytest.fixture(scope="session")
def session_switch(_session_ptender: Session) -> Switch:
    """`switch` for fixtures of session scope."""
    return _session_ptender.switch()


@pytest.fixture(scope="session")
def session_virtual_switch(_session_ptender: Session) -> Switch:
    """`virtual_switch` for fixtures of session scope."""
    return _session_ptender.switch(virtual=True)


@pytest.fixture(scope="session")
def session_blockimage(_session_ptender: Session) -> BlockImageFactory:
    """`blockimage` for fixtures of session scope."""
    from tender.testing.fixtures import BlockImageFactory

    return BlockImageFactory(_session_ptender)
