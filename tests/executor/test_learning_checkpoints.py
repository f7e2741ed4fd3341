"""Checkpoints are trusted by their hash only."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from executor.learning import checkpoints
from executor.learning.models import Student, build_student
from protocol.errors import CheckpointError
from protocol.schema import CheckpointRef, StudentSpec

CLASSES = ("car", "bus", "person")


def student(seed: int = 0) -> Student:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return build_student(StudentSpec(head_width=8), len(CLASSES)).eval()


def save(store: Path, net: Student, version: int = 1) -> CheckpointRef:
    return checkpoints.save(
        store, net, stream_id="gate", version=version, classes=CLASSES, crop_px=32, retrain_id="full", accuracy=0.7
    )


def files(store: Path) -> list[str]:
    return sorted(path.name for path in store.rglob("*") if path.is_file())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    net = student()
    ref = save(tmp_path, net)
    loaded, manifest = checkpoints.load(tmp_path, ref)
    crops = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8)
    assert torch.equal(loaded(crops), net(crops))
    assert not loaded.training
    assert (manifest.classes, manifest.head_width, manifest.retrain_id) == (CLASSES, 8, "full")
    assert ref.num_bytes == (tmp_path / ref.path).stat().st_size


def test_two_models_of_one_version_never_share_a_file(tmp_path: Path) -> None:
    first, second = save(tmp_path, student(0)), save(tmp_path, student(1))
    assert first.path != second.path
    checkpoints.load(tmp_path, first)
    checkpoints.load(tmp_path, second)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path, seed: int) -> None:
    ref = save(tmp_path, student())
    path = tmp_path / ref.path
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data)) if seed else 3
    data[place] ^= 1 << (seed % 8)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(tmp_path, ref)


@pytest.mark.parametrize("num_bytes", [0, 5, 1000])
def test_a_truncated_file_is_noticed(tmp_path: Path, num_bytes: int) -> None:
    ref = save(tmp_path, student())
    path = tmp_path / ref.path
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(tmp_path, ref)


def test_a_missing_file_and_a_damaged_manifest_are_noticed(tmp_path: Path) -> None:
    ref = save(tmp_path, student())
    manifest = (tmp_path / ref.path).with_suffix(".json")
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoints.load(tmp_path, ref)
    manifest.write_text(text.replace('"head_width": 8', '"head_width": 9'))
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoints.load(tmp_path, ref)
    manifest.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load(tmp_path, ref)


def test_a_reference_to_another_stream_or_version_is_refused(tmp_path: Path) -> None:
    ref = save(tmp_path, student())
    for wrong in (msgspec.structs.replace(ref, version=2), msgspec.structs.replace(ref, stream_id="other")):
        with pytest.raises(CheckpointError, match="not version"):
            checkpoints.load(tmp_path, wrong)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "checkpoints/../../x", "", "."])
def test_no_reference_leads_out_of_the_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="out of the store"):
        checkpoints.load(tmp_path / "store", CheckpointRef(path=path, sha256="0" * 64, stream_id="gate", version=1))


def test_a_link_does_not_lead_out_of_the_store_either(tmp_path: Path) -> None:
    ref = save(tmp_path / "elsewhere", student())
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "checkpoints").symlink_to(tmp_path / "elsewhere" / "checkpoints")
    with pytest.raises(CheckpointError, match="out of the store"):
        checkpoints.load(tmp_path / "store", ref)


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    net = student()
    with torch.no_grad():
        next(net.head.parameters())[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save(tmp_path, net)
    assert files(tmp_path) == []


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, student())
    assert files(tmp_path) == ["checkpoints"]
