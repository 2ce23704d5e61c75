"""A program that forks while its guests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.guest.conftest import Build
from tests.guest.test_usernet import free_port, needs_passt, passts, wait_until_gone
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.usefixtures("any_cpu")
__all__ = ["needs_passt"]  # a fixture: skips where there is none


def test_a_forked_worker_does_not_keep_a_killed_programs_ports(guest: Build) -> None:
    port = free_port()
    code = f"""
import os, time
from tender import Guest, UserNet
guest = Guest({str(guest("web"))!r}, mem_mib=8, net={{"service": UserNet({{{port}: 80}})}}).start()
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        assert program.stdout
        worker = int(program.stdout.readline())
        try:
            assert len(passts(port)) == 1
            program.kill()
            program.wait(PATIENCE_S)
            wait_until_gone(port)
            os.kill(worker, 0)  # it still lives
        finally:
            program.kill()
            os.kill(worker, signal.SIGKILL)
