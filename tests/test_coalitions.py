import itertools
import re

import pytest
import torch

from tve.coalitions import WindowCoalitions, Windows, coalition_pairs, random_halves, require_coalitions

CPU = torch.device("cpu")


@pytest.mark.parametrize(("patches", "radius"), [(1, 0), (4, 0), (5, 1), (6, 2), (7, 6)])
def test_a_window_holds_the_patches_at_most_r_rows_and_columns_away(patches: int, radius: int) -> None:
    windows = Windows(patches, radius)
    kept_NPP = windows.kept_NPP()
    assert kept_NPP.dtype == torch.bool
    assert kept_NPP.shape == (windows.num_coalitions, patches, patches) == (patches**2, patches, patches)
    for p, q, i, j in itertools.product(range(patches), repeat=4):
        near = abs(i - p) <= radius and abs(j - q) <= radius
        assert bool(kept_NPP[p * patches + q, i, j]) == near


def test_windows_are_indexed_row_first() -> None:
    """On a 5 x 5 grid, window 1 is around row 0, column 1; a transposed index would give row 1, column 0."""
    around = Windows(5, 0).kept_NPP()[1].nonzero().tolist()
    assert around == [[0, 1]]


def test_a_patch_lies_in_a_window_exactly_when_the_windows_centre_lies_in_its_own() -> None:
    kept_NN = Windows(6, 2).kept_NPP().flatten(1)
    assert torch.equal(kept_NN, kept_NN.T)


def test_border_windows_are_clipped_and_not_wrapped() -> None:
    sizes = Windows(14, 2).kept_NPP().sum((1, 2)).reshape(14, 14)
    assert int(sizes[0, 0]) == 9
    assert int(sizes[0, 7]) == 15
    assert int(sizes[7, 7]) == 25
    # The mean number of kept tokens that a window's cost is counted with.
    assert float(sizes.float().mean()) == pytest.approx(20.9, abs=0.05)


@pytest.mark.parametrize(
    ("patches", "radius", "message"),
    [
        (0, 0, "patches_per_side: expected at least 1, got 0"),
        (4, -1, "radius: expected 0 to 3"),
        (4, 4, "radius: expected 0 to 3 on a 4 x 4 grid, got 4"),
        (8, 1.5, r"radius: expected a whole number \(int\), got 1\.5"),
        (8, True, r"radius: expected a whole number \(int\), got True"),
        (8.0, 1, r"patches_per_side: expected a whole number \(int\), got 8\.0"),
    ],
)
def test_a_window_that_cannot_be_is_an_error(patches: int, radius: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(patches, radius)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2, 3, 4, 4),
        torch.ones(2, 3, 16, dtype=torch.bool),
        torch.ones(1, 3, 4, 4, dtype=torch.bool),
        torch.ones(2, 3, 4, 5, dtype=torch.bool),
    ],
    ids=["dtype", "flat", "batch", "grid"],
)
def test_coalitions_of_another_form_are_an_error_that_says_both(wrong: torch.Tensor) -> None:
    got = re.escape(f"got {str(wrong.dtype).removeprefix('torch.')} {list(wrong.shape)}; True = present")
    with pytest.raises(ValueError, match=rf"coalitions: expected bool \[2, K, 4, 4\], {got}"):
        require_coalitions(wrong, (2, "K"), 4, CPU)


def test_any_number_of_coalitions_is_accepted() -> None:
    for count in (0, 1, 5):
        require_coalitions(torch.ones(2, count, 4, 4, dtype=torch.bool), (2, "K"), 4, CPU)


def test_random_halves_keep_half_of_each_picture_and_differ() -> None:
    half_BPP = random_halves(200, 5, torch.Generator().manual_seed(0))
    assert half_BPP.dtype == torch.bool
    assert half_BPP.flatten(1).sum(1).unique().tolist() == [12]
    assert len(half_BPP.unique(dim=0)) == 200
    share_PP = half_BPP.double().mean(0)
    assert (share_PP - 12 / 25).abs().max() < 0.12  # three standard deviations of 200 draws are .106


@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_windows_know_their_sizes_and_masks_and_pair_with_their_complements(radius: int) -> None:
    family = Windows(5, radius)
    index = torch.arange(25)[None].expand(2, -1)
    pairs = coalition_pairs(family, index)
    assert isinstance(pairs, WindowCoalitions)
    assert torch.equal(pairs.sizes(), pairs.present().flatten(2).sum(2))
    kept, removed = pairs.present().chunk(2, dim=1)
    assert torch.equal(kept, ~removed)
    assert torch.equal(kept[0], family.kept_NPP())
    assert torch.equal(pairs.reshape(100)[torch.tensor([3, 99])].present(), pairs.present().flatten(0, 1)[[3, 99]])


def test_a_family_that_is_no_windows_pairs_by_masks() -> None:
    class Rows:
        patches_per_side, num_coalitions, radius = 3, 3, 0

        def kept_NPP(self, device: torch.device | str = "cpu") -> torch.Tensor:
            return torch.eye(3, dtype=torch.bool, device=device)[:, :, None].expand(3, 3, 3)

    pairs = coalition_pairs(Rows(), torch.tensor([[2, 0]]))
    assert isinstance(pairs, torch.Tensor)
    assert pairs[0, :, :, 0].tolist() == [
        [False, False, True],
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]
