import math
from functools import cache
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from tve import transfer_rule
from tve.backbones import Backbone, load_backbone
from tve.coalitions import Windows
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.v_information import (
    all_coalitions,
    chain_terms,
    coalition_index,
    coalition_values,
    dividends,
    end_terms,
    num_players,
    shapley_values,
)
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.removal import Removal
from tve.transfer_rule import PerPatch, TransferRule, class_maps, transfer

WIDTH, TARGET = 16, torch.tensor([1, 4, 0])


def tiny_backbone(patches_per_side: int) -> Backbone:
    torch.manual_seed(0)
    size = 8 * patches_per_side
    tiny = {"img_size": size, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny)


def some_pictures(patches_per_side: int) -> Tensor:
    size = 8 * patches_per_side
    return 2 * torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def loud_head() -> nn.Linear:
    """Five classes, between which the tiny backbone's small differences decide."""
    torch.manual_seed(2)
    head = nn.Linear(WIDTH, 5)
    nn.init.normal_(head.weight, std=3.0)
    return head


@cache
def real_game(patches_per_side: int, removal: Removal) -> tuple[CoalitionEvaluator, Tensor, nn.Linear, Tensor]:
    """An evaluator, pictures, a head, and log p of the pictures' classes under every coalition [2^N, B]."""
    evaluator = CoalitionEvaluator(tiny_backbone(patches_per_side), removal)
    images, head = some_pictures(patches_per_side), loud_head()
    return evaluator, images, head, coalition_values(evaluator, images, head, TARGET)


def random_game(num: int, largest: int, seed: int = 0, games: int = 4) -> Tensor:
    """A table [2^N, G] of random games in which at most `largest` players interact."""
    present = torch.tensor([[index >> n & 1 for n in range(num)] for index in range(2**num)]).bool()
    generator = torch.Generator().manual_seed(seed)
    amount = torch.randn(2**num, games, generator=generator, dtype=torch.float64)
    amount[present.sum(1) > largest] = 0
    within = ~(present[None] & ~present[:, None]).any(2)  # T in S
    return within.double() @ amount


def all_orders(num: int) -> Tensor:
    return torch.tensor(list(permutations(range(num))))


def maps_of_game(values: Tensor, patches_per_side: int, radius: int, per_patch: PerPatch) -> Tensor:
    """The transfer rule's maps [G, P, P] of games on a grid, read from what the windows' coalitions are worth."""
    kept = Windows(patches_per_side, radius).kept_NPP()
    everything, nothing = torch.ones_like(kept[:1]), torch.zeros_like(kept[:1])
    alone, without, full, empty = (values[coalition_index(some)] for some in (kept, ~kept, everything, nothing))
    # Each game is a picture whose embedding holds its worth, less that of ∅, and the head hands it on.
    meta = MetaAttribution(
        (alone - empty).T[..., None], (without - empty).T[..., None], (full - empty).T, torch.zeros(1).double(), radius
    )
    return transfer(meta, nn.Identity(), TransferRule("logit", per_patch))[:, 0]


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_along_every_order_of_a_pictures_patches_the_terms_sum_to_the_whole_information(removal: Removal) -> None:
    evaluator, images, head, values = real_game(2, removal)
    terms = chain_terms(values, all_orders(4))
    with torch.no_grad():
        whole = head(evaluator.full(images)).log_softmax(-1) - head(evaluator.empty()).log_softmax(-1)
    expected = whole[torch.arange(3), TARGET].double().expand(24, 3)
    assert expected.abs().min() > 0.01
    torch.testing.assert_close(terms.sum(1), expected, atol=1e-5, rtol=0)


def test_a_term_is_what_a_patch_adds_to_those_before_it() -> None:
    values = random_game(4, largest=4)
    orders = all_orders(4)[[0, 5, 13, 23]]
    terms = chain_terms(values, orders)
    for row, order in enumerate(orders.tolist()):
        for place, player in enumerate(order):
            before = sum(2**other for other in order[:place])
            torch.testing.assert_close(terms[row, player], values[before + 2**player] - values[before])


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_shapley_values_are_the_mean_term_over_all_orders(removal: Removal) -> None:
    _, _, _, values = real_game(2, removal)
    torch.testing.assert_close(shapley_values(values), chain_terms(values, all_orders(4)).mean(0))


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_shapley_values_of_a_real_picture_share_out_the_whole_information(removal: Removal) -> None:
    _, _, _, values = real_game(3, removal)
    torch.testing.assert_close(shapley_values(values).sum(0), values[-1] - values[0])


