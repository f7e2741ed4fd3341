"""Checks of NVIDIA MPS that harm nobody: start, proof of attachment, shares, interference, limits, queries."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from pathlib import Path

from executor.gpu_check.bench import Bench, output_of, rounded
from executor.gpu_check.transcript import Details, SkipCheckError
from executor.shares.mps import CLIENT_LIMIT
from protocol.errors import WorkerError

TABLE = (5, 10, 12.5, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100)
GIB = 1 << 30
NUM_THREADS = 4


def mps_start(bench: Bench, details: Details) -> None:
    """The daemon starts in the compute mode as it is, with directories of its own, before there is any client."""
    bench.need_gpu()
    details["program"] = bench.program
    if not bench.program:
        bench.mps_trouble = "the program nvidia-cuda-mps-control is nowhere on this machine (see the check machine)"
        raise SkipCheckError(bench.mps_trouble)
    try:
        details["start_s"] = round(bench.start_daemon(), 3)
    except Exception:
        details["logs"] = bench.logs()
        # As a user would start it, for what it says on its own terminal.
        environment = [
            f"CUDA_MPS_PIPE_DIRECTORY={bench.directory}/pipe",
            f"CUDA_MPS_LOG_DIRECTORY={bench.directory}/log",
        ]
        details["in_the_foreground"] = output_of(["env", *environment, "timeout", "5", bench.program, "-f"], 10.0)
        raise
    daemon = bench.need_daemon()
    daemon.server_pids()
    for command in ("get_default_active_thread_percentage", "get_default_client_priority", "help", "no_such_command"):
        with contextlib.suppress(WorkerError):
            daemon.query(command)
    details["files"] = sorted(str(path) for path in Path(bench.directory).rglob("*"))
    details["sockets_bytes"] = max(len(os.fsencode(name)) for name in details["files"])


def mps_attach(bench: Bench, details: Details) -> None:
    """A client under MPS: in the server's client list, fewer multiprocessors than the GPU has."""
    daemon = bench.need_daemon()
    try:
        client = bench.clients.open(bench.under_mps(50), 60.0)
    except Exception as error:
        details["logs"] = bench.logs()
        bench.mps_trouble = f"no client can be started under MPS: {error}"
        bench.tidy()
        daemon.close()
        bench.daemon = None
        raise
    details["client"] = rounded(client.opened)
    server = daemon.server_of(client.pid)
    details["server_pid"], details["client_pid"] = server, client.pid
    if server is not None:
        details["state"] = daemon.server_state(server)
        for command in (f"get_active_thread_percentage {server}", f"get_device_client_list {server}", "ps"):
            with contextlib.suppress(WorkerError):
                daemon.query(command)
        for command in (
            f"get_client_list {client.pid}",
            f"terminate_client {server} 1",
            f"get_server_status {os.getpid()}",
        ):
            with contextlib.suppress(WorkerError):  # what it prints when asked for nonsense
                daemon.query(command)
    details["processes"] = output_of(["nvidia-smi", "--query-compute-apps=pid,name,used_memory", "--format=csv"])
    details["nvidia_smi"] = output_of(["nvidia-smi"])
    details["logs"] = bench.logs()
    if server is None:
        raise WorkerError("the client is in no server's client list")
    if not 0 < client.opened["num_units"] < bench.num_units:
        raise WorkerError(f"the client sees {client.opened['num_units']} of {bench.num_units} multiprocessors at 50 %")
    client.leave()
    time.sleep(0.3)
    details["clients_after_leaving"] = daemon.client_pids(server)


def mps_table(bench: Bench, details: Details) -> None:
    """Percentage and multiprocessors that the client then sees; clients start at the same time."""
    bench.need_daemon()
    table = details["percent_to_units"] = {}
    for start in range(0, len(TABLE), 7):
        part = TABLE[start : start + 7]
        for percent, client in zip(part, bench.clients.open_all([bench.under_mps(p) for p in part]), strict=True):
            table[str(percent)] = client.opened["num_units"]
        bench.tidy()
    # One multiprocessor's worth and less: where the granularity ends.
    for percent in (1.0, 100.0 / max(1, bench.num_units), 300.0 / max(1, bench.num_units)):
        table[f"{percent:.3f}"] = bench.clients.open(bench.under_mps(percent)).opened["num_units"]


