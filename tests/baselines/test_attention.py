from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tve.backbones import Backbone, BackboneConfig, Preprocessing, load_backbone
from tve.baselines.attention import (
    AttentionRollout,
    GradCam,
    attention_probabilities,
    grad_cam_obstacle,
    rollout_obstacle,
)
from tve.baselines.method import Method, Question

PATCHES, PATCH_SIZE, SIZE = 6, 8, 48
TINY = {"img_size": SIZE, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "qk_norm": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "eva": ("eva02_tiny_patch14_224", {}),
}
POOLED = {"class token": [0], "registers": [0], "distilled": [0, 1]}
KEYS = ["a", "b", "c"]


def tiny(kind: str) -> Backbone:
    architecture, arguments = MODELS[kind]
    torch.manual_seed(0)
    backbone = load_backbone(architecture, "random", timm_args=TINY | arguments)
    for parameter in backbone.model.parameters():
        if parameter.ndim == 2:  # timm's start is so near zero that attention would be even
            nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return backbone


def tiny_swin() -> Backbone:
    torch.manual_seed(0)
    arguments = {"img_size": 64, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    return load_backbone("swin_tiny_patch4_window7_224", "random", timm_args=arguments, patches_per_side=4)


def one_patch_reader(place: tuple[int, int]) -> Backbone:
    """A transformer whose class token attends to one place, whatever is there, and copies its colour.

    Channels 0-2 of a token are its patch's colour, 3 marks the place; the class token collects colours in 4-6.
    """
    model: Any = VisionTransformer(
        img_size=SIZE, patch_size=PATCH_SIZE, embed_dim=8, depth=1, num_heads=1, num_classes=0
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    block = model.blocks[0]
    block.norm1, model.norm = nn.Identity(), nn.Identity()
    with torch.no_grad():
        model.pos_embed[0, 1 + place[0] * PATCHES + place[1], 3] = 1.0
        for colour in range(3):
            model.patch_embed.proj.weight[colour, colour] = 1 / PATCH_SIZE**2
            block.attn.qkv.weight[16 + colour, colour] = 1
            block.attn.proj.weight[4 + colour, colour] = 1
        block.attn.qkv.weight[8, 3] = 1000  # keys
        block.attn.qkv.bias[0] = 1  # queries
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    return Backbone(BackboneConfig("reader", "vit", PATCHES, preprocessing), model)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def asked(backbone: Backbone, target: list[int]) -> dict[str, Question]:
    torch.manual_seed(2)
    return {"task": Question(nn.Linear(backbone.embed_dim, 5), torch.tensor(target))}


def map_of(method: Method, images: Tensor, questions: dict[str, Question]) -> Tensor:
    return method(images, KEYS[: len(images)], questions)["task", method.variants[0]].map_BPP


def methods_of(backbone: Backbone) -> list[Method]:
    return [AttentionRollout(backbone), GradCam(backbone)]


@torch.no_grad()
def attention_by_hand(model: Any, images: Tensor) -> list[Tensor]:
    """softmax(q k^T / sqrt(W)) [B, H, T, T] of each block of a VisionTransformer, from its weights."""
    x_BTD, found = model.norm_pre(model._pos_embed(model.patch_embed(images))), []
    for block in model.blocks:
        width = block.attn.head_dim
        rows_BTD = block.norm1(x_BTD) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, _v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in rows_BTD.chunk(3, -1))
        scores = block.attn.q_norm(q) @ block.attn.k_norm(k).transpose(2, 3) / width**0.5
        found.append(scores.softmax(-1))
        x_BTD = block(x_BTD)
    return found


@pytest.mark.parametrize("kind", ["class token", "registers", "distilled", "average"])
def test_rollout_is_the_product_of_the_blocks_attention_read_at_what_is_pooled(kind: str, images: Tensor) -> None:
    backbone = tiny(kind)
    model: Any = backbone.model
    first, second = (attention.mean(1) for attention in attention_by_hand(model, images))
    num_prefix, one = model.num_prefix_tokens, torch.eye(first.shape[1])
    rollout_BTT = (second / 2 + one / 2) @ (first / 2 + one / 2)
    rows = POOLED.get(kind, list(range(num_prefix, num_prefix + PATCHES**2)))
    by_hand = rollout_BTT[:, rows, num_prefix:].mean(1).reshape(3, PATCHES, PATCHES)
    found = map_of(AttentionRollout(backbone), images, asked(backbone, [0, 1, 4]))
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-4)
    assert (found.std((1, 2)) > 1e-3).all()


