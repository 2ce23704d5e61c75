"""Files that are written to a full disk: a line with the file's name, and a status that says it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tender.observe import counters
from tests.guest.conftest import PTENDER, Build
from tests.needs import needs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")

# A full file system of the command's own at $1, where it is.
SCRIPT = """
mount -t tmpfs -o size=64k none "$1"
cd "$1"
mkdir folder
cat /dev/zero >fill 2>/dev/null || true
truncate -s -$2 fill
shift 2
status=0
"$@" || status=$?
test "$(find . -type f -size +0)" = ./fill || echo "it has left $(ls -A)" >&2
exit $status
"""
FULL, ALMOST = 0, 12 << 10  # bytes that are free


def full_disk(
    folder: Path, free: int, *words: object, program: tuple[object, ...] = (PTENDER,)
) -> subprocess.CompletedProcess[str]:
    """The command in a folder that has room for so many bytes; it says what files are left."""
    needs("unshare", "--mount")
    folder.mkdir()
    command = ["unshare", "--mount", "sh", "-ec", SCRIPT, "sh", folder, free, *program, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


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
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    (tmp_path / "trace").write_text('{"trace": 1, "guest": "web"}\n')
    names = {
        "trace": tmp_path / "trace",
        "disk": tmp_path / "disk.img",
        "kernel": guest("exit"),
        "stored": guest("hold"),
    }
    done = full_disk(tmp_path / "full", FULL, *words.format(**names).split())
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.count("\n") == 1, done
    assert message.format(**names) in done.stderr


def test_a_part_of_a_record_is_not_left(guest: Build, tmp_path: Path) -> None:
    done = full_disk(tmp_path / "full", ALMOST, "--record=out", guest("exit"))
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr == "ptender: Could not write record: out: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trace=out", "trace: it ends here: write: No space left on device; the guest goes on"),
        ("--report=out", "report: write: No space left on device"),
    ],
)
def test_a_guest_goes_on(guest: Build, tmp_path: Path, words: str, message: str) -> None:
    done = full_disk(tmp_path / "full", FULL, "--cpu=soft", "--mem=8", words, guest("exit"), 7)
    assert (done.returncode, done.stderr) == (7, f"ptender: {message}\n"), done
    assert "solo5_exit(7)" in done.stdout


SAVE = """
"$1" --cpu=soft --mem=4 --name="$2" --snapshots=. "$3" 600000 >/dev/null 2>&1 &
until [ -e "$4/$!.snapshot" ]; do kill -0 $!; sleep 0.05; done
before=$(stat -f -c %f .)
"$1" snapshot "$2" ../saved || echo "$?, the guest has $((before - $(stat -f -c %f .))) blocks"
kill $!
wait $! || true
test ! -e ../saved
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="snapshots of x86_64 guests")
def test_a_snapshot_that_fails_gives_the_disk_back(guest: Build, tmp_path: Path) -> None:
    name = f"{os.getpid()}.{os.urandom(4).hex()}"
    done = full_disk(
        tmp_path / "full", ALMOST, name, guest("sleep"), counters.folder(),
        program=("sh", "-ec", SAVE, "sh", PTENDER),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1, the guest has 0 blocks\n"), done
    assert done.stderr == (
        f"ptender: {name}: not saved, in the folder of --snapshots: No space left on device\n"
    )
