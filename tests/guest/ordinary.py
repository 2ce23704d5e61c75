"""A command as an ordinary user, where the tests run as root.

The rule here: root's own folders are opened up in a mount namespace of that command alone, since
the interpreter and the checkout may lie in /root.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.needs import needs

NOBODY = "65534"

_SCRIPT = """
set -e
cd /
if [ "$(stat -c %a /root)" = 700 ]; then
    mount --rbind /root "$1"
    mount -t tmpfs -o mode=755 none /root
    for folder in "$1"/* "$1"/.[!.]*; do
        [ -d "$folder" ] || continue
        mkdir "/root/${folder##*/}"
        mount --rbind "$folder" "/root/${folder##*/}"
    done
fi
shift
exec setpriv --reuid NOBODY --regid NOBODY --clear-groups -- "$@"
""".replace("NOBODY", NOBODY)


def ordinary(folder: Path, words: Sequence[object]) -> list[str]:
    """`words` as a command of an ordinary user's; `folder` is an empty one for a mount."""
    command = [str(word) for word in words]
    if os.geteuid() != 0:
        return command
    needs("unshare", "--mount")
    needs("setpriv", "--clear-groups")
    folder.mkdir(exist_ok=True)
    return ["unshare", "--mount", "--", "sh", "-c", _SCRIPT, "sh", str(folder), *command]