@pytest.mark.parametrize("num", [1, 2, 5, 12])
def test_shapley_values_share_every_interaction_evenly_among_its_players(num: int) -> None:
    """The unanimity game of T, worth 1 where all of T is present, gives 1 / |T| to each of T and nothing to others."""
    member = torch.tensor([[index >> n & 1 for n in range(num)] for index in range(2**num)])
    for together in {1, 2**num - 1, 2 ** (num - 1), (2**num - 1) & 0b101101}:
        game = ((torch.arange(2**num) & together) == together).double()
        torch.testing.assert_close(shapley_values(game), member[together].double() / together.bit_count())


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_the_map_of_windows_of_one_patch_is_twice_the_mean_of_the_terms_at_both_ends(removal: Removal) -> None:
    evaluator, images, head, values = real_game(3, removal)
    rule = TransferRule("log_probability", "window")
    u = class_maps(exact_windows(evaluator, images, Windows(3, 0)), head, TARGET, rule)
    assert u.abs().max() > 0.1
    torch.testing.assert_close(u.flatten(1).T.double(), 2 * end_terms(values), atol=2e-5, rtol=0)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_where_only_pairs_interact_half_of_u_is_the_sum_of_its_windows_shapley_values(radius: int) -> None:
    values = random_game(9, largest=2)
    u = maps_of_game(values, 3, radius, "window")
    window_NN = Windows(3, radius).kept_NPP().flatten(1).double()
    torch.testing.assert_close(u.flatten(1).T / 2, window_NN @ shapley_values(values))


def test_where_only_pairs_interact_half_of_phi_is_the_window_mean_of_window_sums_of_shapley_values() -> None:
    values = random_game(9, largest=2)
    phi = maps_of_game(values, 3, 1, "mean")
    window_NN = Windows(3, 1).kept_NPP().flatten(1).double()
    mean_of_sums = window_NN / window_NN.sum(1, keepdim=True) @ window_NN @ shapley_values(values)
    torch.testing.assert_close(phi.flatten(1).T / 2, mean_of_sums)


