"""A golden model of one's own: train a torchvision detector on videos with sample lists, save its weights.

    python examples/train_golden.py golden.safetensors plaza.mp4 motorway.mp4 --map 1=person,3=car,8=truck --epochs 30

Sample lists lie beside the videos under the same name (docs/streams.md). Ids that are not in --map are dropped; the
classes get the ids 1, 2, ... of the new model. Begins with random weights, or goes on where OUT is there already: a
published or an earlier state dict. At the end it prints the options that `ekya-optimizer run --video` needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import resize

from executor.learning.weights import fill, read_state
from executor.streams.samples import label_table, read_samples
from executor.streams.video import Video
from protocol.errors import EkyaError

# A picture uint8 (3, h, w), and what torchvision's detectors are trained with: boxes (n, 4) and labels (n,) from 1.
Example = tuple[Tensor, dict[str, Tensor]]


def read(
    path: Path, classes: tuple[str, ...], class_map: dict[str, str], step: int, min_score: float, edge: int
) -> list[Example]:
    """Every ``step``-th frame that has a box, no larger than ``edge``."""
    video = Video(path)
    samples = read_samples(
        path.with_suffix(".csv"),
        size=(video.width, video.height),
        num_frames=video.num_frames,
        table=label_table(classes, class_map),
        min_score=min_score,
    )
    found = []
    for number in range(0, video.num_frames, step):
        if number in samples:
            picture = torch.from_numpy(np.ascontiguousarray(video.pixels(number))).permute(2, 0, 1)
            boxes, labels = torch.from_numpy(samples[number].boxes), torch.from_numpy(samples[number].labels) + 1
            factor = min(1.0, edge / max(picture.shape[1:]))
            size = [round(factor * side) for side in picture.shape[1:]]
            picture = resize(picture, size, antialias=True)
            found.append((picture, {"boxes": boxes * factor, "labels": labels}))
    video.close()
    return found


def mirrored(picture: Tensor, truth: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    width = picture.shape[2]
    boxes = truth["boxes"]
    flipped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return picture.flip(2), {**truth, "boxes": flipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--map", required=True, metavar="ID=CLASS,...")
    parser.add_argument("--model", default="ssdlite320_mobilenet_v3_large")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--step", type=int, default=4, help="use every so many-th frame")
    parser.add_argument("--edge", type=int, default=320, help="longer edge of the pictures")
    parser.add_argument("--min-score", type=float, default=0.45)
    options = parser.parse_args()
    kept = dict(pair.split("=", 1) for pair in options.map.split(","))
    classes = tuple(dict.fromkeys(kept.values()))
    everything = {str(number): kept.get(str(number), "") for number in range(1, 91)}
    examples = [
        example
        for video in options.videos
        for example in read(video, classes, everything, options.step, options.min_score, options.edge)
    ]
    print(f"{len(examples)} frames, classes {', '.join(classes)}", flush=True)

    torch.manual_seed(1)
    model = torchvision.models.get_model(
        options.model, weights=None, weights_backbone=None, num_classes=len(classes) + 1
    )
    if options.out.exists():
        fill(model, read_state(str(options.out), "out"), str(options.out), options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    num_steps = options.epochs * (-(-len(examples) // options.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=num_steps)
    for epoch in range(1, options.epochs + 1):
        start, total = time.monotonic(), 0.0
        model.train()
        order = torch.randperm(len(examples)).tolist()
        for first in range(0, len(order), options.batch_size):
            drawn = [examples[number] for number in order[first : first + options.batch_size]]
            drawn = [mirrored(*example) if torch.rand(()) < 0.5 else example for example in drawn]
            gains = 0.7 + 0.6 * torch.rand(len(drawn))
            pictures = [(p.float() / 255.0 * gain).clamp(0, 1) for (p, _), gain in zip(drawn, gains, strict=True)]
            loss = sum(model(pictures, [truth for _, truth in drawn]).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(drawn)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out)
        print(
            f"epoch {epoch} of {options.epochs}: loss {total / len(examples):.3f}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    mapped = ",".join(f"{number}={name}" for number, name in enumerate(classes, 1))
    print(
        f"--golden {options.model} --golden-weights {options.out} --golden-classes {len(classes) + 1} "
        f"--classes {','.join(classes)} --class-map {mapped}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EkyaError as error:
        sys.exit(f"train_golden: {error}")
