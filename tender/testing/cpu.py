"""Which CPU the guests of a pytest run have, and why: found out once, told once.

The rule here: `auto` is decided as tender/accel.py decides it, so that no guest has to say again
what the header of pytest has said. Every pytest with a header pays for this: it imports little.
"""

from __future__ import annotations

import os

from tender import accel
from tender.cleanup import Cleanup
from tender.cpu import soft
from tender.errors import HostError

NAMES = {"kvm": "KVM", "soft": "the software CPU"}
_EMULATED = "this machine has no VMX and no SVM: its KVM emulates what a guest executes"


def choose(wanted: str) -> tuple[str, str]:
    """What guests are to be given as `cpu`, and words for people."""
    by = "--ptender-cpu"
    asked = wanted
    if wanted == "auto":
        by = accel.ENVIRONMENT
        asked = os.environ.get(by) or wanted
    if asked != "auto":
        return wanted, f"{NAMES.get(asked, asked)} ({by})"
    why = _why_not_kvm()
    if not why:
        return "auto", NAMES["kvm"]
    try:
        soft.load()
    except soft.NoEngine as error:
        return "auto", NAMES["kvm"] if why == _EMULATED else f"no CPU ({why}; {error})"
    return "soft", f"{NAMES['soft']} ({why})"


def _why_not_kvm() -> str:
    """Why KVM is not taken; empty where it is."""
    try:
        from tender import kvm

        with Cleanup() as cleanup:
            kvm.Kvm(cleanup)
    except ImportError:
        return "there is no KVM on this system"
    except HostError as error:
        return str(error).removesuffix(", or use --cpu=soft")
    return _EMULATED if accel.emulated() else ""
