"""The device that tests run workers on: the first core that this process may use."""

from __future__ import annotations

import os

CORE = f"cpu:{min(os.sched_getaffinity(0))}"
