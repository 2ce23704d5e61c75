"""Files that are written to a full disk: a line with the file's name, and a status that says it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.guest.conftest import PTENDER, Build
from tests.needs import needs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

# A full file system of the command's own at $1, where it is.
SCRIPT = """
mount -t tmpfs -o size=64k none "$1"
cd "$1"
mkdir folder
cat /dev/zero >fill 2>/dev/null || true
shift
exec "$@"
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trace {trace} -o out", "out: No space left on device"),
        ("image {kernel} -t web -o out", "can't write out: No space left on device"),
        ("image {kernel} -t web -o folder/", "can't write folder: No space left on device"),
        ("--record out {kernel}", "Could not write record: out: No space left on device"),
        ("--pidfile out {kernel}", "Could not write PID file: out: No space left on device"),
        ("--block {disk},overlay=out {stored}", "overlay out: No space left on device"),
    ],
)
def test_one_line_names_the_file(guest: Build, tmp_path: Path, words: str, message: str) -> None:
    needs("unshare", "--mount")
    (tmp_path / "full").mkdir()
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    (tmp_path / "trace").write_text('{"trace": 1, "guest": "web"}\n')
    names = {
        "trace": tmp_path / "trace",
        "disk": tmp_path / "disk.img",
        "kernel": guest("exit"),
        "stored": guest("hold"),
    }
    command = ["unshare", "--mount", "sh", "-ec", SCRIPT, "sh", tmp_path / "full", PTENDER]
    done = subprocess.run(
        [*map(str, command), *words.format(**names).split()], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.count("\n") == 1, done
    assert message.format(**names) in done.stderr
