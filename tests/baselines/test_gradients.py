from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tve.backbones import Backbone, BackboneConfig, Preprocessing, load_backbone
from tve.baselines.gradients import DeepLift, GradientShap, IntegratedGradients
from tve.baselines.method import Method, Question

PATCHES, PATCH_SIZE, SIZE = 6, 8, 48
KEYS = ["a", "b", "c"]
WAYS: dict[str, Callable[[Backbone], Method]] = {
    "integrated_gradients": lambda backbone: IntegratedGradients(backbone, num_steps=6, pass_size=4),
    "deep_lift": lambda backbone: DeepLift(backbone, pass_size=4),
    "gradient_shap": lambda backbone: GradientShap(backbone, seed=0, num_samples=6, pass_size=4),
}
EVERY_WAY = pytest.mark.parametrize("way", list(WAYS))


class PixelMlp(nn.Module):
    """An embedding of the pixels that a mask lets through, without norms and attention."""

    num_features = 8

    def __init__(self, seen_PP: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.seen_SS = seen_PP.repeat_interleave(PATCH_SIZE, 0).repeat_interleave(PATCH_SIZE, 1)
        self.first = nn.Linear(3 * SIZE**2, 16)
        self.activation = activation
        self.second = nn.Linear(16, 8)

    def forward_features(self, images_B3SS: Tensor) -> Tensor:
        features: Tensor = self.second(self.activation(self.first((images_B3SS * self.seen_SS).flatten(1))))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features


def pixel_backbone(seen_PP: Tensor, activation: nn.Module) -> Backbone:
    torch.manual_seed(3)
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    return Backbone(BackboneConfig("pixels", "none", PATCHES, preprocessing), PixelMlp(seen_PP, activation))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    tiny = {"img_size": SIZE, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    backbone = load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny)
    for parameter in backbone.model.parameters():
        if parameter.ndim == 2:  # timm's start is so near zero that every map would be, too
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return backbone


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def asked(backbone: Backbone, target: list[int]) -> dict[str, Question]:
    torch.manual_seed(2)
    return {"task": Question(nn.Linear(backbone.embed_dim, 5), torch.tensor(target))}


def map_of(method: Method, images: Tensor, keys: list[str], questions: dict[str, Question]) -> Tensor:
    return method(images, keys, questions)["task", method.variants[0]].map_BPP


def gain(backbone: Backbone, images: Tensor, question: Question) -> Tensor:
    """f(x) - f(0) [B] of logits."""
    with torch.no_grad():
        logits_BC = question.head(backbone(images)) - question.head(backbone(torch.zeros_like(images)))
    return logits_BC.gather(1, question.target_B[:, None])[:, 0]


@EVERY_WAY
def test_each_question_gets_a_map_of_each_picture_on_the_patch_grid(
    backbone: Backbone, images: Tensor, way: str
) -> None:
    questions = {"one": asked(backbone, [0, 1, 4])["task"], "two": asked(backbone, [2, 2, 2])["task"]}
    with torch.no_grad():
        answers = WAYS[way](backbone)(images, KEYS, questions)
    assert answers.keys() == {("one", way), ("two", way)}
    for answer in answers.values():
        assert answer.map_BPP.shape == (3, PATCHES, PATCHES)
        assert answer.map_BPP.dtype == torch.float32
        assert not answer.map_BPP.requires_grad
        assert (answer.map_BPP.std((1, 2)) > 1e-3).all()
    assert not torch.allclose(answers["one", way].map_BPP, answers["two", way].map_BPP)


@EVERY_WAY
def test_a_picture_has_the_same_map_in_every_batch(backbone: Backbone, images: Tensor, way: str) -> None:
    method, order = WAYS[way](backbone), [2, 0, 1]
    together = map_of(method, images, KEYS, asked(backbone, [0, 1, 4]))
    shuffled = map_of(method, images[order], [KEYS[i] for i in order], asked(backbone, [4, 0, 1]))
    alone = map_of(method, images[1:2], KEYS[1:2], asked(backbone, [1]))
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-5)


@EVERY_WAY
def test_a_patch_that_alone_is_seen_has_all_the_attribution(images: Tensor, way: str) -> None:
    seen = torch.zeros(PATCHES, PATCHES)
    seen[4, 1] = 1.0
    backbone = pixel_backbone(seen, nn.GELU())
    found = map_of(WAYS[way](backbone), images, KEYS, asked(backbone, [0, 1, 4]))
    assert (found[:, seen == 0] == 0).all()
    assert (found[:, 4, 1].abs() > 1e-3).all()


