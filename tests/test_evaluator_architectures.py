"""`drop` and `zero` on packed tokens against the definition, on timm's own architectures with every parameter redrawn.

Fresh LayerScale and timm's initialisation hide errors: a block that hardly moves the output can be left out unseen. So
all parameters are drawn anew, such that each block moves the output by at least a tenth.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone
from tve.coalitions import WindowCoalitions, Windows
from tve.evaluator import CoalitionEvaluator
from tve.plain_vits import obstacle, pools_prefix
from tve.removal import Removal, zero_pixels
from tve.token_engine import TokenEngine
from tve.vit_blocks import WholeBlock

GRID = 4
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4, "num_classes": 0}
# What each stands for, and what it takes to make it small.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},  # class token
    "deit_tiny_distilled_patch16_224": {},  # class and distillation token
    "deit3_small_patch16_224": {},  # LayerScale, positions of patches only
    "vit_small_patch14_dinov2": {},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {},  # registers
    "vit_giant_patch14_dinov2": {},  # gated MLP
    "vit_base_patch16_clip_quickgelu_224": {},  # norm before the blocks
    "vit_base_patch16_siglip_224": {},  # attention pooling
    "vit_base_patch16_siglip_gap_224": {},  # average, no class token
    "vit_medium_patch16_gap_240": {},  # average, norm after pooling
    "vit_so150m_patch16_reg4_map_256": {},  # registers and attention pooling
    "vit_wee_patch16_reg1_gap_256": {},  # registers and average
    "vit_pwee_patch16_reg1_gap_256": {},  # attention and MLP side by side
    "vit_dwee_patch16_reg1_gap_256": {},  # differential attention
    "vit_dpwee_patch16_reg1_gap_256": {},  # both
    "vit_small_patch16_18x2_224": {},  # two attentions side by side
    "vit_base_patch16_rpn_224": {},  # norms after the branches
    "vit_base_patch16_xp_224": {},  # side by side, with head norms
    "aimv2_large_patch14_224": {},  # RMS norms, SwiGLU
    "test_vit4": {"patch_size": 16},  # head norms with RMS, scaled attention
    "flexivit_small": {},
    "beit3_base_patch16_224": {},  # norms inside attention and MLP
    "eva_giant_patch14_224": {},  # Eva, biases of q and v alone
    "eva02_tiny_patch14_224": {},  # rotary positions, average
    "eva02_base_patch16_clip_224": {},  # rotary positions, class token, norms inside
    "eva02_enormous_patch14_clip_224": {},  # norms after the branches
    "vit_base_patch16_rope_224": {},  # rotary positions alone
    "vit_base_patch16_rope_mixed_224": {},  # rotary positions of each block and head
    "vit_small_patch16_dinov3": {},  # rotary positions with halves turned, registers
    "vit_pe_core_base_patch16_224": {},  # rotary positions and attention pooling
    "vit_base_patch16_sapiens2": {"num_kv_heads": (4, 2, 1)},  # grouped keys, rotary positions, RMS norms
}
WHOLE = {  # read as whole blocks: no sharing inside them
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_xp_224",
    "eva02_enormous_patch14_clip_224",
}
MADE: dict[str, Backbone] = {}


def backbone(architecture: str) -> Backbone:
    if architecture not in MADE:
        patch = 14 if "patch14" in architecture else 16
        sizes = {"img_size": GRID * patch} | SMALL | ARCHITECTURES[architecture]
        made = load_backbone(architecture, "random", timm_args=sizes)
        redraw(made.model)
        MADE[architecture] = made
    return MADE[architecture]


def redraw(model: nn.Module) -> None:
    """Every parameter and learned-like buffer, at sizes at which each matters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1 and ("norm" in name or "gamma" in name) and not name.endswith("bias"):
            parameter.data = 1 + 0.3 * drawn
        elif parameter.ndim >= 2 and name.endswith("weight"):
            parameter.data = drawn * 1.5 / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.5 * drawn


def pictures(made: Backbone) -> Tensor:
    size = made.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def coalitions() -> Tensor:
    """Of each of two pictures: a window in a corner, all but a window, a sparse one, the complete one."""
    present = torch.rand(2, 4, GRID, GRID, generator=torch.Generator().manual_seed(2)) < 0.3
    present[:, 2, 1, 3] = True
    windows = Windows(GRID, 1).kept_NPP()
    present[:, 0], present[:, 1], present[:, 3] = windows[0], ~windows[6], True
    return present


def definition(model: Any, images: Tensor, present_BKPP: Tensor) -> Tensor:
    """`drop` in float64: no absent patch is attended to, and none is pooled."""
    model = copy.deepcopy(model).double()
    for module in model.modules():  # the plain formula, which takes masks in every attention
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    num_prefix = model.num_prefix_tokens
    rows = []
    for image, present_KPP in zip(images.double(), present_BKPP, strict=True):
        for present_PP in present_KPP:
            visible_T = torch.cat([torch.ones(num_prefix, dtype=torch.bool), present_PP.flatten()])
            mask_TT = visible_T.expand(len(visible_T), -1)[None, None]
            features = model.forward_features(image[None], attn_mask=mask_TT)
            rows.append(model.forward_head(features[:, visible_T], pre_logits=True)[0])
    return torch.stack(rows).unflatten(0, present_BKPP.shape[:2]).detach()


