"""Labelled data sets that people have, read into one form: Ekya sample lists, COCO JSON, YOLO folders.

Nothing is given up at the first mistake: what is wrong is collected as problems with file and line, and the rest is
read. Pictures are found here, not opened, except for their size where boxes are relative to it (YOLO).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from protocol.errors import InputError

Format = Literal["samples", "coco", "yolo"]
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".ts", ".webm", ".m4v")
# COCO's ids of what streets are full of, for sample lists, which carry no names.
COCO_NAMES = {1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 6: "bus", 7: "train", 8: "truck"}
_MAX_PROBLEMS = 1000


@dataclass(frozen=True)
class Problem:
    """Something wrong at ``line`` of ``path`` (0: no line)."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}{f', line {self.line}' if self.line else ''}: {self.text}"


@dataclass(frozen=True)
class Box:
    """Corners in pixels, origin top left, and the category id."""

    x0: float
    y0: float
    x1: float
    y1: float
    category: int


@dataclass(frozen=True)
class Annotated:
    """One frame: its picture (a file, or a number in a video) and its boxes. Frames are ordered by ``time_key``."""

    picture: Path
    number: int | None
    boxes: tuple[Box, ...]
    time_key: tuple[Any, ...]


@dataclass
class AnnotatedSet:
    """A data set. ``names``: category id to name; ``frames`` in order of time; ``video``: of frames with a number."""

    format: Format
    path: Path
    names: dict[int, str]
    frames: list[Annotated] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    video: Path | None = None

    def problem(self, path: Path | str, line: int, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(str(path), line, text))


def detect_format(path: Path) -> Format:
    """By what is there. Raises InputError saying what would be understood."""
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return "samples"
        if path.suffix.lower() == ".json":
            return "coco"
    if path.is_dir():
        if _yaml_of(path) is not None or (path / "labels").is_dir():
            return "yolo"
        lists = [*sorted(path.glob("*.json")), *sorted((path / "annotations").glob("*.json"))]
        if lists:
            raise InputError(f"{path}: give the COCO annotation file itself, for example {lists[0]}")
    if not path.exists():
        raise InputError(f"{path}: is not there")
    raise InputError(
        f"{path}: neither a sample list (.csv), nor a COCO annotation file (.json), nor a YOLO folder (with labels/ or "
        "data.yaml)"
    )


def read_dataset(path: Path, *, images: str = "", form: str = "auto", split: str = "") -> AnnotatedSet:
    """Everything at ``path``. Raises InputError when it cannot be read at all."""
    if not path.exists():
        raise InputError(f"{path}: is not there")
    form = detect_format(path) if form == "auto" else form
    folder = Path(images) if images else None
    if folder is not None and not folder.exists():
        raise InputError(f"images: {folder} is not there")
    readers: dict[str, Callable[[], AnnotatedSet]] = {
        "samples": lambda: read_sample_list(path, folder),
        "coco": lambda: read_coco(path, folder),
        "yolo": lambda: read_yolo(path, folder, split),
    }
    if form not in readers:
        raise InputError(f"format: {form!r} is not known; allowed: auto, {', '.join(readers)}")
    found = readers[form]()
    found.frames.sort(key=lambda frame: frame.time_key)
    return found


# ---------------------------------------------------------------- sample lists


def read_sample_list(path: Path, images: Path | None) -> AnnotatedSet:
    """Rows ``idx,frame id,class,x0,y0,x1,y1[,score]``. Frames are those of a video, or pictures of a folder in order of
    their names: ``images``, else the video or folder beside the list that is named like it."""
    found = AnnotatedSet("samples", path, dict(COCO_NAMES))
    rows: dict[int, list[Box]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                if not fields or (reader.line_num == 1 and fields[0].strip().lower() == "idx"):
                    continue
                try:
                    frame, box = _sample(fields)
                except ValueError as error:
                    found.problem(path, reader.line_num, str(error))
                    continue
                rows.setdefault(frame, []).append(box)
                found.names.setdefault(box.category, str(box.category))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a comma-separated text file: {error}") from error
    source = images or _beside(path)
    if source is None:
        raise InputError(
            f"{path}: its frames are not there: put a video or a folder of pictures named {path.stem!r} beside it, or "
            "name them with images"
        )
    if source.is_file():
        found.video = source
        found.frames = [Annotated(source, number, tuple(rows[number]), (number,)) for number in sorted(rows)]
        return found
    pictures = pictures_in(source)
    if not pictures:
        raise InputError(f"{source}: holds no pictures ({', '.join(PICTURES)})")
    for number in [n for n in rows if n >= len(pictures)]:
        found.problem(path, 0, f"frame id {number} is beyond the {len(pictures)} pictures of {source}")
    found.frames = [
        Annotated(picture, None, tuple(rows.get(number, ())), (number,)) for number, picture in enumerate(pictures)
    ]
    return found


def _sample(fields: list[str]) -> tuple[int, Box]:
    if len(fields) not in (7, 8):
        raise ValueError(f"{len(fields)} columns; allowed: 7 or 8 (idx,frame id,class,x0,y0,x1,y1[,score])")
    try:
        frame, category = int(fields[1]), int(fields[2])
    except ValueError:
        raise ValueError(f"frame id {fields[1]!r} or class {fields[2]!r} is no whole number") from None
    if frame < 0:
        raise ValueError(f"frame id {frame} is negative")
    return frame, _box(fields[3:7], category)


def _box(values: list[Any], category: int) -> Box:
    try:
        x0, y0, x1, y1 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"box {str(values)[:80]} is not four numbers") from None
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        raise ValueError(f"box {values} is not finite")
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box {x0:g},{y0:g},{x1:g},{y1:g} is empty: x0 < x1 and y0 < y1 is needed")
    return Box(x0, y0, x1, y1, category)


