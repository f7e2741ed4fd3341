"""A seeded run as its telemetry tells it: four streams, two GPUs, drift, retrainings, swaps. Plausible, not real."""

from __future__ import annotations

import math

import numpy as np

from protocol.events import (
    ExecutorChanged,
    JobShare,
    Notice,
    PlannedStream,
    PlanSolved,
    ProfileEstimated,
    RetrainFinished,
    StreamAccuracy,
    StreamWindow,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)
from protocol.schema import InferenceConfig, RetrainConfig

STREAMS = ("harbour", "market", "ring-road", "station")
INFERENCE = (
    (InferenceConfig(config_id="full", frame_interval=1, resolution_px=32), 0.42, 1.0),
    (InferenceConfig(config_id="half", frame_interval=2, resolution_px=32), 0.21, 0.93),
    (InferenceConfig(config_id="fifth", frame_interval=5, resolution_px=32), 0.09, 0.81),
)
RETRAIN = (
    (RetrainConfig(config_id="head-3", epochs=3, trained_fraction=0.0), 0.4, 0.72),
    (RetrainConfig(config_id="half-8", epochs=8, trained_fraction=0.5), 3.1, 0.79),
    (RetrainConfig(config_id="all-20", epochs=20, trained_fraction=1.0), 14.5, 0.84),
)
START_S = 1.79e9


def events_of_a_run(seed: int, *, num_windows: int = 4, window_s: float = 30.0) -> tuple[TelemetryEvent, ...]:
    """Events in the order of site time."""
    rng = np.random.default_rng(seed)
    events: list[TelemetryEvent] = []
    for gpu in range(2):
        events.append(
            ExecutorChanged(
                time_s=START_S, site_s=0.0, executor_id=f"e{gpu}", gpu_id=f"cpu-{gpu}", change="joined", reason="hello"
            )
        )
    accuracy = dict.fromkeys(STREAMS, 0.78)
    words = {s: ["day", "clear", "commute", "summer"] for s in STREAMS}
    version = dict.fromkeys(STREAMS, 1)
    for window in range(num_windows):
        open_s = 4.0 + window * window_s
        events.append(
            WindowOpened(
                time_s=START_S + open_s,
                site_s=open_s,
                window=window,
                term=1,
                window_s=window_s,
                num_streams=len(STREAMS),
                policy="milp",
            )
        )
        plan = _plan(rng, window)
        swap_s = {s: open_s + float(rng.uniform(12, 24)) for s in STREAMS if plan[s].retrain_id}
        refused = {s for s in swap_s if rng.uniform() < 0.2}
        drift_s = {s: open_s + float(rng.uniform(2, 28)) for s in STREAMS if rng.uniform() < 0.5}
        for stream in STREAMS:
            events.append(
                ProfileEstimated(
                    time_s=START_S + open_s + 6,
                    site_s=open_s + 6,
                    stream_id=stream,
                    window=window,
                    accuracy_now=accuracy[stream],
                    inference=INFERENCE,
                    retrain=RETRAIN,
                )
            )
        for number, phase in enumerate(("profiling", "plan", *(["replan"] * len(swap_s)))):
            events.append(
                PlanSolved(
                    time_s=START_S + open_s,
                    site_s=open_s + (0.0, 6.0, 14.0, 18.0, 20.0, 23.0)[number],
                    window=window,
                    revision=number,
                    phase=phase,  # type: ignore[arg-type]
                    reason="window opened" if number == 0 else "profiles ready" if number == 1 else "retraining ended",
                    policy="milp",
                    status="optimal",
                    predicted=0.75,
                    bound=0.7504,
                    gap=0.0005,
                    seconds=float(rng.uniform(0.05, 0.6)),
                    detail="",
                    streams=tuple(plan.values()) if phase == "plan" else tuple(_idle(s) for s in STREAMS),
                )
            )
        sums = dict.fromkeys(STREAMS, 0.0)
        for second in range(int(window_s)):
            site_s = open_s + second + 1.0
            for stream in STREAMS:
                if stream in drift_s and second + open_s <= drift_s[stream] < site_s:
                    kind = int(rng.integers(4))
                    words[stream] = list(words[stream])
                    words[stream][kind] = (("night", "dusk"), ("rain", "fog"), ("freight", "festival"), ("winter",))[
                        kind
                    ][0]
                    accuracy[stream] -= float(rng.uniform(0.08, 0.2))
                if stream in swap_s and second + open_s <= swap_s[stream] < site_s:
                    after = accuracy[stream] + float(rng.uniform(0.05, 0.2))
                    promoted = stream not in refused
                    events.append(
                        RetrainFinished(
                            time_s=START_S + site_s,
                            site_s=site_s,
                            stream_id=stream,
                            window=window,
                            retrain_id=plan[stream].retrain_id,
                            accuracy_before=accuracy[stream],
                            accuracy_after=min(after, 1.0) if promoted else accuracy[stream] - 0.01,
                            accuracy_predicted=min(after, 1.0) - 0.03,
                            seconds=8.4,
                            seconds_predicted=8.9,
                            promoted=promoted,
                            reason="better by 9 points" if promoted else "not better on 60 held-out labels",
                        )
                    )
                    if promoted:
                        accuracy[stream] = min(after, 0.97)
                        version[stream] += 1
                        events.append(
                            WorkerChanged(
                                time_s=START_S + site_s,
                                site_s=site_s,
                                job_id=f"inference-{stream}",
                                stream_id=stream,
                                gpu_id=plan[stream].inference_gpu,
                                kind="inference",
                                change="swapped",
                                reason="promoted",
                                gap_ms=101.0,
                            )
                        )
                value = float(np.clip(accuracy[stream] * 0.95 + rng.normal(0, 0.06), 0, 1))
                sums[stream] += value
                events.append(
                    StreamAccuracy(
                        time_s=START_S + site_s,
                        site_s=site_s,
                        stream_id=stream,
                        window=window,
                        accuracy=value,
                        accuracy_sum=value * 10,
                        num_scored=10,
                        num_frames=10,
                        num_analysed=10,
                        num_dropped=int(rng.uniform() < 0.05),
                        num_objects=70,
                        fps=10.0,
                        latency_ms_p50=12.0,
                        model_version=version[stream],
                        inference_id=plan[stream].inference_id,
                        conditions=", ".join(words[stream]),
                    )
                )
                events += _shares(stream, plan[stream], site_s, open_s, swap_s.get(stream), rng)
        closing = tuple(
            StreamWindow(
                stream_id=stream,
                realised=sums[stream] / window_s,
                predicted=min(sums[stream] / window_s + float(rng.normal(0, 0.04)), 1.0),
                num_frames=int(10 * window_s),
                num_analysed=int(10 * window_s),
                num_dropped=2,
                num_objects=2000,
                retrain_id=plan[stream].retrain_id,
                swapped=stream in swap_s and stream not in refused,
            )
            for stream in STREAMS
        )
        events.append(
            WindowClosed(
                time_s=START_S + open_s + window_s,
                site_s=open_s + window_s,
                window=window,
                streams=closing,
                realised=sum(row.realised or 0.0 for row in closing) / len(closing),
                predicted=sum(row.predicted or 0.0 for row in closing) / len(closing),
            )
        )
    events.append(Notice(time_s=START_S, site_s=9.0, level="warning", text="<b>a notice & its marks</b>"))
    return tuple(sorted(events, key=lambda e: e.site_s))


