"""The evaluation's goals, measured from the pictures' rows: one JSON line each, a non-zero exit where one falls short.

    python -m tve_pipeline.goals_evaluation [--num-pictures 50] [--full]

Rows are used only after the outputs' bytes were hashed and found to be those of dvc.lock. By default the first 50
pictures of `scenes`; `--full` (make goals-evaluation FULL=1): all pictures, and the rows of the runs of hours that are
committed under docs/records, whose hashes are checked likewise. A cell is a (backbone, task).
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tve.baselines.method import Question
from tve.baselines.perturbation import Occlusion
from tve.baselines.rise import conditional_means
from tve.coalitions import Windows, random_halves
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer
from tve.export import load_explainer
from tve.fidelity.v_information import all_coalitions
from tve.heads import load_head
from tve.meta_attribution import exact_windows
from tve.pictures import ordered_batches
from tve.shards import Shards
from tve.transfer_rule import TransferRule, class_maps
from tve_pipeline.compare import read_cell
from tve_pipeline.evaluate_measures import EvaluateParams
from tve_pipeline.evaluation import load_task_heads
from tve_pipeline.examine import ExamineParams, examined
from tve_pipeline.goal_lines import Goals
from tve_pipeline.goals import cells, methods_of, section_of, verify_outputs
from tve_pipeline.measure_names import FIDELITIES, SIGN_OF_BETTER
from tve_pipeline.recorded import Column, columns_of, recorded_columns

PROFILES = ("scenes",)
RECORDED = ("scenes_grid", "real", "real_112")
RIVALS = ("vit_shapley", "integrated_gradients", "deep_lift", "gradient_shap", "rollout")
TO_BEAT = ("random_blurred", "centre")  # of the controls
SAMPLERS = ("rise", "kernel_shap", "lime")
BARS_OF_WAY = {
    "scenes": {"fidelity_plus": 0.80, "fidelity_minus": 0.70},
    "real": {"fidelity_plus": 0.70, "fidelity_minus": 0.50},
}
TIMED_BATCH, TIMED_ROUNDS = 32, 9
PARITY_PICTURES = 4
SANITY_PICTURES, SANITY_BAR = 32, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pictures", type=int, default=50, help="of each cell, the first by their keys")
    parser.add_argument("--full", action="store_true", help="all pictures")
    arguments = parser.parse_args(argv)
    goals = Goals()
    for profile in PROFILES:
        verify_outputs(profile)
        columns = list(read_columns(profile, None if arguments.full else arguments.num_pictures))
        if absent := absent_methods(columns):
            elsewhere = "" if arguments.full else "; FULL=1 reads the rows of scenes_grid"
            print(f"{profile} does not run {', '.join(absent)}{elsewhere}", file=sys.stderr)
        against_rivals(goals, profile, columns)
        overtaken(goals, profile, columns)
        shares_of_way(goals, profile, columns)
        for backbone, dataset in cells(profile):
            price(goals, profile, backbone, dataset)
            occlusion_parity(goals, profile, backbone, dataset)
            sanity(goals, profile, backbone, dataset)
    for profile in RECORDED if arguments.full else ():
        columns = list(recorded_columns(profile))
        against_rivals(goals, profile, columns)
        overtaken(goals, profile, columns)
        shares_of_way(goals, profile, columns)
    rise_converges(goals)
    return 1 if goals.fell_short else 0


def absent_methods(columns: Sequence[Column]) -> list[str]:
    """The methods that the goals speak of and no cell has."""
    there = {name for column in columns for name in column.scores}
    samplers = [name for name in SAMPLERS if not any(each.startswith(f"{name}_") for each in there)]
    return [*(name for name in RIVALS if name not in there), *samplers]


def read_columns(profile: str, num_pictures: int | None) -> Iterator[Column]:
    """Every task of every backbone of a profile."""
    for backbone, dataset in cells(profile):
        folder = Path("results", profile, "evaluate", f"{backbone}-{dataset}")
        cell = read_cell(folder, methods_of(profile, backbone))
        assert cell is not None, folder
        yield from columns_of(backbone, cell, num_pictures)


def against_rivals(goals: Goals, profile: str, columns: Sequence[Column]) -> None:
    """In which share of the cells TVE beats each rival, and each control."""
    for names, bar in ((RIVALS, 0.80), (TO_BEAT, 1.0)):
        for method in names:
            there = [column for column in columns if method in column.scores]
            share = sum(column.beats(method) for column in there) / len(there) if there else None
            goals.at_least(f"{profile}: cells in which TVE beats {method} in both fidelities", share, bar, "share")


def overtaken(goals: Goals, profile: str, columns: Sequence[Column]) -> None:
    """The least budget, over cells, at which a sampler's mean passes TVE's; one above the largest where none does."""
    for sampler in SAMPLERS:
        budgets = sorted({int(m.rpartition("_")[2]) for c in columns for m in c.scores if m.startswith(f"{sampler}_")})
        for fidelity in FIDELITIES:
            passing = [
                budget for budget in budgets for column in columns if _passes(column, f"{sampler}_{budget}", fidelity)
            ]
            value = float(min([*passing, budgets[-1] + 1])) if budgets else None
            goals.at_least(f"{profile}: budget at which {sampler} passes TVE, {fidelity}", value, 50, "evaluations")


def shares_of_way(goals: Goals, profile: str, columns: Sequence[Column]) -> None:
    """The least share of the way from random to exact windows, over the cells in which these two differ."""
    for fidelity, bar in BARS_OF_WAY["real" if profile.startswith("real") else "scenes"].items():
        shares = [share for column in columns if (share := column.share_of_way(fidelity)) is not None]
        goals.at_least(f"{profile}: least share of the way, {fidelity}", min(shares, default=None), bar, "share")


@torch.no_grad()
def price(goals: Goals, profile: str, backbone: str, dataset: str) -> None:
    """What ĝ, ĥ and the maps of all classes take beyond G(x), as a multiple of one classification."""
    explainer, images, head = _at_hand(profile, backbone, dataset, TIMED_BATCH)
    classify = functools.partial(_classify, explainer.backbone, head, images)
    ratios = []
    for program in (classify, functools.partial(explainer.explain_all, images, head)):
        program()
    for _ in range(TIMED_ROUNDS):
        classification_s = _seconds(classify)
        ratios.append(
            (_seconds(functools.partial(explainer.explain_all, images, head)) - classification_s) / classification_s
        )
    value = float(np.median(ratios))
    goals.at_most(f"{profile}, {backbone}: ĝ, ĥ and all maps, G(x) given, batch 32", value, 1.5, "classifications")


@torch.no_grad()
def occlusion_parity(goals: Goals, profile: str, backbone: str, dataset: str) -> None:
    """Largest difference between captum's occlusion and the exact windows' second bracket, on the same masks."""

    explainer, images, head = _at_hand(profile, backbone, dataset, PARITY_PICTURES)
    evaluator = CoalitionEvaluator(explainer.backbone, explainer.config.removal)
    target = head(evaluator.full(images)).argmax(-1)
    windows = Windows(explainer.backbone.patches_per_side, 0)
    meta = exact_windows(evaluator, images, windows)
    ours = class_maps(meta, head, target, TransferRule("probability", "window", weight_kept=0.0))
    keys = [str(number) for number in range(len(images))]
    answers = Occlusion(evaluator, radius=0)(images, keys, {"task": Question(head, target)})
    error = float((answers["task", "occlusion"].map_BPP - ours).abs().max())
    goals.at_most(f"{profile}, {backbone}: occlusion against captum's", error, 1e-5, "probability")


def sanity(goals: Goals, profile: str, backbone: str, dataset: str) -> None:
    """Largest mean rank correlation, over tasks, of TVE's maps with those of what was redrawn; and broken bounds."""
    shards = Shards.open(Path("data", profile, "shards", dataset))
    explainer = load_explainer(Path("models", profile, "export", backbone))
    heads = load_task_heads(Path("models", profile, "heads", f"{backbone}-{dataset}"), explainer.backbone, shards.tasks)
    evaluation = EvaluateParams.model_validate(section_of(profile, "evaluate"))
    params = ExamineParams(num_pictures=SANITY_PICTURES, num_heads=5, seed=0)
    _, images = next(ordered_batches(shards, evaluation.split, explainer.backbone, batch_size=SANITY_PICTURES))
    tasks = examined(explainer, heads, images, params, evaluation)["tasks"].values()
    for name, found in (
        ("random heads", [task["tve"]["random_head"] for task in tasks]),
        ("another picture", [task["tve"]["other_picture"] for task in tasks]),
        ("all blocks redrawn", [task["tve"]["blocks"][-1] for task in tasks if task["tve"]["blocks"]]),
    ):
        largest = max((value for value in found if value is not None), default=None)
        goals.at_most(f"{profile}, {backbone}: rank correlation with {name}", largest, SANITY_BAR, "correlation")
    broken = float(sum(task["bound"]["num_broken"] for task in tasks))
    goals.at_most(f"{profile}, {backbone}: pictures that break the bound", broken, 0, "pictures")


