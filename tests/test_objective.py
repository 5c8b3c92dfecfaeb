"""The regression loss and R² against their definitions."""

import pytest
import torch

from tve.meta_attribution import MetaAttribution
from tve.objective import (
    TargetScale,
    WindowTargets,
    draw_centres,
    explained_variance,
    regression_loss,
    target_scale,
    trivial_answers,
)


def test_the_loss_is_the_mean_square_of_each_drawn_window_under_the_norm(exact: MetaAttribution) -> None:
    generator = torch.Generator().manual_seed(2)
    centre_BM = torch.tensor([[2, 2, 8], [0, 5, 1], [7, 3, 4]])  # one is drawn twice
    kept_BMD, removed_BMD = torch.randn(2, 3, 3, 5, generator=generator)
    scale = TargetScale(*torch.randn(2, 5, 5, generator=generator))
    given = ((exact.kept_BND, kept_BMD, scale.kept_DD), (exact.removed_BND, removed_BMD, scale.removed_DD))
    for loss, (predicted_BND, target_BMD, norm_DD) in zip(
        regression_loss(exact, WindowTargets(centre_BM, kept_BMD, removed_BMD), scale), given, strict=True
    ):
        squares = [
            (norm_DD.T @ (predicted_BND[picture, window] - target_BMD[picture, draw])).square()
            for picture in range(3)
            for draw, window in enumerate(centre_BM[picture].tolist())
        ]
        torch.testing.assert_close(loss, torch.stack(squares).mean())


@pytest.fixture
def exact() -> MetaAttribution:
    generator = torch.Generator().manual_seed(0)
    kept, removed = torch.randn(2, 3, 9, 5, generator=generator)
    return MetaAttribution(kept, removed, torch.randn(3, 5, generator=generator), torch.zeros(5), 1)


def test_a_perfect_prediction_has_r2_one_and_no_loss(exact: MetaAttribution) -> None:
    assert explained_variance(exact, exact).kept == 1
    centres = draw_centres(3, 9, 4, torch.Generator().manual_seed(1))
    index = centres[..., None].expand(-1, -1, 5)
    targets = WindowTargets(centres, exact.kept_BND.gather(1, index), exact.removed_BND.gather(1, index))
    assert [float(loss) for loss in regression_loss(exact, targets, TargetScale(torch.eye(5), torch.eye(5)))] == [0, 0]


def test_predicting_each_pictures_own_mean_has_r2_zero(exact: MetaAttribution) -> None:
    mean = exact.kept_BND.mean(1, keepdim=True).expand_as(exact.kept_BND)
    flat = MetaAttribution(mean, exact.removed_BND, exact.full_BD, exact.empty_D, exact.radius)
    assert explained_variance(flat, exact).kept == pytest.approx(0, abs=1e-6)


def test_a_constant_error_costs_r2_but_not_centred_r2(exact: MetaAttribution) -> None:
    shifted = MetaAttribution(exact.kept_BND + 3, exact.removed_BND - 3, exact.full_BD, exact.empty_D, exact.radius)
    learned = explained_variance(shifted, exact)
    assert learned.kept < 0
    assert learned.removed < 0
    assert learned.kept_centred == pytest.approx(1, abs=1e-5)
    assert learned.removed_centred == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("floor", [None, 0.01, 1.0])
def test_both_scaled_losses_of_the_trivial_answers_are_one(exact: MetaAttribution, floor: float | None) -> None:
    trivial = trivial_answers(exact, exact.kept_BND.mean((0, 1)))
    every_centre = torch.arange(9).expand(3, 9)
    targets = WindowTargets(every_centre, exact.kept_BND, exact.removed_BND)
    for loss in regression_loss(trivial, targets, target_scale(exact, floor)):
        assert float(loss) == pytest.approx(1, rel=1e-5)


def test_whitening_makes_a_faint_direction_count_and_the_plain_norm_does_not(exact: MetaAttribution) -> None:
    faint = torch.tensor([1, 1, 1, 1, 0.01])
    squeezed = MetaAttribution(exact.kept_BND * faint, exact.removed_BND, exact.full_BD, exact.empty_D, exact.radius)
    every_centre = torch.arange(9).expand(3, 9)
    targets = WindowTargets(every_centre, squeezed.kept_BND, squeezed.removed_BND)
    wrong_there = MetaAttribution(
        squeezed.kept_BND * torch.tensor([1, 1, 1, 1, 0]),
        squeezed.removed_BND,
        exact.full_BD,
        exact.empty_D,
        exact.radius,
    )
    plain, whitened = (
        float(regression_loss(wrong_there, targets, target_scale(squeezed, floor))[0]) for floor in (None, 1e-6)
    )
    assert plain < 1e-3
    assert whitened > 0.1


def test_drawn_centres_are_distinct_and_uniform() -> None:
    centres = draw_centres(4000, 9, 3, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in centres[:200].tolist())
    share = centres.flatten().bincount(minlength=9) / centres.numel()
    assert torch.allclose(share, torch.full((9,), 1 / 9), atol=0.01)


def test_more_centres_than_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 9, got 10"):
        draw_centres(1, 9, 10, torch.Generator())
