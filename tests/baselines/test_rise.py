from itertools import combinations

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import Question
from tve.baselines.rise import Rise, conditional_means
from tve.evaluator import CoalitionEvaluator
from tve.removal import Removal
from tve.transfer_rule import read

PATCHES, D = 3, 16


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    tiny = {"img_size": 24, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 2, "num_classes": 0}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny)


@pytest.fixture(scope="module")
def head() -> nn.Module:
    """Steep, so that coalitions differ."""
    torch.manual_seed(1)
    layer = nn.Linear(D, 3)
    with torch.no_grad():
        layer.weight.mul_(8)
    return layer


def every_half() -> torch.Tensor:
    """All 126 coalitions of 4 of 9 patches, [K, P, P]."""
    halves = torch.zeros(126, PATCHES**2, dtype=torch.bool)
    for row, members in zip(halves, combinations(range(9), 4), strict=True):
        row[list(members)] = True
    return halves.unflatten(1, (PATCHES, PATCHES))


def exact(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E[f | p in S] and the standard deviation of f given p in S, each [P, P], over all halves."""
    mean, deviation = torch.zeros(PATCHES, PATCHES).double(), torch.zeros(PATCHES, PATCHES).double()
    for p in range(PATCHES):
        for q in range(PATCHES):
            given = values[every_half()[:, p, q]].double()
            mean[p, q], deviation[p, q] = given.mean(), given.std(correction=0)
    return mean, deviation


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_the_error_falls_with_the_root_of_the_budget_and_is_that_of_independent_draws(
    backbone: Backbone, head: nn.Module, removal: Removal
) -> None:
    evaluator = CoalitionEvaluator(backbone, removal)
    image = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    values = read(head, evaluator(image, every_half()[None])[0], "probability")[:, 1]
    mean, deviation = exact(values)

    # One picture under many keys: independent draws.
    budgets, num_keys = (30, 120, 480), 24
    rise = Rise(evaluator, budgets)
    asked = {"q": Question(head, torch.full((num_keys,), 1))}
    answers = rise(image.expand(num_keys, -1, -1, -1), [str(key) for key in range(num_keys)], asked)
    rms = []
    for budget in budgets:
        error = answers["q", f"rise_{budget}"].map_BPP.double() - mean
        in_standard_errors = error / (deviation / (budget * 4 / 9) ** 0.5)  # 4 of 9 halves hold a patch
        assert in_standard_errors.abs().max() < 5
        assert 0.8 < in_standard_errors.square().mean().sqrt() < 1.25
        rms.append(error.square().mean().sqrt())
    assert 1.6 < rms[0] / rms[1] < 2.4
    assert 1.6 < rms[1] / rms[2] < 2.4


def test_all_halves_together_give_the_exact_conditional_mean() -> None:
    values = torch.randn(126, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conditional_means(values, every_half()), exact(values)[0])


def test_the_map_of_an_additive_game_is_linear_in_its_weights_with_a_known_slope() -> None:
    """With w[p] of each patch, E[f | p in S] = w[p] + (sum of the others) 3 / 8: three of the other eight are there."""
    weights = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    values = every_half().flatten(1).double() @ weights
    expected = weights + (weights.sum() - weights) * 3 / 8
    torch.testing.assert_close(conditional_means(values, every_half()).flatten(), expected)


def test_a_patch_that_no_half_holds_gets_the_mean_of_all() -> None:
    present = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=torch.bool)
    found = conditional_means(torch.tensor([1.0, 4.0]), present)
    assert found.tolist() == [[2.5, 1.0], [4.0, 2.5]]


def test_a_model_that_says_the_same_of_everything_gets_a_flat_map_at_every_budget(backbone: Backbone) -> None:
    constant = nn.Linear(D, 2)
    nn.init.zeros_(constant.weight)
    rise = Rise(CoalitionEvaluator(backbone, "zero"), (2, 7, 20), output="logit")
    answers = rise(torch.randn(1, 3, 24, 24), ["key"], {"q": Question(constant, torch.tensor([1]))})
    for variant in rise.variants:
        torch.testing.assert_close(
            answers["q", variant].map_BPP, constant.bias[1].detach().expand(1, PATCHES, PATCHES), atol=1e-6, rtol=0
        )