def mps_unreachable(bench: Bench, details: Details) -> None:
    """What a client does that does not find the daemon, and how it is found out."""
    daemon = bench.need_daemon()
    nowhere = Path(bench.directory) / "no"
    nowhere.mkdir(exist_ok=True)
    environment = bench.under_mps(30) | {"CUDA_MPS_PIPE_DIRECTORY": str(nowhere), "CUDA_VISIBLE_DEVICES": bench.uuid}
    client = bench.clients.open(environment)
    details["num_units"] = client.opened["num_units"]
    details["in_client_list"] = daemon.server_of(client.pid) is not None
    details["runs_silently_without_mps"] = client.opened["num_units"] == bench.num_units
    details["client"] = rounded(client.opened)


def mps_startup(bench: Bench, details: Details) -> None:
    """Start-up time and device memory of a client at 100, 50 and 10 %, one after the other."""
    bench.need_daemon()
    for percent in (100, 50, 10):
        before = bench.used_memory()
        client = bench.clients.open(bench.under_mps(percent))
        opened = bench.used_memory()
        start = time.monotonic()
        bench.rate(client, bench.workloads()[f"{bench.nets[-1]}_infer_b16"], scale=0.1)
        details[f"{percent}_percent"] = {
            "ready_s": round(client.opened["ready_s"], 3),
            "timings": client.opened["timings"],
            "model_warm_s": round(time.monotonic() - start, 3),
            "context_bytes": opened - before,
            "with_model_bytes": bench.used_memory() - before,
        }
        client.leave()


def mps_shares(bench: Bench, details: Details) -> None:
    """Achieved against granted: throughput of every kind of work at each percentage / at 100 % (phi)."""
    bench.need_daemon()
    full: dict[str, float] = {}
    for percent in bench.percentages:
        client = bench.clients.open(bench.under_mps(percent))
        row = details[f"{percent}_percent"] = {"num_units": client.opened["num_units"]}
        for name, work in bench.workloads().items():
            measured = bench.rate(client, work, scale=0.6)
            full.setdefault(name, measured["per_s"])
            row[name] = {
                "per_s": measured["per_s"],
                "phi": round(measured["per_s"] / full[name], 4),
                "step_ms_p50": measured["step_ms_p50"],
            }
        client.leave()


def mps_two_at_half(bench: Bench, details: Details) -> None:
    """Two clients at 50 %: each alone, both together; the same uncapped. 1 = no interference."""
    bench.need_daemon()
    for percent in (50, 100):
        one, two = bench.clients.open_all([bench.under_mps(percent), bench.under_mps(percent)])
        rows = details[f"{percent}_percent"] = {}
        for name in ("resnet18_train_b32", "resnet18_train_b256", "edge_cnn_train_b32", "matmul"):
            work = bench.workloads().get(name)
            if work is None:
                continue
            alone = [bench.rate(client, work)["per_s"] for client in (one, two)]
            together = [answer["per_s"] for answer in bench.rates([(one, work), (two, work)])]
            rows[name] = {
                "alone_per_s": alone,
                "together_per_s": together,
                "of_alone": [round(b / a, 4) for a, b in zip(alone, together, strict=True)],
            }
        bench.tidy()


def mps_priority(bench: Bench, details: Details) -> None:
    """Latency of inference while another client trains, with and without the priority hint; both uncapped."""
    bench.need_daemon()
    infer = bench.workloads()[f"{bench.nets[-1]}_infer_b16"]
    train = bench.workloads().get("resnet18_train_b256", bench.workloads()[f"{bench.nets[-1]}_train_b32"])
    for name, of_inference, of_training in (("equal", 0, 0), ("inference_first", 0, 1), ("training_first", 1, 0)):
        serving = bench.clients.open(bench.under_mps(100, of_inference))
        alone = bench.rate(serving, infer)
        trainer = bench.clients.open(bench.under_mps(100, of_training))
        trainer.post("work", seconds=None, **train)
        time.sleep(0.5)
        beside = bench.rate(serving, infer)
        trainer.post("stop")
        details[name] = {"inference_alone": alone, "inference": beside, "training": rounded(trainer.good())}
        bench.tidy()


