"""The site file: TOML, decoded strictly. A mistake names the file, the key and what is allowed."""

from __future__ import annotations

import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import msgspec

from optimizer.checks import check_quantum
from protocol.errors import ConfigError, InputError
from protocol.schema import (
    DatasetSource,
    Fraction,
    InferenceConfig,
    LiveSource,
    Name,
    OracleGolden,
    PositiveInt,
    PositiveSeconds,
    Record,
    RecordedSource,
    RetrainConfig,
    Seconds,
    Share,
    StreamSpec,
    TorchvisionGolden,
)


class BootstrapConfig(Record, frozen=True, kw_only=True):
    """How the first model of a stream without a checkpoint is trained.

    ``seconds``: length of stream time before the start that is labelled. ``label_fps`` overrides the
    stream's label rate for it. Trained from scratch, all layers.
    """

    seconds: PositiveSeconds = 60.0
    label_fps: Annotated[float, msgspec.Meta(gt=0.0)] = 2.0
    epochs: PositiveInt = 12
    batch_size: PositiveInt = 32
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] = 2e-3


class ProfilingConfig(Record, frozen=True, kw_only=True):
    """Labelling and micro-profiling of a window.

    ``label_span``: the last part of the previous window, as a fraction of it, that is labelled.
    ``when``: "beside" = trials are jobs of the plan. Labels are made shortly before the window's start, from the part
    ``ahead`` before it on at the earliest, in what plans leave over; what is missing then comes first, for the part
    ``head_start`` of the window at most, at ``share`` of every GPU. Then the window is planned, and what is still to be
    labelled, tried or measured goes on beside serving and retraining at ``beside_share`` (``share`` as long as no
    stream is through); whoever is through has the rest of the window planned anew. "before" = everything is done at
    ``share`` before the window is planned, and cut off after the part ``limit`` of it. Beside a plan ``limit`` is the
    longest that one job may take. The paper's method always goes before.
    ``data_share``: part of the labelled data a trial trains on. ``budget_gpu_s``: busy
    seconds of a window for the trials of all streams. ``method``: "paper" = the micro-profiler of the paper as it
    stands there (everything is tried for 5 epochs on 10 % of the data, no history, no budget), to compare with.
    """

    label_span: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.6
    share: Share = 0.4
    limit: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.4
    data_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.1
    num_epochs: PositiveInt = 3
    budget_gpu_s: PositiveSeconds = 2.0
    method: Literal["calibrated", "paper"] = "calibrated"
    when: Literal["beside", "before"] = "beside"
    ahead: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.2
    head_start: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.1
    beside_share: Share = 0.2

    @property
    def beside(self) -> bool:
        """Whether trials run beside the window's plan."""
        return self.when == "beside" and self.method != "paper"


class GateConfig(Record, frozen=True, kw_only=True):
    """When a retrained model goes live and when it is rolled back (optimizer/gate.py has the tests).

    ``margin``: by how much it has to be better on held-out labels, with ``confidence`` to go live at once; it is
    refused when it is worse with ``refusal_confidence``, or no different on ``tie_objects`` road users or more.
    ``benefit_of_doubt``: one in between is compared on fresh labels first; false refuses it. ``canary_s``: how long
    models are compared on fresh labels at most, before (on trial) and after (canary) they go live; 0 = no canary, what
    the gate says is final. ``keep_confidence``: a live model stays at the end of its canary unless the confidence
    that it is better is below this. ``alarm``: chance of calling a model worse that is not, over all looks.
    ``step_s``: time between two looks; ``label_fps``: frames labelled per second meanwhile; ``share``: GPU share kept
    for it in plans (it takes more of what they leave over). ``penalty_windows``: a configuration that was rolled back,
    refused as worse, or failed is not tried again on that stream for so many windows. ``always_promote``: no gate at
    all, as in systems that deploy whatever comes out of training; for comparisons.
    """

    margin: Fraction = 0.01
    confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1.0)] = 0.8
    refusal_confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1.0)] = 0.95
    keep_confidence: Annotated[float, msgspec.Meta(ge=0.0, le=0.5)] = 0.3
    tie_objects: PositiveInt = 20
    benefit_of_doubt: bool = True
    canary_s: Seconds = 60.0
    alarm: Annotated[float, msgspec.Meta(gt=0.0, lt=0.5)] = 0.05
    step_s: PositiveSeconds = 5.0
    label_fps: Annotated[float, msgspec.Meta(gt=0.0)] = 2.0
    share: Share = 0.1
    penalty_windows: Annotated[int, msgspec.Meta(ge=0)] = 2
    always_promote: bool = False


