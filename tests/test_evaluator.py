import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone
from tve.coalitions import WindowCoalitions, Windows
from tve.evaluator import CoalitionEvaluator
from tve.kernels import Choice
from tve.memory import MemoryNeed, peak_bytes
from tve.precision import Precision
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
AUTO_ON_A_CPU = "Triton's interpreter is for tests, not for speed"
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
    ample, tight = CoalitionEvaluator(made, removal), CoalitionEvaluator(made, removal)
    calls = {id(ample): 0, id(tight): 0}
    for evaluator in (ample, tight):
        evaluate = evaluator.engine._pass

        def counted(*given: Any, evaluate: Any = evaluate, owner: int = id(evaluator)) -> Tensor:
            calls[owner] += 1
            return evaluate(*given)  # type: ignore[no-any-return]

        evaluator.engine._pass = counted  # type: ignore[method-assign]
    expected = ample(images, present)
    tight.engine.memory_bytes = 2**17
    torch.testing.assert_close(tight(images, present), expected)
    assert calls[id(ample)] < calls[id(tight)]
    torch.testing.assert_close(tight.full(images), ample.full(images))


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_live_tensors_stay_within_the_budget_and_use_it(removal: Removal, precision: Precision) -> None:
    made, images = backbone(), pictures(8)
    present = torch.rand(8, 800, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    for mib in (4, 6, 8):
        evaluator = CoalitionEvaluator(made, removal, memory_mib=mib, precision=precision)
        evaluator.full(images[:1])  # measures its needs on tensors without memory, which are counted as others are
        peak = peak_bytes(lambda evaluator=evaluator: evaluator(images, present)) - 8 * 800 * 32 * 4  # type: ignore[misc]
        assert 0.2 * mib < peak / 2**20 < 1.1 * mib


def test_measuring_its_needs_takes_no_memory() -> None:
    evaluator, images = CoalitionEvaluator(backbone(), "drop", memory_mib=2), pictures(2)
    before, after = _resident_bytes(), 0
    for _ in range(3):
        CoalitionEvaluator(evaluator.backbone, "drop", memory_mib=2).full(images)
        after = _resident_bytes()
    assert after - before < 16 * 2**20  # the probe's 32,768 rows would hold 40 MiB


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_backbone_that_moved_is_an_error() -> None:
    made = backbone()
    evaluator = CoalitionEvaluator(made, "drop")
    evaluator.device = torch.device("meta")
    with pytest.raises(
        ValueError, match="backbone: expected on meta, where it was when this evaluator was made, got cpu"
    ):
        evaluator(pictures(), coalitions())


def test_replaced_layers_and_hooks_are_not_read_around() -> None:
    class Halved(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / 2  # type: ignore[no-any-return]

    images, present = pictures(), coalitions()
    made = backbone()
    made.model.blocks[1].attn.qkv = Halved(made.model.blocks[1].attn.qkv)  # type: ignore[index,union-attr]
    made.model.blocks[2].attn.register_forward_hook(lambda *given: given[-1] * 2)  # type: ignore[index,union-attr]
    torch.testing.assert_close(
        CoalitionEvaluator(made, "drop")(images, present).double(),
        attention_forbidden(made, images, present),
        atol=2e-5,
        rtol=2e-5,
    )


def test_a_budget_too_small_for_one_coalition_is_an_error() -> None:
    made = load_backbone(VIT, "random")
    present = torch.ones(1, 1, 14, 14, dtype=torch.bool)
    for removal in ("zero", "drop"):
        evaluator = CoalitionEvaluator(made, removal, memory_mib=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"memory_mib: expected at least \d+ for the tokens of one picture, got 1"):
            evaluator(torch.zeros(1, 3, 224, 224), present)
        evaluator.engine._bank_need = MemoryNeed(0, 1)  # type: ignore[union-attr]
        with pytest.raises(
            ValueError, match=r"memory_mib: expected at least \d+ for one coalition of 197 tokens, got 1"
        ):
            evaluator(torch.zeros(1, 3, 224, 224), present)
    made = load_backbone("resnet18", "random", patches_per_side=7)
    with pytest.raises(ValueError, match=r"memory_mib: expected at least \d+ for one masked copy, got 1"):
        CoalitionEvaluator(made, "zero", memory_mib=1)(torch.zeros(1, 3, 224, 224), present[..., :7, :7])


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_coarser_patches_are_blocks_of_the_models_own(removal: Removal) -> None:
    fine, coarse = (load_backbone(VIT, "random", timm_args=SIZE, patches_per_side=side) for side in (4, 2))
    coarse.model.load_state_dict(fine.model.state_dict())
    present = torch.tensor([[[[True, False], [False, True]]] * 1] * 3)
    spread = present.repeat_interleave(2, -1).repeat_interleave(2, -2)
    found = CoalitionEvaluator(coarse, removal)(pictures(), present)
    torch.testing.assert_close(found, CoalitionEvaluator(fine, removal)(pictures(), spread))
    windows = WindowCoalitions(Windows(2, 0), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(
        CoalitionEvaluator(coarse, removal)(pictures(), windows),
        CoalitionEvaluator(coarse, removal)(pictures(), windows.present()),
    )


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
    masked = CoalitionEvaluator(load_backbone("resnet18", "random", patches_per_side=7), "zero")
    assert masked(torch.zeros(1, 3, 224, 224), torch.ones(1, 0, 7, 7, dtype=torch.bool)).shape == (1, 0, 512)
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


def test_drop_is_refused_on_a_grid_that_does_not_divide_the_models_own() -> None:
    made = load_backbone(VIT, "random", timm_args=SIZE, patches_per_side=8)
    with pytest.raises(ValueError, match="a grid of 4 per side, which a grid of 8 does not divide"):
        CoalitionEvaluator(made, "drop")
    images, present = pictures(1), torch.rand(1, 2, 8, 8) < 0.5
    expected = made(zero_pixels(images.expand(2, -1, -1, -1), present[0]))
    torch.testing.assert_close(CoalitionEvaluator(made, "zero")(images, present)[0], expected)


def test_settings_that_do_not_exist_are_errors() -> None:
    made = backbone()
    with pytest.raises(ValueError, match="removal: expected one of"):
        CoalitionEvaluator(made, "blur")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision: expected one of"):
        CoalitionEvaluator(made, "drop", precision="float8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_mib: expected at least 1, got 0"):
        CoalitionEvaluator(made, "drop", memory_mib=0)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_inputs_of_another_shape_are_errors(removal: Removal) -> None:
    evaluator = CoalitionEvaluator(backbone(), removal)
    with pytest.raises(ValueError, match=r"coalitions: expected bool \[3, K, 4, 4\], got float32"):
        evaluator(pictures(), coalitions().float())
    with pytest.raises(ValueError, match=r"coalitions: expected bool \[3, K, 4, 4\]"):
        evaluator(pictures(), coalitions(2))
    for call in (lambda images: evaluator(images, coalitions(1)), evaluator.full):
        with pytest.raises(ValueError, match=r"images: expected \[B, 3, 32, 32\]"):
            call(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="coalitions: expected cpu, where the pictures are, got meta"):
        evaluator(pictures(), coalitions().to("meta"))
    with pytest.raises(ValueError, match="images: expected cpu, where the backbone is, got meta"):
        evaluator(pictures().to("meta"), coalitions())
    with pytest.raises(ValueError, match="or WindowCoalitions, got list"):
        evaluator(pictures(), [[0]])  # type: ignore[arg-type]
    for wrong, got in (
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([[0], [1]]), "torch.int64"),
        ([0, 1], "list"),
    ):
        with pytest.raises(
            ValueError, match=rf"image_index: expected int64 \[M\] on cpu, a picture of each, got {got}"
        ):
            evaluator.ragged(pictures(), wrong, coalitions()[0, :2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_index: expected 0 to 2, got 3"):
        evaluator.ragged(pictures(), torch.tensor([0, 3]), coalitions()[0, :2])
    nan = pictures()
    nan[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinity in picture 1"):
        evaluator(nan, coalitions())


def test_windows_that_do_not_fit_are_errors() -> None:
    evaluator, centre = CoalitionEvaluator(backbone(), "drop"), torch.tensor([[0], [3], [16]])
    kept = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"centre: expected 0 to 15 \(p \* P \+ q\), got 16"):
        evaluator(pictures(), WindowCoalitions(Windows(4, 1), centre, kept))
    with pytest.raises(
        ValueError, match=r"expected windows \[3, K\] on a grid \[4, 4\], got windows \[3, 1\] on a grid \[5"
    ):
        evaluator(pictures(), WindowCoalitions(Windows(5, 1), centre, kept))
    with pytest.raises(ValueError, match=r"centre: expected a tensor of torch.int64, got torch.float32"):
        WindowCoalitions(Windows(4, 1), centre.float(), kept)
    with pytest.raises(ValueError, match=r"window coalitions: expected one sign a centre"):
        WindowCoalitions(Windows(4, 1), centre, kept[:2])


def test_a_backend_that_cannot_run_is_an_error_and_auto_says_why_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as on a machine without a GPU
    made = backbone()
    assert CoalitionEvaluator(made, "drop").choice == Choice("torch", AUTO_ON_A_CPU)
    assert CoalitionEvaluator(made, "drop", backend="torch").choice == Choice("torch", "asked for")
    resnet = load_backbone("resnet18", "random", patches_per_side=7)
    assert CoalitionEvaluator(resnet, "zero").choice.backend == "torch"
    with pytest.raises(ValueError, match="got resnet18: resnet18 is evaluated on masked copies; use 'auto'"):
        CoalitionEvaluator(resnet, "zero", backend="triton")
    narrow = load_backbone(VIT, "random", timm_args=SIZE | {"num_heads": 4})
    with pytest.raises(ValueError, match="its heads have a width of 8, and kernels serve 16 to 128; use 'auto'"):
        CoalitionEvaluator(narrow, "drop", backend="triton")
    with pytest.raises(ValueError, match=r"backend: expected one of \['auto', 'triton', 'torch'\], got 'cuda'"):
        CoalitionEvaluator(made, "drop", backend="cuda")  # type: ignore[arg-type]