def distance(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drop_equals_forbidding_attention(architecture: str) -> None:
    made, present = backbone(architecture), coalitions()
    images = pictures(made)
    evaluator = CoalitionEvaluator(made, "drop")
    assert distance(evaluator(images, present), definition(made.model, images, present)) < 2e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zero_equals_the_model_on_masked_copies(architecture: str) -> None:
    made, present = backbone(architecture), coalitions()
    images = pictures(made)
    model: Any = copy.deepcopy(made.model).double()
    masked = [zero_pixels(images.double(), present[:, k]) for k in range(present.shape[1])]
    exact = torch.stack([model.forward_head(model.forward_features(x), pre_logits=True) for x in masked], dim=1)
    evaluator = CoalitionEvaluator(made, "zero")
    assert isinstance(evaluator.engine, TokenEngine)
    assert distance(evaluator(images, present), exact.detach()) < 2e-6


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_equal_their_masks(architecture: str, removal: Removal) -> None:
    made = backbone(architecture)
    images, evaluator = pictures(made), CoalitionEvaluator(made, removal)
    centres = torch.tensor([[0, 5, 5, 11], [15, 6, 6, 3]])
    windows = WindowCoalitions(Windows(GRID, 1), centres, torch.tensor([[True, True, False, False]] * 2))
    torch.testing.assert_close(evaluator(images, windows), evaluator(images, windows.present()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_moves_the_output_by_a_tenth(architecture: str) -> None:
    made = backbone(architecture)
    images, present = pictures(made), coalitions()
    whole = definition(made.model, images, present)
    for number in range(len(made.model.blocks)):  # type: ignore[arg-type]
        assert distance(definition(without_block(made.model, number), images, present), whole) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_taken_apart_unless_they_cannot_be(architecture: str) -> None:
    engine = CoalitionEvaluator(backbone(architecture), "drop").engine
    assert isinstance(engine, TokenEngine)
    assert {type(block) is WholeBlock for block in engine.blocks} == {architecture in WHOLE}


@pytest.mark.parametrize("architecture", ["deit3_small_patch16_224", "eva02_base_patch16_clip_224", "test_vit4"])
def test_the_comparison_sees_what_is_left_out(architecture: str) -> None:
    """The tolerance above is a thousandth of what a missing position, block or norm would make."""
    made, present = backbone(architecture), coalitions()
    images = pictures(made)
    exact = definition(made.model, images, present)
    mutants = {f"block {number}": without_block(made.model, number) for number in range(3)}
    mutants["position"] = copy.deepcopy(made.model)
    mutants["position"].pos_embed.data.zero_()  # type: ignore[union-attr,operator]
    for name in ("norm1", "norm2"):
        mutants[name] = copy.deepcopy(made.model)
        setattr(mutants[name].blocks[1], name, nn.Identity())  # type: ignore[index]
    mutants["scale"] = copy.deepcopy(made.model)
    for name, parameter in mutants["scale"].named_parameters():
        if "gamma" in name or name.endswith("norm.weight"):
            parameter.data.fill_(1)
    for name, mutant in mutants.items():
        left_out = copy.copy(made)
        left_out.__dict__["_modules"] = {**made._modules, "model": mutant}
        found = CoalitionEvaluator(left_out, "drop")(images, present)
        assert distance(found, exact) > 2e-3, name


def without_block(model: nn.Module, number: int) -> nn.Module:
    shorter: Any = copy.deepcopy(model)
    shorter.blocks[number] = PassedThrough()
    return shorter  # type: ignore[no-any-return]


class PassedThrough(nn.Module):
    def forward(self, x: Tensor, **_: object) -> Tensor:
        return x


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_coalition_is_served_where_something_is_left_to_pool(architecture: str) -> None:
    made = backbone(architecture)
    images, nothing = pictures(made), torch.zeros(2, 1, GRID, GRID, dtype=torch.bool)
    evaluator = CoalitionEvaluator(made, "drop")
    if pools_prefix(made.model):
        assert distance(evaluator(images, nothing), definition(made.model, images, nothing)) < 2e-6
    else:
        with pytest.raises(ValueError, match="got an empty coalition; use removal 'zero'"):
            evaluator(images, nothing)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("beit_base_patch16_224", "Beit is no plain vision transformer"),
        ("cait_xxs24_224", "Cait is no plain vision transformer"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos is no plain"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed lets patches see their neighbours"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer is no plain"),
        ("resnet18", "ResNet is no plain"),
    ],
)
def test_models_that_drop_cannot_serve_are_refused_by_name(architecture: str, reason: str) -> None:
    made = load_backbone(architecture, "random")
    assert reason in obstacle(made.model, made.image_size, made.patches_per_side)
    with pytest.raises(ValueError, match=f"removal: expected 'zero' for {architecture}.*{reason}"):
        CoalitionEvaluator(made, "drop")
