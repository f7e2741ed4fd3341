"""The compiled loop of the queue search: compiled once per installation, by nobody who is waited for.

Compiling takes some seconds of processor time, more than most budgets, and a planner's child is killed when it is late.
So it is done by a process of its own, detached from whoever needed it first (``python -m
optimizer.policies.timeline_cache``); numba keeps the machine code on disk, and a marker says that it is complete.
Until then ``kernel`` is None and the planner searches without. Loading the code takes a few tenths of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

KERNELS = "optimizer.policies.timeline_kernels"
SOURCE = Path(__file__).with_name("timeline_kernels.py")
NICENESS = 5
LOOK_S = 0.05


class _Here:
    """What this process has of the compiled loop."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kernel: Any = None
        self.loading: threading.Thread | None = None
        self.compiling = False
        self.compiler: subprocess.Popen[bytes] | None = None  # kept, so that nobody misses it before its end

    def load(self) -> None:
        self.kernel = importlib.import_module(KERNELS).anneal


_here = _Here()


def kernel() -> Any:
    """``timeline_kernels.anneal`` if it has been loaded, else None."""
    return _here.kernel


def prepare(wait_s: float) -> bool:
    """Get the compiled loop if that takes at most ``wait_s`` seconds; True if it is there.

    Otherwise it goes on being loaded, or compiled in a process of its own, and a later call finds it.
    """
    if _here.kernel is not None:
        return True
    if not is_compiled():
        start_compiling()
        return False
    with _here.lock:
        if _here.loading is None:
            _here.loading = threading.Thread(target=_here.load, name="load timeline kernels", daemon=True)
            _here.loading.start()
    _here.loading.join(max(0.0, wait_s))
    return _here.kernel is not None


def wait_compiled(timeout_s: float) -> bool:
    """Have the loop compiled, if it is not yet, and wait for it. False when ``timeout_s`` seconds were not enough."""
    end_s = time.monotonic() + timeout_s
    while not is_compiled():
        start_compiling()
        if time.monotonic() > end_s:
            return False
        time.sleep(LOOK_S)
    if _here.compiler is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _here.compiler.wait(max(LOOK_S, end_s - time.monotonic()))
    return True


def is_compiled() -> bool:
    """Whether the machine code on disk is complete and belongs to this source, interpreter and processor."""
    try:
        folder = Path(_marker().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return any(folder.glob("timeline_kernels.anneal-*.nbc"))


def start_compiling() -> None:
    """Start the process that compiles, once per process; a second one at the same time ends at once."""
    with _here.lock:
        if _here.compiling:
            return
        _here.compiling = True
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        _here.compiler = subprocess.Popen(
            [sys.executable, "-m", "optimizer.policies.timeline_cache"],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )


def main() -> int:
    """Compile, unless another process is at it, and leave the marker."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    marker = _marker()
    with marker.with_suffix(".lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        if is_compiled():
            return 0
        anneal = importlib.import_module(KERNELS).anneal
        fresh = marker.with_suffix(f".{os.getpid()}")
        fresh.write_text(str(anneal._cache.cache_path), encoding="utf-8")
        fresh.replace(marker)
    return 0


def _marker() -> Path:
    """Named after all that numba's own cache depends on."""
    state = SOURCE.stat()
    parts = (
        SOURCE,
        state.st_mtime_ns,
        state.st_size,
        importlib.metadata.version("numba"),
        sys.version,
        platform.node(),
    )
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
    return _folder() / f"timeline_kernels-{digest}.ready"


def _folder() -> Path:
    """The first folder that can be written to: beside the source, as numba does it, or the user's cache."""
    beside = SOURCE.parent / "__pycache__"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "ekya"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