@EVERY_WAY
def test_of_a_linear_model_the_map_is_weight_times_pixel_summed_over_a_patch(images: Tensor, way: str) -> None:
    backbone = pixel_backbone(torch.ones(PATCHES, PATCHES), nn.Identity())
    questions = asked(backbone, [0, 1, 4])
    model: Any = backbone.model
    method = GradientShap(backbone, 0, num_samples=3, noise=0.0) if way == "gradient_shap" else WAYS[way](backbone)
    head: Any = questions["task"].head
    weight_BM = (head.weight @ model.second.weight @ model.first.weight)[[0, 1, 4]]
    by_hand = torch.zeros(3, PATCHES, PATCHES)
    for p in range(PATCHES):
        for q in range(PATCHES):
            rows, columns = (slice(i * PATCH_SIZE, (i + 1) * PATCH_SIZE) for i in (p, q))
            product = images * weight_BM.reshape(images.shape)
            by_hand[:, p, q] = product[:, :, rows, columns].sum((1, 2, 3)).detach()
    torch.testing.assert_close(map_of(method, images, KEYS, questions), by_hand, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_sum_to_what_the_picture_adds_to_the_logit(backbone: Backbone, images: Tensor) -> None:
    questions = asked(backbone, [0, 1, 4])
    found = map_of(IntegratedGradients(backbone), images, KEYS, questions)
    torch.testing.assert_close(found.sum((1, 2)), gain(backbone, images, questions["task"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU()], ids=lambda module: type(module).__name__)
def test_without_norms_and_attention_deeplift_sums_to_what_the_picture_adds(
    images: Tensor, activation: nn.Module
) -> None:
    backbone = pixel_backbone(torch.ones(PATCHES, PATCHES), activation)
    questions = asked(backbone, [0, 1, 4])
    found = map_of(DeepLift(backbone), images, KEYS, questions)
    torch.testing.assert_close(found.sum((1, 2)), gain(backbone, images, questions["task"]), atol=1e-5, rtol=1e-4)


def test_without_noise_many_draws_of_gradient_shap_come_near_integrated_gradients(images: Tensor) -> None:
    backbone = pixel_backbone(torch.ones(PATCHES, PATCHES), nn.GELU())
    questions = asked(backbone, [0, 1, 4])
    exact = map_of(IntegratedGradients(backbone), images, KEYS, questions)
    errors = []
    for num_samples in (4, 1024):
        method = GradientShap(backbone, 0, num_samples=num_samples, noise=0.0, pass_size=256)
        errors.append(float((map_of(method, images, KEYS, questions) - exact).norm() / exact.norm()))
    assert errors[1] < 0.02 < errors[0]


def test_draws_follow_the_seed_and_the_key_and_leave_every_generator_alone(backbone: Backbone, images: Tensor) -> None:
    same, questions = images[:1].expand(3, -1, -1, -1), asked(backbone, [1, 1, 1])
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    first = map_of(GradientShap(backbone, seed=0, num_samples=4), same, ["a", "b", "a"], questions)
    assert (torch.rand(1), np.random.rand()) == expected
    other = map_of(GradientShap(backbone, seed=1, num_samples=4), same, ["a", "b", "a"], questions)
    assert torch.equal(first[0], first[2])
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    assert not torch.allclose(first[0], other[0], atol=1e-3)


@EVERY_WAY
def test_the_cost_is_what_passes_through_the_backbone_never_more_than_a_pass_at_once(
    backbone: Backbone, images: Tensor, way: str
) -> None:
    forwards: list[int] = []
    backwards: list[int] = []
    stem: Any = backbone.model.patch_embed
    handles = [
        stem.register_forward_hook(lambda _m, _i, tokens: forwards.append(len(tokens))),
        stem.register_full_backward_hook(lambda _m, _i, gradients: backwards.append(len(gradients[0]))),
    ]
    answer = WAYS[way](backbone)(images, KEYS, asked(backbone, [0, 1, 4]))["task", way]
    for handle in handles:
        handle.remove()
    assert sum(forwards) == answer.cost.forwards * len(images)
    assert sum(backwards) == answer.cost.backwards * len(images)
    assert max(forwards) <= 4


def state(backbone: Backbone) -> list[object]:
    modules = [(name, sorted(vars(module)), module.training) for name, module in backbone.named_modules()]
    hooks = [
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for module in backbone.modules()
    ]
    parameters = [(parameter.requires_grad, parameter.grad) for parameter in backbone.parameters()]
    return [modules, [[len(each) for each in kinds] for kinds in hooks], parameters]


@EVERY_WAY
def test_the_backbone_is_left_as_it_was(backbone: Backbone, images: Tensor, way: str) -> None:
    before = state(backbone)
    WAYS[way](backbone)(images, KEYS, asked(backbone, [0, 1, 4]))
    assert state(backbone) == before
    assert not images.requires_grad


@EVERY_WAY
def test_the_backbone_is_left_as_it_was_after_a_pass_that_fails(backbone: Backbone, images: Tensor, way: str) -> None:
    def fail(_module: nn.Module, _given: tuple[Tensor, ...], _result: Tensor) -> None:
        raise MemoryError

    handle = backbone.model.norm.register_forward_hook(fail)  # type: ignore[union-attr]
    before = state(backbone)
    with pytest.raises(MemoryError):
        WAYS[way](backbone)(images, KEYS, asked(backbone, [0, 1, 4]))
    assert state(backbone) == before
    handle.remove()


@EVERY_WAY
def test_a_class_that_the_head_does_not_have_is_an_error(backbone: Backbone, images: Tensor, way: str) -> None:
    with pytest.raises(ValueError, match=r"class: expected 0 to 4, got"):
        WAYS[way](backbone)(images, KEYS, asked(backbone, [0, 5, 1]))


def test_settings_that_make_no_pass_are_errors(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        IntegratedGradients(backbone, num_steps=0)
    with pytest.raises(ValueError, match="pass_size: expected at least 1, got 0"):
        DeepLift(backbone, pass_size=0)
    with pytest.raises(ValueError, match="noise: expected a standard deviation"):
        GradientShap(backbone, 0, noise=-1.0)
