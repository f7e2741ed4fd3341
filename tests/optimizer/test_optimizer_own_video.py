"""`run --video` and `ingest`: from a recording or a data set to a run or a report; mistakes are named, exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from rich.console import Console
from safetensors.torch import save_file

from optimizer.cli import main
from optimizer.config import load_site
from optimizer.own_video import Wish, write_site
from optimizer.report import read_events
from protocol.events import WindowClosed
from protocol.schema import RecordedSource
from tests.cameras.film import city, write_film
from tests.executor.test_streams_dataset import coco

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]
SIZE = (240, 160)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script, in this process: imports are paid once."""

    def call(*words: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["ekya-optimizer", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds of a street, with its sample list beside it: persons, cars and all the others as trucks."""
    path = tmp_path_factory.mktemp("film") / "street.mp4"
    write_film(path, seed=3, num_frames=120, size=SIZE)
    scene, lines = city(3, SIZE, 10.0), ["idx,frame id,class,x0,y0,x1,y1,score"]
    for number in range(120):
        frame = scene.frame(number)
        for box, label in zip(frame.boxes.tolist(), frame.labels.tolist(), strict=True):
            corners = ",".join(f"{value:g}" for value in box)
            lines.append(f"{len(lines) - 1},{number},{[1, 2, 3, 8, 8, 4][label]},{corners},1.0")
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that sees a person in the middle and a car beside it, in every picture, whatever it shows."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        "ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4
    )
    with torch.no_grad():
        for level, layers in enumerate(model.head.classification_head.module_list):
            layers[-1].weight.zero_()
            bias = layers[-1].bias.view(-1, 4)
            bias.zero_()
            bias[:, 0] = 9.0
            if level == 4:
                bias[0] = torch.tensor([0.0, 5.0, 0.0, 0.0])
                bias[3] = torch.tensor([0.0, 0.0, 0.0, 5.0])
        for layers in model.head.regression_head.module_list:
            layers[-1].weight.zero_()
            layers[-1].bias.zero_()
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(path))
    return path


def test_a_recording_with_a_sample_list_runs_and_is_reported_in_one_command(
    film: Path, tmp_path: Path, command: Command
) -> None:
    done = command(
        "run", "--video", film, "--samples", film.with_suffix(".csv"), "--windows", "1", "--window-seconds", "8",
        "--executors", "1", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (closed,) = [e for e in read_events(tmp_path / "out" / "events.jsonl") if isinstance(e, WindowClosed)]
    assert closed.realised > 0.3
    assert (tmp_path / "out" / "report.html").is_file()
    site = load_site(tmp_path / "out" / "site.toml")
    assert set(site.streams[0].classes) <= {"person", "bicycle", "car", "truck", "motorcycle"}


def test_a_recording_is_labelled_by_the_golden_model_at_the_rate_asked_for(
    film: Path, weights: Path, tmp_path: Path
) -> None:
    wish = Wish(
        videos=(film,), golden="ssdlite320_mobilenet_v3_large", weights=weights, weights_classes=4,
        classes=("person", "car"), class_map=("1=person", "3=car"), fps=2.0, task="detection",
    )  # fmt: skip
    site = load_site(write_site(wish, tmp_path, "cpu:0", Console(quiet=True)))
    stream = site.streams[0]
    assert isinstance(stream.source, RecordedSource)
    assert (stream.fps, stream.source.clips[0].step, stream.task) == (2.0, 5, "detection")
    rows = (tmp_path / "street.csv").read_text().splitlines()[1:]
    assert {int(row.split(",")[1]) for row in rows} == set(range(0, 120, 5))
    assert {row.split(",")[2] for row in rows} == {"1", "3"}
    assert dict(stream.source.class_map) == {"1": "person", "3": "car"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--video", "{dir}/none.mp4"], "--video {dir}/none.mp4: no such file"),
        (["--video", "{film}"], "--golden-weights FILE"),
        (["--video", "{film}", "--golden-weights", "{dir}/none.pt"], "--golden-weights {dir}/none.pt: no such file"),
        (["--video", "{film}", "--golden-weights", "{text}"], "--golden-weights {text}: cannot be read"),
        (["--video", "{text}", "--samples", "{list}"], "cannot be opened as video"),
        (["--video", "{film}", "--samples", "{text}"], "line 1: 1 columns"),
        (["--video", "{film}", "--samples", "{dir}/none.csv"], "--samples {dir}/none.csv: no such file"),
        (["--video", "{film}", "--samples", "{list}", "--classes", "cow,pig"], "none of --classes cow, pig"),
        (["--video", "{film}", "--samples", "{list}", "--classes", "car"], "--classes: at least two"),
        (["--video", "{film}", "--samples", "{list}", "--task", "sing"], "--task 'sing'"),
        (["--video", "{film}", "--samples", "{list}", "--golden-weights", "{text}"], "--samples and --golden-weights"),
        (["--video", "{film}", "--samples", "{list}", "--policy", "magic"], "magic"),
        (["--video", "{film}", "--golden", "nonsense", "--golden-weights", "{text}"], "nonsense"),
        (["site.toml", "--video", "{film}"], "not both"),
        ([], "give a site file, or --video FILE"),
    ],
)
def test_what_cannot_be_run_is_named_in_one_line(
    film: Path, tmp_path: Path, command: Command, words: list[str], text: str
) -> None:
    (tmp_path / "text.txt").write_text("nothing of use\n")
    names = {
        "dir": tmp_path, "film": film, "text": tmp_path / "text.txt", "list": film.with_suffix(".csv")
    }  # fmt: skip
    done = command("run", *(word.format(**names) for word in words), "--out", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert text.format(**names) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ingest_says_what_is_in_a_data_set(tmp_path: Path, command: Command) -> None:
    path = coco(tmp_path)
    done = command("ingest", path, "--windows", "3", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "coco, 12 frames (0 without a box), 12 boxes" in done.stdout
    assert (tmp_path / "out" / "drift.png").stat().st_size > 5000
    done = command("ingest", path, "--json")
    assert json.loads(done.stdout)["classes"] == {"tram": 6, "car": 6}


def test_ingest_lists_problems_and_ends_with_2(tmp_path: Path, command: Command) -> None:
    path = coco(tmp_path)
    raw = json.loads(path.read_text())
    raw["annotations"][0]["bbox"] = [0, 0, 500, 10]
    raw["annotations"][1]["category_id"] = 1
    path.write_text(json.dumps(raw))
    done = command("ingest", path)
    assert done.returncode == 2
    assert "leaves the 64x48 picture" in done.stderr
    assert "annotations[1]: category_id 1" in done.stderr
    assert "12 frames" in done.stdout, "the rest is shown"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{dir}/none"], "is not there"),
        (["{dir}"], "give the COCO annotation file itself"),
        (["{dir}/set.json", "--format", "xml"], "format: 'xml' is not known"),
        (["{dir}/set.json", "--images", "{dir}/nowhere"], "images: {dir}/nowhere is not there"),
        (["{dir}/set.json", "--windows", "0"], "--windows 0"),
    ],
)
def test_ingest_refuses_what_it_cannot_read(tmp_path: Path, command: Command, words: list[str], text: str) -> None:
    (tmp_path / "set.json").write_text('{"images": [], "annotations": [], "categories": []}')
    done = command("ingest", *(word.format(dir=tmp_path) for word in words))
    assert done.returncode == 2
    assert text.format(dir=tmp_path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
