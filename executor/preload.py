"""Imported once by the forkserver, so that a worker starts in milliseconds instead of seconds.

What is imported here is inherited by every worker: it must touch neither CUDA nor NVML (a context does
not survive a fork) and must not make a ZeroMQ context.
"""

from __future__ import annotations

import contextlib

import torch  # noqa: F401
import torchvision  # noqa: F401

import executor.worker  # noqa: F401

with contextlib.suppress(ImportError):  # the extra ekya[detection]
    import torchmetrics.detection  # noqa: F401