class DriftConfig(Record, frozen=True, kw_only=True):
    """What follows from the drift detector (optimizer/drifting.py).

    ``react``: a sudden drift within a window has the stream labelled, profiled and planned at once, if at least the
    part ``least_left`` of the window is left; labels are taken of the ``label_s`` seconds after the alarm.
    """

    react: bool = True
    least_left: Fraction = 0.35
    label_s: PositiveSeconds = 8.0


class LabelsConfig(Record, frozen=True, kw_only=True):
    """How much the golden models label in a window, and what (optimizer/label_budget.py, docs/learning.md).

    ``budget_gpu_s``: busy seconds of golden models per window, all streams and purposes together; left out: no limit,
    the streams' label rates decide. ``allocation``: "uniform" gives every stream the same part of what its label rate
    asks for, frames evenly spaced; "adaptive" gives more to streams that drift, and labels frames that their students
    are unsure of. ``uniform_share``: part of the budget, and of each stream's frames, that is spread evenly all the
    same. ``kept_share``: part of the budget kept for what comes later in the window: clips of inference trials,
    comparisons of new models, sudden drifts. ``min_frames``: every stream gets as many first.
    """

    budget_gpu_s: PositiveSeconds | None = None
    allocation: Literal["uniform", "adaptive"] = "uniform"
    uniform_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.4
    kept_share: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.25
    min_frames: PositiveInt = 8


class CorrectionConfig(Record, frozen=True, kw_only=True):
    """What is done when the epochs of a running retraining tell another story than its estimate.

    ``stop``: stop it when, ``sigmas`` standard errors of the held-out split allowed for, it will make the model worse,
    or when it has levelled off; not before ``min_epochs``. The planner is told of accuracies that differ by more than
    ``tell_accuracy`` and of costs that differ by more than the part ``tell_seconds``.
    """

    stop: bool = True
    min_epochs: PositiveInt = 3
    sigmas: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)] = 1.0
    tell_accuracy: Fraction = 0.08
    tell_seconds: Annotated[float, msgspec.Meta(gt=0.0)] = 0.2


class ZooConfig(Record, frozen=True, kw_only=True):
    """Earlier models that are kept for when their conditions come back (optimizer/zoo.py).

    ``max_mb``: what they may take on disk besides the models that serve, in megabytes (10^6 bytes); 0 = no zoo, and no
    model is ever deleted. ``evaluate``: how many of them look at a stream's new labels in a window, at most.
    """

    max_mb: Annotated[float, msgspec.Meta(ge=0.0, le=1e7)] = 0.0
    evaluate: PositiveInt = 3


