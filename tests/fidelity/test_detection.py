import pytest
import torch
from sklearn.metrics import average_precision_score

from tve.fidelity.detection import average_precision, mass_inside, pointing_hit
from tve.fidelity.levels import nested_levels

TOP_ROW = torch.tensor([[[True, True], [False, False]]])


def drawn(num_pictures: int, patches: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of few levels, so that many scores are equal, and objects of every size."""
    generator = torch.Generator().manual_seed(levels)
    maps = torch.randint(-levels, levels, (num_pictures, patches, patches), generator=generator) / 4
    share = torch.rand(num_pictures, 1, 1, generator=generator)
    return maps, torch.rand(num_pictures, patches, patches, generator=generator) < share


def test_mass_inside_is_the_objects_share_of_positive_attribution() -> None:
    attribution = torch.tensor([[[3.0, -5.0], [1.0, 2.0]]])
    torch.testing.assert_close(mass_inside(attribution, TOP_ROW), torch.tensor([0.5]))
    torch.testing.assert_close(mass_inside(attribution, ~TOP_ROW), torch.tensor([0.5]))
    left_column = torch.tensor([[[True, False], [True, False]]])
    torch.testing.assert_close(mass_inside(attribution, left_column), torch.tensor([4 / 6]))


def test_a_map_without_positive_mass_has_no_share_of_it_inside() -> None:
    attribution = torch.tensor([[[-3.0, -5.0], [0.0, -2.0]]])
    assert mass_inside(attribution, TOP_ROW).isnan().all()
    assert not pointing_hit(attribution, TOP_ROW).isnan().any()
    assert not average_precision(attribution, TOP_ROW).isnan().any()


def test_the_pointing_game_asks_for_the_highest_patch_alone() -> None:
    attribution = torch.tensor([[[3.0, -5.0], [1.0, 2.0]]])
    for place, hit in (((0, 0), 1.0), ((0, 1), 0.0), ((1, 1), 0.0)):
        found = torch.zeros(1, 2, 2, dtype=torch.bool)
        found[0][place] = True
        assert pointing_hit(attribution, found).tolist() == [hit]


def test_of_equal_highest_patches_the_game_takes_that_which_levels_take_first() -> None:
    maps, objects = drawn(200, 4, levels=2)
    on_the_first = (nested_levels(maps, [1 / 16])[:, 0] & objects).flatten(1).any(1)
    defined = objects.flatten(1).any(1) & ~objects.flatten(1).all(1)
    assert pointing_hit(maps, objects)[defined].bool().equal(on_the_first[defined])


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_average_precision_is_scikit_learns_ties_included(levels: int) -> None:
    maps, objects = drawn(100, 5, levels)
    found = average_precision(maps, objects)
    for place, (scores, truth) in enumerate(zip(maps.flatten(1), objects.flatten(1), strict=True)):
        if truth.any() and not truth.all():
            expected = average_precision_score(truth.numpy(), scores.numpy())
            assert found[place].item() == pytest.approx(expected, abs=1e-6)


def test_a_map_that_ranks_the_object_first_detects_it_and_a_constant_one_gets_its_share() -> None:
    perfect, constant = torch.tensor([[[3.0, 2.0], [1.0, -4.0]]]), torch.zeros(1, 2, 2)
    assert average_precision(perfect, TOP_ROW).tolist() == [1.0]
    assert average_precision(constant, TOP_ROW).tolist() == [0.5]
    # The object's patches come third and fourth.
    torch.testing.assert_close(average_precision(-perfect, TOP_ROW), torch.tensor([(1 / 3 + 2 / 4) / 2]))


@pytest.mark.parametrize("measure", [mass_inside, pointing_hit, average_precision])
def test_an_object_without_patches_or_with_all_of_them_cannot_be_found(measure: object) -> None:
    assert callable(measure)
    attribution = torch.rand(3, 2, 2) + 1
    objects = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.eye(2)]).bool()
    assert measure(attribution, objects).isnan().tolist() == [True, True, False]


def test_an_object_of_another_grid_or_dtype_and_a_map_that_is_not_finite_are_errors() -> None:
    with pytest.raises(ValueError, match=r"expected bool \[1, 3, 3\].*got bool \[1, 2, 2\]"):
        mass_inside(torch.zeros(1, 3, 3), TOP_ROW)
    with pytest.raises(ValueError, match="got float32"):
        average_precision(torch.zeros(1, 2, 2), TOP_ROW.float())
    with pytest.raises(ValueError, match="got 1 that are not"):
        pointing_hit(torch.tensor([[[torch.nan, 0.0], [0.0, 0.0]]]), TOP_ROW)
