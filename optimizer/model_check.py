"""Asks, before anything is started, whether the models that a site names can be had.

The optimizer itself knows nothing of torch: a child process that does looks at them. Sites that name no model
of their own are not made to wait for it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from optimizer.config import SiteConfig
from protocol.errors import ConfigError, EkyaError
from protocol.schema import StreamSpec, TorchvisionGolden

# The small students, which need no looking up, with the task that each is for.
_OWN = {("classification", ""), ("classification", "edge_cnn"), ("detection", ""), ("detection", "edge_detector")}
_TIMEOUT_S = 180.0


def check_models(site: SiteConfig, origin: Path | str) -> None:
    """Raises ConfigError naming the site file ``origin``, the stream and the field when a model cannot be had."""
    streams = tuple(stream for stream in site.streams if _names_a_model(stream))
    if not streams:
        return
    checked = subprocess.run(
        [sys.executable, "-m", "executor.learning.check"],
        input=msgspec.json.encode({"streams": streams}),
        capture_output=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    said = checked.stderr.decode(errors="replace").strip()
    if checked.returncode == 2 and said:
        raise ConfigError(f"{origin}: {said.splitlines()[-1]}")
    if checked.returncode:
        raise EkyaError(f"the models of {origin} cannot be checked: {said[-300:]}")


def _names_a_model(stream: StreamSpec) -> bool:
    own = (stream.task, stream.student.architecture) in _OWN and not stream.student.checkpoint
    return not own or isinstance(stream.golden, TorchvisionGolden)
