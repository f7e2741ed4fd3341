"""An executor whose GPU is a model: ``python -m tests.executor.mps_executor PROGRAM ADDRESS SETTINGS.toml``.

The service, the supervisor, the MPS backend and the daemon's process are the real ones; the control program is the
model, and the environment of every worker names it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from executor.config import make_config
from executor.service import Service
from executor.shares.devices import Device
from executor.shares.incident import Drain
from executor.shares.mps import MpsBackend
from executor.shares.mps_control import MpsDaemon
from executor.signals import SignalWakeup
from protocol import logs
from protocol.messages import Job

GPU = Device(kind="cuda", index=0, memory_bytes=80 << 30, uuid="GPU-1", name="model", num_units=132)


class Backend(MpsBackend):
    """The MPS backend; its workers know the model as CUDA would know the daemon."""

    program = ""

    def worker_environment(self, job: Job, share: float) -> Mapping[str, str]:
        return {**super().worker_environment(job, share), "MPS_MODEL": self.program}


def main() -> int:
    program, address, settings = sys.argv[1:]
    logs.configure("executor", "warning")
    signals = SignalWakeup()
    signals.install()
    config = make_config({"device": "cuda:0", "connect": address, "executor_id": "e1"}, settings)
    Backend.program = program
    backend = Backend(GPU, MpsDaemon("GPU-1", program=program, query_timeout_s=5.0), drain=Drain(wait_s=1.0))
    return Service(config, GPU, backend, signals).run()


if __name__ == "__main__":
    sys.exit(main())
