"""An executor that serves cameras while they misbehave: real processes, real connections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.schema import CheckpointRef
from tests.cameras.film import SIZE, write_film
from tests.cameras.network_camera import NetworkCamera
from tests.cameras.rtsp_camera import RtspCamera, why_not
from tests.cameras.soak import FPS, Camera, Soak, train_student
from tests.integration.rig import free_port

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(240)]
SECONDS = 24.0

Made = tuple[Path, Path, CheckpointRef]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(folder, film, model that knows the film's scene)."""
    folder = tmp_path_factory.mktemp("soak")
    write_film(folder / "film.ts", seed=1, num_frames=60, size=SIZE, fps=int(FPS))
    return folder, folder / "film.ts", train_student(folder / "store", SIZE, seconds=15.0)


def network(folder: Path, film: Path) -> Camera:
    return NetworkCamera(film, fps=FPS)


def rtsp(folder: Path, film: Path) -> Camera:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return RtspCamera(folder, free_port(), film, fps=FPS)


@pytest.mark.parametrize("kind", [network, rtsp])
def test_a_camera_that_misbehaves_costs_no_worker_and_disturbs_no_other(
    made: Made, kind: Callable[[Path, Path], Camera]
) -> None:
    folder, film, checkpoint = made
    soak = Soak(folder, folder / "store", checkpoint, [kind(folder, film) for _ in range(2)])
    try:
        outcome = soak.run(SECONDS, seed=1, trouble_every_s=1.0)
    finally:
        soak.close()
    calm, hurt = outcome.streams["calm-1"], outcome.streams["hurt-1"]
    print(calm, hurt, outcome.latency_ms_p99, outcome.memory_mib)
    assert not outcome.deaths
    assert hurt.num_troubles >= 1
    assert hurt.num_unnoticed == 0
    assert hurt.num_recovered >= 1, "it came back by itself"
    assert calm.num_degraded == 0
    # Wide, for busy machines: benchmarks/live_cameras.py holds the real bounds.
    assert calm.num_frames >= 0.3 * FPS * SECONDS
    assert hurt.accuracy > calm.accuracy - 0.15
