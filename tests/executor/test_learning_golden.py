"""Golden models: one interface, torchvision's models by name, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import save_file

from executor.learning import datasets, labeling
from executor.learning.device import Device
from executor.learning.golden import ClassificationGolden, DetectionGolden, class_table, open_golden
from executor.learning.stepping import FreeStepper
from executor.streams.samples import label_table, read_samples
from protocol.errors import InputError
from protocol.messages import LabelJob
from protocol.schema import Clip, RecordedSource, StreamSpec, TorchvisionGolden
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))
MODEL = "ssdlite320_mobilenet_v3_large"
CLASSES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of three classes that sees red where there is anything: its last layer has a bias for class 1."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = torchvision.models.get_model(MODEL, weights=None, weights_backbone=None, num_classes=4)
    for head in model.head.classification_head.module_list:
        bias = head[-1].bias.view(-1, 4)
        torch.nn.init.zeros_(head[-1].weight)
        with torch.no_grad():
            bias.copy_(torch.tensor([0.0, 3.0, 1.0, -3.0]).expand_as(bias))
    path = tmp_path_factory.mktemp("weights") / "golden.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path


def spec(path: Path | str, **options: Any) -> TorchvisionGolden:
    fields: dict[str, Any] = {"model": MODEL, "class_map": {"1": "red", "2": "blue"}, "num_classes": 4}
    return TorchvisionGolden(weights_file=str(path), **(fields | options))


def stream(golden: TorchvisionGolden, **options: Any) -> StreamSpec:
    return msgspec.structs.replace(tiny_source.spec(), golden=golden, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_detector_from_a_local_file_labels_any_picture(weights: Path, suffix: str) -> None:
    golden = open_golden(stream(spec(weights.with_suffix(suffix))), CPU, FreeStepper(), seed=1)
    assert isinstance(golden, DetectionGolden)
    picture = np.zeros((120, 200, 3), np.uint8)
    found = golden.label_image(picture)
    assert len(found) > 0
    assert found.boxes.dtype == np.float32
    assert found.boxes.min() >= 0
    assert (found.boxes <= np.array([200, 120, 200, 120])).all()
    assert set(found.labels.tolist()) == {0}  # red, the class with the bias; blue is less sure than min_score
    assert set(found.ids.tolist()) == {1}
    assert (found.scores >= 0.5).all()
    frame = tiny_source.TinyFrame(3)
    again = golden.label(frame)
    assert np.array_equal(again.boxes, golden.label_image(frame.image()).boxes)


def test_classes_that_are_not_mapped_are_dropped_and_one_object_of_two_classes_is_one(weights: Path) -> None:
    picture = np.zeros((120, 200, 3), np.uint8)
    unmapped = DetectionGolden(spec(weights, class_map={"3": "red"}), CLASSES, CPU)
    assert len(unmapped.label_image(picture)) == 0
    options: dict[str, Any] = {"min_score": 0.05}
    apart = DetectionGolden(spec(weights, **options), CLASSES, CPU).label_image(picture)
    merged = DetectionGolden(spec(weights, class_map={"1": "red", "2": "red"}, **options), CLASSES, CPU)
    assert set(apart.labels.tolist()) == {0, 2}
    assert 0 < len(merged.label_image(picture)) <= np.bincount(apart.labels).max()


def test_the_input_size_is_the_sites_choice(weights: Path) -> None:
    golden: Any = DetectionGolden(spec(weights, input_px=160), CLASSES, CPU)
    assert golden._model.transform.fixed_size == (160, 160)
    assert len(golden.label_image(np.zeros((120, 200, 3), np.uint8))) >= 0


def test_a_classifier_names_what_is_in_the_sources_boxes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=5)
    torch.nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        # Neither 0 nor 3 is the likeliest class by itself; together, as one class of the site, they are.
        model.fc.bias.copy_(torch.tensor([0.35, 0.4, 0.0, 0.25, 0.0]).clamp(min=1e-6).log())
    path = tmp_path / "classifier.pt"
    torch.save(model.state_dict(), path)
    golden_spec = TorchvisionGolden(
        model="shufflenet_v2_x0_5", class_map={"0": "blue", "3": "blue", "1": "red"}, weights_file=str(path),
        num_classes=5, input_px=32,
    )  # fmt: skip
    golden = ClassificationGolden(golden_spec, CLASSES, CPU)
    frame = tiny_source.TinyFrame(3)
    found = golden.label(frame)
    assert np.array_equal(found.boxes, frame.boxes)
    assert set(found.labels.tolist()) == {2}
    assert found.scores == pytest.approx(np.full(len(found), 0.6), abs=1e-3)
    assert set(found.ids.tolist()) == {0}
    assert len(golden.label(tiny_source.TinyFrame(9))) == 0


def test_published_class_names_may_be_used_instead_of_ids() -> None:
    table = class_table(
        TorchvisionGolden(model=MODEL, class_map={"car": "red", "8": "red", "person": "blue", "dog": ""}),
        CLASSES,
        "detection",
    )
    assert {int(number): int(table[number]) for number in torch.nonzero(table >= 0)} == {1: 2, 3: 0, 8: 0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "yolo"}, r"golden\.model.*'yolo'.*ssdlite320"),
        ({"class_map": {"1": "pink"}}, "'pink' is not among the classes red, green, blue"),
        ({"class_map": {"4": "red"}}, "class ids 0 to 3, not 4"),
        ({"class_map": {"blimp": "red"}}, "'blimp' is neither"),
        ({"class_map": {"1": ""}}, "maps no class"),
        ({"weights_file": "/nowhere/w.pt"}, r"weights_file /nowhere/w\.pt: cannot be read: there is no such file"),
        ({"num_classes": 0}, r"does not fit ssdlite320_mobilenet_v3_large with golden\.num_classes = 91"),
        ({"model": "resnet18"}, r"no weights of resnet18.*missing"),
        ({"weights_file": "", "weights": "IMAGENET21K"}, "no weights 'IMAGENET21K'; published: COCO_V1"),
    ],
)
def test_a_golden_model_that_cannot_be_is_explained_in_one_line(
    weights: Path, options: dict[str, Any], told: str
) -> None:
    wrong = msgspec.structs.replace(spec(weights), **options)
    with pytest.raises(InputError, match=told) as caught:
        open_golden(stream(wrong), CPU, FreeStepper(), seed=1)
    assert "stream tiny" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_weights_file_is_named(weights: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    data = weights.with_suffix(suffix).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"golden.weights_file .*cut{suffix}: cannot be read") as caught:
        DetectionGolden(spec(path), CLASSES, CPU)
    assert "\n" not in str(caught.value)


def test_a_state_dict_within_a_training_checkpoint_is_found_and_a_whole_model_is_refused_in_words(
    weights: Path, tmp_path: Path
) -> None:
    state = torch.load(weights.with_suffix(".pt"), weights_only=True)
    torch.save({"epoch": 3, "model": state, "optimizer": {"lr": 0.1}}, tmp_path / "training.pth")
    DetectionGolden(spec(tmp_path / "training.pth"), CLASSES, CPU)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(InputError, match=r"whole\.pth: cannot be read: .* save its state dict") as caught:
        DetectionGolden(spec(tmp_path / "whole.pth"), CLASSES, CPU)
    assert "weights_only" not in str(caught.value)


def test_published_weights_that_cannot_be_had_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no route to host\); name a local file"):
        DetectionGolden(TorchvisionGolden(model=MODEL, class_map={"1": "red"}), CLASSES, CPU)


class Picture(tiny_source.TinySource):
    """Frames without any truth, as a live camera's are."""

    def frame(self, index: int) -> Any:
        frame = super().frame(index)
        frame.boxes, frame.labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return frame


