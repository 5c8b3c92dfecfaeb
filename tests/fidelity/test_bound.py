"""The bound is arithmetic in float64 on logits below 100: rounding moves either side by less than 1e-12, and a bound is
held to be broken where it is exceeded by more.
"""

import pytest
import torch
from torch import Tensor, nn

from tve.fidelity.bound import Bound, explanation_bound, lipschitz, patch_weights
from tve.meta_attribution import MetaAttribution
from tve.objective import WindowTargets, regression_loss, target_scale
from tve.transfer_rule import Output, PerPatch, TransferRule, class_maps, of_patches

B, P, D = 8, 5, 6
OUTPUTS: tuple[Output, ...] = ("logit", "probability", "log_probability")
PER_PATCH: tuple[PerPatch, ...] = ("share", "mean", "window")
ROUNDING = 1e-12


def random_meta(generator: torch.Generator, radius: int = 1) -> MetaAttribution:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return MetaAttribution(normal(B, P * P, D), normal(B, P * P, D), normal(B, D), normal(D), radius)


def random_head(generator: torch.Generator, num_classes: int, size: float = 1.0) -> nn.Linear:
    head = nn.Linear(D, num_classes, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def with_error(exact: MetaAttribution, kept: Tensor, removed: Tensor) -> MetaAttribution:
    return MetaAttribution(
        exact.kept_BND + kept, exact.removed_BND + removed, exact.full_BD, exact.empty_D, exact.radius
    )


def output_of(head: nn.Linear, embedding: Tensor, output: Output, target: int) -> Tensor:
    logits: Tensor = head(embedding)
    outputs = {"logit": logits, "probability": logits.softmax(-1), "log_probability": logits.log_softmax(-1)}
    return outputs[output][..., target]


def steepest(head: nn.Linear, output: Output, target: int) -> tuple[Tensor, Tensor]:
    """An embedding [D] where the class's output is about as steep as it gets anywhere, and the steep direction.

    There the class and the one whose weights are farthest from its own share all probability evenly, or the other one
    has it all; the head's rows are independent, so that logits can be chosen.
    """
    farthest = int((head.weight - head.weight[target]).norm(dim=1).argmax())
    logits = torch.full((head.out_features,), -50.0, dtype=torch.float64)
    logits[farthest] = 0.0
    if output == "probability":
        logits[target] = 0.0
    embedding = torch.linalg.lstsq(head.weight, (logits - head.bias)[:, None]).solution[:, 0].detach()
    direction = head.weight[target] - (0 if output == "logit" else head.weight[farthest])
    return embedding, (direction / direction.norm()).detach()


def assert_holds(found: Bound) -> None:
    """Of every patch and every picture, up to rounding."""
    rms = found.actual_BPP.square().mean((1, 2)).sqrt()
    for small, large in (
        (found.actual_BPP, found.bound_BPP),
        (found.actual_B, found.bound_B),
        (found.bound_B, found.from_loss_B),
        (found.bound_BPP.square().mean((1, 2)).sqrt(), found.from_loss_B),
        (rms, found.from_loss_B),
    ):
        assert bool((small <= large * (1 + ROUNDING) + ROUNDING).all())


@pytest.mark.parametrize("per_patch", PER_PATCH)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.3), (-0.4, 0.0)])
@pytest.mark.parametrize("output", OUTPUTS)
def test_no_picture_breaks_any_of_the_bounds(output: Output, weights: tuple[float, float], per_patch: PerPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = TransferRule(output, per_patch, *weights)
    for size in (0.01, 1.0, 30.0):
        for num_classes, radius in ((2, 1), (9, 2)):
            exact, head = random_meta(generator, radius), random_head(generator, num_classes, size**-0.5)
            error = torch.randn(2, B, P * P, D, generator=generator) * size
            target = torch.randint(num_classes, (B,), generator=generator)
            found = explanation_bound(with_error(exact, *error), exact, head, target, rule)
            assert found.actual_B.min() > 0
            assert_holds(found)


@pytest.mark.parametrize("per_patch", PER_PATCH)
@pytest.mark.parametrize("output", OUTPUTS)
def test_errors_along_the_steepest_direction_attain_the_bounds(output: Output, per_patch: PerPatch) -> None:
    generator, patch = torch.Generator().manual_seed(1), P + 2
    head, rule = random_head(generator, 4), TransferRule(output, per_patch, 0.5, 2.0)
    embedding, direction = steepest(head, output, target=2)
    windows = embedding.expand(B, P * P, D)
    exact = MetaAttribution(windows, windows, embedding.expand(B, D), embedding, radius=1)
    # In proportion to the weights, and of opposite signs, as the two brackets have; in each window of the sign with
    # which it counts for one patch, which is the same for all patches but in shares.
    weights_NM = patch_weights(P, 1, per_patch)
    signs_M = torch.where(weights_NM[patch] < -ROUNDING, -1.0, 1.0).float()
    error = (1e-5 * direction * signs_M[:, None]).expand(B, P * P, D)
    found = explanation_bound(with_error(exact, 0.5 * error, -2.0 * error), exact, head, 2, rule)
    assert_holds(found)
    at_patch = (slice(None), *divmod(patch, P))
    torch.testing.assert_close(found.actual_BPP[at_patch], found.bound_BPP[at_patch], rtol=1e-4, atol=0)
    if per_patch == "share":
        assert (signs_M < 0).any()
        return
    torch.testing.assert_close(found.actual_BPP, found.bound_BPP, rtol=1e-4, atol=0)
    unevenness = weights_NM.sum(0).max()
    torch.testing.assert_close(found.actual_B * unevenness.sqrt(), found.from_loss_B, rtol=1e-4, atol=0)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_constant_is_the_largest_gradient_that_a_class_has_anywhere(output: Output) -> None:
    generator = torch.Generator().manual_seed(2)
    head = random_head(generator, 5)
    constants = lipschitz(head, torch.arange(5), output)
    for target, constant in enumerate(constants.tolist()):
        # Random places, some of them where the head is sure of itself, and the steepest one.
        random = torch.randn(2000, D, generator=generator, dtype=torch.float64) * torch.logspace(-1, 2, 2000)[:, None]
        at = torch.cat([random, steepest(head, output, target)[0][None]]).requires_grad_()
        (gradient,) = torch.autograd.grad(output_of(head, at, output, target).sum(), at)
        norm = gradient.norm(dim=1)
        assert norm.max() <= constant * (1 + ROUNDING)
        assert norm[-1] >= constant * (1 - 1e-9)


def test_classes_that_are_nearly_alike_have_the_slope_of_their_small_difference() -> None:
    head = random_head(torch.Generator().manual_seed(3), 2, size=1000)
    with torch.no_grad():
        head.weight[1] = head.weight[0]
        head.weight[1, 0] += 1e-6
    expected = torch.full((2,), 1e-6, dtype=torch.float64)
    torch.testing.assert_close(lipschitz(head, torch.arange(2), "log_probability"), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(lipschitz(head, torch.arange(2), "probability"), expected / 4, rtol=1e-4, atol=0)


@pytest.mark.parametrize("per_patch", PER_PATCH)
@pytest.mark.parametrize("radius", [0, 1, 3, 4])
def test_what_a_patch_gets_of_each_window_is_what_the_map_is_made_with(radius: int, per_patch: PerPatch) -> None:
    u_BCPP = torch.randn(2, 3, P, P, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights_NM = patch_weights(P, radius, per_patch)
    expected = (u_BCPP.flatten(2) @ weights_NM.T).unflatten(2, (P, P))
    torch.testing.assert_close(of_patches(u_BCPP, radius, per_patch), expected)


def test_what_is_bounded_is_the_difference_of_the_maps_that_are_drawn() -> None:
    generator = torch.Generator().manual_seed(5)
    exact, head = random_meta(generator), random_head(generator, 3).float()
    predicted = with_error(exact, *(0.3 * torch.randn(2, B, P * P, D, generator=generator)))
    target, rule = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), TransferRule("probability", weight_kept=0.4)
    drawn = class_maps(predicted, head, target, rule) - class_maps(exact, head, target, rule)
    found = explanation_bound(predicted, exact, head, target, rule)
    torch.testing.assert_close(found.actual_BPP.float(), drawn.abs(), rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_windows_of_both_squared_errors() -> None:
    generator = torch.Generator().manual_seed(6)
    exact, head = random_meta(generator), random_head(generator, 3)
    kept, removed = torch.zeros(B, P * P, D), torch.zeros(B, P * P, D)
    kept[3, 7, 2], removed[3, 11, 4], removed[5, 0, 0] = 3.0, 4.0, 10.0
    found = explanation_bound(with_error(exact, kept, removed), exact, head, 0)
    expected = torch.zeros(B, dtype=torch.float64)
    expected[3], expected[5] = (9 + 16) / P**2, 100 / P**2
    torch.testing.assert_close(found.loss_B, expected, rtol=1e-5, atol=0)


def test_a_perfect_prediction_has_no_error_and_a_bound_of_zero() -> None:
    generator = torch.Generator().manual_seed(7)
    exact, head = random_meta(generator), random_head(generator, 3)
    found = explanation_bound(exact, exact, head, 1, TransferRule("log_probability"))
    for values in (found.actual_BPP, found.bound_BPP, found.from_loss_B, found.loss_B):
        assert not values.any()


def test_a_head_that_is_not_linear_needs_a_constant_and_is_bounded_by_it() -> None:
    generator = torch.Generator().manual_seed(8)
    exact = random_meta(generator)
    predicted = with_error(exact, *torch.randn(2, B, P * P, D, generator=generator))
    first, last = random_head(generator, D), random_head(generator, 3)
    head = nn.Sequential(first, nn.ReLU(), last)
    with pytest.raises(ValueError, match=r"head: expected nn.Linear, got Sequential.*give lipschitz_B"):
        explanation_bound(predicted, exact, head, 0)
    # ReLU is 1-Lipschitz; a logit reads one row of the last layer.
    constant = torch.linalg.matrix_norm(first.weight.detach(), 2) * last.weight[0].detach().norm()
    found = explanation_bound(predicted, exact, head, 0, lipschitz_B=constant.expand(B))
    assert_holds(found)
    with pytest.raises(ValueError, match=r"lipschitz: expected \[8\], at least 0"):
        explanation_bound(predicted, exact, head, 0, lipschitz_B=-constant.expand(B))


def test_under_whitened_errors_a_logit_errs_by_its_own_spread_times_the_root_of_the_loss_at_most() -> None:
    """Whatever the head: sd(W_y g) sqrt(D loss). Errors along the covariance times W_y attain it."""
    generator = torch.Generator().manual_seed(10)
    plain = random_meta(generator)
    mixing = torch.diag(torch.logspace(-1.5, 0.5, D)) @ torch.randn(D, D, generator=generator)
    exact = MetaAttribution(plain.kept_BND @ mixing, plain.removed_BND, plain.full_BD, plain.empty_D, plain.radius)
    scale = target_scale(exact, whitening_floor=1e-9)
    every = torch.arange(P * P).expand(B, -1)
    targets = WindowTargets(every, exact.kept_BND, exact.removed_BND)
    covariance = exact.kept_BND.flatten(0, 1).T.cov(correction=0)
    for weight in torch.randn(10, D, generator=generator):
        spread = (exact.kept_BND @ weight).std(correction=0)
        sizes = torch.rand(B, P * P, 1, generator=generator)
        for error, attains in (
            (torch.randn(B, P * P, D, generator=generator) * sizes, False),
            ((covariance @ weight).expand(B, P * P, D) * sizes, True),
        ):
            predicted = with_error(exact, error, torch.zeros(()))
            kept_loss, _ = regression_loss(predicted, targets, scale)
            actual, bound = (error @ weight).square().mean().sqrt(), spread * (D * kept_loss).sqrt()
            assert actual <= bound * (1 + 1e-3)  # float32
            assert attains == bool(actual >= bound * (1 - 1e-3))


def test_other_windows_and_classes_that_do_not_exist_are_errors() -> None:
    generator = torch.Generator().manual_seed(9)
    exact, head = random_meta(generator), random_head(generator, 3)
    with pytest.raises(
        ValueError, match=r"predicted: expected the exact one's g \[8, 25, 6\].*radius 1, got .*radius 2"
    ):
        explanation_bound(random_meta(generator, radius=2), exact, head, 0)
    with pytest.raises(ValueError, match=r"class: expected 0 to 2, got \[-1, "):
        explanation_bound(exact, exact, head, -1)
    for absent in (-1, 3):
        with pytest.raises(ValueError, match="class: expected 0 to 2"):
            lipschitz(head, torch.tensor([0, absent]), "logit")
