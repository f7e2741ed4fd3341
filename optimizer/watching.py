"""Retrained models on their way: gate, comparison on fresh labels, canary, roll-back. Works on the site's state.

The tests are in ``optimizer.gate``; here is when they are made and what follows. A stream serves
``StreamState.checkpoint`` at every moment: the old model until the new one is promoted, the old one again when it is
rolled back, so that there is always exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from optimizer import gate
from optimizer.config import SiteConfig
from optimizer.emitter import Emitter
from optimizer.following import serving_job_id, used_shares
from optimizer.gate import Verdict
from optimizer.labels import Labels
from optimizer.ports import ProfilerPort
from optimizer.state import Canary, ExecutorState, SiteState, StreamState
from protocol.events import GateDecided
from protocol.messages import CanaryJob
from protocol.schema import CanaryResult, CheckpointRef, PairedCounts, RetrainResult, StreamSpec

# A worker has so long to take a promoted model over; one that has not is taken to have refused it.
_SWAP_S = 15.0
# With less than this a comparison does not get on; it waits for room.
_LEAST_SHARE = 0.02
# Of the share that plans leave over a comparison takes up to this; the site's ``share`` is what plans keep free for it.
_LEFT_OVER = 0.5
# A period without labels (no room, no executor) is extended, but not beyond so many times its length.
_LONGEST = 3.0
_LEAST_LOOKS = 2


class Watcher:
    """``executors`` are those that are there; ``want`` asks for a new plan and is given the reason."""

    def __init__(
        self,
        site: SiteConfig,
        state: SiteState,
        specs: Mapping[str, StreamSpec],
        executors: Mapping[str, ExecutorState],
        profiler: ProfilerPort,
        emit: Emitter,
        want: Callable[[str], None],
        labels: Labels,
    ) -> None:
        self._site = site
        self._state = state
        self._specs = specs
        self._executors = executors
        self._profiler = profiler
        self._emit = emit
        self._want = want
        self._labels = labels

    # ------------------------------------------------------------ events

    def retrained(self, stream: StreamState, result: RetrainResult, base: CheckpointRef | None, now: float) -> Verdict:
        """A retraining that started from ``base`` (None: not known any more) ended: what the gate says, and do it."""
        assert stream.checkpoint is not None
        if stream.canary is not None and stream.canary.stage == "canary":
            # Two models on their way would be two questions at once: the older one is answered with what is known.
            self._judge(stream, now, over=True)
        serving, config = stream.checkpoint, self._site.gate
        verdict, held_out = gate.judge_retraining(result, config, serving.version), result.paired
        if base is not None and base.sha256 != serving.sha256 and result.checkpoint is not None:
            # Its held-out votes were won against a model that is not the one to beat.
            reason = "the model that it started from does not serve any more"
            watched = config.benefit_of_doubt and config.canary_s > 0.0 and verdict.decision != "refused"
            held_out = PairedCounts(num_objects=0, num_won=0, num_lost=0)
            verdict = Verdict(
                decision="on_trial" if watched else "refused",
                confidence=None,
                reason=f"{reason}: watched on fresh labels" if watched else reason,
            )
        if stream.canary is not None and verdict.decision in ("promoted", "on_trial"):
            self._supersede(stream, now)
        candidate = result.checkpoint
        if candidate is not None:
            stream.judged_version = max(stream.judged_version, candidate.version)
        if candidate is not None and verdict.decision in ("promoted", "on_trial"):
            canary = Canary(
                candidate=candidate,
                previous=serving,
                stage="shadow",
                retrain_id=result.config.config_id,
                window=result.window,
                since_s=now,
                watched_s=now,
                held_out=held_out,
                accuracy_expected=self._expected(stream, result),
            )
            if verdict.decision == "on_trial":
                stream.canary = canary
            else:
                self._go_live(stream, canary, proven=True, now=now)
        elif verdict.confidence is not None:
            self.penalise(stream, result.config.config_id)  # it was tried, and was no good
        self._tell(
            GateDecided(
                stream_id=stream.stream_id,
                window=result.window,
                stage="gate",
                decision=verdict.decision,
                retrain_id=result.config.config_id,
                version=candidate.version if candidate else 0,
                previous_version=serving.version,
                accuracy_candidate=result.accuracy_after,
                accuracy_previous=result.accuracy_before,
                paired=result.paired,
                confidence=verdict.confidence,
                seconds=0.0,
                reason=verdict.reason,
            )
        )
        return verdict

    def compared(self, job_id: str, result: CanaryResult, now: float) -> tuple[CheckpointRef, float] | None:
        """A stretch of live frames was labelled and both models compared on it.

        The model that serves and its accuracy there; None when the job is none of ours.
        """
        stream = self._of(job_id)
        canary = stream.canary if stream is not None else None
        if stream is None or canary is None or canary.job is None:
            return None
        serves = (
            (canary.candidate, result.accuracy_candidate)
            if canary.stage == "canary"
            else (canary.previous, result.accuracy_previous)
        )
        canary.watched_s = self._site_time(canary.job, canary.job.to_s)
        canary.job, canary.executor_id, canary.num_failures = None, "", 0
        canary.num_looks += 1
        canary.fresh = gate.add(canary.fresh, result.paired)
        canary.num_crops += result.num_crops
        canary.right_candidate += result.accuracy_candidate * result.num_crops
        canary.right_previous += result.accuracy_previous * result.num_crops
        self._judge(stream, now, over=self._is_over(canary, now))
        return serves

    def failed(self, job_id: str, now: float) -> bool:
        """A comparison failed: that stretch is skipped. False when the job is none of ours."""
        stream = self._of(job_id)
        if stream is None or stream.canary is None:
            return False
        canary = stream.canary
        canary.job, canary.executor_id, canary.watched_s = None, "", now
        canary.num_failures += 1
        return True

    def forget(self, executor_id: str) -> None:
        """An executor is gone; what it compared is done again elsewhere."""
        for stream in self._state.streams.values():
            if stream.canary is not None and stream.canary.executor_id == executor_id:
                stream.canary.job, stream.canary.executor_id = None, ""

    def penalise(self, stream: StreamState, retrain_id: str) -> None:
        """The configuration is not tried again on this stream for a few windows."""
        windows = self._site.gate.penalty_windows
        if windows and retrain_id:
            stream.penalties[retrain_id] = self._state.window + windows

    # ------------------------------------------------------------ time

    def advance(self, now: float) -> None:
        """End the periods that are over, and take note of swaps."""
        for stream in self._state.streams.values():
            canary = stream.canary
            if canary is None:
                continue
            if canary.stage == "canary" and not canary.swapped:
                serves = self._serves(stream)
                if serves is None or serves == canary.candidate.version:
                    canary.swapped, canary.since_s, canary.watched_s = True, now, now
                elif now - canary.since_s > _SWAP_S:
                    reason = f"the worker did not take it over within {_SWAP_S:g} s"
                    self._roll_back(stream, Verdict(decision="rolled_back", confidence=None, reason=reason), now)
                continue
            if canary.job is None and self._is_over(canary, now):
                self._judge(stream, now, over=True)

    def conclude(self, now: float) -> None:
        """The run ends: decide with what is known, so that no model stays unjudged."""
        for stream in self._state.streams.values():
            if stream.canary is not None:
                self._judge(stream, now, over=True)

    def assign(self, now: float) -> None:
        """Start comparisons that are due and fit beside everything else; shrink or end those that do not fit."""
        waiting = [s for s in self._state.streams.values() if s.canary is not None]
        if not waiting:
            return
        used = used_shares(self._state, self._executors)
        for stream in waiting:
            canary = stream.canary
            assert canary is not None
            if canary.job is not None:
                share = self._share(1.0 - used.get(canary.executor_id, 1.0))
                if share < _LEAST_SHARE:
                    canary.job, canary.executor_id = None, ""
                    continue
                if abs(share - canary.job.share) > 1e-9:
                    canary.job = msgspec.structs.replace(canary.job, share=share)
            elif not self._start(stream, canary, used, now):
                continue
            assert canary.job is not None
            used[canary.executor_id] += canary.job.share

    def _share(self, room: float) -> float:
        """What a comparison gets where there is ``room``: what nobody else has use for, as far as it helps.

        Frames are worth more the sooner they are looked at, and what is left over is free until the next plan.
        """
        return min(max(self._site.gate.share, _LEFT_OVER), room)

    def _start(self, stream: StreamState, canary: Canary, used: Mapping[str, float], now: float) -> bool:
        due = now - canary.watched_s >= self._site.gate.step_s and (canary.swapped or canary.stage == "shadow")
        if not due or self._state.origin_s is None or self._state.phase not in ("profiling", "planning", "executing"):
            return False
        homes = sorted(used, key=lambda e: (e != stream.serving_executor, used[e], e))
        home = next((e for e in homes if 1.0 - used[e] >= _LEAST_SHARE), None)
        if home is None:
            return False
        spec = self._specs[stream.stream_id]
        offset = spec.start_s - self._state.origin_s
        # Never more than a few steps at once: what was missed while there was no room stays missed.
        begin = max(canary.watched_s, now - 2.0 * self._site.gate.step_s)
        label_fps = self._labels.look_fps(stream, now - begin, now)
        if label_fps <= 0.0:
            return False
        canary.num_jobs += 1
        canary.executor_id = home
        canary.job = CanaryJob(
            job_id=f"canary/{stream.stream_id}/v{canary.candidate.version}/{canary.stage}-{canary.num_jobs}",
            stream=spec,
            share=self._share(1.0 - used[home]),
            window=self._state.window,
            from_s=begin + offset,
            to_s=now + offset,
            label_fps=label_fps,
            candidate=canary.candidate,
            previous=canary.previous,
        )
        return True

    # ------------------------------------------------------------ decisions

    def _judge(self, stream: StreamState, now: float, *, over: bool) -> None:
        canary, config = stream.canary, self._site.gate
        assert canary is not None
        if canary.stage == "shadow":
            verdict = gate.judge_shadow(canary.held_out, canary.fresh, config, over=over)
        else:
            verdict = gate.judge_canary(canary.fresh, config, proven=canary.proven, over=over)
        if verdict is None:
            return
        if verdict.decision == "rolled_back":
            self._roll_back(stream, verdict, now)
            return
        self._tell(_decided(stream.stream_id, canary, verdict, now))
        if verdict.decision == "promoted":
            confidence = verdict.confidence if verdict.confidence is not None else 0.0
            self._go_live(stream, canary, proven=confidence >= config.confidence, now=now)
            self._want(f"{stream.stream_id} got a new model")
            return
        stream.canary = None
        if verdict.decision == "refused":
            self.penalise(stream, canary.retrain_id)
        elif stream.profile is not None and canary.num_crops:
            self._measured(stream, canary.right_candidate / canary.num_crops, canary.num_crops)
        self._want(f"{stream.stream_id}: model {canary.candidate.version} was {verdict.decision}")

    def _go_live(self, stream: StreamState, canary: Canary, *, proven: bool, now: float) -> None:
        stream.checkpoint, stream.swapped = canary.candidate, True
        if stream.profile is not None:
            stream.profile = msgspec.structs.replace(stream.profile, accuracy_now=canary.accuracy_expected)
        if self._site.gate.canary_s > 0.0:
            stream.canary = Canary(
                candidate=canary.candidate,
                previous=canary.previous,
                stage="canary",
                proven=proven,
                retrain_id=canary.retrain_id,
                window=canary.window,
                since_s=now,
                watched_s=now,
                held_out=canary.held_out,
                accuracy_expected=canary.accuracy_expected,
                num_jobs=canary.num_jobs,
            )
        self._emit.save()

    def _roll_back(self, stream: StreamState, verdict: Verdict, now: float) -> None:
        canary, stream.canary = stream.canary, None
        assert canary is not None
        stream.checkpoint = canary.previous
        if canary.num_crops:
            self._measured(stream, canary.right_previous / canary.num_crops, canary.num_crops)
        self.penalise(stream, canary.retrain_id)
        running = stream.running
        if running is not None and running.job.checkpoint == canary.candidate:
            # It builds on a model that is no good.
            stream.running, stream.settled = None, True
            if stream.stream_id not in self._state.ended:
                self._state.ended.append(stream.stream_id)
        self._tell(_decided(stream.stream_id, canary, verdict, now))
        self._emit.notice(
            "warning", f"{stream.stream_id}: model {canary.candidate.version} rolled back: {verdict.reason}"
        )
        self._want(f"model of {stream.stream_id} rolled back")
        self._emit.save()

    def _supersede(self, stream: StreamState, now: float) -> None:
        """The model on trial gives way to a newer one, made of newer labels."""
        canary, stream.canary = stream.canary, None
        assert canary is not None
        verdict = Verdict(decision="refused", confidence=None, reason="there is a newer model")
        self._tell(_decided(stream.stream_id, canary, verdict, now))

    def _measured(self, stream: StreamState, accuracy: float, num_crops: int) -> None:
        """Fresh labels say what a model is worth; few of them say it only in part."""
        if stream.profile is not None:
            weight = num_crops / (num_crops + 30.0)
            mixed = weight * accuracy + (1.0 - weight) * stream.profile.accuracy_now
            stream.profile = msgspec.structs.replace(stream.profile, accuracy_now=min(1.0, max(0.0, mixed)))

    # ------------------------------------------------------------ small things

    def _expected(self, stream: StreamState, result: RetrainResult) -> float:
        if stream.profile is None:
            return result.accuracy_after
        return gate.accuracy_when_live(stream.profile.accuracy_now, result)

    def _is_over(self, canary: Canary, now: float) -> bool:
        elapsed, period = now - canary.since_s, self._site.gate.canary_s
        enough = canary.num_looks >= _LEAST_LOOKS or canary.num_failures >= _LEAST_LOOKS
        return elapsed >= period and (enough or elapsed >= _LONGEST * period)

    def _serves(self, stream: StreamState) -> int | None:
        """The version that the stream's worker says it serves, None when nothing is known."""
        executor = self._executors.get(stream.serving_executor)
        job_id = serving_job_id(stream.stream_id)
        for worker in executor.workers if executor else ():
            if worker.job_id == job_id and worker.state == "ready" and worker.model_version:
                return worker.model_version
        return None

    def _site_time(self, job: CanaryJob, position_s: float) -> float:
        origin = self._state.origin_s
        return position_s - job.stream.start_s + (origin if origin is not None else 0.0)

    def _of(self, job_id: str) -> StreamState | None:
        for stream in self._state.streams.values():
            if stream.canary is not None and stream.canary.job is not None and stream.canary.job.job_id == job_id:
                return stream
        return None

    def _tell(self, event: GateDecided) -> None:
        self._profiler.record_gate(event)
        self._emit.publish(event)
        self._emit.save()


def _decided(stream_id: str, canary: Canary, verdict: Verdict, now: float) -> GateDecided:
    crops = canary.num_crops
    return GateDecided(
        stream_id=stream_id,
        window=canary.window,
        stage=canary.stage,
        decision=verdict.decision,
        retrain_id=canary.retrain_id,
        version=canary.candidate.version,
        previous_version=canary.previous.version,
        accuracy_candidate=min(1.0, canary.right_candidate / crops) if crops else None,
        accuracy_previous=min(1.0, canary.right_previous / crops) if crops else None,
        paired=gate.add(canary.held_out, canary.fresh) if canary.stage == "shadow" else canary.fresh,
        confidence=verdict.confidence,
        seconds=max(0.0, now - canary.since_s),
        reason=verdict.reason,
    )
