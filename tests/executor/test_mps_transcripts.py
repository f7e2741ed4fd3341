"""The model of the MPS control program against transcripts of ``make gpu-check`` recorded on GPUs.

Every command of a transcript is given to the model, with its processes in the place of the recorded ones, and has to be
answered in the same words. Clients come, go and fault through CUDA and not through commands; so before a command, the
model's clients are brought to what the recorded answer shows.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executor.shares.mps import percentage
from executor.shares.mps_control import MpsDaemon
from protocol.errors import WorkerError
from tests.executor.test_executor_mps import program

__all__ = ["program"]
pytestmark = pytest.mark.process

TRANSCRIPTS = sorted(Path(__file__).with_name("transcripts").glob("*.json"))


class Stage:
    """The model, and who stands for whom."""

    def __init__(self, program: str) -> None:
        self.daemon = MpsDaemon("GPU-1", program=program, query_timeout_s=10.0)
        self.daemon.start()
        self.daemon.query("model_mortal")  # as on the GPUs of the transcripts: a killed client harms nobody
        self.actors: dict[int, subprocess.Popen[bytes]] = {}
        self.servers: dict[int, int] = {}

    def close(self) -> None:
        for actor in self.actors.values():
            actor.kill()
            actor.wait()
        self.daemon.close()

    def serve(self, recorded: int) -> None:
        """There is a server from now on; it starts with the first client, as the real one."""
        if recorded not in self.servers:
            first = self._actor(-1)
            self.daemon.query(f"model_attach {first.pid} 100")
            self.servers[recorded] = self.daemon.server_pids()[0]
            self.daemon.query(f"model_detach {first.pid}")

    def attach(self, recorded: set[int]) -> None:
        """These are the clients."""
        wanted = {self._actor(number).pid for number in recorded}
        server = self.daemon.server_pids()[0]
        present = set(self.daemon.client_pids(server))
        for pid in present - wanted:
            self.daemon.query(f"model_detach {pid}")
        for pid in wanted - present:
            self.daemon.query(f"model_attach {pid} 50")

    def translated(self, words: str) -> str:
        """A command or an answer with the model's processes for the recorded ones."""
        numbers = {**{n: actor.pid for n, actor in self.actors.items()}, **self.servers}
        return " ".join(str(numbers.get(int(word), word)) if word.isdecimal() else word for word in words.split())

    def _actor(self, recorded: int) -> subprocess.Popen[bytes]:
        if recorded not in self.actors or self.actors[recorded].poll() is not None:
            self.actors[recorded] = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
        return self.actors[recorded]


@pytest.fixture
def stage(program: str) -> Iterator[Stage]:
    made = Stage(program)
    yield made
    made.close()


def checks(path: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]}


REPLAYED = (
    "mps_attach",
    "mps_table",
    "mps_unreachable",
    "mps_terminate_busy",
    "mps_killed",
    "mps_fault_assert",
    "mps_priority",
    "mps_sigterm",
)


def having(*names: str) -> list[Path]:
    """The transcripts in which these checks passed: a GPU is not always borrowed long enough for all of them."""
    return [path for path in TRANSCRIPTS if all(checks(path).get(n, {}).get("status") == "passed" for n in names)]


def test_every_check_was_recorded_once_at_least() -> None:
    for name in (*REPLAYED, "mps_workers", "mps_queries", "mps_many", "mps_server_killed", "pacing", "students"):
        assert having(name), name


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for name in REPLAYED for path in having(name)], ids=lambda v: getattr(v, "stem", v)
)
def test_the_model_answers_as_was_recorded(stage: Stage, path: Path, name: str) -> None:
    check = checks(path)[name]
    assert check["status"] == "passed"
    terminated: set[int] = set()
    compared = 0
    for entry in check["commands"]:
        words, recorded = entry["command"].split(), entry["stdout"]
        if entry["exit_code"] != 0 or words[0] in ("get_device_client_list", "ps"):
            continue  # the daemon was not up yet; tables of many columns nobody reads
        if words[0] == "get_server_list":
            for number in recorded.split():
                stage.serve(int(number))
        if words[0] == "get_client_list" and recorded.split() and recorded.split()[0].isdecimal():
            stage.attach({int(number) for number in recorded.split()})
        elif words[0] == "get_client_list" and not recorded.strip():
            stage.attach(set())
        answer = stage.daemon.query(stage.translated(entry["command"]))
        expected = stage.translated(recorded)
        if words[0] == "terminate_client" and recorded.strip() == "0":
            terminated.add(int(words[2]))
        assert sorted(answer.split()) == sorted(expected.split()), entry["command"]
        compared += 1
    assert compared or not check["commands"]
    for number in terminated:
        assert stage.actors[number].wait(10.0) is not None


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_model_knows_the_commands_of_the_start(stage: Stage, path: Path) -> None:
    for entry in checks(path)["mps_start"]["commands"]:
        if entry["exit_code"] == 0:
            assert stage.daemon.query(entry["command"]) == entry["stdout"].strip(), entry["command"]
        else:  # asked before the daemon was up
            assert "Cannot find MPS control daemon process" in entry["stdout"] + entry["stderr"]
    stage.daemon.kill()
    with pytest.raises(WorkerError, match="Cannot find MPS control daemon process"):
        stage.daemon.query("get_server_list")