def test_the_only_place_that_is_attended_to_has_all_of_the_rollout(images: Tensor) -> None:
    backbone = one_patch_reader((4, 1))
    expected = torch.zeros(3, PATCHES, PATCHES)
    expected[:, 4, 1] = 0.5  # the other half stays with the class token
    torch.testing.assert_close(map_of(AttentionRollout(backbone), images, asked(backbone, [0, 1, 4])), expected)


def test_on_a_coarser_grid_a_patch_has_the_rollout_of_all_its_tokens(images: Tensor) -> None:
    fine = tiny("class token")
    coarse = Backbone(BackboneConfig("coarse", "vit", 3, fine.config.preprocessing), fine.model)
    map_B66, map_B33 = (map_of(AttentionRollout(each), images, asked(each, [0, 1, 4])) for each in (fine, coarse))
    expected = map_B66.reshape(3, 3, 2, 3, 2).sum((2, 4))
    torch.testing.assert_close(map_B33, expected)


@pytest.mark.parametrize("kind", ["class token", "distilled", "average"])
def test_grad_cam_weights_what_enters_the_last_attention_by_its_mean_gradient(kind: str, images: Tensor) -> None:
    backbone, target = tiny(kind), torch.tensor([0, 1, 4])
    model: Any = backbone.model
    questions, kept = asked(backbone, target.tolist()), []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _m, _i, normed: kept.append(normed))
    logits_BC = questions["task"].head(backbone(images.clone().requires_grad_()))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits_BC.gather(1, target[:, None]).sum(), kept[0])
    patches = slice(model.num_prefix_tokens, None)
    by_hand = (kept[0][:, patches] * gradient[:, patches].mean(1, keepdim=True)).sum(-1).detach()
    found = map_of(GradCam(backbone), images, questions)
    torch.testing.assert_close(found, by_hand.reshape(3, PATCHES, PATCHES), atol=1e-6, rtol=1e-4)
    assert (found.std((1, 2)) > 1e-3).all()
    torch.testing.assert_close(map_of(GradCam(backbone, relu=True), images, questions), found.clamp(min=0))
    assert (found < 0).any()


