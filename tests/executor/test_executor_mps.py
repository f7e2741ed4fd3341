"""The MPS backend against a model of the control program (tests/executor/mps_control_model.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from executor.limits import Limits
from executor.links import Ready, StartJob
from executor.processes import ForkServer
from executor.shares.choose import choose_backend
from executor.shares.devices import Device
from executor.shares.mps import CLIENT_LIMIT, MpsBackend
from executor.shares.mps_control import MpsDaemon
from executor.supervisor import Exited, Reported, Supervisor
from protocol.errors import DeviceError, WorkerError
from tests.executor import optimizer_model as model

pytestmark = pytest.mark.process

MODEL = Path(__file__).with_name("mps_control_model.py")
GPU = Device(kind="cuda", index=0, memory_bytes=141 << 30, uuid="GPU-1", name="H200", num_units=132)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as a program that starts as fast as Python can: without site-packages and version managers."""
    path = tmp_path_factory.mktemp("bin") / "nvidia-cuda-mps-control"
    path.write_text(f"#!{Path(sys.executable).resolve()} -IS\n" + MODEL.read_text())
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def daemon(program: str) -> Iterator[MpsDaemon]:
    daemon = MpsDaemon("GPU-1", program=program, query_timeout_s=5.0)
    yield daemon
    daemon.close()


@pytest.fixture
def backend(daemon: MpsDaemon) -> MpsBackend:
    return MpsBackend(GPU, daemon)


@pytest.fixture
def client() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def daemon_pid(daemon: MpsDaemon) -> int:
    return int((daemon.pipe_directory / "nvidia-cuda-mps-control.pid").read_text())


def test_a_worker_gets_its_percentage_its_memory_and_its_priority(backend: MpsBackend, daemon: MpsDaemon) -> None:
    environment = dict(backend.worker_environment(model.inference(memory_bytes=3 << 30), 0.3))
    assert environment == {
        "CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe_directory),
        "CUDA_MPS_LOG_DIRECTORY": str(daemon.log_directory),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
        "CUDA_MPS_CLIENT_PRIORITY": "0",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=3072M",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert dict(backend.worker_environment(model.retraining(), 0.125))["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "12.5"
    assert dict(backend.worker_environment(model.retraining(), 1.0))["CUDA_MPS_CLIENT_PRIORITY"] == "1"


def test_a_worker_without_mps_is_found_out(backend: MpsBackend, daemon: MpsDaemon) -> None:
    with pytest.raises(WorkerError, match="runs without MPS"):
        backend.attached(Ready(pid=os.getpid(), startup_s=0.1, num_units=132), 0.3)
    units = int(daemon.query(f"model_attach {os.getpid()} 30"))
    assert units == 38
    backend.attached(Ready(pid=os.getpid(), startup_s=0.1, num_units=units), 0.3)
    with pytest.raises(WorkerError, match="132 of 132 multiprocessors"):
        backend.attached(Ready(pid=os.getpid(), startup_s=0.1, num_units=132), 0.3)


def test_the_percentage_is_read_once_so_that_resizing_is_pacing_within_it(
    backend: MpsBackend, daemon: MpsDaemon
) -> None:
    daemon.query(f"model_attach {os.getpid()} 40")
    assert daemon.query(f"model_percentage {os.getpid()}") == "40.0"
    assert not backend.can_resize_live
    assert backend.paced_share(0.4, 0.4) == 1.0
    assert backend.paced_share(0.1, 0.4) == pytest.approx(0.25)
    assert backend.observe(0.25, 0.4) == pytest.approx(0.1)


def test_a_failed_command_is_noticed_although_the_exit_code_is_0(backend: MpsBackend, daemon: MpsDaemon) -> None:
    assert "Unknown" in daemon.query("no_such_command")
    with pytest.raises(WorkerError, match="not found"):
        daemon.client_pids(1)
    daemon.query(f"model_attach {os.getpid()} 40")
    assert not daemon.terminate_client(daemon.server_pids()[0], 1)


def test_a_client_is_terminated_through_the_daemon(
    backend: MpsBackend, daemon: MpsDaemon, client: subprocess.Popen[bytes]
) -> None:
    daemon.query(f"model_attach {client.pid} 40")
    backend.evict(client.pid)
    assert client.wait(timeout=10) == -signal.SIGKILL
    server = daemon.server_pids()[0]
    assert daemon.client_pids(server) == []
    assert daemon.server_state(server) == "ACTIVE"


def test_no_client_is_admitted_to_a_faulted_or_full_server(backend: MpsBackend, daemon: MpsDaemon) -> None:
    daemon.query(f"model_attach {os.getpid()} 10")
    daemon.query("model_fault")
    with pytest.raises(WorkerError, match="FAULT"):
        backend.worker_environment(model.inference(), 0.1)
    daemon.query(f"model_detach {os.getpid()}")
    # Any living process will do for a client: the model looks for its number only.
    living = [p.pid for p in psutil.process_iter()][:CLIENT_LIMIT]
    if len(living) < CLIENT_LIMIT:
        pytest.skip("too few processes on this machine to fill the server with")
    daemon.query("\n".join(f"model_attach {pid} 1" for pid in living))
    with pytest.raises(WorkerError, match="limit is 48"):
        backend.worker_environment(model.inference(), 0.1)


@pytest.mark.parametrize("death", ["daemon", "server"])
def test_a_dead_daemon_or_server_is_noticed_and_replaced(backend: MpsBackend, daemon: MpsDaemon, death: str) -> None:
    daemon.query(f"model_attach {os.getpid()} 10")
    server = daemon.server_pids()[0]
    assert backend.check(0.0) == ""
    old = daemon_pid(daemon)
    os.kill(old if death == "daemon" else server, signal.SIGKILL)
    if death == "server":
        daemon.query("get_server_list")  # the model buries its dead when it is next asked
    end = time.monotonic() + 10.0
    while psutil.pid_exists(old if death == "daemon" else server) and time.monotonic() < end:
        if backend.check(time.monotonic()):
            break
        time.sleep(0.02)
    else:
        assert "died" in backend.check(time.monotonic() + 10.0)
    with pytest.raises(WorkerError, match="died"):
        backend.worker_environment(model.inference(), 0.1)
    assert backend.check(time.monotonic() + 20.0) == ""
    assert daemon_pid(daemon) != old
    assert "CUDA_MPS_PIPE_DIRECTORY" in backend.worker_environment(model.inference(), 0.1)


def test_a_daemon_that_does_not_answer_is_an_error_and_not_a_hang(program: str) -> None:
    daemon = MpsDaemon("GPU-1", program=program, query_timeout_s=1.0)
    daemon.start()
    daemon.query("model_delay 30")
    with pytest.raises(WorkerError, match="timed out"):
        daemon.server_pids()
    daemon.kill()
    daemon.close()


def test_closing_leaves_no_process_and_no_directory(program: str) -> None:
    daemon = MpsDaemon("GPU-1", program=program)
    backend = MpsBackend(GPU, daemon)
    daemon.query(f"model_attach {os.getpid()} 10")
    pids = [daemon_pid(daemon), *daemon.server_pids()]
    processes = [psutil.Process(pid) for pid in pids]
    backend.close()
    backend.close()
    assert not model.wait_gone(processes, 3.0)
    assert not daemon.pipe_directory.exists()


def test_directories_must_be_short_and_the_program_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="mps_directory"):
        MpsDaemon("GPU-1", str(tmp_path / ("x" * 100)))
    daemon = MpsDaemon("GPU-1", str(tmp_path / "m"), program="/nowhere/nvidia-cuda-mps-control")
    with pytest.raises(DeviceError, match="cannot be started"):
        MpsBackend(GPU, daemon)


