"""``python -m executor.gpu_check --out FILE.json``: prove on a GPU what only a GPU can prove.

Changes no setting of the GPU: no compute mode, no MIG, no clocks, no reset. Exit code 0: every check passed or was
skipped for a reason; 1: some failed; 2: wrong input; 3: it had to give up; 4: no GPU, so nothing could be proven.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from executor.gpu_check import cuda_checks, incident_checks, mps_checks, worker_checks
from executor.gpu_check.bench import Bench
from executor.gpu_check.clients import Clients
from executor.gpu_check.transcript import Details, Transcript, watchdog
from executor.shares import nvml
from executor.shares.devices import find_device
from protocol.errors import DeviceError

Check = Callable[[Bench, Details], None]

# (name, check, limit in seconds, seconds that must be left). What matters most comes first.
CHECKS: tuple[tuple[str, Check, float, float], ...] = (
    ("machine", cuda_checks.machine, 60.0, 0.0),
    ("cuda_client", cuda_checks.cuda_client, 150.0, 10.0),
    ("mps_start", mps_checks.mps_start, 40.0, 5.0),
    ("mps_attach", mps_checks.mps_attach, 60.0, 5.0),
    ("mps_table", mps_checks.mps_table, 120.0, 15.0),
    ("mps_unreachable", mps_checks.mps_unreachable, 30.0, 5.0),
    ("mps_startup", mps_checks.mps_startup, 45.0, 10.0),
    ("mps_hand_over", mps_checks.mps_hand_over, 75.0, 20.0),
    ("mps_workers", worker_checks.mps_workers, 60.0, 15.0),
    ("mps_two_at_half", mps_checks.mps_two_at_half, 75.0, 25.0),
    ("mps_shares", mps_checks.mps_shares, 120.0, 45.0),
    ("mps_memory_cap", mps_checks.mps_memory_cap, 30.0, 5.0),
    ("mps_terminate_busy", incident_checks.terminated, 75.0, 15.0),
    ("mps_killed", incident_checks.killed, 75.0, 15.0),
    ("mps_fault_address", incident_checks.fault_address, 90.0, 20.0),
    ("students", cuda_checks.students, 60.0, 15.0),
    ("pacing", cuda_checks.pacing, 80.0, 30.0),
    ("hand_over_pacing", cuda_checks.hand_over_pacing, 60.0, 15.0),
    ("mps_fault_assert", incident_checks.fault_assert, 90.0, 20.0),
    ("mps_priority", mps_checks.mps_priority, 60.0, 15.0),
    ("pacing_two", cuda_checks.pacing_two, 45.0, 10.0),
    ("mps_queries", mps_checks.mps_queries, 45.0, 10.0),
    ("mps_sigterm", incident_checks.stopped_by_sigterm, 75.0, 15.0),
    ("mps_many", mps_checks.mps_many, 60.0, 30.0),
    ("mps_server_killed", incident_checks.server_killed, 75.0, 20.0),
    ("mps_quit", incident_checks.quits, 30.0, 0.0),
)


def run_checks(bench: Bench, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> int:
    """Run the checks (``only`` those named, with what they need); returns the exit code."""
    needed = {"machine", "cuda_client", "mps_start", "mps_attach", *only}
    transcript = bench.transcript
    try:
        for name, check, limit_s, needs_s in CHECKS:
            if name in skip or (only and name not in needed):
                continue
            transcript.run(name, lambda details, c=check: c(bench, details), limit_s, needs_s, bench.tidy)  # type: ignore[misc]
    finally:
        if bench.daemon is not None:
            bench.daemon.close()
        transcript.head["finished"] = True
        transcript.write()
    statuses = [check["status"] for check in transcript.checks]
    transcript.note(", ".join(f"{statuses.count(s)} {s}" for s in ("passed", "failed", "skipped")))
    if not bench.works:
        return 4 if not bench.uuid else 1
    return 1 if "failed" in statuses else 0


def _used_memory(index: int) -> int:
    """Memory taken of the GPU; 0 where NVML is of no help."""
    try:
        return nvml.used_memory_bytes(index)
    except DeviceError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m executor.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="the transcript, a JSON file")
    parser.add_argument("--seconds", type=float, default=420.0, help="time for all checks together (420)")
    parser.add_argument("--device", type=int, default=0, metavar="K", help="the GPU cuda:K, as nvidia-smi counts (0)")
    parser.add_argument("--only", default="", help="names of checks, separated by commas")
    arguments = parser.parse_args()
    only = tuple(name for name in arguments.only.split(",") if name)
    unknown = set(only) - {name for name, *_ in CHECKS}
    if unknown:
        parser.error(f"--only: no such check: {', '.join(sorted(unknown))}")
    if not arguments.seconds > 0.0:
        parser.error("--seconds: must be above 0")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: the folder {arguments.out.parent} does not exist")
    transcript = Transcript(arguments.out, arguments.seconds)
    try:
        gpu = find_device(f"cuda:{arguments.device}")
        uuid, units = gpu.uuid, gpu.num_units
        transcript.head["gpu"] = {"name": gpu.name, "uuid": uuid, "memory_bytes": gpu.memory_bytes, "num_units": units}
    except DeviceError as error:
        uuid, units = cuda_checks.uuid_by_program(arguments.device), 0
        transcript.head["gpu"] = f"{uuid or 'none'}; NVML: {error}"
    transcript.note(f"GPU: {transcript.head['gpu']}")
    watchdog(transcript, arguments.seconds + 45.0)
    # Short: the daemon's sockets may have paths of 107 bytes at most.
    directory = tempfile.mkdtemp(prefix="ekya-", dir="/tmp")
    bench = Bench(
        transcript,
        Clients("cuda:0"),
        uuid,
        cuda_checks.find_program(),
        index=arguments.device,
        num_units=units,
        used_memory=lambda: _used_memory(arguments.device),
        directory=directory,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        return run_checks(bench, only)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # whatever a client or a thread is still doing
