"""Wanted things and measured things: streams, configurations, devices, checkpoints, results.

This file holds structs only. Conventions: all structs are frozen and keyword-only; times are in
seconds, shares are fractions of one GPU, accuracies are fractions 0..1. Suffixes: ``Spec`` = wanted,
``Config`` = knobs, ``Profile`` = measured or estimated, ``Result`` = happened.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Share = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

Task = Literal["classification", "detection"]
DriftKind = Literal["class_mix", "light", "weather", "appearance"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all plain data: immutable, keyword-only, unknown fields refused."""


# ---------------------------------------------------------------- streams


class DriftEvent(Record, frozen=True, kw_only=True):
    """A change of a city scene: ``kind`` moves to level ``to`` between ``at_s`` and ``at_s + over_s``.

    ``to`` is kind-specific and checked by the source: class_mix: "commute" | "freight" | "weekend" |
    "festival"; light: "day" | "dusk" | "night"; weather: "clear" | "rain" | "fog" | "snow";
    appearance: "summer" | "winter" | "fleet" (vehicle colours and clothing).
    """

    kind: DriftKind
    at_s: float
    to: str
    over_s: Seconds = 5.0


class CitySource(Record, frozen=True, kw_only=True, tag="city"):
    """A procedural street camera: deterministic in (seed, frame index), ground truth known.

    With an empty ``drift`` a schedule is derived from the seed: one event of a random kind about
    every ``drift_period_s`` seconds (0 turns drift off).
    """

    seed: int
    width: Annotated[int, msgspec.Meta(ge=160, le=1920)] = 640
    height: Annotated[int, msgspec.Meta(ge=120, le=1080)] = 360
    num_objects: Annotated[float, msgspec.Meta(gt=0.0, le=60.0)] = 8.0
    drift: tuple[DriftEvent, ...] = ()
    drift_period_s: Seconds = 30.0


class Clip(Record, frozen=True, kw_only=True):
    """Frames ``first_frame`` to ``last_frame`` (inclusive, None = to the end) of a video file and its sample list.

    ``step``: only every so many-th of them is a frame of the stream.
    """

    video: str
    samples: str
    first_frame: Annotated[int, msgspec.Meta(ge=0)] = 0
    last_frame: int | None = None
    step: PositiveInt = 1


class RecordedSource(Record, frozen=True, kw_only=True, tag="recorded"):
    """Clips played one after the other and looped into an endless stream.

    ``class_map`` maps COCO ids, written as strings, to class names of the site; an id mapped to ""
    is dropped; an id that is not listed is an error. Rows below ``min_score`` are dropped.
    """

    clips: Annotated[tuple[Clip, ...], msgspec.Meta(min_length=1)]
    class_map: dict[str, str]
    min_score: Fraction = 0.0


class LiveSource(Record, frozen=True, kw_only=True, tag="live"):
    """A camera or whatever else sends pictures at its own pace. It carries no labels.

    ``url``: rtsp://..., http(s)://..., udp:// or tcp:// (MPEG-TS), /dev/videoN (V4L2), or a video file, which is played
    at its own pace and begun again at its end when ``loop`` is set. ``transport``: of RTSP.

    ``open_timeout_s``: for opening. ``stall_s``: without a usable picture for so long the stream counts as stalled (or
    garbage, when data came) and is opened anew. ``max_latency_s``: a picture that waited longer than this is dropped.
    ``backoff_s``: pause before the first attempt to open it again, doubled up to ``backoff_max_s``. ``keep_s``: seconds
    of pictures that are kept on disk for labels and trials.
    """

    url: Annotated[str, msgspec.Meta(min_length=1)]
    transport: Literal["tcp", "udp"] = "tcp"
    loop: bool = True
    open_timeout_s: PositiveSeconds = 6.0
    stall_s: PositiveSeconds = 2.0
    max_latency_s: PositiveSeconds = 0.4
    backoff_s: PositiveSeconds = 0.5
    backoff_max_s: PositiveSeconds = 15.0
    keep_s: PositiveSeconds = 120.0