def _beside(path: Path) -> Path | None:
    for suffix in VIDEOS:
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    return path.with_suffix("") if path.with_suffix("").is_dir() else None


# ---------------------------------------------------------------- COCO


def read_coco(path: Path, images: Path | None) -> AnnotatedSet:
    """Lists ``images`` {id, file_name}, ``annotations`` {image_id, category_id, bbox: x, y, w, h} and ``categories``.

    Frames are in order of ``frame_id``/``date_captured`` where given, else of their file names. Pictures are looked for
    in ``images``, beside the file, and in ``images/`` beside it or beside its folder. Crowd regions are left out.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from error
    if not isinstance(raw, dict) or not all(
        isinstance(raw.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise InputError(f"{path}: is no COCO annotation file: lists images, annotations and categories are needed")
    names: dict[int, str] = {}
    found = AnnotatedSet("coco", path, names)
    for number, entry in enumerate(raw["categories"]):
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str):
            names[entry["id"]] = entry["name"]
        else:
            found.problem(path, 0, f"categories[{number}]: id (a whole number) and name are needed")
    places = [images] if images else [path.parent, path.parent / "images", path.parent.parent / "images"]
    entries: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(raw["images"]):
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("file_name"), str):
            found.problem(path, 0, f"images[{number}]: id and file_name are needed")
        elif not isinstance(entry["id"], int | str) or entry["id"] in entries:
            found.problem(path, 0, f"images[{number}]: id {entry['id']!r} is used twice or is no id")
        else:
            entries[entry["id"]] = entry
    boxes: dict[Any, list[Box]] = {key: [] for key in entries}
    for number, entry in enumerate(raw["annotations"]):
        try:
            key, box = _coco_box(entry, names)
            if key not in entries:
                raise ValueError(f"image_id {key!r} is none of the images")
            if box is not None:
                boxes[key].append(box)
        except (ValueError, TypeError, OverflowError) as error:
            found.problem(path, 0, f"annotations[{number}]: {error}")
    for key, entry in entries.items():
        name = Path(entry["file_name"])
        candidates = (place / part for place in places for part in (name, Path(name.name)))
        picture = next((candidate for candidate in candidates if _is_file(candidate)), None)
        if picture is None:
            found.problem(path, 0, f"image {entry['file_name'][:200]} is not in {' or '.join(map(str, places))}")
            continue
        order = (entry.get("frame_id"), entry.get("date_captured"))
        known = isinstance(order[0], int), isinstance(order[1], str)
        time_key = (order[0] if known[0] else 0, order[1] if known[1] else "", natural(entry["file_name"]))
        found.frames.append(Annotated(picture, None, tuple(boxes[key]), time_key))
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _coco_box(entry: Any, names: dict[int, str]) -> tuple[Any, Box | None]:
    if not isinstance(entry, dict):
        raise ValueError("is no object")
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in entry]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    for key in ("image_id", "category_id"):
        if not isinstance(entry[key], int | str):
            raise ValueError(f"{key} {str(entry[key])[:80]} is no id")
    if entry["category_id"] not in names:
        raise ValueError(f"category_id {entry['category_id']!r} is none of the categories")
    if entry.get("iscrowd"):
        return entry["image_id"], None
    bbox = entry["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(v, int | float) for v in bbox):
        raise ValueError(f"bbox {bbox!r} is not [x, y, width, height]")
    x, y, w, h = bbox
    return entry["image_id"], _box([x, y, x + w, y + h], entry["category_id"])


# ---------------------------------------------------------------- YOLO


def read_yolo(path: Path, images: Path | None, split: str) -> AnnotatedSet:
    """``images/[SPLIT/]NAME.jpg`` and ``labels/[SPLIT/]NAME.txt`` with rows ``class x y w h`` relative to the picture;
    names from ``data.yaml`` or ``classes.txt``. Frames are in order of their names, numbers in them counted as such."""
    names = _yolo_names(path)
    found = AnnotatedSet("yolo", path, names)
    folder = images or path / "images"
    if split:
        if not re.fullmatch(r"[\w-][\w.-]*", split):
            raise InputError(f"split: {split!r} is no name of a folder in images/")
        folder = folder / split
    if not folder.is_dir():
        raise InputError(
            f"{folder}: is not there; a YOLO data set has its pictures in images/, or name them with images"
        )
    pictures = pictures_in(folder, deep=True)
    if not pictures:
        raise InputError(f"{folder}: holds no pictures ({', '.join(PICTURES)})")
    labels = path / "labels" / split if split else path / "labels"
    seen: set[Path] = set()
    for picture in pictures:
        text = labels / picture.relative_to(folder).with_suffix(".txt")
        seen.add(text)
        boxes: tuple[Box, ...] = ()
        if text.is_file():  # a picture without a file shows nothing
            boxes = _yolo_boxes(found, text, picture)
        found.frames.append(Annotated(picture, None, boxes, natural(str(picture.relative_to(folder)))))
    if labels.is_dir():
        for text in sorted(labels.rglob("*.txt")):
            if text not in seen and text.name != "classes.txt":
                found.problem(text, 0, "no picture of this name")
    elif not any(frame.boxes for frame in found.frames):
        raise InputError(f"{labels}: is not there; a YOLO data set has its boxes in labels/")
    return found


def _yolo_boxes(found: AnnotatedSet, text: Path, picture: Path) -> tuple[Box, ...]:
    from executor.streams.pictures import picture_size

    boxes = []
    try:
        width, height = picture_size(picture)
        lines = text.read_text(encoding="utf-8").splitlines()
    except InputError as error:
        found.problem(picture, 0, str(error).removeprefix(f"{picture}: "))
        return ()
    except (OSError, UnicodeDecodeError) as error:
        found.problem(text, 0, f"cannot be read: {error}")
        return ()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) not in (5, 6):
                raise ValueError(f"{len(fields)} numbers; allowed: class x y w h [confidence]")
            if not fields[0].isdigit():
                raise ValueError(f"class {fields[0]!r} is no whole number")
            category = int(fields[0])
            if category not in found.names:
                raise ValueError(f"class {category} has no name; there are {len(found.names)}")
            x, y, w, h = (float(value) for value in fields[1:5])
            if not all(0.0 <= value <= 1.0 for value in (x, y, w, h)):
                raise ValueError(f"{' '.join(fields[1:5])} is not within 0 to 1 (relative to the picture)")
            corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            boxes.append(_box(corners, category))
        except ValueError as error:
            found.problem(text, number, str(error))
    return tuple(boxes)


def _yaml_of(path: Path) -> Path | None:
    return next((path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()), None)


def _yolo_names(path: Path) -> dict[int, str]:
    settings = _yaml_of(path)
    if settings is not None:
        names = parse_names(settings.read_text(encoding="utf-8", errors="replace"))
        if not names:
            raise InputError(f"{settings}: names is missing, or written in a way that is not understood: write a list")
        return names
    for place in (path / "classes.txt", path / "labels" / "classes.txt"):
        if place.is_file():
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
            return dict(enumerate(line.strip() for line in lines if line.strip()))
    raise InputError(f"{path}: the classes have no names: data.yaml with names, or classes.txt, is needed")


def parse_names(text: str) -> dict[int, str]:
    """``names`` of a YOLO data.yaml: a list in brackets, a list of lines, or a map of numbers; {} for anything else."""
    lines = [re.sub(r"\s+#.*$", "", line).rstrip() for line in text.splitlines()]
    start = next((n for n, line in enumerate(lines) if re.match(r"names\s*:", line)), None)
    if start is None:
        return {}
    rest = lines[start].partition(":")[2].strip()
    if rest.startswith(("[", "{")):
        close = {"[": "]", "{": "}"}[rest[0]]
        for line in lines[start + 1 :]:
            if rest.endswith(close):
                break
            rest += " " + line.strip()
        parts = [part.strip() for part in rest[1:].rstrip(close).split(",") if part.strip()]
        if close == "]":
            return dict(enumerate(_unquoted(part) for part in parts))
        pairs = [part.partition(":") for part in parts]
        return {int(key): _unquoted(name) for key, _, name in pairs if re.fullmatch(r"\s*\d{1,9}\s*", key)}
    names: dict[int, str] = {}
    for line in lines[start + 1 :]:
        if not line.strip():
            continue
        item = re.match(r"\s*-\s+(.*)$", line)
        pair = re.match(r"\s+(\d{1,9})\s*:\s*(.*)$", line)
        if item:
            names[len(names)] = _unquoted(item[1])
        elif pair:
            names[int(pair[1])] = _unquoted(pair[2])
        else:
            break
    return names


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")


# ---------------------------------------------------------------- pictures


def pictures_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The pictures of a folder in order of their names."""
    every = folder.rglob("*") if deep else folder.iterdir()
    return sorted((p for p in every if p.suffix.lower() in PICTURES), key=lambda p: natural(str(p)))


def natural(name: str) -> tuple[Any, ...]:
    """A key that puts frame9 before frame10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part)
