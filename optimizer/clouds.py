"""Retrainings in the cloud: what is under way on the links, and which of them the plan in force wants.

The coordinator does not talk to a cloud itself: it says per link what should be transferred, in order, and hears
when a model is there. Whoever gives it links has to carry that out; a site's service gives it none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from optimizer.emitter import Emitter
from optimizer.ports import CloudJob, CloudQueue
from optimizer.retrain_jobs import new_job
from optimizer.state import SiteState, StreamState, Transfer
from protocol.plan import Assignment, CloudProfile
from protocol.schema import LinkSpec, StreamSpec

_DUST = 1e-9  # bytes and seconds that count as none


def advance(queue: Sequence[Transfer], link: LinkSpec, seconds: float) -> None:
    """Let ``seconds`` pass for the transfers of a link, in their order: rule 8 of ``protocol.plan``."""
    while seconds > 0.0:
        sending = next((i for i, one in enumerate(queue) if one.up_bytes > 0.0), len(queue))
        waiting = [one for one in queue[:sending] if one.cloud_s > 0.0]
        head = next((i for i, one in enumerate(queue) if not one.is_there), len(queue))
        coming = queue[head] if head < sending and queue[head].cloud_s <= 0.0 else None
        step_s = min([seconds, *(one.cloud_s for one in waiting)])
        if sending < len(queue):
            step_s = min(step_s, queue[sending].up_bytes / link.up_bytes_per_s)
        if coming is not None:
            step_s = min(step_s, coming.down_bytes / link.down_bytes_per_s)
        for one in queue[: sending + 1]:
            one.begun = True
        if sending < len(queue):
            queue[sending].up_bytes = _less(queue[sending].up_bytes, step_s * link.up_bytes_per_s)
        for one in waiting:
            one.cloud_s = _less(one.cloud_s, step_s)
        if coming is not None:
            coming.down_bytes = _less(coming.down_bytes, step_s * link.down_bytes_per_s)
        seconds -= max(step_s, _DUST)


def arrived(queue: Sequence[Transfer]) -> list[Transfer]:
    """The models of a link that are there: with nothing to fetch a retraining still waits for those in front of it."""
    return list(itertools.takewhile(lambda transfer: transfer.is_there, queue))


def first_arrival_s(queue: Sequence[Transfer], link: LinkSpec) -> float:
    """Seconds until the first model of a link is there if nothing changes, inf without one."""
    first = next((one for one in queue if not one.is_there), None)
    if first is None:
        return math.inf
    # In front of the first that is not there nothing is left to send.
    return first.up_bytes / link.up_bytes_per_s + first.cloud_s + first.down_bytes / link.down_bytes_per_s


def _less(amount: float, done: float) -> float:
    left = amount - done
    return left if left > _DUST * max(1.0, amount) else 0.0


def what_is_left(profile: CloudProfile, transfer: Transfer) -> CloudProfile:
    """``profile`` as the planner is asked about it while it runs."""
    return CloudProfile(
        retrain_id=profile.retrain_id,
        link_id=profile.link_id,
        accuracy_after=profile.accuracy_after,
        up_bytes=round(transfer.up_bytes),
        cloud_seconds=transfer.cloud_s,
        down_bytes=round(transfer.down_bytes),
        swap_bytes=profile.swap_bytes,
        accuracy_error=profile.accuracy_error,
        gain_error=profile.gain_error,
        running=True,
        config=profile.config,
    )


class CloudCarrier:
    """Carries out what a plan wants of the cloud. Without links it does nothing."""

    def __init__(
        self, state: SiteState, specs: Mapping[str, StreamSpec], links: Sequence[LinkSpec], emit: Emitter
    ) -> None:
        self._state, self._specs, self._emit = state, specs, emit
        self.links = tuple(links)
        self._said: dict[str, tuple[str, ...]] = {}

    def advance(self, now: float) -> None:
        """Bring what is known of the transfers up to ``now`` (site clock)."""
        if not self.links:
            return
        passed_s, self._state.links_s = now - self._state.links_s, now
        for link in self.links:
            advance(self._queue(link), link, passed_s)

    def follow(self) -> None:
        """Begin, keep or give up transfers as the plan in force says."""
        plan = self._state.plan
        if plan is None or not self.links:
            return
        for assignment in plan.assignments:
            stream = self._state.streams.get(assignment.stream_id)
            if stream is not None and stream.profile is not None and not stream.settled:
                self._set(stream, assignment)

    def dispatch(self) -> None:
        """Say what every link should transfer, where it has changed."""
        for link in self.links:
            queue = self._queue(link)
            wanted = tuple(transfer.job.job_id for transfer in queue)
            if self._said.get(link.link_id, ()) != wanted:
                self._said[link.link_id] = wanted
                jobs = tuple(
                    CloudJob(job=one.job, up_bytes=one.up_bytes, cloud_s=one.cloud_s, down_bytes=one.down_bytes)
                    for one in queue
                )
                self._emit.add(CloudQueue(link_id=link.link_id, jobs=jobs))

    def _queue(self, link: LinkSpec) -> list[Transfer]:
        """The transfers of a link in their order."""
        found = [s.sent for s in self._state.streams.values() if s.sent is not None and s.sent.link_id == link.link_id]
        return sorted(found, key=lambda transfer: (not transfer.begun, transfer.turn))

    def _set(self, stream: StreamState, assignment: Assignment) -> None:
        step = assignment.cloud
        if step is None:
            stream.sent = None
            return
        if stream.sent is not None and stream.sent.retrain_id == step.retrain_id:
            stream.sent.turn = step.turn
            return
        assert stream.profile is not None
        profile = next((p for p in stream.profile.cloud if p.retrain_id == step.retrain_id), None)
        if profile is None or profile.config is None or stream.dataset is None:
            return
        stream.retrain_id = step.retrain_id
        spec = self._specs[stream.stream_id]
        # All of whatever the cloud has.
        job = new_job("cloud", stream, spec, self._state.window, profile.config, 1.0)
        stream.sent = Transfer(
            job=job,
            retrain_id=step.retrain_id,
            link_id=profile.link_id,
            turn=step.turn,
            up_bytes=float(profile.up_bytes),
            cloud_s=profile.cloud_seconds,
            down_bytes=float(profile.down_bytes),
            accuracy_predicted=profile.accuracy_after,
        )
