"""Checks that need a GPU but no MPS: the machine, start-up, the students' speed, shares by pacing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

from executor.gpu_check.bench import Bench, output_of, rounded
from executor.gpu_check.transcript import Details, SkipCheckError
from executor.shares.mps_control import PROGRAM

PLACES = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin", "/usr/local/bin", "/opt/nvidia/bin", "/bin")
SHARES = (0.1, 0.25, 0.5, 0.75)
FIELDS = "index,name,uuid,driver_version,compute_mode,mig.mode.current,memory.total,memory.used,clocks.sm,pstate"


def find_program(name: str = PROGRAM) -> str:
    """Path of a program of the driver: on the PATH, or where drivers put it; empty when it is nowhere."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES)) or ""


def uuid_by_program(index: int) -> str:
    """The UUID of the GPU by nvidia-smi, for where NVML's library cannot be used; empty when there is none."""
    said = output_of(["nvidia-smi", f"--id={index}", "--query-gpu=uuid", "--format=csv,noheader"])
    text = str(said.get("stdout", "")).strip()
    return text if said["exit_code"] == 0 and text.startswith("GPU-") else ""


def machine(bench: Bench, details: Details) -> None:
    """What this machine is, and whether the programs of MPS are there. Changes nothing."""
    details["python"] = sys.version
    details["kernel"] = platform.platform()
    details["user_id"] = os.getuid()
    details["cores"] = os.cpu_count()
    details["packages"] = {
        name: _version(name) for name in ("torch", "torchvision", "nvidia-ml-py", "pyzmq", "msgspec")
    }
    details["environment"] = {name: value for name, value in os.environ.items() if "CUDA" in name or "NVIDIA" in name}
    details["device_files"] = sorted(str(path) for path in Path("/dev").glob("nvidia*"))
    details["programs"] = {name: find_program(name) for name in (PROGRAM, "nvidia-cuda-mps-server", "nvidia-smi")}
    roots = [root for root in ("/usr/local/nvidia", "/usr/lib", "/opt") if Path(root).is_dir()]
    details["found"] = output_of(["find", *roots, "-maxdepth", "4", "-name", "*mps*"])
    details["commands"] = [
        output_of(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv"]),
        output_of(["nvidia-smi"]),
        output_of(["nvidia-smi", "-q", "-d", "COMPUTE"]),
        output_of(["df", "-h", "/dev/shm", "/tmp"]),
    ]
    details["uuid"], details["multiprocessors"] = bench.uuid, bench.num_units


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def cuda_client(bench: Bench, details: Details) -> None:
    """A worker from the forkserver takes the GPU without MPS; its time and its memory."""
    if not bench.uuid:
        raise SkipCheckError("there is no NVIDIA GPU here, by NVML and by nvidia-smi")
    start = time.monotonic()
    bench.clients.warm_up()
    details["forkserver_s"] = round(time.monotonic() - start, 2)
    for attempt in ("first", "second"):
        before = bench.used_memory()
        client = bench.clients.open(bench.plain(), 120.0)
        details[attempt] = rounded(client.opened) | {"device_memory_bytes": bench.used_memory() - before}
    bench.works = True
    bench.num_units = bench.num_units or int(client.opened["num_units"])
    details["multiprocessors"] = bench.num_units


def students(bench: Bench, details: Details) -> None:
    """Rates of retraining and inference of our students, with the GPU to themselves; steps per second and ms."""
    bench.need_gpu()
    client = bench.clients.open(bench.plain())
    for name, work in bench.workloads().items():
        details[name] = bench.rate(client, work)
    details["peak_bytes"] = client.ask("memory")["peak_bytes"]


def pacing(bench: Bench, details: Details) -> None:
    """Shares held by duty cycle: busy share and throughput against what was granted (phi by pacing)."""
    bench.need_gpu()
    client = bench.clients.open(bench.plain())
    for name in ("edge_cnn_train_b32", "resnet18_infer_b16", "matmul"):
        work = bench.workloads().get(name)
        if work is None:
            continue
        full = bench.rate(client, work)
        rows = details[name] = [{"share": 1.0, "busy_share": full["busy_share"], "phi": 1.0, "per_s": full["per_s"]}]
        for share in SHARES:
            row = bench.rate(client, work, share)
            rows.append(
                {
                    "share": share,
                    "busy_share": row["busy_share"],
                    "error": round(row["busy_share"] / share - 1.0, 4),
                    "phi": round(row["per_s"] / full["per_s"], 4),
                    "per_s": row["per_s"],
                }
            )


def pacing_two(bench: Bench, details: Details) -> None:
    """Two clients without MPS: unpaced, and each paced to a half; throughput against one alone."""
    bench.need_gpu()
    one, two = bench.clients.open_all([bench.plain(), bench.plain()])
    for name in ("resnet18_train_b32", "matmul"):
        work = bench.workloads().get(name)
        if work is None:
            continue
        alone = bench.rate(one, work)["per_s"]
        rows: Details = {"alone_per_s": alone}
        for label, share in (("unpaced", 1.0), ("paced_to_half", 0.5)):
            together = [answer["per_s"] for answer in bench.rates([(one, work), (two, work)], share)]
            rows[label] = {"per_s": together, "of_alone": [round(value / alone, 4) for value in together]}
        details[name] = rows


def hand_over_pacing(bench: Bench, details: Details) -> None:
    """A stream at 30 frames per second goes from one process to another, while a third one trains; no MPS."""
    bench.need_gpu()
    work = bench.workloads()[f"{bench.nets[-1]}_infer_b16"]
    trainer = bench.clients.open(bench.plain())
    trainer.post("work", seconds=None, share=0.5, **bench.workloads()[f"{bench.nets[-1]}_train_b32"])
    details["hand_overs"] = []
    for _ in range(bench.rounds):
        old = bench.clients.open(bench.plain())
        details["hand_overs"].append(bench.hand_over(old, bench.plain(), work, 30.0))
        old.leave()
    trainer.post("stop")
    trainer.good()
