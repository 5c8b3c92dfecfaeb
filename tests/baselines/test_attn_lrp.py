from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.norm import LayerNorm, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tve.backbones import Backbone, BackboneConfig, Preprocessing, load_backbone
from tve.baselines.attn_lrp import (
    AttnLrp,
    activated,
    attended,
    attn_lrp_obstacle,
    embedding_by_rules,
    normed,
    transformed,
)
from tve.baselines.method import Question

PATCHES, PATCH_SIZE, SIZE = 6, 8, 48
TINY = {"img_size": SIZE, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average, scales, head norms": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "init_values": 0.5, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "norm first, quick GELU": ("vit_base_patch16_clip_quickgelu_224", {}),
}
KEYS = ["a", "b", "c"]


def tiny(kind: str) -> Backbone:
    architecture, arguments = MODELS[kind]
    torch.manual_seed(0)
    backbone = load_backbone(architecture, "random", timm_args=TINY | arguments)
    for parameter in backbone.model.parameters():  # timm starts near zero, norms at one and biases at zero
        parameter.copy_(torch.randn_like(parameter) * (parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.5))
    return backbone


def bias_free(backbone: Backbone) -> Backbone:
    """The same model with nothing that is no function of the picture: biases, positions and prefix tokens zero."""
    for name, parameter in backbone.model.named_parameters():
        if name.endswith(("bias", "pos_embed", "cls_token")):
            nn.init.zeros_(parameter)
    return backbone


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


def asked(backbone: Backbone, target: list[int], bias: bool = True) -> dict[str, Question]:
    torch.manual_seed(2)
    return {"task": Question(nn.Linear(backbone.embed_dim, 5, bias=bias), torch.tensor(target))}


def map_of(backbone: Backbone, images: Tensor, questions: dict[str, Question]) -> Tensor:
    return AttnLrp(backbone)(images, KEYS[: len(images)], questions)["task", "attn_lrp"].map_BPP


def relevance_of(result: Tensor, relevance: Tensor, given: Tensor) -> Tensor:
    """What relevance the input of a layer has, where its result, nowhere zero, has that much."""
    (gradient,) = torch.autograd.grad(result, given, relevance / result.detach())
    return given.detach() * gradient


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_rules_change_gradients_and_not_the_embedding(kind: str, images: Tensor) -> None:
    backbone = tiny(kind)
    assert attn_lrp_obstacle(backbone) == ""
    torch.testing.assert_close(embedding_by_rules(backbone, images), backbone(images), atol=1e-5, rtol=1e-4)


def test_relevance_of_a_model_without_biases_sums_to_the_logit_where_attention_adds_nothing(images: Tensor) -> None:
    backbone = bias_free(tiny("average, scales, head norms"))
    model: Any = backbone.model
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    questions = asked(backbone, [0, 1, 4], bias=False)
    logit_B = questions["task"].head(backbone(images)).gather(1, torch.tensor([[0], [1], [4]]))[:, 0]
    found = map_of(backbone, images, questions)
    torch.testing.assert_close(found.sum((1, 2)), logit_B.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", [LayerNorm(16), RmsNorm(16), nn.LayerNorm(16, elementwise_affine=False)])
def test_a_norm_and_an_mlp_without_biases_pass_all_relevance_on(norm: nn.Module) -> None:
    torch.manual_seed(4)
    mlp, x = Mlp(16, 24, 8, bias=False).double(), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    norm, relevance = norm.double(), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(normed(norm, x), norm(x))
    found = relevance_of(transformed(mlp, normed(norm, x)), relevance, x)
    torch.testing.assert_close(found.sum(1), relevance.sum(1))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU()], ids=lambda module: type(module).__name__)
