"""Eight RTSP cameras into one executor while half of them are killed, frozen, spoilt and restarted at random.

    python benchmarks/live_cameras.py --seconds 600 --json live.json

Needs GStreamer's RTSP server (``make rtsp-rig``). Every camera is a process; frames carry their number, so that
accuracy is measured against the truth of each very frame. Exit code 1 when a bound is not kept: healthy streams analyse
at least 95 % of their frames, are as accurate as their twin that nothing happened to (within 5 points), the latency
from frame to result has a 99th percentile of at most 500 ms, memory grows by less than 2 MiB a minute, no worker died.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.cameras.film import SIZE, write_film
from tests.cameras.rtsp_camera import RtspCamera, why_not
from tests.cameras.soak import BACK_S, FPS, Outcome, Soak, slope, train_student
from tests.integration.rig import free_port


def bounds(outcome: Outcome) -> list[str]:
    """What was not kept, in words."""
    broken = []
    for name, tally in outcome.streams.items():
        if tally.fps < 0.95 * FPS:
            broken.append(f"{name}: {tally.fps:.2f} frames a second while its camera was well")
        if tally.twin_scored and tally.accuracy < tally.twin_accuracy - 0.05:
            broken.append(f"{name}: accuracy {tally.accuracy:.3f}, its calm twin meanwhile {tally.twin_accuracy:.3f}")
        if tally.num_unnoticed:
            broken.append(f"{name}: {tally.num_unnoticed} of {tally.num_troubles} troubles were not noticed")
        if max(tally.recovery_s, default=0.0) > BACK_S:
            broken.append(f"{name}: came back {max(tally.recovery_s):.1f} s after its camera")
    if outcome.latency_ms_p99 > 500.0:
        broken.append(f"latency p99 {outcome.latency_ms_p99:.0f} ms")
    if outcome.memory_slope() > 2.0:
        broken.append(f"memory grows by {outcome.memory_slope():.1f} MiB a minute")
    broken += [f"a worker died: {text}" for text in outcome.deaths]
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--trouble-every", type=float, default=4.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers into this file")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"live_cameras: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        print("making films and a model ...", flush=True)
        cameras = []
        for number in range(1, options.streams + 1):
            seed = (number + 1) // 2
            film = folder / f"film{seed}.ts"
            if not film.exists():
                write_film(film, seed=seed, num_frames=200, size=SIZE, fps=int(FPS))
            cameras.append(RtspCamera(folder, free_port(), film, fps=FPS))
        checkpoint = train_student(folder / "store", SIZE)
        soak = Soak(folder, folder / "store", checkpoint, cameras)
        try:
            outcome = soak.run(options.seconds, options.seed, options.trouble_every, print)
        finally:
            soak.close()
    half = outcome.seconds / 2
    print("stream   troubles degraded back s    fps accuracy its twin dropped memory MiB a minute")
    for name, tally in outcome.streams.items():
        memory = f"{tally.memory_mib[-1][1]:6.0f} {slope(tally.memory_mib, half):+8.2f}" if tally.memory_mib else ""
        print(
            f"{name:8} {tally.num_troubles:8} {tally.num_degraded:8} {max(tally.recovery_s, default=0.0):6.1f} "
            f"{tally.fps:6.2f} {tally.accuracy:8.3f} {tally.twin_accuracy:8.3f} {tally.num_dropped:7} {memory}"
        )
    noticed = [t.noticed_s - t.at_s for s in outcome.streams.values() for t in s.troubles if t.noticed_s is not None]
    growth = slope(outcome.executor_mib, half)
    print(f"noticed within {max(noticed, default=0.0):.1f} s; executor itself {growth:+.2f} MiB a minute")
    print(
        f"latency p99 {outcome.latency_ms_p99:.0f} ms; memory {outcome.memory_mib[0][1]:.0f} -> "
        f"{outcome.memory_mib[-1][1]:.0f} MiB, slope {outcome.memory_slope():+.2f} MiB a minute; workers that died: "
        f"{len(outcome.deaths)}; processor time {outcome.busy_s:.0f} s"
    )
    if options.json:
        options.json.write_bytes(msgspec.json.encode(outcome))
    broken = bounds(outcome)
    for text in broken:
        print(f"NOT KEPT: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