def test_a_daemon_that_ends_at_once_is_an_error(program: str, tmp_path: Path) -> None:
    daemon = MpsDaemon("no uuid", str(tmp_path / "m"), program=program)
    with pytest.raises(DeviceError, match="ended at once"):
        daemon.start()


def test_mps_is_chosen_only_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch, program: str, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu = Device(kind="cpu", index=0, memory_bytes=1)
    assert choose_backend("pacing", cpu).name == "pacing"
    fallen_back = choose_backend("auto", GPU)
    assert fallen_back.name == "pacing"
    assert "not by MPS" in fallen_back.remark
    assert not choose_backend("pacing", cpu).remark
    with pytest.raises(DeviceError, match="needs an NVIDIA GPU"):
        choose_backend("mps", cpu)
    with pytest.raises(DeviceError, match="needs the program"):
        choose_backend("mps", GPU)
    monkeypatch.setenv("PATH", f"{Path(program).parent}:/usr/bin:/bin")
    backend = choose_backend("auto", GPU)
    assert backend.name == "mps"
    backend.close()


@pytest.mark.parametrize(("mode", "attached"), [("good", True), ("without_mps", False)])
def test_real_workers_are_held_to_their_percentage(
    backend: MpsBackend, daemon: MpsDaemon, program: str, mode: str, attached: bool
) -> None:
    supervisor = Supervisor(
        "tests.executor.problem_worker:main",
        Limits(),
        backend.evict,
        forkserver=ForkServer("tests.executor.problem_worker"),
    )
    job = model.inference(share=0.25)
    environment = {**backend.worker_environment(job, 0.25), "MPS_MODEL": program, "PROBLEM": f"*={mode}"}
    supervisor.start(1, StartJob(job=job, store="", device=backend.worker_device, pace=True), environment)
    ready, end = None, time.monotonic() + 20.0
    while ready is None and time.monotonic() < end:
        for event in supervisor.poll():
            assert not isinstance(event, Exited), event
            if isinstance(event, Reported) and isinstance(event.report, Ready):
                ready = event.report
        time.sleep(0.01)
    assert ready is not None
    if attached:
        assert ready.num_units == 32
        backend.attached(ready, 0.25)
        server = daemon.server_of(ready.pid)
        assert server is not None
        supervisor.stop(1, "test over", quick=True)  # through the daemon, so that the server stays healthy
        supervisor.close()
        assert daemon.server_state(server) == "ACTIVE"
    else:
        with pytest.raises(WorkerError, match="without MPS"):
            backend.attached(ready, 0.25)
    supervisor.close()