class DatasetSource(Record, frozen=True, kw_only=True, tag="dataset"):
    """A labelled data set of pictures, played in time order and looped into an endless stream.

    ``path``: an Ekya sample list (.csv), a COCO annotation file (.json) or the folder of a YOLO data set. ``images``:
    folder of the pictures; "" = where the format keeps them. ``format``: "auto" = by what is at ``path``.
    ``class_map``: category of the data set, by name or by id, to class of the stream; "" drops it. Empty: categories
    named like a class of the stream are that class, the others are dropped. ``split``: of a YOLO data set
    ("train", "val", ...), "" = all in one.
    """

    path: Annotated[str, msgspec.Meta(min_length=1)]
    images: str = ""
    format: Literal["auto", "samples", "coco", "yolo"] = "auto"
    class_map: dict[str, str] = {}
    split: str = ""


Source = CitySource | RecordedSource | LiveSource | DatasetSource

StreamCondition = Literal["ok", "stalled", "lost", "garbage", "changed"]
"""How a live stream is: no picture comes, it cannot be reached, what comes cannot be decoded, its size changed."""


class OracleGolden(Record, frozen=True, kw_only=True, tag="oracle", tag_field="kind"):
    """A golden model that reads the source's own truth.

    ``error_rate`` is the share of labels replaced by a wrong class; ``seconds_per_frame`` the GPU-seconds that
    labelling one frame costs at speed 1 and share 1. The oracle really burns that time, so that labelling
    competes with the other jobs.
    """

    error_rate: Fraction = 0.02
    seconds_per_frame: Seconds = 0.02


