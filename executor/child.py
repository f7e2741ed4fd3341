"""The first steps of a worker process, before anything in it touches a device. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from protocol import logs

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent dies; Linux only, a no-op elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def resolve(entry: str) -> Callable[[Connection], None]:
    """The function named by ``module:function``. Raises ImportError or AttributeError."""
    module, _, function = entry.partition(":")
    found: Callable[[Connection], None] = getattr(importlib.import_module(module), function)
    return found


def enter(
    connection: Connection, entry: str, environment: Mapping[str, str], oom_score_adj: int, log_level: str
) -> None:
    """Run ``entry`` in this fresh child of the forkserver.

    ``environment`` (an empty value unsets a variable) is set here and not in the parent: one MPS percentage
    belongs to one worker, and it is read at the first CUDA call. ``oom_score_adj``: 0..1000, how soon the
    kernel gives this process up.
    """
    os.setpgid(0, 0)  # the stop ladder signals the group, so that helpers of the worker go with it
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # the executor died before the kernel could be asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(oom_score_adj))
    for name, value in environment.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    logs.configure("worker", log_level)
    resolve(entry)(connection)


def enter_nothing(connection: Connection) -> None:
    """The entry of a process that only proves that processes can be started."""
    connection.close()
