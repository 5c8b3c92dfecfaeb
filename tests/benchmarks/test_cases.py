"""The sets of coalitions that are timed."""

import pytest
import torch

from benchmarks.cases import ON_A_CPU, Amounts, CaseName, case, masks, some

AMOUNTS = Amounts(pictures=2, halves=5, orders=3, zeros=4)


@pytest.mark.parametrize(
    ("name", "count", "removal"),
    [
        ("kept", 196, "drop"),
        ("removed", 25, "drop"),
        ("pairs", 50, "drop"),
        ("half", 5, "drop"),
        ("fidelity", 54, "drop"),
        ("zero", 4, "zero"),
    ],
)
def test_a_case_has_the_coalitions_that_it_claims(name: CaseName, count: int, removal: str) -> None:
    made = case(name, 14, 2, AMOUNTS, "cpu")
    assert masks(made.coalitions).shape == (2, count, 14, 14)
    assert made.num_evaluations == 2 * count
    assert made.removal == removal
    assert (made.radius == 2) == (name in ("kept", "removed", "pairs"))


def test_pairs_are_windows_and_their_complements() -> None:
    present_KN = masks(case("pairs", 14, 1, ON_A_CPU, "cpu").coalitions)[0].flatten(1)
    assert torch.equal(present_KN[:25], ~present_KN[25:])
    assert present_KN[0].sum() == 4


def test_halves_hold_half_of_the_patches_and_differ() -> None:
    present_BKN = masks(case("half", 14, 1, AMOUNTS, "cpu").coalitions).flatten(-2)
    assert (present_BKN.sum(-1) == 98).all()
    assert len(present_BKN.flatten(0, 1).unique(dim=0)) == 10


def test_the_levels_of_an_order_are_nested_and_the_rest_is_what_they_leave() -> None:
    present_OLN = masks(case("fidelity", 10, 1, AMOUNTS, "cpu").coalitions)[0].flatten(1).unflatten(0, (3, 18))
    top, rest = present_OLN[:, :9], present_OLN[:, 9:]
    assert top.sum(-1).tolist() == [[10, 20, 30, 40, 50, 60, 70, 80, 90]] * 3
    assert (top[:, 1:] | ~top[:, :-1]).all()
    assert torch.equal(top, ~rest)


def test_a_case_is_the_same_on_every_call() -> None:
    first, second = (masks(case("half", 14, 1, AMOUNTS, "cpu").coalitions) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["kept", "half"])
def test_some_coalitions_are_those_of_their_indices(name: CaseName) -> None:
    made = case(name, 4, 1, AMOUNTS, "cpu")
    chosen = torch.tensor([0, 3])
    assert torch.equal(masks(some(made.coalitions, chosen)), masks(made.coalitions)[:, chosen])


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"case: expected one of .*, got 'whole'"):
        case("whole", 14, 1, AMOUNTS, "cpu")  # type: ignore[arg-type]
