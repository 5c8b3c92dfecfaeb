"""All sides on a tiny model: they agree, and what is written down of them follows from their times."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, compare
from benchmarks.baselines import SIDES, Side, SideName, groupable, sides
from benchmarks.cases import Amounts, CaseName, case, masks
from benchmarks.compare import measure_case, relative_error
from benchmarks.measure import Rate, fastest, paired_seconds, peak_mib, rate, speedup
from tve.backbones import Backbone, load_backbone
from tve.coalitions import Coalitions

CPU = torch.device("cpu")
AMOUNTS = Amounts(pictures=2, halves=3, orders=1, zeros=3)


def uncompiled(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
    return function


@pytest.fixture(autouse=True)
def _short_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "compiled", uncompiled)
    sizes = {"eager copies": (4,), "compiled copies": (3,), "eager rows": (20, 1000), "compiled rows": (7,)}
    monkeypatch.setitem(baselines.CANDIDATES, "cpu", sizes | {"static rows": (50,), "MiB": (64,)})
    monkeypatch.setitem(baselines.MASKED_AT_MOST, "cpu", 1000)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["kept", "removed", "pairs", "half", "fidelity", "zero"])
def test_all_settings_of_all_sides_agree_on_what_they_compute(tiny: Backbone, name: CaseName) -> None:
    given = case(name, 4, 1, AMOUNTS, CPU)
    made = sides(tiny, given.removal, "float32")
    assert set(made) == ({"masked_eager", "masked_compiled", "evaluator"} if name == "zero" else set(SIDES))
    by_removal: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for side in made.values():
            results = [each.embed(pictures(), given.coalitions) for each in side.candidates]
            by_removal.setdefault(side.removal, []).extend([*results, side.eager(pictures(), given.coalitions)])
    for results in by_removal.values():
        assert all(relative_error(result, results[0]) < 1e-5 for result in results)
    if name != "zero":
        assert relative_error(by_removal["zero"][0], by_removal["drop"][0]) > 1e-2


def test_masked_copies_are_pictures_with_zeros(tiny: Backbone) -> None:
    given = case("half", 4, 1, AMOUNTS, CPU)
    pixels = masks(given.coalitions).repeat_interleave(8, -1).repeat_interleave(8, -2)
    copies = pictures()[:, None] * pixels[:, :, None]
    embed = sides(tiny, "drop", "float32", ("masked_eager",))["masked_eager"].candidates[0].embed
    assert relative_error(embed(pictures(), given.coalitions).flatten(0, 1), tiny(copies.flatten(0, 1))) < 1e-5


def test_a_case_is_measured_on_every_side(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.MASKED_AT_MOST, "cpu", 5)
    given = case("kept", 4, 1, AMOUNTS, CPU)
    measured = measure_case(sides(tiny, "drop", "float32"), pictures(), given, 3, torch.float32)
    assert list(measured) == list(SIDES)
    assert {name: each.evaluations for name, each in measured.items()} == {
        "masked_eager": 4,
        "masked_compiled": 4,
        "grouped_eager": 32,
        "grouped_compiled": 32,
        "evaluator": 32,
    }
    for each in measured.values():
        assert len(each.per_s) == 3
        assert set(each.ratio_over) == {"a", "b", "c"}
        assert each.peak_mib >= 0
    assert measured["masked_eager"].ratio_over["a"] == 1
    assert 1 in (measured["grouped_eager"].ratio_over["c"], measured["grouped_compiled"].ratio_over["c"])
    full, ours = measured["masked_eager"].flops_per_evaluation, measured["evaluator"].flops_per_evaluation
    assert ours < measured["grouped_eager"].flops_per_evaluation < full
    assert full == measured["masked_compiled"].flops_per_evaluation


def test_zero_is_measured_on_a_share_of_its_coalitions(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.MASKED_AT_MOST, "cpu", 2)
    measured = measure_case(
        sides(tiny, "zero", "float32"), pictures(), case("zero", 4, 1, AMOUNTS, CPU), 1, torch.float32
    )
    assert (measured["masked_eager"].evaluations, measured["evaluator"].evaluations) == (2, 6)


def test_a_side_that_is_wrong_is_not_timed(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sides(tiny, "drop", "float32", ("grouped_eager", "evaluator"))
    right = made["evaluator"].candidates[0]

    def wrong(images_B3SS: Tensor, coalitions: Coalitions) -> Tensor:
        return right.embed(images_B3SS, coalitions).roll(1, dims=1)

    changed: dict[SideName, Side] = made | {
        "evaluator": replace(made["evaluator"], candidates=(replace(right, embed=wrong),))
    }
    monkeypatch.setattr(compare, "paired_seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match=r"evaluator: expected the embeddings of grouped_eager within 0\.0001"):
        measure_case(changed, pictures(), case("kept", 4, 1, AMOUNTS, CPU), 1, torch.float32)


def test_results_that_are_not_finite_disagree() -> None:
    assert not relative_error(torch.full((2, 2), torch.nan), torch.ones(2, 2)) < 1


@pytest.mark.parametrize("changes", [{"global_pool": "avg"}, {"reg_tokens": 2}])
def test_only_a_class_token_is_grouped(changes: dict[str, Any]) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    assert not groupable(load_backbone("vit_tiny_patch16_224", "random", timm_args=size | changes))


def test_percentiles_are_of_the_rate() -> None:
    assert rate(12, [1, 2, 3, 4, 6, 12]) == Rate(2.0, 3.5, 6.0)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    assert speedup([10, 40, 30], [5, 10, 30]) == 2  # of the medians it would be 3


def test_every_program_runs_once_a_round_in_an_order_that_turns() -> None:
    order: list[str] = []
    elapsed_s = paired_seconds({name: lambda name=name: order.append(name) for name in "abc"}, 4, CPU)  # type: ignore
    assert "".join(order) == "abcbcacababc"
    assert {name: len(each) for name, each in elapsed_s.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_fastest_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"slow": iter([5.0]), "noisy": iter([1.9, 0.9, 1.5]), "steady": iter([1.0] * 3), "slower": iter([1.2])}
    programs = [lambda name=name: name for name in times]
    monkeypatch.setattr("benchmarks.measure.seconds", lambda program, _: next(times[program()]))
    assert fastest(programs, CPU) == 1
    assert not any(list(left) for left in times.values())


def test_the_best_setting_of_masked_copies_is_searched_once(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def first(programs: list[Callable[[], object]], device: torch.device) -> int:
        searched.append(len(programs))
        return 0

    monkeypatch.setattr(compare, "fastest", first)
    monkeypatch.setitem(baselines.MASKED_AT_MOST, "cpu", 4)
    made, known = sides(tiny, "drop", "float32", ("masked_eager", "evaluator")), compare.Known()
    for name in ("half", "kept"):
        measure_case(made, pictures(), case(name, 4, 1, AMOUNTS, CPU), 1, torch.float32, known)
    assert len(searched) == 3  # the evaluator's is searched for each case
    assert set(known) == {("masked_eager", 4)}


def test_peak_memory_is_what_lives_at_once() -> None:
    def runs() -> Tensor:
        parts = [torch.ones(2**20) for _ in range(16)]  # 64 MiB together
        return torch.stack(parts).sum()

    assert 120 < peak_mib(runs, CPU) < 150