def test_the_gradient_of_an_activation_is_its_value_over_its_input_also_at_zero(activation: nn.Module) -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    result = activated(activation, x)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(result, activation(x))
    at_zero = 1.0 if isinstance(activation, nn.ReLU) else 0.5
    expected = [float(activation(value) / value) if value else at_zero for value in x.detach()]
    torch.testing.assert_close(gradient, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_one_attention_follows_the_rules_written_out_by_hand() -> None:
    """Uniform rule at both products, softmax by Taylor's first order, epsilon rule (epsilon 0) at linear layers."""
    torch.manual_seed(5)
    attention = Attention(6, num_heads=1, qkv_bias=False, proj_bias=False).double()
    x_TD = torch.randn(4, 6, dtype=torch.float64)
    relevance_TD = torch.randn(4, 6, dtype=torch.float64)

    def linear(given_TD: Tensor, weight_ED: Tensor, relevance_TE: Tensor) -> Tensor:
        share_TED = given_TD[:, None] * weight_ED / (given_TD @ weight_ED.T)[..., None]
        return (share_TED * relevance_TE[..., None]).sum(1)

    with torch.no_grad():
        query, key, value = attention.qkv.weight.chunk(3)
        q_TD, k_TD, v_TD = x_TD @ query.T, x_TD @ key.T, x_TD @ value.T
        scores_TT = q_TD @ k_TD.T / 6**0.5
        a_TT = scores_TT.softmax(-1)
        of_gathered = linear(a_TT @ v_TD, attention.proj.weight, relevance_TD)
        # [i, j, d]: the share of a_ij v_jd in the gathered value (i, d), half of it to each factor.
        by_product = a_TT[..., None] * v_TD / (a_TT @ v_TD)[:, None] * of_gathered[:, None] / 2
        of_a, of_v = by_product.sum(2), by_product.sum(0)
        of_scores = scores_TT * (of_a - a_TT * of_a.sum(1, keepdim=True))
        by_product = q_TD[:, None] * k_TD / 6**0.5 / scores_TT[..., None] * of_scores[..., None] / 2
        of_q, of_k = by_product.sum(1), by_product.sum(0)
        by_hand = linear(x_TD, query, of_q) + linear(x_TD, key, of_k) + linear(x_TD, value, of_v)

    given = x_TD[None].clone().requires_grad_()
    found = relevance_of(attended(attention, given), relevance_TD[None], given)
    torch.testing.assert_close(found[0], by_hand)


def test_the_only_patch_that_is_read_has_half_the_logit_and_the_others_nothing(images: Tensor) -> None:
    """Half: attention and value share the relevance of their product, and an attention of 1 passes none on."""
    backbone = one_patch_reader((4, 1))
    questions = asked(backbone, [0, 1, 4], bias=False)
    found = map_of(backbone, images, questions)
    logit_B = questions["task"].head(backbone(images)).gather(1, torch.tensor([[0], [1], [4]]))[:, 0]
    expected = torch.zeros(3, PATCHES, PATCHES)
    expected[:, 4, 1] = logit_B.detach() / 2
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    assert (found == 0).sum() == 3 * (PATCHES**2 - 1)


def test_a_patch_of_zeros_has_no_relevance_whatever_its_position_and_bias(images: Tensor) -> None:
    backbone, blank = tiny("class token"), images.clone()
    blank[:, :, 2 * PATCH_SIZE : 3 * PATCH_SIZE, PATCH_SIZE : 2 * PATCH_SIZE] = 0
    found = map_of(backbone, blank, asked(backbone, [0, 1, 4]))
    assert (found[:, 2, 1] == 0).all()
    assert (found != 0).sum() == 3 * (PATCHES**2 - 1)


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_picture_has_the_same_map_in_every_batch_and_every_question_its_own(kind: str, images: Tensor) -> None:
    backbone = tiny(kind)
    questions = {"one": asked(backbone, [0, 1, 4])["task"], "two": asked(backbone, [2, 2, 2])["task"]}
    with torch.no_grad():
        together = AttnLrp(backbone)(images, KEYS, questions)
    alone = AttnLrp(backbone)(images[1:2], KEYS[1:2], {"one": Question(questions["one"].head, torch.tensor([1]))})
    assert together.keys() == {("one", "attn_lrp"), ("two", "attn_lrp")}
    one, two = (answer.map_BPP for answer in together.values())
    assert one.shape == (3, PATCHES, PATCHES)
    assert one.dtype == torch.float32
    torch.testing.assert_close(alone["one", "attn_lrp"].map_BPP, one[1:2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one, two, atol=1e-4)


def test_the_cost_is_one_pass_each_way_and_the_backbone_is_left_as_it_was(images: Tensor) -> None:
    backbone = tiny("class token")

    def state() -> list[object]:
        hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in backbone.modules()]
        fused = [block.attn.fused_attn for block in backbone.model.blocks]  # type: ignore[union-attr]
        return [*hooks, *fused, *((parameter.requires_grad, parameter.grad) for parameter in backbone.parameters())]

    forwards: list[int] = []
    backwards: list[int] = []
    method, before = AttnLrp(backbone), state()
    stem: Any = backbone.model.patch_embed
    handles = [
        stem.register_forward_hook(lambda _m, _i, tokens: forwards.append(len(tokens))),
        stem.register_full_backward_hook(lambda _m, _i, gradients: backwards.append(len(gradients[0]))),
    ]
    answer = method(images, KEYS, asked(backbone, [0, 1, 4]))["task", "attn_lrp"]
    for handle in handles:
        handle.remove()
    assert (sum(forwards), sum(backwards)) == (answer.cost.forwards * 3, answer.cost.backwards * 3)
    assert state() == before
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("architecture", "arguments", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 12, "window_size": 4}, "SwinTransformer is"),
        ("vit_base_patch16_siglip_224", TINY, "it pools by an attention of its own"),
        ("vit_base_patch16_rpn_224", TINY, "ResPostBlock, is not timm's plain one"),
        ("vit_tiny_patch16_224", TINY | {"act_layer": "mish"}, "its activation Mish has no rule"),
        ("vit_small_patch14_reg4_dinov2", TINY | {"mlp_layer": SwiGLU}, "its SwiGLU has no rule"),
    ],
)
def test_a_model_without_rules_is_named_with_the_reason(
    architecture: str, arguments: dict[str, Any], reason: str
) -> None:
    backbone = load_backbone(architecture, "random", timm_args=arguments)
    assert reason in attn_lrp_obstacle(backbone)
    with pytest.raises(ValueError, match=f"AttnLRP: expected a plain vision transformer .*{reason}"):
        AttnLrp(backbone)
