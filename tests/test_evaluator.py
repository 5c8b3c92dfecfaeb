import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.removal import Removal, zero_pixels

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
VIT = "vit_tiny_patch16_224"
# Ways to pool, kinds of prefix tokens, and where the position embedding is added.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "class token": (VIT, {}),
    "class token and registers": (VIT, {"reg_tokens": 4}),
    "positions of patches only": (VIT, {"reg_tokens": 4, "no_embed_class": True}),
    "average of patches": (VIT, {"global_pool": "avg", "fc_norm": True}),
    "average, no prefix": (VIT, {"global_pool": "avg", "class_token": False}),
    "average, registers": (VIT, {"global_pool": "avg", "reg_tokens": 2, "class_token": False}),
    "attention pooling": (VIT, {"global_pool": "map", "class_token": False}),
    "norm before the blocks": (VIT, {"pre_norm": True}),
    "layer scale and norms of q, k": (VIT, {"init_values": 0.1, "qk_norm": True}),
    "pictures of any size": (VIT, {"dynamic_img_size": True}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}),
}
WITHOUT_CLASS_TOKEN = ("average of patches", "average, no prefix", "average, registers", "attention pooling")


def backbone(variant: str = "class token") -> Backbone:
    architecture, changes = VARIANTS[variant]
    torch.manual_seed(0)
    made = load_backbone(architecture, "random", timm_args=SIZE | changes)
    for parameter in made.model.parameters():  # untrained positions and scales are too small to show a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coalitions(count: int = 3, per_picture: int = 7) -> Tensor:
    """Random coalitions of all sizes, none empty; the last of each picture is complete."""
    generator = torch.Generator().manual_seed(2)
    present = torch.rand(count, per_picture, 4, 4, generator=generator) < torch.rand(
        count, per_picture, 1, 1, generator=generator
    )
    present[..., 1, 2] = True
    present[:, -1] = True
    return present