class TorchvisionGolden(Record, frozen=True, kw_only=True, tag="torchvision", tag_field="kind"):
    """A golden model of torchvision, by the name that ``torchvision.models.get_model`` knows.

    A detection model finds boxes of its own; a classification model names what is in the source's boxes.
    ``weights_file``: a local state dict (.safetensors, .pt, .pth); empty = the published ``weights`` of that name,
    downloaded on first use. ``num_classes``: outputs of the model in ``weights_file``, 0 = as published.
    ``class_map`` maps the model's class ids (COCO ids for published detectors), written as strings, or their
    published names to class names of the site; what is not listed, or mapped to "", is dropped.
    Boxes below ``min_score`` are dropped. ``input_px``: shorter edge of the frame, or edge of the crop, as the model
    sees it, 0 = as published.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    class_map: dict[str, str]
    weights: str = "DEFAULT"
    weights_file: str = ""
    num_classes: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    min_score: Fraction = 0.5
    input_px: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0


GoldenSpec = OracleGolden | TorchvisionGolden


class StudentSpec(Record, frozen=True, kw_only=True):
    """The small model that serves a stream. ``checkpoint`` = "" means: train a first model at start.

    ``architecture``: "edge_cnn" or a torchvision classification model by name for classification streams,
    "edge_detector" or "ssdlite320_mobilenet_v3_large" for detection streams; "" = the small one of the stream's task.
    """

    architecture: Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[A-Za-z0-9_]*$")] = ""
    head_width: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 64
    checkpoint: str = ""


class StreamSpec(Record, frozen=True, kw_only=True):
    """One video stream and what is wanted of it.

    ``start_s``: the stream's own time when the site's clock starts; the first model is trained on what lies before it.
    ``label_fps``: frames per second that the golden model labels. ``exemplar_mb``: what the memory against
    forgetting may take, in megabytes (10^6 bytes) of labelled crops or frames; 0 = none. ``crop_px``: edge of the
    square object crops kept for training.
    ``task``: what the student does: "classification" names the objects at the source's boxes, "detection" finds
    them as well. ``frame_px``: longer edge of the whole frames that a detection stream keeps for training.
    ``max_latency_s``: inference configurations whose results come later than this after their frame are not
    planned (the quickest is, where all are too slow). ``retrain_every``: the stream is profiled and retrained
    only once in so many windows of the site.
    """

    stream_id: Name
    source: Source
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2)]
    fps: Annotated[float, msgspec.Meta(gt=0.0, le=240.0)] = 10.0
    start_s: float = 0.0
    student: StudentSpec = StudentSpec()
    golden: GoldenSpec = OracleGolden()
    min_accuracy: Fraction = 0.0
    weight: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    label_fps: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    exemplar_mb: Annotated[float, msgspec.Meta(ge=0.0, le=10_000.0)] = 1.0
    crop_px: Annotated[int, msgspec.Meta(ge=16, le=256)] = 64
    task: Task = "classification"
    frame_px: Annotated[int, msgspec.Meta(ge=64, le=1280)] = 192
    max_latency_s: PositiveSeconds | None = None
    retrain_every: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


# ---------------------------------------------------------------- configurations


class InferenceConfig(Record, frozen=True, kw_only=True):
    """How a stream is analysed: one frame in ``frame_interval``.

    ``resolution_px``: edge of the crops for classification, longer edge of the frame for detection.
    """

    config_id: Name
    frame_interval: PositiveInt = 1
    resolution_px: Annotated[int, msgspec.Meta(ge=8, le=1280)] = 32


class RetrainConfig(Record, frozen=True, kw_only=True):
    """How a student is retrained.

    ``trained_fraction``: share of the backbone's blocks, counted from the output, that is trained
    besides the head; 0 = head only, 1 = everything. ``head_width``: hidden units of the head, 0 = none. ``base``:
    number of the zoo's model to begin from, 0 = the serving one; with it ``epochs`` may be 0, which takes that model
    as it is.
    """

    config_id: Name
    epochs: Count
    batch_size: PositiveInt = 32
    data_fraction: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    trained_fraction: Fraction = 1.0
    head_width: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 64
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] = 1e-3
    base: Count = 0


# ---------------------------------------------------------------- devices


class GpuSpec(Record, frozen=True, kw_only=True):
    """One GPU as the planner sees it. Capacity is 1 less ``reserved_share`` (kept free for other jobs).

    ``speed`` is relative to the device that costs are stated for. ``share_efficiency`` holds points
    (share, training throughput at that share / throughput at share 1), ascending; empty = linear.
    ``memory_bytes`` 0 = unlimited.
    """

    gpu_id: Name
    speed: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    memory_bytes: Bytes = 0
    reserved_share: Fraction = 0.0
    share_efficiency: tuple[tuple[float, float], ...] = ()


class LinkSpec(Record, frozen=True, kw_only=True):
    """A link of the site to a cloud that retrains: bandwidth of each direction, in bytes per second."""

    link_id: Name
    up_bytes_per_s: Annotated[float, msgspec.Meta(gt=0.0)]
    down_bytes_per_s: Annotated[float, msgspec.Meta(gt=0.0)]


# ---------------------------------------------------------------- stored things


class CheckpointRef(Record, frozen=True, kw_only=True):
    """A model file below the site's store, with what is needed to trust and to explain it.

    ``path`` is relative to the store. ``version`` counts the models of a stream from 1.
    """

    path: str
    sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    stream_id: Name
    version: PositiveInt
    retrain_id: str = ""
    num_bytes: Bytes = 0


class DatasetRef(Record, frozen=True, kw_only=True):
    """Labelled crops (classification) or frames (detection) of one stream: file below the store, number per split.

    ``class_counts``: labelled objects per class. ``label_s_per_frame``: busy seconds of the golden model per frame,
    measured while the set was labelled (0 = not measured).
    """

    path: str
    stream_id: Name
    window: int
    num_train: int
    num_validation: int
    class_counts: tuple[int, ...]
    label_s_per_frame: Seconds = 0.0


class Conditions(Record, frozen=True, kw_only=True):
    """What a stretch of a stream looked like, told by its labelled examples themselves.

    ``class_mix``: share of the labelled objects per class; ``light``: mean red, green, blue and the spread of
    brightness, 0..1; ``layout``: the mean picture of an example at 4 x 4 pixels, row by row, RGB, 0..1.
    """

    class_mix: tuple[float, ...]
    light: tuple[float, ...] = ()
    layout: tuple[float, ...] = ()


class ZooRef(Record, frozen=True, kw_only=True):
    """An earlier model of the site's zoo, by its number there."""

    number: PositiveInt
    checkpoint: CheckpointRef


