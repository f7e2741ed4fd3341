"""What a worker reports, as telemetry. Pure."""

from __future__ import annotations

from executor.links import Progress, Report, StreamStats
from executor.roster_entry import Worker
from protocol.events import JobShare, StreamAccuracy, TelemetryEvent
from protocol.messages import Job


def numbers_of(worker: Worker, report: Report, gpu_id: str, backend: str, window: int) -> tuple[TelemetryEvent, ...]:
    """The event of a report that carries numbers; none for other reports. ``window`` is that of the plan held."""
    job = worker.job
    if isinstance(report, StreamStats):
        return (accuracy_event(job, report, window),)
    if isinstance(report, Progress):
        share = JobShare(
            job_id=job.job_id,
            kind=worker.kind,
            stream_id=job.stream.stream_id,
            gpu_id=gpu_id,
            share_granted=job.share,
            share_achieved=report.share_achieved,
            backend=backend,
        )
        return (share,)
    return ()


def accuracy_event(job: Job, stats: StreamStats, window: int) -> StreamAccuracy:
    """A stream's counts as telemetry; ``fps`` is frames analysed per second."""
    return StreamAccuracy(
        stream_id=job.stream.stream_id,
        window=window,
        accuracy=min(1.0, max(0.0, stats.accuracy_sum / stats.num_scored)) if stats.num_scored else None,
        accuracy_sum=stats.accuracy_sum,
        num_scored=stats.num_scored,
        num_frames=stats.num_frames,
        num_analysed=stats.num_analysed,
        num_dropped=stats.num_dropped,
        num_objects=stats.num_objects,
        fps=stats.num_analysed / stats.interval_s if stats.interval_s > 0.0 else 0.0,
        latency_ms_p50=stats.latency_ms_p50,
        latency_ms_p99=stats.latency_ms_p99,
        model_version=stats.model_version,
        inference_id=stats.inference_id,
        conditions=stats.conditions,
        memory_bytes=stats.memory_bytes,
        signals=stats.signals,
    )
