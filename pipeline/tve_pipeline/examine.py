"""Stage `examine`: do TVE's maps depend on what they explain, and how far are they from exact ones?

    python -m tve_pipeline.examine BACKBONE DATASET

Writes results/P/examine/BACKBONE-DATASET/metrics.json, for every task and for TVE and the exact windows:

random_head    rank correlation of a picture's map with the map of the same class under redrawn heads
other_picture  the same with the map that another picture's meta-attribution gives
blocks         the same with the maps of backbones whose 1, 2, … last blocks are redrawn (`tve.fidelity.sanity`); of TVE
               where its explainer reads the backbone's own features (a trained end: those of the blocks before it), and
               nothing where it has networks of its own
bound          TVE's error beside its bounds (`tve.fidelity.bound`), and how many pictures break one: none should

Correlations are means over pictures; a map that does not change has 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tve.backbones import Backbone
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve.export import load_explainer
from tve.fidelity.bound import Bound, explanation_bound
from tve.fidelity.sanity import SEQUENCES, random_head, randomised, rank_correlation
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.samples import decode_image
from tve.shards import Shards
from tve.transfer_rule import TransferRule, class_maps
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluate_measures import EvaluateParams, TaskHead
from tve_pipeline.evaluation import batches, load_task_heads, own_device
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import Count, Section, Seed, active_profile, load_section

ROUNDING = 1e-9  # of a bound, all of which is computed in float64
READINGS = ("tve", "exact_windows")


class ExamineParams(Section):
    """Section `examine` of params.yaml."""

    num_pictures: int = Field(ge=2)  # of those that are evaluated
    num_heads: Count  # redrawn
    seed: Seed


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    profile, cell = active_profile(), f"{backbone}-{dataset}"
    params, evaluation = load_section("examine", ExamineParams), load_section("evaluate", EvaluateParams)
    shards = Shards.open(Path("data", profile, "shards", dataset))
    explainer = load_explainer(Path("models", profile, "export", backbone)).to(own_device())
    heads = load_task_heads(Path("models", profile, "heads", cell), explainer.backbone, shards.tasks)
    samples = [sample for batch in batches(shards, evaluation, params.num_pictures) for sample in batch]
    images = torch.stack([explainer.backbone.preprocess(decode_image(sample.image)) for sample in samples])
    with whole_folder(Path("results", profile, "examine", cell)) as folder:
        write_json(folder / "metrics.json", examined(explainer, heads, images.to(own_device()), params, evaluation))


def examined(
    explainer: Explainer,
    heads: Mapping[str, TaskHead],
    images_B3SS: Tensor,
    params: ExamineParams,
    evaluation: EvaluateParams,
) -> dict[str, Any]:
    """What metrics.json states.

    Args:
        explainer: trained.
        heads: by task.
        images_B3SS: normalised pictures, two at least.
        params: the stage's section.
        evaluation: section `evaluate`, for how maps are read.
    """
    rule = TransferRule(evaluation.output, evaluation.per_patch)
    metas = meta_attributions(explainer, images_B3SS, evaluation)
    redrawn = [
        meta_attributions(on_backbone(explainer, changed), images_B3SS, evaluation)
        for changed in cascade(explainer.backbone, params.seed)
    ]
    another = torch.arange(len(images_B3SS)).roll(1)
    asked = {"tve": read_by(explainer.config, redrawn), "exact_windows": redrawn}
    tasks: dict[str, Any] = {}
    for task, each in heads.items():
        head, full_BD = each.head, metas["exact_windows"].full_BD
        with torch.no_grad():
            target_B = head(full_BD).argmax(-1)
        other_heads = [random_head(head, params.seed + number) for number in range(params.num_heads)]
        found: dict[str, Any] = {}
        for name in READINGS:
            map_BPP = class_maps(metas[name], head, target_B, rule)

            def correlation(other_BPP: Tensor, map_BPP: Tensor = map_BPP) -> float | None:
                values_B = rank_correlation(map_BPP, other_BPP)
                there_B = values_B[values_B.isfinite()]  # a constant map has no ranks
                return float(there_B.mean()) if len(there_B) else None

            by_head = [correlation(class_maps(metas[name], other, target_B, rule)) for other in other_heads]
            told = [value for value in by_head if value is not None]
            found[name] = {
                "random_head": sum(told) / len(told) if told else None,
                "other_picture": correlation(class_maps(metas[name][another], head, target_B, rule)),
                "blocks": [
                    None if of is None else correlation(class_maps(of[name], head, target_B, rule))
                    for of in asked[name]
                ],
            }
        bound = explanation_bound(metas["tve"], metas["exact_windows"], head, target_B, rule)
        tasks[task] = found | {"bound": bound_numbers(bound)}
    return {"num_pictures": len(images_B3SS), "tasks": tasks}


@torch.no_grad()
def meta_attributions(
    explainer: Explainer, images_B3SS: Tensor, evaluation: EvaluateParams
) -> dict[str, MetaAttribution]:
    """TVE's and the exact ones of some pictures, with one G(∅)."""
    evaluator = CoalitionEvaluator(
        explainer.backbone,
        explainer.config.removal,
        memory_mib=evaluation.memory_mib,
        precision=evaluation.precision,
    )
    exact, predicted = exact_windows(evaluator, images_B3SS, explainer.family), explainer(images_B3SS)
    return {"tve": replace(predicted, empty_D=exact.empty_D), "exact_windows": exact}


def cascade(backbone: Backbone, seed: int) -> Iterator[Backbone]:
    """The backbone with its last block redrawn, with its last two, … with all; none where it has no blocks."""
    blocks: list[Any] = [getattr(backbone.model, name) for name in SEQUENCES if hasattr(backbone.model, name)]
    for count in range(1, len(blocks[0]) + 1 if blocks else 1):
        yield randomised(backbone, count, seed)


def read_by(
    config: ExplainerConfig, redrawn: Sequence[dict[str, MetaAttribution]]
) -> Sequence[dict[str, MetaAttribution] | None]:
    """What an explainer is asked about: of blocks that it has copies of None, and nothing where all are its own."""
    if config.form == "two_networks" or (config.trunk == "trained" and config.trained_blocks is None):
        return []
    own_blocks = config.trained_blocks or 0
    return [*[None] * own_blocks, *redrawn[own_blocks:]]


def on_backbone(explainer: Explainer, backbone: Backbone) -> Explainer:
    """The same trained explainer, reading another backbone of the same form."""
    moved = Explainer(backbone, explainer.config).to(explainer.empty_D.device)
    moved.load_trained_state(explainer.trained_state())
    return moved.eval()


def bound_numbers(bound: Bound) -> dict[str, float | int]:
    """Means over pictures, in the unit of the rule's output; tightness is the median of bound over error."""
    broken_B = (bound.actual_BPP > bound.bound_BPP + ROUNDING).any(2).any(1) | (
        bound.bound_B > bound.from_loss_B + ROUNDING
    )
    return {
        "error": float(bound.actual_B.mean()),
        "bound": float(bound.bound_B.mean()),
        "loss_bound": float(bound.from_loss_B.mean()),
        "bound_over_error": float((bound.bound_B / bound.actual_B).median()),
        "loss_bound_over_error": float((bound.from_loss_B / bound.actual_B).median()),
        "num_broken": int(broken_B.sum()),
    }


if __name__ == "__main__":
    run_stage("examine", main, "BACKBONE", "DATASET")