# ---------------------------------------------------------------- results


class LabelResult(Record, frozen=True, kw_only=True, tag="labels"):
    """Golden labels were written. ``golden_s``: busy seconds of the golden model.

    ``agreement``: accuracy of the serving model on them, every frame counted for those that it stands for; None where
    nothing was served. ``agreement_low``, ``agreement_high``: its 95 % interval (Wilson), and ``num_pieces`` the
    independent pieces of evidence that it rests on. ``num_exemplars`` of the data set's examples, ``exemplar_bytes`` of
    memory, are what was carried over from earlier windows; ``conditions``: of the new ones.
    """

    dataset: DatasetRef
    num_frames: int
    seconds: Seconds
    golden_s: Seconds = 0.0
    agreement: Fraction | None = None
    agreement_low: Fraction = 0.0
    agreement_high: Fraction = 1.0
    num_pieces: Count = 0
    num_exemplars: Count = 0
    exemplar_bytes: Bytes = 0
    conditions: Conditions | None = None


class EpochResult(Record, frozen=True, kw_only=True):
    """Validation accuracy after an epoch (0 = before the first) and the busy seconds that the epoch took.

    ``validation_s``: the part of them that went into the validation; None where it was not told apart.
    """

    epoch: int
    accuracy: Fraction
    loss: float
    busy_s: Seconds
    validation_s: Seconds | None = None


class RetrainTrial(Record, frozen=True, kw_only=True):
    """One micro-profiling trial: few epochs on a part of the data. ``num_samples`` is per epoch.

    ``prepare_s``: busy seconds that were spent once on the ``num_samples``, before the first epoch; it grows with them.
    """

    config: RetrainConfig
    num_samples: int
    total_samples: int
    startup_s: Seconds
    epochs: tuple[EpochResult, ...]
    memory_bytes: Bytes = 0
    prepare_s: Seconds = 0.0


class InferenceTrial(Record, frozen=True, kw_only=True):
    """One inference configuration measured on labelled frames.

    ``busy_s_per_frame``: busy seconds at share 1 per *stream* frame (skipped frames included), so
    that fps times it is the GPU share needed. ``accuracy``: mean frame accuracy, skipped frames
    carrying the last result over; ``num_frames``: stream frames looked at.
    """

    config: InferenceConfig
    busy_s_per_frame: Seconds
    accuracy: Fraction
    num_frames: int
    memory_bytes: Bytes = 0


class ZooTrial(Record, frozen=True, kw_only=True):
    """An earlier model on the window's new labels, by forward passes only; it was trained on none of them.

    Where the scene changed within the labels, on those after the change only: they are what is to come. ``accuracy``,
    ``accuracy_low``, ``accuracy_high``: mean over frames and its 95 % interval; ``accuracy_serving``: of the serving
    model on the same labels. ``paired``: both models there, the earlier one as the new one. ``confidence``: mean of
    its belief in what it says, None where the task has no such thing. ``busy_s``: loading and looking.
    """

    number: PositiveInt
    accuracy: Fraction
    accuracy_low: Fraction
    accuracy_high: Fraction
    accuracy_serving: Fraction
    paired: PairedCounts
    confidence: Fraction | None
    busy_s: Seconds