class SiteConfig(Record, frozen=True, kw_only=True):
    """A site: its streams, the configurations to choose from, and how its windows are planned.

    ``deadline_s``: a plan is there this long after it was asked for, whatever the solver does.
    ``min_executors``: the first window waits for so many. ``replan_s``: with less than this left in a
    window nothing is planned anew. ``migration_s`` and ``config_change_s``: seconds of a stream's accuracy that moving
    it to another GPU, or changing its inference configuration, is reckoned to cost until it was measured
    (optimizer/moving.py). ``heartbeat_s`` and ``silence_s``: an executor that is silent for ``silence_s`` counts as
    lost. ``planning_quantile``: plans are made on this quantile of every uncertain gain; 0.5 = what is expected, less =
    cautious.
    """

    name: Name
    streams: Annotated[tuple[StreamSpec, ...], msgspec.Meta(min_length=1)]
    inference: Annotated[tuple[InferenceConfig, ...], msgspec.Meta(min_length=1)]
    retrain: tuple[RetrainConfig, ...] = ()
    window_s: Annotated[float, msgspec.Meta(ge=5.0, le=86400.0)] = 200.0
    policy: str = "timeline"
    share_quantum: Share = 0.1
    deadline_s: PositiveSeconds = 1.0
    replan_s: Seconds = 3.0
    migration_s: Seconds = 1.5
    config_change_s: Seconds = 0.05
    planning_quantile: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.5
    min_executors: PositiveInt = 1
    heartbeat_s: PositiveSeconds = 0.5
    silence_s: PositiveSeconds = 3.0
    control: str = "tcp://127.0.0.1:5760"
    telemetry: str = "tcp://127.0.0.1:*"
    bootstrap: BootstrapConfig = BootstrapConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    gate: GateConfig = GateConfig()
    correction: CorrectionConfig = CorrectionConfig()
    drift: DriftConfig = DriftConfig()
    labels: LabelsConfig = LabelsConfig()
    zoo: ZooConfig = ZooConfig()