def test_a_label_job_needs_no_truth_and_its_sample_list_can_be_replayed(weights: Path, tmp_path: Path) -> None:
    wanted = stream(spec(weights, input_px=96), label_fps=1.0)
    job = LabelJob(job_id="label", stream=wanted, share=1.0, window=2, from_s=-2.0, to_s=4.0)
    result = labeling.label(job, Picture(wanted), tmp_path, CPU, FreeStepper(), seed=1)
    assert result is not None
    assert result.num_frames == 6
    assert result.dataset.label_s_per_frame > 0.0
    crops = datasets.load(tmp_path, result.dataset, CLASSES)
    assert crops.class_counts(3)[0] == len(crops) > 0
    table = label_table(CLASSES, {"1": "red", "2": "blue"})
    rows = read_samples(
        tmp_path / "samples" / "tiny" / "w000002.csv", size=(640, 240), num_frames=1000, table=table, min_score=0.0
    )
    golden = DetectionGolden(spec(weights, input_px=96), CLASSES, CPU)
    assert list(rows) == [0, 20, 40, 60]  # what lies before the stream's first frame is in no recording
    for index, samples in rows.items():
        found: NDArray[np.float32] = golden.label(tiny_source.TinyFrame(index)).boxes
        assert np.allclose(samples.boxes, found, atol=1e-2, rtol=1e-4)


def test_the_oracles_sample_list_uses_the_ids_of_the_recording() -> None:
    source = RecordedSource(clips=(Clip(video="v", samples="s"),), class_map={"3": "red", "8": "green", "6": "green"})
    golden = open_golden(msgspec.structs.replace(tiny_source.spec(), source=source), CPU, FreeStepper(), seed=1)
    frame = tiny_source.TinyFrame(1)
    found = golden.label(frame)
    assert found is not None
    expected = {0: 3, 1: 8, 2: 3}  # blue is on no list: it is numbered by its place
    assert found.ids.tolist() == [expected[label] for label in frame.labels.tolist()]
