"""What the plugin shows on the terminal while tests run: a line, or a Python shell."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import pytest


def names_at_failure(item: pytest.Item, call: pytest.CallInfo[None]) -> dict[str, Any]:
    """The names for a shell after a failure: the fixtures, and those of the test's frame."""
    found: dict[str, Any] = dict(getattr(item, "funcargs", {}))
    if call.excinfo is not None:
        code = getattr(getattr(item, "function", None), "__code__", None)
        for entry in call.excinfo.traceback:
            if entry.frame.raw.f_code is code:
                found = {**entry.frame.f_globals, **found, **entry.frame.f_locals}
    return found


def interact(config: pytest.Config, title: str, names: dict[str, Any]) -> None:
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


def say(config: pytest.Config, text: str) -> None:
    """Print a line where it is seen now."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        print(text, flush=True)
        return
    with capture.global_and_fixture_disabled():
        print(f"\n{text}", flush=True)


def _own(names: dict[str, Any]) -> list[str]:
    return [name for name in names if not name.startswith(("_", "@"))]