def mps_memory_cap(bench: Bench, details: Details) -> None:
    """A client with a limit of 2 GiB takes 1 GiB and not 4 GiB; a client beside it is unlimited."""
    bench.need_daemon()
    client = bench.clients.open(bench.under_mps(50, memory_bytes=2 * GIB))
    details["memory_total_bytes"] = client.opened.get("memory_total_bytes")
    details["memory_free_bytes"] = client.opened.get("memory_free_bytes")
    client.ask("allocate", bytes=GIB)
    client.post("allocate", bytes=4 * GIB)
    details["beyond"] = client.answer()
    details["after_refusal"] = rounded(client.ask("allocate", bytes=GIB))
    other = bench.clients.open(bench.under_mps(50))
    other.ask("allocate", bytes=4 * GIB)
    details["capped"] = not details["beyond"]["ok"]
    if not details["capped"]:
        raise WorkerError("the memory limit was not held")


def mps_hand_over(bench: Bench, details: Details) -> None:
    """A stream at 30 frames per second goes from a client at 20 % to one at 60 % and back, beside a trainer at 40 %."""
    bench.need_daemon()
    work = bench.workloads()[f"{bench.nets[-1]}_infer_b16"]
    trainer = bench.clients.open(bench.under_mps(40, priority=1))
    trainer.post("work", seconds=None, **bench.workloads()[f"{bench.nets[-1]}_train_b32"])
    details["hand_overs"] = []
    for old_percent, new_percent in ((20, 60), (60, 20)) * bench.rounds:
        old = bench.clients.open(bench.under_mps(old_percent))
        found = bench.hand_over(old, bench.under_mps(new_percent), work, 30.0)
        details["hand_overs"].append({"from": old_percent, "to": new_percent, **found})
        old.leave()
    trainer.post("stop")
    details["trainer"] = rounded(trainer.good())


def mps_queries(bench: Bench, details: Details) -> None:
    """Queries to the control program one after another, and from several threads at once."""
    daemon = bench.need_daemon()
    client = bench.clients.open(bench.under_mps(10))
    server = daemon.server_of(client.pid)

    def ask() -> str:
        try:
            return "right" if daemon.client_pids(server or 0) == [client.pid] else "wrong: another list"
        except WorkerError as error:
            return f"wrong: {error}"

    def count(answers: list[str], seconds: float) -> Details:
        wrong = [answer for answer in answers if answer != "right"]
        return {"asked": len(answers), "wrong": len(wrong), "examples": wrong[:5], "seconds": round(seconds, 2)}

    start = time.monotonic()
    details["serial"] = count([ask() for _ in range(bench.queries)], time.monotonic() - start)
    details["serial"]["seconds"] = round(time.monotonic() - start, 2)
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        answers = list(pool.map(lambda _: ask(), range(NUM_THREADS * bench.queries)))
    details["concurrent"] = count(answers, time.monotonic() - start)


def mps_many(bench: Bench, details: Details) -> None:
    """As many clients as are admitted, two more than the limit we go by."""
    daemon = bench.need_daemon()
    wanted = CLIENT_LIMIT + 2
    clients = [bench.clients.start(bench.under_mps(2)) for _ in range(wanted)]
    for client in clients:
        client.post("open", device=bench.clients.device)
    details["wanted"], details["limit_we_use"] = wanted, CLIENT_LIMIT
    errors: dict[str, int] = {}
    attached = 0
    for client in clients:
        answer = client.answer(60.0)
        attached += bool(answer["ok"]) and answer["num_units"] < bench.num_units
        if not answer["ok"]:
            errors[answer["error"]] = errors.get(answer["error"], 0) + 1
        elif answer["num_units"] >= bench.num_units:
            errors["silently without MPS"] = errors.get("silently without MPS", 0) + 1
    details["attached"], details["not_attached"] = attached, errors
    server = daemon.server_pids()[0]
    details["in_client_list"] = len(daemon.client_pids(server))
