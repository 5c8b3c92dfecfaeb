"""The evaluation's goals: what they make of scores that are known."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tve_pipeline.goal_lines import Goals
from tve_pipeline.goals_evaluation import absent_methods, against_rivals, overtaken, rise_converges, shares_of_way
from tve_pipeline.recorded import Column

NOISE = np.random.default_rng(0).normal(scale=0.01, size=(2, 40))


def scores(plus: float, minus: float) -> dict[str, NDArray[np.float64]]:
    return {"fidelity_plus": plus + NOISE[0], "fidelity_minus": minus + NOISE[1]}


def column(**maps: tuple[float, float]) -> Column:
    given = {"tve": (0.5, 0.1), "random": (0.2, 0.3), "exact_windows": (0.6, 0.05)} | maps
    jitter = np.random.default_rng(1).normal(scale=0.02, size=40)
    return Column(
        "vit",
        "digit",
        {name: {f: v + jitter * (name != "tve") for f, v in scores(*g).items()} for name, g in given.items()},
    )


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["goal"]: line for line in found}


def test_a_rival_is_beaten_only_where_both_intervals_are_clear_of_zero(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [column(vit_shapley=(0.3, 0.2), rollout=(0.3, 0.1)), column(vit_shapley=(0.4, 0.2), rollout=(0.3, 0.3))]
    against_rivals(Goals(), "p", columns)
    found = lines(capsys)
    assert found["p: cells in which TVE beats vit_shapley in both fidelities"]["value"] == 1.0
    assert found["p: cells in which TVE beats rollout in both fidelities"]["value"] == 0.5
    missing = found["p: cells in which TVE beats deep_lift in both fidelities"]
    assert (missing["value"], missing["ok"]) == (None, None)


def test_the_budget_that_passes_is_the_least_over_cells_and_none_is_beyond_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = [column(rise_10=(0.4, 0.2), rise_100=(0.55, 0.2)), column(rise_10=(0.4, 0.2), rise_100=(0.45, 0.2))]
    overtaken(Goals(), "p", columns)
    found = lines(capsys)
    assert found["p: budget at which rise passes TVE, fidelity_plus"]["value"] == 100
    assert found["p: budget at which rise passes TVE, fidelity_minus"]["value"] == 101
    assert found["p: budget at which lime passes TVE, fidelity_plus"]["ok"] is None


def test_methods_that_no_cell_has_are_named() -> None:
    rivals = {"integrated_gradients": (0.3, 0.2), "deep_lift": (0.3, 0.2), "gradient_shap": (0.3, 0.2)}
    assert absent_methods([column(rise_10=(0.4, 0.2), **rivals)]) == ["vit_shapley", "rollout", "kernel_shap", "lime"]


def test_the_least_share_of_the_way_counts(capsys: pytest.CaptureFixture[str]) -> None:
    goals = Goals()
    shares_of_way(goals, "p", [column(), column(tve=(0.3, 0.1))])
    found = lines(capsys)
    assert found["p: least share of the way, fidelity_plus"]["value"] == pytest.approx(0.25, abs=0.05)
    assert found["p: least share of the way, fidelity_minus"]["ok"] is True
    assert goals.fell_short


def test_rise_converges_to_its_conditional_means(capsys: pytest.CaptureFixture[str]) -> None:
    goals = Goals()
    rise_converges(goals)
    assert not goals.fell_short
