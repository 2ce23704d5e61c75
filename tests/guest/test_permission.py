"""What a user is told who may not open /dev/kvm."""

from __future__ import annotations

import os
import subprocess

import pytest

from tender.cpu import native
from tests.guest.conftest import PTENDER, ROOT, Build
from tests.needs import needs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to make a /dev/kvm")

INSTEAD = "soft" if native.missing() else "native"
GROUP = 1  # one that has a name everywhere
ALONE = "as root, chgrp kvm /dev/kvm && chmod 660 /dev/kvm"

# A /dev of its own with such a device in it; then somebody who can read the files of this checkout,
# which may be in root's folder, and has no other right.
SCRIPT = """
mount -t tmpfs -o "$1" none /dev
mknod -m 666 /dev/null c 1 3
mknod -m "$3" /dev/kvm c 10 232
chgrp "$2" /dev/kvm
shift 3
exec setpriv --reuid=12345 --regid=12345 --clear-groups \\
    --inh-caps=+dac_read_search --ambient-caps=+dac_read_search -- "$@"
"""


def as_somebody(
    mount: str, group: int, mode: str, *words: object
) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--mount", "--", "sh", "-ec", SCRIPT, "sh", mount, group, mode, *words]
    needs("unshare", "--mount")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("mount", "group", "mode", "hint"),
    [
        ("mode=755", GROUP, "660", "join the group {group!r}"),
        ("mode=755", GROUP, "600", f"its file is root's alone: {ALONE}, and join that group"),
        ("mode=755", 0, "660", f"its file is root's alone: {ALONE}, and join that group"),
        ("mode=755", 54321, "660", "join the group '54321'"),
        ("mode=755", 65534, "660", "its group is none of this user namespace: join it outside"),
        ("mode=755,nodev", 0, "666", "not for want of a right to its file (a mount with nodev, "),
    ],
)
def test_what_would_be_right(guest: Build, mount: str, group: int, mode: str, hint: str) -> None:
    done = as_somebody(mount, group, mode, PTENDER, "--cpu=kvm", guest("exit"))
    text = hint.format(group=name_of(group))
    assert done.returncode == 1
    assert f"ptender: KVM: Could not open /dev/kvm: no permission: {text}" in done.stderr, done
    assert done.stderr.endswith(f", or use --cpu={INSTEAD}\n")
    assert done.stderr.count("\n") == 1


def name_of(group: int) -> str:
    import grp

    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


@pytest.mark.parametrize(
    ("group", "mode", "hint"),
    [
        (GROUP, "660", "as root, usermod -aG {group} 12345, then log in again"),
        (
            GROUP,
            "600",
            f"{ALONE} (its file is root's alone), usermod -aG kvm 12345, then log in again",
        ),
        (0, "660", f"{ALONE} (its file is root's alone), usermod -aG kvm 12345, then log in again"),
        (
            54321,
            "660",
            f"{ALONE} (its file is root's alone), usermod -aG kvm 12345, then log in again",
        ),
    ],
)
def test_quickstart_says_the_same(group: int, mode: str, hint: str) -> None:
    """Its own functions, without what it installs."""
    text = (ROOT / "quickstart").read_text()
    script = text[text.index("group_of_kvm() {") : text.index("\nfor word in")] + "\ncheck_kvm"
    script = f'cd "{ROOT}"; say() {{ echo "$*"; }}; fail() {{ say "$*"; exit 1; }}\n{script}'
    done = as_somebody("mode=755", group, mode, "bash", "-euo", "pipefail", "-c", script)
    why = f"no permission to open /dev/kvm: {hint.format(group=name_of(group))}; until then "
    assert done.stdout.startswith(why), done