class TrialResult(Record, frozen=True, kw_only=True, tag="trials"):
    """All trials of one stream's profiling job.

    ``accuracy_now``: serving model on labels it was not trained on, mean over frames; more of them than the
    validation split, which epoch 0 of the trials is measured on, where the model saw none of the window's labels.
    ``accuracy_low``, ``accuracy_high``: 95 % interval of ``accuracy_now`` (Wilson), one trial per road user.
    ``golden_s``: busy seconds of the golden model on the clip of the inference trials.
    """

    stream_id: Name
    window: int
    accuracy_now: Fraction
    retrain: tuple[RetrainTrial, ...]
    inference: tuple[InferenceTrial, ...]
    seconds: Seconds
    accuracy_low: Fraction = 0.0
    accuracy_high: Fraction = 1.0
    golden_s: Seconds = 0.0
    zoo: tuple[ZooTrial, ...] = ()


class StreamSignals(Record, frozen=True, kw_only=True):
    """What serving tells about drift for nothing. ``confidence``: mean of the student's belief in what it says, 0..1.

    ``class_counts``: objects by the class that the student saw. ``look``: of the crops, mean red, green and blue and
    the spread of brightness, 0..1; empty where the student does not look at crops.
    """

    num_objects: Count
    confidence: Fraction
    class_counts: tuple[int, ...]
    look: tuple[float, ...] = ()


# Parts that a vote may weigh: see PairedCounts.
VOTE_WEIGHTS = 8


class PairedCounts(Record, frozen=True, kw_only=True):
    """Two models on the same labels: ``num_won`` of ``num_objects`` road users (not crops: one that is seen in many
    frames counts once) are classified right more often by the new model, ``num_lost`` by the old one.

    A vote weighs by how many more crops it is about, in ``VOTE_WEIGHTS``-ths of the heaviest possible one of its look.
    ``won_weights``, ``lost_weights``: how many of the votes weigh one such part, two, and so on; those that are not
    counted there weigh a whole one.
    """

    num_objects: Count = 0
    num_won: Count = 0
    num_lost: Count = 0
    won_weights: tuple[Count, ...] = ()
    lost_weights: tuple[Count, ...] = ()


class RetrainResult(Record, frozen=True, kw_only=True, tag="retraining"):
    """A retraining ended. Accuracies are on the same held-out split, before and after; ``paired`` compares both there.

    ``checkpoint`` is None when nothing usable came out; ``reason`` then says why. ``map_before`` and ``map_after``:
    mean average precision of detectors on that split, for people; None = not measured.
    """

    stream_id: Name
    window: int
    config: RetrainConfig
    checkpoint: CheckpointRef | None
    accuracy_before: Fraction
    accuracy_after: Fraction
    num_validation: int
    epochs: tuple[EpochResult, ...]
    busy_s: Seconds
    seconds: Seconds
    reason: str = ""
    paired: PairedCounts = PairedCounts()
    map_before: Fraction | None = None
    map_after: Fraction | None = None


class CanaryResult(Record, frozen=True, kw_only=True, tag="comparison"):
    """Two models on labels of a live stretch that neither was trained on. ``num_crops`` labelled objects;
    ``golden_s``: busy seconds of the golden model."""

    stream_id: Name
    candidate_version: PositiveInt
    num_frames: Count
    num_crops: Count
    accuracy_candidate: Fraction
    accuracy_previous: Fraction
    paired: PairedCounts
    seconds: Seconds
    golden_s: Seconds = 0.0


class RetrainRun(Record, frozen=True, kw_only=True):
    """Where and how fast a retraining ran, as the optimizer saw it from the start command to the report.

    ``device``: what executors of this kind are called, e.g. "cpu" or a GPU's name. ``share``: granted GPU share, None
    when it changed on the way. ``work_s``: GPU-seconds that the execution model gives for ``elapsed_s`` at the granted
    shares, start-up included: what the retraining cost in the planner's currency.
    """

    executor_id: Name
    device: str
    share: Share | None
    elapsed_s: Seconds
    work_s: Seconds
