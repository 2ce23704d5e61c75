"""What the documents show is what happens: their sessions are run, line by line.

The rule here, for the documents: a ```console block is a terminal, `$ ` or `# ` (root) before what
is typed, and what comes out below; `...` stands for anything. A command that ends with ` &` goes on
beside the others. A block of another kind whose fence names a file (```c greet.c) is that file.
Fences without either (```sh, ```text) are not run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.cli import options
from tests.guest.conftest import PTENDER, ROOT, Namespace, open_namespace
from tests.needs import needs
from tests.waiting import PATIENCE_S

GUIDES = (
    "operators",
    "observing",
    "snapshots",
    "debugging",
    "guests",
    "library",
    "devices",
    "testing",
    "from-solo5",
)
DOCUMENTS = ["README.md", "docs/software-cpu.md", *(f"docs/guide-{who}.md" for who in GUIDES)]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENDED = "--ended--"


class Terminal:
    """A shell whose output, and that of all that it starts, comes in here."""

    def __init__(self, namespace: Namespace, folder: Path) -> None:
        path = f"{PTENDER.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._shell = subprocess.Popen(
            [*namespace.enter, "bash"],
            cwd=folder,
            env={"PTENDER_CPU": "kvm", **os.environ, "PATH": path},  # what the documents show
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._output = ""
        self._lock = threading.Lock()  # of it: one thread adds to it, another takes from it
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._shell.stdout
        while part := os.read(self._shell.stdout.fileno(), 4096):
            with self._lock:
                self._output += part.decode(errors="replace")

    def _wait_for(self, pattern: str) -> str:
        """Take the output up to the end of `pattern`; all of it if that does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with self._lock:
                if found := re.match(pattern, self._output, re.DOTALL):
                    self._output = self._output[found.end() :]
                    return found[0]
            time.sleep(0.01)
        return self._output

    def type(self, command: str, shown: str) -> str:
        assert self._shell.stdin
        beside = command.endswith(" &")
        self._shell.stdin.write(command + "\n" + ("" if beside else f"echo {ENDED}\n"))
        self._shell.stdin.flush()
        pattern = as_pattern(shown) if beside else f".*?{ENDED}\n"
        return self._wait_for(pattern).removesuffix(f"{ENDED}\n")

    def close(self) -> None:
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        assert self._shell.stdin
        self._shell.stdin.close()
        self._reader.join()
        assert self._shell.stdout
        self._shell.stdout.close()


def as_pattern(shown: str) -> str:
    return ".*?".join(map(re.escape, shown.split("...")))


def sessions(block: str) -> Iterator[tuple[str, str]]:
    """What is typed in a ```console block, and what it shows below."""
    for part in re.split(r"^[$#] ", block, flags=re.MULTILINE)[1:]:
        typed = re.match(r"(?:[^\n]*\\\n)*[^\n]*\n", part)
        assert typed
        yield typed[0].rstrip("\n"), part[typed.end() :]


@pytest.fixture
def namespace(any_cpu: str) -> Iterator[Namespace]:
    yield from open_namespace()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_sessions_of_a_document(namespace: Namespace, tmp_path: Path, document: str) -> None:
    (tmp_path / "guest-bindings").symlink_to(ROOT / "guest-bindings")
    if re.search("=user|UserNet", (ROOT / document).read_text()):
        if shutil.which("passt") is None:
            pytest.skip("passt is not installed: apt install passt")
        needs("unshare", "--user")  # passt does
        namespace.tap("out0", "192.0.2.2/24")  # passt wants a way out, be it one to nowhere
        namespace.ip("route add default via 192.0.2.1")
    terminal = Terminal(namespace, tmp_path)
    try:
        for kind, name, block in BLOCK.findall((ROOT / document).read_text()):
            if name:
                (tmp_path / name).write_text(block)
            elif kind == "console":
                for typed, shown in sessions(block):
                    output = terminal.type(typed, shown)
                    assert re.fullmatch(as_pattern(shown), output, re.DOTALL), (typed, output)
    finally:
        terminal.close()


def test_every_option_is_in_a_guide() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("docs/*.md"))
    missing = [word for word in options.BY_NAME if f"`{word}" not in text]
    assert missing == []


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target
