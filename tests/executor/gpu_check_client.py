"""The client of the GPU check on a core, attached to the model of the MPS control program as CUDA would be."""

from __future__ import annotations

import os
import subprocess
from multiprocessing.connection import Connection
from typing import Any

from executor.learning.gpu_client import Answer, Client

NUM_UNITS = 132


def main(connection: Connection) -> None:
    """What executor.learning.gpu_client does, with the model's multiprocessors."""
    _Client(connection).run()
    _ask(f"model_detach {os.getpid()}")


def _ask(command: str) -> str:
    program = os.environ.get("MPS_MODEL", "")
    if not program or not os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        return ""
    done = subprocess.run([program], input=f"{command}\n", capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class _Client(Client):
    def _do_open(self, command: dict[str, Any]) -> Answer:
        said = _ask(f"model_attach {os.getpid()} {os.environ.get('CUDA_MPS_ACTIVE_THREAD_PERCENTAGE', '100')}")
        if said in ("805", "807"):
            raise RuntimeError(f"CUDA error {said}")
        return super()._do_open(command) | {"num_units": int(said or NUM_UNITS)}

    def _do_prepare_fault(self, command: dict[str, Any]) -> Answer:
        return {}

    def _do_fault(self, command: dict[str, Any]) -> Answer:
        _ask("model_fault")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _do_allocate(self, command: dict[str, Any]) -> Answer:
        limit = os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "")
        if limit and command["bytes"] > int(limit.removeprefix("0=").removesuffix("M")) << 20:
            raise MemoryError("CUDA out of memory")
        return {}