def attention_forbidden(made: Backbone, images: Tensor, present_BKPP: Tensor) -> Tensor:
    """The definition of `drop`, in float64: no absent patch is attended to, and none is pooled."""
    model: Any = copy.deepcopy(made.model).double()
    num_prefix = model.num_prefix_tokens
    rows = []
    for image, present_KPP in zip(images.double(), present_BKPP, strict=True):
        for present_PP in present_KPP:
            visible_T = torch.cat([torch.ones(num_prefix, dtype=torch.bool), present_PP.flatten()])
            features = model.forward_features(image[None], attn_mask=visible_T[None, None, None])
            rows.append(model.forward_head(features[:, visible_T], pre_logits=True)[0])
    return torch.stack(rows).reshape(*present_BKPP.shape[:2], -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_equals_forbidding_attention_to_removed_patches(variant: str) -> None:
    made, images, present = backbone(variant), pictures(), coalitions()
    exact = attention_forbidden(made, images, present)
    embeddings = CoalitionEvaluator(made, "drop")(images, present)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_equals_the_model_on_a_masked_copy(variant: str) -> None:
    made, images, present = backbone(variant), pictures(), coalitions()
    masked = torch.stack([zero_pixels(images, present[:, k]) for k in range(present.shape[1])], dim=1)
    expected = torch.stack([made(copies) for copies in masked])
    torch.testing.assert_close(CoalitionEvaluator(made, "zero")(images, present), expected)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_pixels_of_removed_patches_change_nothing(removal: Removal) -> None:
    evaluator, images, present = CoalitionEvaluator(backbone(), removal), pictures(1), coalitions(1, 1)
    present[0, 0] = torch.rand(4, 4, generator=torch.Generator().manual_seed(5)) < 0.5
    untouched = zero_pixels(torch.ones_like(images), present[:, 0]) > 0
    noise = torch.where(untouched, images, torch.randn_like(images))
    assert not torch.equal(noise, images)
    assert torch.equal(evaluator(images, present), evaluator(noise, present))


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_the_complete_coalition_is_the_picture(removal: Removal) -> None:
    made, images = backbone(), pictures()
    evaluator = CoalitionEvaluator(made, removal)
    complete = evaluator(images, torch.ones(3, 1, 4, 4, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(complete, made(images))
    torch.testing.assert_close(evaluator.full(images), made(images))


def test_zero_serves_models_without_tokens() -> None:
    torch.manual_seed(0)
    made = load_backbone("resnet18", "random", timm_args={"num_classes": 5}, patches_per_side=7)
    images, present = torch.randn(1, 3, 224, 224), torch.zeros(1, 2, 7, 7, dtype=torch.bool)
    present[0, 1, :3] = True
    expected = made(zero_pixels(images.expand(2, -1, -1, -1), present[0]))
    torch.testing.assert_close(CoalitionEvaluator(made, "zero")(images, present)[0], expected)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_the_memory_budget_does_not_change_results(removal: Removal) -> None:
    made, images, present = backbone(), pictures(), coalitions()
    ample, tight = CoalitionEvaluator(made, removal), CoalitionEvaluator(made, removal, memory_mib=1)
    tight.memory_bytes = 1  # one copy a pass
    assert ample._copies_per_pass(16) > 21
    assert tight._copies_per_pass(16) == 1
    torch.testing.assert_close(tight(images, present), ample(images, present))
    torch.testing.assert_close(tight.full(images), ample.full(images))


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_a_coalition_does_not_depend_on_its_company(removal: Removal) -> None:
    evaluator, images, present = CoalitionEvaluator(backbone(), removal), pictures(), coalitions()
    together = evaluator(images, present)
    for b, k in ((0, 0), (1, 3), (2, 6)):
        alone = evaluator(images[b : b + 1], present[b : b + 1, k : k + 1])[0, 0]
        torch.testing.assert_close(alone, together[b, k])


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_any_number_of_coalitions_per_picture_gives_what_the_batch_gives(removal: Removal) -> None:
    evaluator, images, present = CoalitionEvaluator(backbone(), removal), pictures(), coalitions()
    chosen = torch.tensor([[2, 6], [0, 1], [2, 0], [2, 2], [0, 5]])  # (picture, coalition), out of order
    ragged = evaluator.ragged(images, chosen[:, 0], present[chosen[:, 0], chosen[:, 1]])
    batched = evaluator(images, present)[chosen[:, 0], chosen[:, 1]]
    torch.testing.assert_close(ragged, batched)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_no_coalition_and_no_picture_give_nothing(removal: Removal) -> None:
    evaluator = CoalitionEvaluator(backbone(), removal)
    none_each = evaluator(pictures(2), torch.ones(2, 0, 4, 4, dtype=torch.bool))
    assert none_each.shape == (2, 0, 32)
    no_picture = evaluator(torch.zeros(0, 3, 32, 32), torch.ones(0, 4, 4, 4, dtype=torch.bool))
    assert no_picture.shape == (0, 4, 32)


def test_an_empty_coalition_with_a_class_token_is_the_same_for_every_picture() -> None:
    evaluator = CoalitionEvaluator(backbone(), "drop")
    empty = evaluator(pictures(), torch.zeros(3, 1, 4, 4, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(empty, evaluator.empty().expand(3, -1))
    torch.testing.assert_close(
        empty[:1].double(),
        attention_forbidden(evaluator.backbone, pictures(1), torch.zeros(1, 1, 4, 4, dtype=torch.bool))[0],
        atol=2e-5,
        rtol=2e-5,
    )


@pytest.mark.parametrize("variant", WITHOUT_CLASS_TOKEN)
def test_an_empty_coalition_without_a_class_token_is_an_error_that_names_zero(variant: str) -> None:
    evaluator = CoalitionEvaluator(backbone(variant), "drop")
    present = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    present[0, 1] = False
    with pytest.raises(ValueError, match="pools patch tokens; got an empty coalition; use removal 'zero'"):
        evaluator(pictures(1), present)


@pytest.mark.parametrize("variant", WITHOUT_CLASS_TOKEN)
def test_the_empty_picture_without_a_class_token_is_the_all_zero_one(variant: str) -> None:
    made = backbone(variant)
    expected = made(torch.zeros(1, 3, 32, 32))[0]
    removals: tuple[Removal, ...] = ("zero", "drop")
    for removal in removals:
        torch.testing.assert_close(CoalitionEvaluator(made, removal).empty(), expected)


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("variant", ["class token", "average of patches"])
def test_bfloat16_is_close_to_float32(removal: Removal, variant: str) -> None:
    made, images, present = backbone(variant), pictures(), coalitions()
    exact = CoalitionEvaluator(made, removal)(images, present)
    rough = CoalitionEvaluator(made, removal, precision="bfloat16")(images, present)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough - exact).norm() / exact.norm()) < 0.02
    assert next(made.model.parameters()).dtype == torch.float32


def test_drop_is_refused_where_tokens_cannot_be_left_out() -> None:
    for architecture in ("resnet18", "swin_tiny_patch4_window7_224"):
        made = load_backbone(architecture, "random", patches_per_side=7)
        with pytest.raises(ValueError, match=f"removal: expected 'zero' for {architecture}"):
            CoalitionEvaluator(made, "drop")


def test_drop_is_refused_where_a_stem_lets_patches_see_each_other() -> None:
    made = load_backbone("vit_tiny_r_s16_p8_224", "random")
    with pytest.raises(ValueError, match="removal: expected 'zero' for vit_tiny_r_s16_p8_224"):
        CoalitionEvaluator(made, "drop")


def test_drop_is_refused_on_a_grid_that_is_not_the_models_own() -> None:
    made = load_backbone(VIT, "random", timm_args=SIZE, patches_per_side=2)
    with pytest.raises(ValueError, match="'drop' expected the model's own 4 x 4 patches, got a grid of 2"):
        CoalitionEvaluator(made, "drop")


def test_settings_that_do_not_exist_are_errors() -> None:
    made = backbone()
    with pytest.raises(ValueError, match="removal: expected one of"):
        CoalitionEvaluator(made, "blur")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision: expected one of"):
        CoalitionEvaluator(made, "drop", precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_mib: expected at least 1, got 0"):
        CoalitionEvaluator(made, "drop", memory_mib=0)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_inputs_of_another_shape_are_errors(removal: Removal) -> None:
    evaluator = CoalitionEvaluator(backbone(), removal)
    with pytest.raises(ValueError, match=r"coalitions: expected bool \[3, K, 4, 4\], got torch.float32"):
        evaluator(pictures(), coalitions().float())
    with pytest.raises(ValueError, match=r"coalitions: expected bool \[3, K, 4, 4\]"):
        evaluator(pictures(), coalitions(2))
    for call in (lambda images: evaluator(images, coalitions(1)), evaluator.full):
        with pytest.raises(ValueError, match=r"images: expected \[B, 3, 32, 32\]"):
            call(torch.zeros(1, 3, 24, 24))