def _idle(stream: str) -> PlannedStream:
    gpu = f"cpu-{STREAMS.index(stream) % 2}"
    return PlannedStream(stream_id=stream, predicted=0.7, inference_id="half", inference_share=0.3, inference_gpu=gpu)


def _plan(rng: np.random.Generator, window: int) -> dict[str, PlannedStream]:
    plan = {}
    for place, stream in enumerate(STREAMS):
        config, share, _ = INFERENCE[int(rng.integers(len(INFERENCE)))]
        retrain = RETRAIN[int(rng.integers(len(RETRAIN)))][0] if (place + window) % 3 else None
        plan[stream] = PlannedStream(
            stream_id=stream,
            predicted=0.74,
            inference_id=config.config_id,
            inference_share=math.ceil(10 * share) / 10,
            inference_gpu=f"cpu-{place % 2}",
            retrain_id=retrain.config_id if retrain else "",
            retrain_share=0.3 if retrain else 0.0,
            retrain_gpu=f"cpu-{(place + 1) % 2}" if retrain else "",
            retrain_start_s=0.0,
            retrain_end_s=12.0 if retrain else 0.0,
            inference_id_after="full" if retrain else "",
        )
    return plan


def _shares(
    stream: str, plan: PlannedStream, site_s: float, open_s: float, swap_s: float | None, rng: np.random.Generator
) -> list[TelemetryEvent]:
    since = site_s - open_s
    rows: list[tuple[str, str, str, float]] = [
        (f"inference-{stream}", "inference", plan.inference_gpu, plan.inference_share)
    ]
    if since <= 3:
        rows.append((f"label-{stream}-{open_s:.0f}", "label", plan.inference_gpu, 0.1))
    elif since <= 6:
        rows.append((f"trial-{stream}-{open_s:.0f}", "trial", plan.inference_gpu, 0.2))
    elif swap_s is not None and site_s <= swap_s + 1:
        rows.append((f"retrain-{stream}-{open_s:.0f}", "retrain", plan.retrain_gpu, plan.retrain_share))
    return [
        JobShare(
            time_s=START_S + site_s,
            site_s=site_s,
            job_id=job_id,
            kind=kind,  # type: ignore[arg-type]
            stream_id=stream,
            gpu_id=gpu,
            share_granted=share,
            share_achieved=share * float(rng.uniform(0.95, 1.03)),
            backend="pacing",
        )
        for job_id, kind, gpu, share in rows
    ]
