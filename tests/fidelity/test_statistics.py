import itertools

import numpy as np
import pytest
import torch

from tve.fidelity.statistics import paired_bootstrap, positive_density


def test_the_interval_is_that_of_all_resamples_enumerated_by_hand() -> None:
    """Four pictures have 4^4 resamples; with 80 % confidence the interval's ends are clear of jumps."""
    differences = np.array([0.0, 1.0, 3.0, 10.0])
    every_mean = np.sort([np.mean(drawn) for drawn in itertools.product(differences, repeat=4)])
    (interval,) = paired_bootstrap(differences[:, None], num_resamples=40_000, seed=0, confidence=0.8)
    assert interval.mean == 3.5
    assert interval.low == pytest.approx(np.quantile(every_mean, 0.1), abs=0.26)
    assert interval.high == pytest.approx(np.quantile(every_mean, 0.9), abs=0.26)


def test_two_pictures_give_three_possible_means() -> None:
    """Means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the middle 40 % is 1/2 alone, the middle 95 % all."""
    differences = np.array([[0.0], [1.0]])
    (narrow,) = paired_bootstrap(differences, 10_000, seed=1, confidence=0.4)
    (wide,) = paired_bootstrap(differences, 10_000, seed=1, confidence=0.95)
    assert (narrow.low, narrow.high) == (0.5, 0.5)
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_many_pictures_give_the_normal_interval() -> None:
    differences = np.random.default_rng(0).normal(0.3, 2.0, (2000, 1))
    (interval,) = paired_bootstrap(differences, 5000, seed=0)
    half_width = 1.96 * differences.std() / np.sqrt(2000)
    assert interval.low == pytest.approx(differences.mean() - half_width, abs=0.01)
    assert interval.high == pytest.approx(differences.mean() + half_width, abs=0.01)


def test_columns_are_resampled_together_and_do_not_change_one_another() -> None:
    columns = np.random.default_rng(0).normal(size=(50, 3))
    columns[:, 2] = -columns[:, 0]
    together = paired_bootstrap(columns, 3000, seed=5)
    alone = [paired_bootstrap(columns[:, k : k + 1], 3000, seed=5)[0] for k in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))
    assert (together[2].low, together[2].high) == pytest.approx((-together[0].high, -together[0].low))


def test_a_constant_difference_has_no_width_and_excludes_zero() -> None:
    above, none, below = paired_bootstrap(np.tile([0.25, 0.0, -0.25], (7, 1)), 200, seed=0)
    assert (above.low, above.high) == pytest.approx((0.25, 0.25))
    assert above.excludes_zero
    assert below.excludes_zero
    assert not none.excludes_zero


def test_no_pictures_or_scores_that_are_not_finite_are_errors() -> None:
    with pytest.raises(ValueError, match="N > 0"):
        paired_bootstrap(np.zeros((0, 2)), 10, seed=0)
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(np.array([[1.0], [np.nan]]), 10, seed=0)


def test_density_is_the_positive_mass_for_each_patch_of_the_object() -> None:
    attribution = torch.tensor([[[3.0, -5.0], [1.0, 2.0]]])
    top_row = torch.tensor([[[True, True], [False, False]]])
    assert positive_density(attribution, top_row).tolist() == [1.5]
    assert positive_density(attribution, ~top_row).tolist() == [1.5]
    assert positive_density(attribution, torch.ones(1, 2, 2, dtype=torch.bool)).tolist() == [1.5]