def rise_converges(goals: Goals) -> None:
    """RISE on a 3 x 3 grid against the conditional means over all its halves, in standard errors."""

    every = all_coalitions(3)
    halves = every[every.flatten(1).sum(1) == 4]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 9, generator=generator, dtype=torch.float64)

    def game(present_KPP: Tensor) -> Tensor:
        rows = present_KPP.flatten(1).double()
        return torch.einsum("kn,nm,km->k", rows, weight, rows)

    exact = conditional_means(game(halves), halves)
    drawn = random_halves(100_000, 3, generator)
    error = float((conditional_means(game(drawn), drawn) - exact).abs().max())
    standard_error = float(game(halves).std()) / (len(drawn) * 4 / 9) ** 0.5
    goals.at_most(
        "RISE on 3 x 3, 100,000 halves, from the exact conditional mean", error / standard_error, 4.0, "standard errors"
    )


def _passes(column: Column, method: str, fidelity: str) -> bool:
    sign = SIGN_OF_BETTER[fidelity]
    found = column.scores.get(method)
    return found is not None and bool(sign * found[fidelity].mean() > sign * column.scores["tve"][fidelity].mean())


def _at_hand(profile: str, backbone: str, dataset: str, count: int) -> tuple[Explainer, Tensor, nn.Linear]:
    """An explainer, some test pictures, and the head of the dataset's first task."""
    explainer = load_explainer(Path("models", profile, "export", backbone))
    shards = Shards.open(Path("data", profile, "shards", dataset))
    _, images = next(ordered_batches(shards, "test", explainer.backbone, batch_size=count))
    file = sorted(Path("models", profile, "heads", f"{backbone}-{dataset}").glob("*.safetensors"))[0]
    return explainer, images, load_head(file, explainer.backbone.embed_dim)


def _classify(backbone: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = head(backbone(images))
    return logits


def _seconds(program: Callable[[], object]) -> float:
    started = time.perf_counter()
    program()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
