import pytest
import torch

from tve.fidelity.areas import deletion_area, insertion_area
from tve.fidelity.scores import Fidelity

FULL, EMPTY = torch.tensor([0.8, 1.0]), torch.tensor([0.2, 0.0])


def fidelity_of(kept: list[list[float]], removed: list[list[float]]) -> Fidelity:
    """Fidelity where p(y|x) is FULL and the levels' probabilities are given."""
    return Fidelity(FULL[:, None] - torch.tensor(removed), FULL[:, None] - torch.tensor(kept))


def test_areas_are_those_of_a_hand_calculation() -> None:
    """Levels of 1 and 3 of 4 patches."""
    found = fidelity_of(kept=[[0.4, 0.6], [1.0, 1.0]], removed=[[0.6, 0.4], [0.0, 0.0]])
    insertion = insertion_area(found, FULL, EMPTY, [0.25, 0.75], 4)
    deletion = deletion_area(found, FULL, EMPTY, [0.25, 0.75], 4)
    # From .2 over .4 and .6 to .8; from 0 to 1 at the first level, and 1 from there on.
    torch.testing.assert_close(insertion, torch.tensor([0.25 * 0.3 + 0.5 * 0.5 + 0.25 * 0.7, 0.125 + 0.75]))
    # From .8 over .6 and .4 to .2; from 1 to 0 at the first level, and 0 from there on.
    torch.testing.assert_close(deletion, torch.tensor([0.25 * 0.7 + 0.5 * 0.5 + 0.25 * 0.3, 0.125]))


def test_a_probability_that_rises_in_proportion_to_patches_has_its_mean_as_area_whatever_the_levels() -> None:
    """0.1 and 0.3 of 7 patches are 1 and 2 patches: trapezoids between 0.1 and 0.3 would miss the line."""
    for fractions, sizes in (([0.1, 0.3], [1, 2]), ([0.5], [4]), ([0.2, 0.25, 0.9], [1, 2, 6])):
        share = torch.tensor(sizes) / 7
        kept = EMPTY[:, None] + (FULL - EMPTY)[:, None] * share
        removed = FULL[:, None] - (FULL - EMPTY)[:, None] * share
        found = fidelity_of(kept.tolist(), removed.tolist())
        torch.testing.assert_close(insertion_area(found, FULL, EMPTY, fractions, 7), (FULL + EMPTY) / 2)
        torch.testing.assert_close(deletion_area(found, FULL, EMPTY, fractions, 7), (FULL + EMPTY) / 2)


def test_fractions_that_round_to_one_level_count_it_once() -> None:
    twice = fidelity_of(kept=[[0.5, 0.5]] * 2, removed=[[0.5, 0.5]] * 2)
    once = fidelity_of(kept=[[0.5]] * 2, removed=[[0.5]] * 2)
    of_once = insertion_area(once, FULL, EMPTY, [0.5], 4)
    torch.testing.assert_close(insertion_area(twice, FULL, EMPTY, [0.49, 0.51], 4), of_once)


def test_fractions_that_do_not_ascend_or_are_not_those_of_the_fidelity_are_errors() -> None:
    found = fidelity_of(kept=[[0.5, 0.5]] * 2, removed=[[0.5, 0.5]] * 2)
    with pytest.raises(ValueError, match="expected ascending ones"):
        insertion_area(found, FULL, EMPTY, [0.75, 0.25], 4)
    with pytest.raises(ValueError, match=r"expected drops \[2, 1\]"):
        deletion_area(found, FULL, EMPTY, [0.5], 4)
    with pytest.raises(ValueError, match=r"\[1\] and \[2\]"):
        insertion_area(found, FULL, EMPTY[:1], [0.25, 0.75], 4)
