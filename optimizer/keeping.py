"""Fills and clears the zoo as the site runs: takes up what serves, notes what trials measured, gives up for room.

Works on the site's state; the decisions are in ``optimizer.zoo``. The planner knows nothing of it: what the zoo offers
a stream are retraining configurations in its profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from optimizer import zoo
from optimizer.config import SiteConfig
from optimizer.emitter import Emitter
from optimizer.ports import Tidy
from optimizer.state import SiteState, Situation, StreamState, ZooModel, ZooState
from protocol.events import ZooChanged
from protocol.schema import CheckpointRef, DatasetRef, LabelResult, StreamSpec, TrialResult, ZooRef

MEGABYTE = 1_000_000
# A model may begin to serve a window after its labels were made, when those of the next one are there already.
_REMEMBERED = 3


class ZooKeeper:
    """``emit``: where events and outputs go."""

    def __init__(self, site: SiteConfig, state: SiteState, specs: Mapping[str, StreamSpec], emit: Emitter) -> None:
        self._config = site.zoo
        self._offers = site.zoo.max_mb > 0.0 and site.profiling.method != "paper"
        self._state = state
        self._specs = specs
        self._emit = emit

    def labelled(self, stream: StreamState, result: LabelResult) -> None:
        """A window's labels are there: this is what the stream looks like now."""
        if result.conditions is not None:
            known = stream.conditions | {result.dataset.window: result.conditions}
            stream.conditions = dict(sorted(known.items())[-_REMEMBERED:])

    def for_trial(self, stream: StreamState) -> tuple[ZooRef, ...]:
        """The earlier models that are worth looking at on the stream's new labels."""
        if not self._offers or stream.checkpoint is None or stream.dataset is None:
            return ()
        found = zoo.candidates(
            self._state.zoo,
            self._specs[stream.stream_id],
            stream.conditions.get(stream.dataset.window),
            serving_sha256=stream.checkpoint.sha256,
            dataset_window=stream.dataset.window,
            count=self._config.evaluate,
        )
        return tuple(ZooRef(number=model.number, checkpoint=model.checkpoint) for model in found)

    def tried(self, stream: StreamState, dataset: DatasetRef, result: TrialResult) -> None:
        """What the serving model and earlier ones are worth on the window's labels."""
        accuracies = {row.number: row.accuracy for row in result.zoo}
        for row in result.zoo:
            model = zoo.find(self._state.zoo, row.number)
            if model is not None and row.confidence is not None:
                model.confidence = row.confidence
        serving = zoo.by_weights(self._state.zoo, stream.checkpoint.sha256) if stream.checkpoint else None
        if serving is not None:
            accuracies[serving.number] = result.zoo[0].accuracy_serving if result.zoo else result.accuracy_now
        if accuracies:
            self._note(stream, dataset.window, accuracies)

    def advance(self) -> None:
        """Take up models that have begun to serve; make room."""
        if self._config.max_mb <= 0.0:
            return
        state = self._state
        for stream in state.streams.values():
            checkpoint = stream.checkpoint
            if checkpoint is None or stream.kept_sha256 == checkpoint.sha256:
                continue
            stream.kept_sha256 = checkpoint.sha256
            known = zoo.by_weights(state.zoo, checkpoint.sha256)
            accuracy = stream.profile.accuracy_now if stream.profile is not None else None
            if stream.canary is not None and stream.canary.candidate.sha256 == checkpoint.sha256:
                accuracy = stream.canary.accuracy_expected
            trained = stream.dataset.window if stream.dataset is not None else state.window
            if stream.canary is not None:
                trained = stream.canary.window
            model = zoo.keep(
                state.zoo, self._specs[stream.stream_id], checkpoint, max(0, state.window), trained, accuracy
            )
            if known is None:
                if accuracy is not None:
                    self._note(stream, trained, {model.number: accuracy})
                self._tell(model, "kept")
                self._make_room()

    def _note(self, stream: StreamState, window: int, accuracies: dict[int, float]) -> None:
        conditions = stream.conditions.get(window)
        if conditions is not None:
            situation = Situation(
                stream_id=stream.stream_id, window=window, conditions=conditions, accuracies=accuracies
            )
            zoo.note(self._state.zoo, situation)

    def window_over(self) -> None:
        """Make the room that pinned models took, and say which are of use, so that the files of others can go."""
        if self._config.max_mb > 0.0:
            self._make_room()
            self._emit.save()
            self._emit.add(Tidy(in_use=frozenset(ref.path for ref in _checkpoints(self._state))))

    def _make_room(self) -> None:
        zoo_state = self._state.zoo
        serving = {s.checkpoint.sha256 for s in self._state.streams.values() if s.checkpoint is not None}
        # What is served, compared, trained from, looked at or on offer in this window stays.
        offered = {
            profile.config.base
            for stream in self._state.streams.values()
            if stream.profile is not None
            for profile in stream.profile.retrain
            if profile.config is not None
        }
        pinned = {ref.sha256 for ref in _checkpoints(msgspec.structs.replace(self._state, zoo=ZooState()))}
        pinned |= {model.checkpoint.sha256 for model in zoo_state.models if model.number in offered}
        limit = int(self._config.max_mb * MEGABYTE)
        for model in zoo.give_up(zoo_state, limit, free=serving, pinned=pinned):
            self._tell(model, "given_up")

    def _tell(self, model: ZooModel, change: Literal["kept", "given_up"]) -> None:
        models = self._state.zoo.models
        self._emit.publish(
            ZooChanged(
                stream_id=model.stream_id,
                window=max(0, self._state.window),
                change=change,
                number=model.number,
                version=model.checkpoint.version,
                accuracy=model.accuracy,
                num_models=len(models),
                num_bytes=zoo.num_bytes(models),
            )
        )
        self._emit.save()


def _checkpoints(value: Any) -> Iterator[CheckpointRef]:
    """All checkpoints that a piece of state names, wherever they stand in it."""
    if isinstance(value, CheckpointRef):
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _checkpoints(getattr(value, name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _checkpoints(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _checkpoints(inner)