def test_grad_cam_of_a_swin_is_the_class_weight_at_each_place_of_its_last_features() -> None:
    backbone, target = tiny_swin(), torch.tensor([0, 4])
    images, questions = torch.randn(2, 3, 64, 64), asked(backbone, target.tolist())
    model, head = backbone.model, questions["task"].head
    with torch.no_grad():
        features_Bhwd = model.forward_features(images)  # type: ignore[operator]
        assert features_Bhwd.shape[1:3] == (8, 8)
        cam_Bhw = torch.einsum("bhwd,bd->bhw", features_Bhwd, head.weight[target]) / 64  # type: ignore[attr-defined]
    # Bilinear, from 8 x 8 to 4 x 4: the mean of each four.
    expected = cam_Bhw.reshape(2, 4, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(map_of(GradCam(backbone), images, questions), expected, atol=1e-6, rtol=1e-4)


def test_grad_cam_peaks_at_the_only_patch_that_is_not_blank() -> None:
    image = torch.zeros(1, 3, SIZE, SIZE)
    image[:, 1, 4 * PATCH_SIZE : 5 * PATCH_SIZE, PATCH_SIZE : 2 * PATCH_SIZE] = 1.0
    backbone, head = one_patch_reader((4, 1)), nn.Linear(8, 2, bias=False)
    nn.init.zeros_(head.weight)
    nn.init.ones_(head.weight[1, 4:7])
    found = map_of(GradCam(backbone), image, {"task": Question(head, torch.tensor([1]))})
    assert found[0, 4, 1] > 0
    assert found.count_nonzero() == 1


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_picture_has_the_same_map_in_every_batch_and_every_head_one_of_its_own(kind: str, images: Tensor) -> None:
    backbone = tiny(kind)
    questions = {"one": asked(backbone, [0, 1, 4])["task"], "two": asked(backbone, [2, 2, 2])["task"]}
    alone = {name: Question(asked.head, asked.target_B[1:2]) for name, asked in questions.items()}
    for method, depends_on_class in zip(methods_of(backbone), (False, True), strict=True):
        with torch.no_grad():
            together = method(images, KEYS, questions)
        assert together.keys() == {(name, method.variants[0]) for name in questions}
        for key, answer in method(images[1:2], KEYS[1:2], alone).items():
            assert answer.map_BPP.shape == (1, PATCHES, PATCHES)
            assert answer.map_BPP.dtype == torch.float32
            torch.testing.assert_close(answer.map_BPP, together[key].map_BPP[1:2], atol=1e-5, rtol=1e-5)
        one, two = (answer.map_BPP for answer in together.values())
        assert torch.allclose(one, two, atol=1e-6) is not depends_on_class


def test_the_cost_is_what_passes_through_the_last_block(images: Tensor) -> None:
    backbone = tiny("class token")
    block: Any = backbone.model.blocks[-1]  # type: ignore[index]
    for method in methods_of(backbone):
        forwards: list[int] = []
        backwards: list[int] = []
        handles = [
            block.attn.register_forward_hook(lambda _m, _i, tokens, seen=forwards: seen.append(len(tokens))),
            block.attn.register_full_backward_hook(lambda _m, _i, grads, seen=backwards: seen.append(len(grads[0]))),
        ]
        answer = method(images, KEYS, asked(backbone, [0, 1, 4]))["task", method.variants[0]]
        for handle in handles:
            handle.remove()
        assert sum(forwards) == answer.cost.forwards * len(images)
        assert sum(backwards) == answer.cost.backwards * len(images)


def backbone_state(backbone: Backbone) -> list[object]:
    return [
        *((name, len(module._forward_hooks), len(module._backward_hooks)) for name, module in backbone.named_modules()),
        *((parameter.requires_grad, parameter.grad) for parameter in backbone.parameters()),
        *(block.attn.fused_attn for block in backbone.model.blocks),  # type: ignore[union-attr]
    ]


def test_the_backbone_is_left_as_it_was(images: Tensor) -> None:
    backbone = tiny("class token")
    backbone.model.blocks[1].attn.fused_attn = False  # type: ignore[index,union-attr]
    before = backbone_state(backbone)
    for method in methods_of(backbone):
        method(images, KEYS, asked(backbone, [0, 1, 4]))
        assert backbone_state(backbone) == before


def test_the_backbone_is_left_as_it_was_after_a_pass_that_fails() -> None:
    backbone = tiny("class token")
    before = backbone_state(backbone)
    with pytest.raises(AssertionError), attention_probabilities(backbone.model):
        backbone.model.forward_features(torch.zeros(1, 3, 5, 5))  # type: ignore[operator]
    assert backbone_state(backbone) == before


def test_a_model_for_which_rollout_is_not_defined_is_named_with_the_reason() -> None:
    swin = tiny_swin()
    assert "SwinTransformer" in rollout_obstacle(swin)
    assert grad_cam_obstacle(swin) == ""
    with pytest.raises(ValueError, match=r"attention rollout: expected .*SwinTransformer is no plain"):
        AttentionRollout(swin)
    torch.manual_seed(0)
    pooled = load_backbone("vit_tiny_patch16_224", "random", timm_args=TINY | {"global_pool": "max"})
    assert rollout_obstacle(pooled) == "it pools by max, which is no mean of rows"


def test_a_model_whose_features_have_no_grid_is_named_with_the_reason() -> None:
    class Mean(nn.Module):
        num_features = 3

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward_features(self, images_B3SS: Tensor) -> Tensor:
            return self.gain * images_B3SS.mean((2, 3))

    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    backbone = Backbone(BackboneConfig("mean", "none", PATCHES, preprocessing), Mean())
    with pytest.raises(ValueError, match=r"Grad-CAM: expected .* got mean: .*got \[1, 3\]"):
        GradCam(backbone)
