"""torchvision's classification families as students."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

from executor.learning import zoo
from executor.learning.device import Device
from executor.learning.inference import CropClassifier
from executor.learning.models import Classifier, build_student, named_spec, set_trainable
from executor.learning.stepping import FreeStepper
from executor.learning.training import CropTrainer, even_batches
from protocol.errors import InputError
from protocol.schema import RetrainConfig, StudentSpec
from tests.executor.test_learning_data import crop_set

CPU = Device("cpu:0", torch.device("cpu"))
FAMILIES = {
    "densenet121": (8, 32),
    "efficientnet_b0": (18, 8),
    "mnasnet0_5": (20, 8),
    "mobilenet_v2": (19, 8),
    "mobilenet_v3_large": (17, 8),
    "regnet_y_400mf": (17, 8),
    "resnet18": (9, 8),
    "shufflenet_v2_x1_0": (18, 8),
    "squeezenet1_1": (9, 24),
}


def student(name: str, head_width: int = 8) -> Classifier:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    built = build_student(StudentSpec(architecture=name, head_width=head_width), 3)
    assert isinstance(built, Classifier)
    return built


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_chain_of_blocks_that_keeps_what_the_published_network_computes(name: str) -> None:
    num_blocks, min_px = FAMILIES[name]
    form = zoo.form_of(name)
    assert (form.num_blocks, form.min_px) == (num_blocks, min_px)
    torch.manual_seed(1)
    network = zoo.new_network(name).eval()
    chain = torch.nn.Sequential(*zoo.take_apart(network)).eval()
    seen: list[torch.Tensor] = []
    classifier = network.get_submodule("fc" if hasattr(network, "fc") else "classifier")
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        x = torch.rand(2, 3, 64, 64)
        network(x)
        features = chain(x)
        if seen[0].dim() == 2:
            features = features.mean(dim=(2, 3))
    assert torch.allclose(features, seen[0], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_the_blocks_next_to_its_output(name: str) -> None:
    net = student(name)
    num_trained = set_trainable(net, 0.3)
    assert 0 < num_trained < len(net.blocks)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    config = RetrainConfig(config_id="x", epochs=1, batch_size=8, learning_rate=1e-2)
    CropTrainer(net, None, config, crop_set([0, 1, 2] * 4, px=32), CPU, 0).epoch(FreeStepper())
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    frozen = tuple(f"blocks.{number}." for number in range(len(net.blocks) - num_trained))
    assert any(key.startswith("head.") for key in changed)
    assert any(key.startswith("blocks.") for key in changed)
    assert not any(key.startswith(frozen) for key in changed)


def test_a_family_that_needs_larger_crops_is_given_them() -> None:
    net = student("squeezenet1_1")
    classifier = CropClassifier(net, CPU, 1)
    classifier.warm_up(8)
    asked: list[int] = []

    class Frame:
        index, time_s, conditions = 0, 0.0, ""
        boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).numpy()
        labels = torch.tensor([0]).numpy()

        def crops(self, px: int) -> object:
            asked.append(px)
            return torch.zeros(1, px, px, 3, dtype=torch.uint8).numpy()

    classifier.analyse(Frame(), 8)  # type: ignore[arg-type]
    assert asked == [24]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_b_16", "one size only"),
        ("maxvit_t", "one size only"),
        ("inception_v3", "75 px"),
        ("resnet19", "'resnet19' is neither edge_cnn nor a classification model"),
        ("fcos_resnet50_fpn", "neither edge_cnn nor"),
    ],
)
def test_a_family_that_cannot_be_a_student_is_refused_with_the_reason(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        named_spec(StudentSpec(architecture=name), "classification")
    with pytest.raises(InputError, match=told):
        build_student(StudentSpec(architecture=name), 3)


def test_a_family_is_looked_at_without_touching_the_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    zoo.form_of.cache_clear()
    zoo.form_of("shufflenet_v2_x0_5")
    assert torch.equal(torch.rand(1), expected)


def test_every_published_name_is_accepted_or_refused_in_words() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        try:
            zoo.check_name(name)
        except InputError as error:
            assert name in str(error)  # noqa: PT017 - the message is what is tested


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 33, 64, 65, 97])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_no_batch_holds_a_single_example(count: int, batch_size: int) -> None:
    batches = even_batches(np.arange(count), batch_size)
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2
    assert max(sizes) <= max(3, batch_size + 1)
    assert sorted(set(np.concatenate(batches).tolist())) == list(range(count))


def test_one_crop_more_than_a_batch_trains_a_network_whose_last_map_is_one_pixel() -> None:
    net = student("resnet18")
    config = RetrainConfig(config_id="x", epochs=1, batch_size=8, trained_fraction=1.0)
    assert not CropTrainer(net, None, config, crop_set([0, 1, 2] * 3, px=32), CPU, 0).epoch(FreeStepper())
