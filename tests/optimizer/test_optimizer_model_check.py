"""A site that names a model that cannot be had is refused before anything is started."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimizer.config import load_site
from optimizer.model_check import check_models
from protocol.errors import ConfigError

SITE = """
name = "yard"
[stream_defaults]
classes = ["person", "car"]
source = { type = "city", seed = 3 }
[[streams]]
stream_id = "gate"
[[streams]]
stream_id = "lot"
%s
[[inference]]
config_id = "full"
"""


def site_file(tmp_path: Path, extra: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(SITE % extra)
    return path


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ('student = { architecture = "resnet19" }', "'resnet19' is neither edge_cnn nor a classification model"),
        ('task = "detection"\nstudent = { architecture = "resnet18" }', "'resnet18' is no student for detection"),
        (
            'golden = { kind = "torchvision", model = "fcos_resnet50_fpn", weights = "X", class_map = { 1 = "car" } }',
            "has no weights 'X'; published: COCO_V1",
        ),
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_file_and_stream(tmp_path: Path, extra: str, told: str) -> None:
    path = site_file(tmp_path, extra)
    with pytest.raises(ConfigError) as caught:
        check_models(load_site(path), path)
    message = str(caught.value)
    assert message.startswith(f"{path}: stream lot: ")
    assert told in message
    assert "\n" not in message


def test_a_damaged_weights_file_is_named_and_the_command_ends_with_two(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"nothing")
    golden = 'kind = "torchvision", model = "fcos_resnet50_fpn", weights_file = "w.pt", class_map = { 1 = "car" }'
    path = site_file(tmp_path, f"golden = {{ {golden} }}")
    done = subprocess.run(
        [sys.executable, "-m", "optimizer.cli", "run", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert f"golden.weights_file {tmp_path / 'w.pt'}: cannot be read" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_models_that_exist_pass_and_a_site_of_small_students_does_not_wait(tmp_path: Path) -> None:
    path = site_file(tmp_path, 'student = { architecture = "squeezenet1_1" }')
    check_models(load_site(path), path)
    path = site_file(tmp_path, 'task = "detection"')
    start = time.process_time()
    check_models(load_site(path), path)
    assert time.process_time() - start < 0.5