@pytest.mark.parametrize("path", having("mps_table"), ids=lambda path: path.stem)
def test_the_model_gives_the_recorded_multiprocessors(stage: Stage, path: Path) -> None:
    table = checks(path)["mps_table"]["details"]["percent_to_units"]
    assert len(table) > 10
    actor = stage._actor(1)
    for percent, units in table.items():
        # What the worker is told, and not more digits than that: the driver reads no others.
        told = percentage(float(percent) / 100.0)
        assert stage.daemon.query(f"model_attach {actor.pid} {told}") == str(units), percent
        stage.daemon.query(f"model_detach {actor.pid}")


@pytest.mark.parametrize("path", having("mps_table", "mps_fault_address"), ids=lambda path: path.stem)
def test_what_the_executor_relies_on_was_seen_on_the_gpu(path: Path) -> None:
    found = {name: check["details"] for name, check in checks(path).items() if check["status"] == "passed"}
    assert found["mps_unreachable"]["runs_silently_without_mps"]
    assert found["mps_memory_cap"]["capped"]
    for hand_over in found["mps_hand_over"]["hand_overs"]:
        assert hand_over["frames_lost"] == hand_over["frames_twice"] == 0
        assert hand_over["added_ms"] < 20.0
    assert found["mps_terminate_busy"]["terminate_client_succeeded"]
    assert not found["mps_terminate_busy"]["stream"]["hurt"]
    fault = found["mps_fault_address"]
    assert fault["stream"]["hurt"]
    assert not fault["new_client_beside"]["ok"]
    assert fault["brought_back_by"] == "all clients leaving"
    # A failed assertion stays in its client, unlike an illegal address.
    assert not found["mps_fault_assert"]["stream"]["hurt"]
    assert found["mps_fault_assert"]["new_client_beside"]["ok"]
    for hand_over in found["hand_over_pacing"]["hand_overs"]:
        assert hand_over["frames_lost"] == 0
    assert not found["mps_quit"]["servers_left"]


@pytest.mark.parametrize("path", having("mps_workers", "mps_queries", "mps_many"), ids=lambda path: path.stem)
def test_what_only_a_crowd_shows_was_seen_on_the_gpu(path: Path) -> None:
    found = {name: check["details"] for name, check in checks(path).items() if check["status"] == "passed"}
    # Two of the executor's own workers hand a stream over; each was proven to be attached with its share.
    workers = found["mps_workers"]
    assert workers["added_ms"] <= 20.0
    assert workers["stats"]["num_dropped"] == 0
    assert workers["worker_1"]["num_units"] < workers["worker_2"]["num_units"]
    # Queries one after the other are answered, queries at once are not: they are made under a lock.
    assert found["mps_queries"]["serial"]["wrong"] == 0
    assert found["mps_queries"]["concurrent"]["wrong"] > 0
    # The daemon's limit is the one that the executor keeps below.
    assert found["mps_many"]["attached"] == found["mps_many"]["limit_we_use"] < found["mps_many"]["wanted"]
    priority = found["mps_priority"]
    assert (
        priority["inference_first"]["inference"]["step_ms_p99"] < priority["training_first"]["inference"]["step_ms_p99"]
    )
    assert not found["mps_sigterm"]["stream"]["hurt"]
    killed = found["mps_server_killed"]
    assert killed["stream"]["hurt"]
    assert killed["new_client_beside"]["ok"]
