"""Signals that come to an optimizer when its loop is over."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

LATE = """
import os, signal, sys
from optimizer.service import install_stop_signals

class Ended:
    def stop(self, reason):
        return False

install_stop_signals(Ended())
os.kill(os.getpid(), int(sys.argv[1]))
print("still here")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_loop_ends_the_process_without_a_traceback(number: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LATE, str(int(number))], capture_output=True, text=True, timeout=120.0, check=False
    )
    assert ended.returncode == -number
    assert ended.stdout == ""
    assert ended.stderr == ""
