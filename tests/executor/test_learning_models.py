"""Students: one form for all architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from executor.learning.models import Student, build_student, replace_head, set_trainable
from protocol.errors import InputError
from protocol.schema import StudentSpec

Architecture = Literal["edge_cnn", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
ARCHITECTURES: tuple[Architecture, ...] = ("edge_cnn", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5")


def student(architecture: Architecture = "edge_cnn", num_classes: int = 5, head_width: int = 16) -> Student:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_student(StudentSpec(architecture=architecture), num_classes, head_width)


def contiguous(net: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


def crops(count: int, px: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, px, px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(px))


@pytest.mark.parametrize("px", [8, 16, 24, 33, 48, 64])
def test_the_edge_cnn_takes_crops_of_any_edge(px: int) -> None:
    logits = student().eval()(crops(3, px))
    assert logits.shape == (3, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_classifies_and_learns(architecture: Architecture) -> None:
    net = student(architecture).train()
    loss = torch.nn.functional.cross_entropy(net(crops(4, 32)), torch.tensor([0, 1, 2, 3]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_edge_cnn_is_small() -> None:
    assert 25_000 <= sum(parameter.numel() for parameter in student(head_width=64).parameters()) <= 100_000


@pytest.mark.parametrize(("fraction", "num_blocks"), [(0.0, 0), (0.2, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_blocks_are_trained_from_the_output_backwards(fraction: float, num_blocks: int) -> None:
    net = student()
    assert set_trainable(net, fraction) == num_blocks
    trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in net.blocks]
    assert trained == [False] * (4 - num_blocks) + [True] * num_blocks
    assert all(parameter.requires_grad for parameter in net.head.parameters())


def test_frozen_blocks_keep_their_batch_statistics_while_the_others_learn_theirs() -> None:
    net = student()
    set_trainable(net, 0.5)
    before = {name: value.clone() for name, value in net.named_buffers()}
    net.train()(crops(8, 16))
    changed = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    assert changed
    assert {name.split(".")[1] for name in changed} == {"2", "3"}


def test_a_head_of_the_same_form_is_kept_and_another_form_is_new() -> None:
    net = student(head_width=16)
    head = net.head
    assert replace_head(net, 5, 16) is False
    assert net.head is head
    assert replace_head(net, 5, 0) is True
    assert net.eval()(crops(2, 16)).shape == (2, 5)
    assert replace_head(net, 7, 0) is True
    assert net.eval()(crops(2, 16)).shape == (2, 7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_torchvision_backbone_starts_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(3)
    published = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    net = build_student(StudentSpec(architecture="shufflenet_v2_x0_5", checkpoint=str(path)), 3).eval()
    x = torch.rand(2, 3, 64, 64)
    body = torch.nn.Sequential(*[module for name, module in published.named_children() if name != "fc"])
    assert torch.allclose(net.blocks(x), body(x), atol=1e-5)


def test_a_backbone_file_that_does_not_fit_is_the_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        build_student(StudentSpec(checkpoint=str(path)), 3)
    path.write_bytes(b"no weights at all")
    with pytest.raises(InputError, match="cannot be read"):
        build_student(StudentSpec(checkpoint=str(path)), 3)
    path.with_suffix(".pth").write_bytes(b"no weights at all")
    with pytest.raises(InputError, match="cannot be read"):
        build_student(StudentSpec(checkpoint=str(path.with_suffix(".pth"))), 3)
    save_file(contiguous(student()), path)
    with pytest.raises(InputError, match="no weights of resnet18"):
        build_student(StudentSpec(architecture="resnet18", checkpoint=str(path)), 3)


def test_an_edge_cnn_backbone_starts_from_a_local_file(tmp_path: Path) -> None:
    donor = student(num_classes=9)
    save_file(contiguous(donor), tmp_path / "edge.safetensors")
    net = build_student(StudentSpec(checkpoint=str(tmp_path / "edge.safetensors")), 3)
    for here, there in zip(net.blocks.parameters(), donor.blocks.parameters(), strict=True):
        assert torch.equal(here, there)
