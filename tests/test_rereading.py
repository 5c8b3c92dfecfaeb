"""The class token's way through the last blocks anew, window by window."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.coalitions import Windows
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve.export import load_explainer, save_explainer
from tve.meta_attribution import exact_windows
from tve.rereading import most_blocks, reread, seen_without

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
KINDS = {
    "ViT": ("vit_tiny_patch16_224", SMALL),
    "DeiT, two tokens": ("deit_tiny_distilled_patch16_224", SMALL),
    "registers, layer scale": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 3, "init_values": 0.3}),
    "head norms": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}),
    "norm before, none after pooling, no position of the class": (
        "vit_tiny_patch16_224",
        SMALL | {"pre_norm": True, "fc_norm": True, "no_embed_class": True, "dynamic_img_size": True},
    ),
}


def backbone(kind: str = "ViT", **settings: object) -> Backbone:
    torch.manual_seed(0)
    architecture, timm_args = KINDS[kind]
    made = load_backbone(architecture, "random", timm_args=timm_args, **settings)  # type: ignore[arg-type]
    for parameter in made.model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_who_sees_every_patch_comes_to_the_embedding(kind: str, num_blocks: int) -> None:
    made, images = backbone(kind), torch.randn(2, 3, 32, 32)
    features = made.features(images, 2, num_blocks)
    assert len(features.entering) == num_blocks
    found = reread(made, features.entering, torch.ones(5, 16, dtype=torch.bool))
    torch.testing.assert_close(found, made(images)[:, None].expand(-1, 5, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("patches_per_side", "radius"), [(4, 1), (2, 0)])
def test_where_blocks_before_the_last_say_nothing_it_is_the_exact_answer(
    kind: str, patches_per_side: int, radius: int
) -> None:
    made, images = backbone(kind, patches_per_side=patches_per_side), torch.randn(2, 3, 32, 32)
    family, evaluator = Windows(patches_per_side, radius), CoalitionEvaluator(made, "drop")

    def read(num_blocks: int) -> torch.Tensor:
        return reread(made, made.features(images, 2, num_blocks).entering, seen_without(family, 4))

    # What patches have told each other of the window in the blocks before stays.
    assert (read(1) - exact_windows(evaluator, images, family).removed_BND).abs().max() > 1e-2
    for block in list(made.model.blocks)[:-1]:  # type: ignore[arg-type]
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    exact = exact_windows(evaluator, images, family).removed_BND
    assert (exact - exact[:, :1]).abs().max() > 1e-2
    for num_blocks in (1, 2):
        torch.testing.assert_close(read(num_blocks), exact, atol=1e-4, rtol=1e-4)


def test_a_patch_of_several_tokens_is_left_out_with_all_of_them() -> None:
    seen_NT = seen_without(Windows(4, 0), tokens_per_side=8)
    assert seen_NT.shape == (16, 64)
    assert (~seen_NT).sum(1).tolist() == [4] * 16
    assert (~seen_NT[5]).nonzero().flatten().tolist() == [18, 19, 26, 27]
    with pytest.raises(ValueError, match="tokens_per_side: expected a multiple of 4, the grid, got 6"):
        seen_without(Windows(4, 0), tokens_per_side=6)


@pytest.mark.parametrize(
    ("architecture", "timm_args", "expected"),
    [
        ("vit_tiny_patch16_224", SMALL, 3),
        ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "class_token": False}, 0),
        ("eva02_tiny_patch14_224", {"img_size": 28}, 0),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}, 0),
        ("resnet18", {}, 0),
    ],
)
def test_class_tokens_alone_are_carried_through_anew(
    architecture: str, timm_args: dict[str, object], expected: int
) -> None:
    assert most_blocks(load_backbone(architecture, "random", timm_args=timm_args)) == expected


def test_no_block_before_one_that_may_do_anything_and_none_with_hooks() -> None:
    made = backbone()
    blocks = made.model.blocks
    blocks[1].norm1.register_forward_hook(lambda *_: None)  # type: ignore[index,union-attr,operator]
    assert most_blocks(made) == 3  # what an explainer is made of depends on no hook
    entering = made.features(torch.randn(1, 3, 32, 32), 1, 3).entering
    assert reread(made, entering[1:], torch.ones(1, 16, dtype=torch.bool)).shape == (1, 1, 32)
    with pytest.raises(ValueError, match="block 1 of vit_tiny_patch16_224: expected no hooks, got some"):
        reread(made, entering, torch.ones(1, 16, dtype=torch.bool))
    blocks[1].attn.qkv = nn.Sequential(blocks[1].attn.qkv)  # type: ignore[index,union-attr,operator]
    assert most_blocks(made) == 2


def test_a_window_that_removes_everything_leaves_the_class_token_to_itself() -> None:
    made, images = backbone(), torch.randn(2, 3, 32, 32)
    alone = reread(made, made.features(images, 1, 2).entering, torch.zeros(1, 16, dtype=torch.bool))
    assert alone.isfinite().all()
    assert not torch.allclose(alone[:, 0], made(images), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "num_entered", "most"),
    [({}, 4, 3), ({}, -1, 3), ({"global_pool": "avg", "class_token": False}, 1, 0)],
)
def test_tokens_that_a_backbone_does_not_have_are_refused(
    settings: dict[str, object], num_entered: int, most: int
) -> None:
    made = load_backbone("vit_tiny_patch16_224", "random", timm_args=SMALL | settings)
    with pytest.raises(ValueError, match=f"num_entered: expected 0 to {most} for vit_tiny_patch16_224, got"):
        made.features(torch.randn(1, 3, 32, 32), 1, num_entered)


def explainer(made: Backbone, reread_blocks: int, trunk: str = "frozen") -> Explainer:
    torch.manual_seed(1)
    return Explainer(
        made,
        ExplainerConfig(1, "drop", trunk=trunk, num_levels=2, width=16, depth=1, reread_blocks=reread_blocks),  # type: ignore[arg-type]
    )


def test_an_explainer_begins_at_the_trivial_answers_and_can_say_what_it_reread() -> None:
    made, images = backbone(), torch.randn(2, 3, 32, 32)
    explains = explainer(made, 2)
    full_BD = made(images)
    torch.testing.assert_close(explains(images).removed_BND, full_BD[:, None].expand(-1, 16, -1), atol=1e-4, rtol=1e-4)
    nn.init.ones_(explains.network.reread_scale_D)  # type: ignore[arg-type]
    expected = reread(made, made.features(images, 2, 2).entering, seen_without(explains.family, 4))
    torch.testing.assert_close(explains(images).removed_BND, expected, atol=1e-4, rtol=1e-4)


def test_a_backbone_without_class_tokens_has_the_explainer_it_would_have() -> None:
    swin = load_backbone(
        "swin_tiny_patch4_window7_224",
        "random",
        timm_args={"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)},
    )
    assert explainer(swin, 3).trained_state().keys() == explainer(swin, 0).trained_state().keys()
    assert explainer(backbone(), 9).network.reread_blocks == 3  # type: ignore[union-attr]


def test_a_frozen_trunk_takes_no_gradient_even_where_it_could() -> None:
    made = backbone().requires_grad_(True)
    explains = explainer(made, 2)
    nn.init.ones_(explains.network.reread_scale_D)  # type: ignore[arg-type]
    explains(torch.randn(1, 3, 32, 32)).removed_BND.square().mean().backward()
    assert all(parameter.grad is None for parameter in made.parameters())
    assert explains.network.reread_scale_D.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


def test_a_trained_trunk_takes_gradients_through_what_is_reread() -> None:
    explains = explainer(backbone(), 2, trunk="trained")
    nn.init.ones_(explains.network.reread_scale_D)  # type: ignore[arg-type]
    # The mixing blocks say nothing yet, so that no gradient comes through the levels.
    explains(torch.randn(1, 3, 32, 32)).removed_BND.square().mean().backward()
    gradients = {name: p.grad for name, p in explains.network.named_parameters()}
    assert gradients["from_pixels.weight"].abs().sum() == 0  # type: ignore[union-attr]
    assert gradients["trunk.model.blocks.3.attn.qkv.weight"].abs().sum() > 0  # type: ignore[union-attr]
    assert gradients["trunk.model.blocks.0.attn.qkv.weight"].abs().sum() > 0  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in explains.backbone.parameters())


def test_under_autocast_rereading_keeps_to_float32() -> None:
    made, images = backbone(), torch.randn(2, 3, 32, 32)
    explains = explainer(made, 2)
    nn.init.ones_(explains.network.reread_scale_D)  # type: ignore[arg-type]
    with torch.no_grad():
        meta = explains(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = explains(images)
    changed, roughly = (each.removed_BND - each.full_BD[:, None] for each in (meta, rough))
    assert (changed - roughly).norm() < 0.1 * changed.norm()


def test_an_export_says_what_it_rereads_and_opens_the_same(tmp_path: Path) -> None:
    explains = explainer(load_backbone("vit_tiny_patch16_224", "random", timm_args=SMALL), 2).eval()
    nn.init.ones_(explains.network.reread_scale_D)  # type: ignore[arg-type]
    save_explainer(explains, tmp_path, {})
    assert "trunk frozen, blocks reread: 2" in (tmp_path / "README.md").read_text()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_explainer(tmp_path)(images).removed_BND, explains(images).removed_BND)


def test_the_number_of_blocks_is_a_whole_number_not_below_zero() -> None:
    with pytest.raises(ValueError, match="reread_blocks: expected 0 or more, got -1"):
        ExplainerConfig(1, "drop", reread_blocks=-1)
    with pytest.raises(ValueError, match=r"reread_blocks: expected a whole number \(int\), got 1\.0"):
        ExplainerConfig(1, "drop", reread_blocks=1.0)  # type: ignore[arg-type]
