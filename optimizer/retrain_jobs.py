"""The job of a retraining that begins, on a GPU of the site or in the cloud."""

from __future__ import annotations

from optimizer.state import StreamState
from protocol.messages import RetrainJob
from protocol.schema import CheckpointRef, RetrainConfig, StreamSpec


def new_job(
    kind: str,
    stream: StreamState,
    spec: StreamSpec,
    window: int,
    config: RetrainConfig,
    share: float,
    start: CheckpointRef | None = None,
) -> RetrainJob:
    """The job of a retraining that begins now; takes the stream's next model version. The stream has a data set.

    ``start``: the model of the zoo that ``config`` begins from.
    """
    assert stream.dataset is not None
    version, stream.next_version = stream.next_version, stream.next_version + 1
    return RetrainJob(
        job_id=f"{kind}/{stream.stream_id}/w{window}/v{version}",
        stream=spec,
        share=share,
        window=window,
        dataset=stream.dataset,
        checkpoint=stream.checkpoint,
        config=config,
        next_version=version,
        seed=window,
        start=start,
    )