def load_site(path: Path) -> SiteConfig:
    """Read a site file. Paths of videos and sample lists are relative to the file.

    A table ``[stream_defaults]`` gives values for every stream that does not set them itself.

    Raises:
        ConfigError: the file is missing, is not TOML, or a key or value is wrong.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give the path of a site file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; a site file is TOML") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    return parse_site(raw, str(path), path.parent)


def parse_site(raw: dict[str, Any], origin: str, folder: Path) -> SiteConfig:
    """Check a decoded site file; ``origin`` names it in errors, ``folder`` is where its paths start.

    Raises:
        ConfigError: naming the key and what is allowed.
    """
    merged = _with_defaults(raw, origin)
    try:
        site = msgspec.convert(merged, SiteConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(str(error))}") from None
    site = msgspec.structs.replace(site, streams=tuple(_absolute(stream, folder) for stream in site.streams))
    _check(site, origin)
    return site


def _with_defaults(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    merged = dict(raw)
    defaults = merged.pop("stream_defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{origin}: stream_defaults must be a table of stream fields")
    streams = merged.get("streams")
    if isinstance(streams, list):
        merged["streams"] = [_stream(defaults | stream) if isinstance(stream, dict) else stream for stream in streams]
    return merged


def _stream(raw: dict[str, Any]) -> dict[str, Any]:
    """A golden model without a kind is the oracle."""
    golden = raw.get("golden")
    return raw | {"golden": {"kind": "oracle"} | golden} if isinstance(golden, dict) else raw


def _absolute(stream: StreamSpec, folder: Path) -> StreamSpec:
    def resolve(path: str) -> str:
        return str((folder / path).resolve())

    student = stream.student
    if student.checkpoint:
        student = msgspec.structs.replace(student, checkpoint=resolve(student.checkpoint))
    golden = stream.golden
    if isinstance(golden, TorchvisionGolden) and golden.weights_file:
        golden = msgspec.structs.replace(golden, weights_file=resolve(golden.weights_file))
    source = stream.source
    if isinstance(source, RecordedSource):
        clips = tuple(
            msgspec.structs.replace(c, video=resolve(c.video), samples=resolve(c.samples)) for c in source.clips
        )
        source = msgspec.structs.replace(source, clips=clips)
    elif isinstance(source, DatasetSource):
        images = resolve(source.images) if source.images else ""
        source = msgspec.structs.replace(source, path=resolve(source.path), images=images)
    elif isinstance(source, LiveSource) and "://" not in source.url:
        source = msgspec.structs.replace(source, url=resolve(source.url))
    return msgspec.structs.replace(stream, source=source, student=student, golden=golden)


def _check(site: SiteConfig, origin: str) -> None:
    def unique(key: str, names: list[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{origin}: {key} {name!r} is used twice; every {key} must be its own")

    unique("streams.stream_id", [s.stream_id for s in site.streams])
    unique("inference.config_id", [c.config_id for c in site.inference])
    unique("retrain.config_id", [c.config_id for c in site.retrain])
    for number, retrain in enumerate(site.retrain):
        if retrain.epochs < 1:
            raise ConfigError(f"{origin}: retrain[{number}].epochs: must be at least 1, not {retrain.epochs}")
        if retrain.base:
            raise ConfigError(f"{origin}: retrain[{number}].base: is set by the system; leave it out")
    for stream in site.streams:
        where = f"{origin}: stream {stream.stream_id!r}"
        if len(set(stream.classes)) < len(stream.classes):
            raise ConfigError(f"{where}: classes must differ from one another")
        if isinstance(stream.source, RecordedSource):
            for path in (path for clip in stream.source.clips for path in (clip.video, clip.samples)):
                if not Path(path).is_file():
                    raise ConfigError(f"{where}: {path} is not there; paths are relative to the site file")
            for number, clip in enumerate(stream.source.clips):
                if clip.last_frame is not None and clip.last_frame < clip.first_frame:
                    raise ConfigError(
                        f"{where}: source.clips[{number}]: last_frame = {clip.last_frame} lies before first_frame = "
                        f"{clip.first_frame}"
                    )
            for coco, name in stream.source.class_map.items():
                if not re.fullmatch(r"[0-9]+", coco):
                    raise ConfigError(f"{where}: class_map {coco!r}: recorded video has COCO ids, whole numbers")
                if name and name not in stream.classes:
                    allowed = ", ".join(stream.classes)
                    raise ConfigError(f"{where}: class_map {coco!r} = {name!r} is no class of it; allowed: {allowed}")
        _check_source(stream, site, where)
        for path, key in (
            (stream.student.checkpoint, "student.checkpoint"),
            (_golden_file(stream), "golden.weights_file"),
        ):
            if path and not Path(path).is_file():
                raise ConfigError(f"{where}: {key} {path} is not there; paths are relative to the site file")
        field, edge = ("crop_px", stream.crop_px) if stream.task == "classification" else ("frame_px", stream.frame_px)
        for config in site.inference:
            if config.resolution_px > edge:
                raise ConfigError(
                    f"{where}: inference configuration {config.config_id!r} wants {config.resolution_px} px, "
                    f"more than the stream's {field} = {edge}; raise {field} or lower resolution_px"
                )
    try:
        check_quantum(site.share_quantum, f"{origin}: share_quantum")
    except InputError as error:
        raise ConfigError(str(error)) from None
    for key, share in (("share", site.profiling.share), ("beside_share", site.profiling.beside_share)):
        if share >= 1.0:
            raise ConfigError(f"{origin}: profiling.{key} must be below 1, or nothing is left for serving")
    if site.silence_s < 2 * site.heartbeat_s:
        raise ConfigError(f"{origin}: silence_s must be at least twice heartbeat_s")


def _golden_file(stream: StreamSpec) -> str:
    return stream.golden.weights_file if isinstance(stream.golden, TorchvisionGolden) else ""


_SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "tcp", "rtp", "srt", "rtmp")


def _check_source(stream: StreamSpec, site: SiteConfig, where: str) -> None:
    source = stream.source
    if isinstance(source, DatasetSource):
        for key, path in (("path", source.path), ("images", source.images)):
            if path and not Path(path).exists():
                raise ConfigError(f"{where}: source.{key}: {path} is not there; paths are relative to the site file")
        for category, name in source.class_map.items():
            if name and name not in stream.classes:
                allowed = ", ".join(stream.classes)
                raise ConfigError(f"{where}: class_map {category!r} = {name!r} is no class of it; allowed: {allowed}")
    if isinstance(source, LiveSource):
        if stream.task == "classification" or isinstance(stream.golden, OracleGolden):
            raise ConfigError(
                f'{where}: a live source carries no labels: task = "detection" and a golden model of '
                'kind = "torchvision" are needed'
            )
        scheme, separator, rest = source.url.partition("://")
        if separator and (scheme.lower() not in _SCHEMES or not rest.strip("/")):
            allowed = ", ".join(f"{name}://" for name in _SCHEMES)
            raise ConfigError(f"{where}: source.url {source.url!r}: allowed are {allowed}, /dev/videoN and a file")
        if not separator and not source.url.startswith("/dev/") and not Path(source.url).is_file():
            raise ConfigError(f"{where}: source.url: {source.url} is not there; paths are relative to the site file")
        span_s = site.profiling.label_span * site.window_s
        if source.keep_s < span_s:
            raise ConfigError(
                f"{where}: source.keep_s = {source.keep_s:g} is less than the {span_s:g} s that are labelled "
                "(profiling.label_span x window_s); raise it or label less"
            )


# ---------------------------------------------------------------- explaining a validation error


def _explain(text: str) -> str:
    """Turn "... - at `$.streams[0].fps`" into "streams[0].fps: ...", with the allowed keys where a key is unknown."""
    match = re.fullmatch(r"(?s)(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?", text)
    assert match is not None
    what, where = match[1], match[2] or ""
    unknown = re.search(r"unknown field `([^`]*)`", what)
    if unknown:
        keys = ", ".join(sorted(_keys_at(where)))
        place = f" in {where}" if where else ""
        return f"unknown key {unknown[1]!r}{place}; allowed: {keys}"
    wrong = re.search(r"[Ii]nvalid (?:enum )?value '([^']*)'", what)
    if wrong and (allowed := _values_at(where)):
        return f"{where}: {wrong[1]!r} is not known; allowed: {', '.join(allowed)}"
    if "matching regex" in what:
        return f"{where}: letters, digits, '.', '_' and '-' are allowed, a letter or a digit first"
    missing = re.search(r"missing required field `([^`]*)`", what)
    if missing:
        return f"{where + '.' if where else ''}{missing[1]} is missing"
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else what


def _values_at(where: str) -> list[str]:
    """The words that may stand at a key: those of a choice, or the kinds of a union of tables."""
    holder, _, key = where.rpartition(".")
    allowed: list[str] = []
    for kind in _kinds_at(holder):
        if not _is_struct(kind):
            continue
        tag = kind.__struct_config__
        if tag.tag and tag.tag_field == key:
            allowed.append(str(tag.tag))
        for field in msgspec.structs.fields(kind):
            if field.name == key:
                allowed += [str(value) for leaf in _leaves(field.type) for value in typing.get_args(leaf)]
    return allowed


def _keys_at(where: str) -> set[str]:
    kinds = _kinds_at(where)
    keys = {field.name for kind in kinds if _is_struct(kind) for field in msgspec.structs.fields(kind)}
    keys |= {kind.__struct_config__.tag_field for kind in kinds if _is_struct(kind) and kind.__struct_config__.tag}
    if kinds == [SiteConfig]:
        keys.add("stream_defaults")
    return keys


def _kinds_at(where: str) -> list[Any]:
    """The types that may stand at a place of a site file."""
    kinds: list[Any] = [SiteConfig]
    for part in re.findall(r"[A-Za-z_]\w*|\[[^\]]*\]", where):
        if part.startswith("["):
            kinds = [arg for kind in kinds for arg in typing.get_args(kind) if arg is not Ellipsis]
        else:
            kinds = [
                field.type
                for kind in kinds
                for field in (msgspec.structs.fields(kind) if _is_struct(kind) else ())
                if field.name == part
            ]
        kinds = [leaf for kind in kinds for leaf in _leaves(kind)]
    return kinds


def _leaves(kind: Any) -> list[Any]:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _leaves(typing.get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return [leaf for arg in typing.get_args(kind) for leaf in _leaves(arg)]
    return [kind]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
