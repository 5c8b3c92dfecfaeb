import pytest
import torch

from tve.fidelity.levels import level_sizes, nested_levels

FRACTIONS = [0.1, 0.3, 0.5, 0.9]


def test_a_level_holds_the_highest_scores_at_their_places() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.8, 0.2, 0.4], [0.0, 0.7, 0.5]]])
    levels = nested_levels(scores, [1 / 9, 4 / 9])
    assert levels[0, 0].int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert levels[0, 1].int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1]]


def test_levels_have_the_rounded_sizes_and_are_nested() -> None:
    scores = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = nested_levels(scores, FRACTIONS)
    assert levels.sum((2, 3)).unique(dim=0).tolist() == [[6, 19, 32, 58]]
    for smaller, larger in zip(levels.unbind(1)[:-1], levels.unbind(1)[1:], strict=True):
        assert not (smaller & ~larger).any()


def test_levels_see_the_order_of_scores_alone() -> None:
    scores = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert nested_levels(scores, FRACTIONS).equal(nested_levels(3 * scores.exp() - 7, FRACTIONS))


def test_ties_are_broken_by_one_order_of_positions_for_every_map() -> None:
    constant = nested_levels(torch.tensor([0.0, 5.0, -1.0])[:, None, None].expand(3, 8, 8), FRACTIONS)
    assert constant[0].equal(constant[1])
    assert constant[0].equal(constant[2])


def test_ties_favour_no_region() -> None:
    half = nested_levels(torch.zeros(1, 14, 14), [0.5])[0, 0]
    for region in (half[:7], half[7:], half[:, :7], half[:, 7:], half[3:11, 3:11], half[::2], half[:, ::2]):
        assert 0.35 < region.float().mean() < 0.65


def test_tied_patches_come_after_higher_and_before_lower_ones() -> None:
    scores = torch.zeros(1, 4, 4)
    scores[0, 2, 1], scores[0, 1, 2] = 1.0, -1.0
    first, all_but_one = nested_levels(scores, [1 / 16, 15 / 16])[0]
    assert first.nonzero().tolist() == [[2, 1]]
    assert (~all_but_one).nonzero().tolist() == [[1, 2]]


def test_a_level_without_a_patch_is_an_error_that_names_the_fraction() -> None:
    with pytest.raises(ValueError, match=r"1 to 3 of 4 patches, got \[0.1\]"):
        level_sizes([0.1, 0.5], 4)


def test_a_map_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 1 that are not"):
        nested_levels(torch.tensor([[[0.0, float("nan")], [1.0, 2.0]]]), [0.5])
