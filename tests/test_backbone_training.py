from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.removal import Removal
from tve_pipeline.backbone import LabelledPictures, accuracies, task_readings
from tve_pipeline.backbone_training import (
    BackboneTrainingConfig,
    classify_kept,
    draw_kept,
    random_patches,
    train_backbone,
    warp,
)

NUM_PICTURES = 128
VIT = "vit_tiny_patch16_224"
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
SMALL_SWIN = {
    "img_size": 32,
    "window_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "num_classes": 4,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (VIT, SMALL_VIT),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL_VIT),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
}
CONFIG = BackboneTrainingConfig(
    num_steps=100,
    batch_size=32,
    learning_rate=3e-3,
    weight_decay=0.05,
    label_smoothing=0.0,
    full_share=0.2,
    keep_fraction_low=0.25,
    keep_fraction_high=0.75,
    warmup_share=0.1,
    warp_pixels=0.5,
    finish_share=0.1,
    finish_full_share=1.0,
    seed=0,
)


def model(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    name, arguments = KINDS[kind]
    made: nn.Module = timm.create_model(name, **arguments)
    return made


def tinted(count: int) -> tuple[Tensor, Tensor]:
    """Noise in which one colour is brighter, or none: the class."""
    generator = torch.Generator().manual_seed(count)
    labels_M = torch.randint(4, (count,), generator=generator)
    tint_M3 = torch.eye(4)[labels_M, :3]
    return (torch.randn(count, 3, 32, 32, generator=generator) + tint_M3[..., None, None]).half(), labels_M


def train(config: BackboneTrainingConfig = CONFIG, images: Tensor | None = None, kind: str = "plain") -> nn.Module:
    made = model(kind)
    own_images, labels_M = tinted(NUM_PICTURES)
    keys = [f"p{i}" for i in range(NUM_PICTURES)]
    train_backbone(made, own_images if images is None else images, labels_M, keys, 4, config)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_from_partial_pictures_and_leaves_the_model_frozen(kind: str) -> None:
    made = train(kind=kind)
    images, labels_M = tinted(200)
    pictures = LabelledPictures(images, {"tint": labels_M}, [])
    assert accuracies(made, pictures, {"tint": torch.arange(4)})["tint"] > 0.9
    halves_BK = random_patches(200, 16, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        told_B = classify_kept(made, images.float(), halves_BK, 4).argmax(1)
    assert (told_B == labels_M).double().mean() > 0.7
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    fused = [module.fused_attn for module in made.modules() if hasattr(module, "fused_attn")]
    assert fused == [module.fused_attn for module in model(kind).modules() if hasattr(module, "fused_attn")]


def test_the_seed_decides_what_is_learned() -> None:
    short = replace(CONFIG, num_steps=3)
    first, again, other = (
        nn.utils.parameters_to_vector(train(config).parameters()) for config in (short, short, replace(short, seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_pictures() -> None:
    images, _ = tinted(NUM_PICTURES)
    images[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step \d+: expected a finite loss, got nan on pictures .*\bp7\b"):
        train(images=images)


def test_training_refuses_what_it_cannot_train() -> None:
    images, labels_M = tinted(16)
    keys = [""] * 16
    with pytest.raises(ValueError, match=r"expected a plain vision transformer .* got ResNet"):
        train_backbone(timm.create_model("resnet18", channels=(8, 8, 8, 8)), images, labels_M, keys, 4, CONFIG)
    with pytest.raises(ValueError, match="batch_size: expected at most the 16 training pictures, got 32"):
        train_backbone(model(), images, labels_M, keys, 4, CONFIG)
    with pytest.raises(ValueError, match="num_classes: expected a classifier of at least 9 classes"):
        train_backbone(model(), images, labels_M + 8 - labels_M.max(), keys, 4, replace(CONFIG, batch_size=8))


@pytest.mark.parametrize(
    ("kind", "changes", "removal"),
    [
        ("plain", {}, "drop"),
        ("plain", {"reg_tokens": 2}, "drop"),
        ("plain", {"class_token": False, "global_pool": "avg"}, "drop"),
        ("swin", {}, "zero"),
    ],
)
def test_kept_patches_are_classified_as_the_operator_leaves_them(
    kind: str, changes: dict[str, object], removal: Removal
) -> None:
    torch.manual_seed(0)
    name, arguments = KINDS[kind]
    backbone = load_backbone(name, "random", timm_args=arguments | changes, patches_per_side=4)
    images = torch.randn(5, 3, 32, 32)
    kept_BK = random_patches(5, 16, 6, torch.Generator().manual_seed(0))
    present = torch.zeros(5, 16, dtype=torch.bool).scatter_(1, kept_BK, True).reshape(5, 1, 4, 4)
    classifier = backbone.classifier()
    assert classifier is not None
    expected = classifier(CoalitionEvaluator(backbone, removal)(images, present)[:, 0])
    torch.testing.assert_close(classify_kept(backbone.model, images, kept_BK, 4), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(classify_kept(backbone.model, images, None, 4), backbone.model(images))


def test_a_distilled_transformer_has_one_classifier_for_both_tokens_that_reads_the_embedding() -> None:
    name, arguments = KINDS["distilled"]
    untrained = load_backbone(name, "random", timm_args=arguments)
    assert untrained.classifier() is None  # two heads that differ
    trained = Backbone(untrained.config, train(replace(CONFIG, num_steps=3), kind="distilled"))
    classifier, images = trained.classifier(), tinted(4)[0].float()
    assert classifier is not None
    torch.testing.assert_close(classifier(trained(images)), trained.model(images), atol=1e-5, rtol=1e-5)
    assert {"head.weight", "head_dist.weight"} <= set(trained.model.state_dict())


def test_a_grid_that_is_not_the_models_own_is_refused() -> None:
    images, labels_M = tinted(NUM_PICTURES)
    with pytest.raises(ValueError, match="patches_per_side: expected the model's own 16 patches in all, got 2"):
        train_backbone(model(), images, labels_M, [""] * NUM_PICTURES, 2, CONFIG)


def test_kept_patches_differ_and_their_number_lies_in_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_kept(3, 16, False, CONFIG, generator) for _ in range(300)]
    partial = [kept_BK for kept_BK in draws if kept_BK is not None]
    assert 0.12 < 1 - len(partial) / len(draws) < 0.28
    assert {kept_BK.shape[1] for kept_BK in partial} == set(range(4, 13))
    assert all(len(set(row)) == len(row) for kept_BK in partial for row in kept_BK.tolist())
    assert all(draw_kept(3, 16, True, CONFIG, generator) is None for _ in range(20))


def test_a_warp_moves_pixels_by_about_as_much_as_it_says() -> None:
    ramp = torch.arange(32.0).expand(64, 3, 32, 32)  # the value of a pixel is its column
    assert warp(ramp, 0.0, torch.Generator()) is ramp
    moved = warp(ramp, 0.8, torch.Generator().manual_seed(0))[..., 8:24, 8:24] - ramp[..., 8:24, 8:24]
    assert abs(moved.mean()) < 0.1
    assert 0.4 < moved.std() < 0.9
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_a_joint_class_tells_the_tasks_that_it_decides() -> None:
    labels = {
        "joint": torch.tensor([0, 1, 2, 3, 0]),
        "digit": torch.tensor([0, 0, 1, 1, 0]),
        "colour": torch.tensor([0, 0, 0, 0, 1]),
    }
    readings = task_readings(labels, "joint", num_classes=5)
    assert {task: reading.tolist() for task, reading in readings.items()} == {
        "joint": [0, 1, 2, 3, -1],
        "digit": [0, 0, 1, 1, -1],
    }
