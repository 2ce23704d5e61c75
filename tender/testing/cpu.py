"""The CPU of a pytest run's guests, and the reason for it, as pytest's header shows it.

The rule here: `auto` gives what tender/accel.py gives, so that no guest warns of what the header
says. Every pytest run with a header imports this file, so it imports little.
"""

from __future__ import annotations

import os

from tender import accel
from tender.cleanup import Cleanup
from tender.cpu import soft
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.embed.interfaces import Cpu

NAMES = {"kvm": "KVM", "native": "the native CPU", "soft": "the software CPU"}
_EMULATED = "this machine has no VMX and no SVM: its KVM emulates what a guest executes"


def choose(wanted: Cpu) -> tuple[Cpu, str]:
    """The `cpu` of guests, and its description with the reason."""
    by = "--ptender-cpu"
    asked: str = wanted
    if wanted == "auto":
        by = accel.ENVIRONMENT
        asked = os.environ.get(by) or wanted
    if asked != "auto":
        return wanted, f"{NAMES.get(asked, asked)} ({by})"
    why = _why_not_kvm()
    if not why:
        return "auto", NAMES["kvm"]
    if accel.native_usable():
        return "native", f"{NAMES['native']} ({why})"
    try:
        soft.load()
    except soft.NoEmulator as error:
        return "auto", NAMES["kvm"] if why == _EMULATED else f"no CPU ({why}; {error})"
    return "soft", f"{NAMES['soft']} ({why})"


def _why_not_kvm() -> str:
    """Why KVM is not used; empty if it is."""
    try:
        from tender import kvm

        with Cleanup() as cleanup:
            kvm.Kvm(cleanup)
    except ImportError:
        return "there is no KVM on this system"
    except HostError as error:
        return str(error)
    return _EMULATED if accel.emulated() else ""