@pytest.mark.parametrize(("side", "radius"), [(3, 0), (3, 1), (3, 2), (2, 1)])
def test_where_only_pairs_interact_shares_are_the_shapley_values_but_for_what_window_sums_do_not_tell(
    side: int, radius: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ridge that only settles what is not told. Windows that all hold everything tell of none apart."""
    monkeypatch.setattr(transfer_rule, "SHARE_RIDGE", 1e-8)
    transfer_rule._share_parts.cache_clear()
    values = random_game(side**2, largest=2)
    try:
        shares = maps_of_game(values, side, radius, "share").flatten(1).T
    finally:
        transfer_rule._share_parts.cache_clear()
    window_NN = Windows(side, radius).kept_NPP().flatten(1).double()
    if radius:  # what all windows have alike goes to the constant
        window_NN = window_NN - window_NN.mean(0)
    told_NN = torch.linalg.pinv(window_NN, atol=1e-6) @ window_NN
    torch.testing.assert_close(shares, told_NN @ shapley_values(values), atol=1e-4, rtol=1e-4)
    assert round(float(told_NN.trace())) == {(3, 0): 9, (3, 1): 8, (3, 2): 0, (2, 1): 0}[side, radius]


def test_where_three_interact_the_ends_are_not_the_shapley_value() -> None:
    """Three players that are worth 1 together: a third each, but a half at the ends."""
    game = torch.zeros(8, dtype=torch.float64)
    game[7] = 1
    torch.testing.assert_close(shapley_values(game), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(end_terms(game), torch.full((3,), 1 / 2, dtype=torch.float64))


def test_what_the_ends_miss_of_shapley_is_each_interactions_dividend_times_a_half_less_one_in_its_size() -> None:
    _, _, _, values = real_game(3, "drop")
    member = all_coalitions(3).flatten(1).double()
    size = member.sum(1)
    factor = torch.where(size > 2, 0.5 - 1 / size.clamp(min=1), 0)
    missed = end_terms(values) - shapley_values(values)
    assert missed.abs().max() > 1e-3
    torch.testing.assert_close(missed, member.T @ (factor[:, None] * dividends(values)))
    excess = ((size / 2 - 1).clamp(min=0)[:, None] * dividends(values)).sum(0)
    torch.testing.assert_close(end_terms(values).sum(0), values[-1] - values[0] + excess)


def test_what_half_of_u_misses_of_a_windows_shapley_values_comes_from_interactions_that_are_partly_in_it() -> None:
    """Each counts a half in u / 2, and by the share of its patches that are in the window in the sum."""
    values = random_game(9, largest=9)
    window_NN = Windows(3, 1).kept_NPP().flatten(1).double()
    member = all_coalitions(3).flatten(1).double()
    share = window_NN @ member.T / member.sum(1).clamp(min=1)
    partly = (share > 0) & (share < 1)
    missed = maps_of_game(values, 3, 1, "window").flatten(1).T / 2 - window_NN @ shapley_values(values)
    assert missed.abs().max() > 0.1
    torch.testing.assert_close(missed, torch.where(partly, 0.5 - share, 0) @ dividends(values))


def test_dividends_of_a_game_are_the_interactions_that_it_was_made_of() -> None:
    """v = 2 + 3 [0] - 5 [1 and 3] + 7 [0, 1 and 2], on four players."""
    made_of = {0b0000: 2.0, 0b0001: 3.0, 0b1010: -5.0, 0b0111: 7.0}
    game = torch.tensor(
        [sum(worth for within, worth in made_of.items() if index & within == within) for index in range(16)]
    )
    expected = torch.zeros(16)
    expected[list(made_of)] = torch.tensor(list(made_of.values()))
    assert torch.equal(dividends(game), expected)


def test_every_coalition_has_its_own_place_in_row_major_order() -> None:
    present = all_coalitions(3)
    assert present.shape == (512, 3, 3)
    assert torch.equal(coalition_index(present), torch.arange(512))
    only = torch.zeros(1, 3, 3, dtype=torch.bool)
    only[0, 1, 2] = True
    assert coalition_index(only).item() == 2**5


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_a_pictures_table_holds_what_each_coalition_says_of_its_class(removal: Removal) -> None:
    evaluator, images, head, values = real_game(2, removal)
    for index in (0, 1, 6, 15):
        present = torch.tensor([[index & 1, index >> 1 & 1], [index >> 2 & 1, index >> 3 & 1]]).bool()
        with torch.no_grad():
            says = head(evaluator(images, present.expand(3, 1, 2, 2))[:, 0]).log_softmax(-1)
        torch.testing.assert_close(values[index], says[torch.arange(3), TARGET].double(), atol=1e-5, rtol=0)


def test_tables_grids_and_orders_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"patches_per_side: expected 1 to 3, got 4"):
        all_coalitions(4)
    for table in (torch.zeros(6), torch.zeros(1), torch.zeros(2**13), torch.zeros(8, dtype=torch.long), torch.ones(())):
        with pytest.raises(ValueError, match=r"values: expected floating \[2\^N, ...\]"):
            num_players(table)
    with pytest.raises(ValueError, match=r"orders: expected permutations of 0 to 2"):
        chain_terms(torch.zeros(8), torch.tensor([[0, 1, 1]]))


def test_the_information_of_a_head_that_ignores_pictures_is_nil() -> None:
    """Its probability is 1 / C under every coalition."""
    evaluator = CoalitionEvaluator(tiny_backbone(2), "drop")
    head = nn.Linear(WIDTH, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    values = coalition_values(evaluator, some_pictures(2), head, 3)
    torch.testing.assert_close(values, torch.full((16, 3), -math.log(5), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(shapley_values(values), torch.zeros(4, 3, dtype=torch.float64), atol=1e-12, rtol=0)
