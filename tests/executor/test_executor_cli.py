"""The command ``ekya-executor``: wrong input ends with one clear line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import zmq

from executor.config import ExecutorConfig, make_config
from executor.shares.devices import find_device, gpu_spec
from protocol.errors import ConfigError, DeviceError
from tests.executor.a_core import CORE

NOWHERE = "tcp://127.0.0.1:9"


def run(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from executor.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("time=")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.process
@pytest.mark.parametrize(
    ("device", "address", "words"),
    [
        ("tpu:0", NOWHERE, ["tpu:0", "cpu:K", "cuda:K"]),
        ("cpu:999", NOWHERE, ["cpu:999 does not exist", "it may use: cpu:"]),
        ("cpu", NOWHERE, ["write cpu:K"]),
        ("cpu:0", "127.0.0.1:5600", ["--connect", "tcp://"]),
        ("cpu:0", "tcp://*:5600", ["--connect", "wildcard"]),
    ],
)
def test_a_wrong_device_or_address_is_named(device: str, address: str, words: list[str]) -> None:
    text = complaint(run("--device", device, "--connect", address, "--wait", "1"))
    assert all(word in text for word in words), text


@pytest.mark.process
def test_an_unreachable_optimizer_is_given_up_after_the_wait() -> None:
    text = complaint(run("--device", CORE, "--connect", NOWHERE, "--wait", "0.5"))
    assert NOWHERE in text
    assert "--wait" in text


@pytest.mark.process
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has an NVIDIA GPU")
def test_a_gpu_without_a_driver_is_an_error_that_says_what_to_do() -> None:
    assert "use a device like cpu:0" in complaint(run("--device", "cuda:0", "--connect", NOWHERE))


@pytest.mark.process
@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b"\x01rejected", msgpack.packb({"type": "rejected", "reason": "e1 is taken"})], "e1 is taken"),
        ([b"\x02rejected", msgpack.packb({"type": "rejected", "reason": "only 2"})], "protocol version 2"),
        ([b"\x07welcome", b"\xc0"], "protocol version 7"),
    ],
)
def test_an_optimizer_that_rejects_it_ends_it(frames: list[bytes], words: str, tmp_path: Path) -> None:
    config = tmp_path / "e.toml"
    config.write_text('preload = "tests.executor.problem_worker"\n')
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    command = [sys.executable, "-c", "from executor.cli import main; main()", "--device", CORE]
    command += ["--connect", f"tcp://127.0.0.1:{port}", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert router.poll(60_000)
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, *frames])
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        router.close()
        context.term()
    done = subprocess.CompletedProcess(command, process.returncode, "", stderr)
    assert words in complaint(done)


@pytest.mark.process
def test_random_bytes_from_the_optimizer_are_dropped(tmp_path: Path) -> None:
    config = tmp_path / "e.toml"
    config.write_text('preload = "tests.executor.problem_worker"\n')
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    command = [sys.executable, "-c", "from executor.cli import main; main()", "--device", CORE]
    command += ["--connect", f"tcp://127.0.0.1:{port}", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        assert router.poll(60_000)
        peer = router.recv_multipart()[0]
        for frames in ([os.urandom(200)], [b"\x01welcome", os.urandom(50)], [b"\x01apply_plan", b""], [b""] * 9):
            router.send_multipart([peer, *frames])
        router.recv_multipart()
        assert router.poll(60_000), "it goes on saying hello"
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        router.close()
        context.term()


@pytest.mark.process
def test_help_is_answered_without_the_heavy_libraries() -> None:
    code = "import sys; sys.argv = ['ekya-executor', '--help']\nfrom executor.cli import main\n"
    code += "try:\n main()\nexcept SystemExit: pass\nprint({'torch', 'zmq', 'executor.service'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--device" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


# ---------------------------------------------------------------- configuration


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text('device = "cpu:1"\nspeed = 2.0\n[limits]\nhang_s = 3.0\n')
    config = make_config({"device": "cpu:0", "connect": NOWHERE, "wait_s": None}, str(path))
    assert (config.device, config.speed, config.limits.hang_s, config.limits.term_grace_s) == ("cpu:0", 2.0, 3.0, 2.0)
    assert config.wait_s == ExecutorConfig(device="", connect="").wait_s


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limits]\nhang = 3.0", ["limits.hang is unknown", "hang_s", "e.toml"]),
        ("speeed = 1.0", ["speeed is unknown", "speed"]),
        ("speed = 'fast'", ["key speed", "float"]),
        ("speed = 0.0", ["key speed", "> 0"]),
        ("worker = 'no function'", ["key worker"]),
        ("executor_id = 'a b'", ["key executor_id"]),
        ("speed = ", ["not valid TOML"]),
    ],
)
def test_mistakes_in_the_file_name_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "e.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_config({"device": "cpu:0", "connect": NOWHERE}, str(path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        make_config({"device": "cpu:0", "connect": NOWHERE}, str(tmp_path / "none.toml"))


def test_a_core_is_a_device_with_its_part_of_the_memory() -> None:
    core = min(os.sched_getaffinity(0))
    device = find_device(f"cpu:{core}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device.memory_bytes * (os.cpu_count() or 1) <= total // 2
    spec = gpu_spec(device, "e1", speed=0.5)
    assert (spec.gpu_id, spec.speed, spec.memory_bytes) == ("e1", 0.5, device.memory_bytes)
    with pytest.raises(DeviceError, match="not known"):
        find_device("cpu:-1")
