"""Stage `evaluate`: how faithful the explainer's maps are, for every task whose head reads one backbone.

    python -m tve_pipeline.evaluate BACKBONE DATASET

All tasks of a dataset share their pictures: the explainer and the exact windows run once a picture, every
head is read over them, and a coalition that several tasks or methods ask for is evaluated once.

    tve, tve_u                      the explainer's maps, with and without the window mean
    exact_windows, exact_windows_u  the same of the exact windows, which the explainer imitates
    tve_hg                          the explainer's map of the class that the backbone's own head predicts
    random, random_blurred, centre  controls (see tve.fidelity.controls)
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from tve.backbones import Backbone
from tve.digests import file_sha256
from tve.evaluator import CoalitionEvaluator, Precision
from tve.explainer import Explainer
from tve.export import load_explainer
from tve.fidelity.controls import control_maps
from tve.fidelity.levels import level_sizes
from tve.fidelity.scores import ScoredMap, fidelity
from tve.heads import load_head
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.removal import Removal
from tve.samples import Sample, decode_image
from tve.shards import Shards
from tve.transfer_rule import Output, TransferRule, class_maps
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluate_results import BatchResults, EvaluationWriter, Facts
from tve_pipeline.outputs import whole_folder
from tve_pipeline.params import Count, Name, Section, active_profile, load_section


class EvaluateParams(Section):
    """Section `evaluate` of params.yaml."""

    split: Name
    num_pictures: Count | None  # drawn from the split by seed; null for all
    removals: tuple[Removal, ...] = Field(min_length=1)
    fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)
    batch_size: Count
    memory_mib: Count
    precision: Precision
    output: Output
    window_mean: bool  # whether the maps that are compared and shown first are phi, or u
    seed: int = Field(ge=0)
    num_bootstrap: Count
    num_heatmaps: int = Field(ge=0)


@dataclass(frozen=True, slots=True)
class TaskHead:
    """A head and what is known of it."""

    classes: tuple[str, ...]
    test_accuracy: float
    head: nn.Linear


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    profile = active_profile()
    params = load_section("evaluate", EvaluateParams)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = Shards.open(Path("data", profile, "shards", dataset))
    explainer = load_explainer(Path("models", profile, "export", backbone)).to(device)
    folder = Path("models", profile, "heads", f"{backbone}-{dataset}")
    heads = load_task_heads(folder, explainer.backbone, shards.tasks)
    with whole_folder(Path("results", profile, "evaluate", f"{backbone}-{dataset}")) as results:
        evaluate(explainer, heads, shards, params, results)


def load_task_heads(folder: Path, backbone: Backbone, tasks: Mapping[str, tuple[str, ...]]) -> dict[str, TaskHead]:
    """The heads of a dataset's tasks, checked against the backbone and the dataset's classes.

    Raises:
        ValueError: heads of another backbone or other classes, or altered files.
    """
    document = json.loads((folder / "heads.json").read_text())
    if document["backbone_sha256"] != backbone.weights_sha256:
        raise ValueError(
            f"{folder}: expected heads on backbone {backbone.weights_sha256}, "
            f"got {document['backbone_sha256']}; run the stage `heads` again"
        )
    heads = {}
    for task, entry in document["tasks"].items():
        if task not in tasks or entry["classes"] != list(tasks[task]):
            raise ValueError(f"{folder}: {task}: expected classes {tasks.get(task)}, got {entry['classes']}")
        path = folder / entry["file"]
        if (actual := file_sha256(path)) != entry["sha256"]:
            raise ValueError(f"{path}: expected sha256 {entry['sha256']}, got {actual}")
        head = load_head(path, backbone.embed_dim).to(next(backbone.parameters()).device)
        heads[task] = TaskHead(tuple(entry["classes"]), float(entry["test_accuracy"]), head)
    return heads


@torch.inference_mode()
def evaluate(
    explainer: Explainer, heads: Mapping[str, TaskHead], shards: Shards, params: EvaluateParams, folder: Path
) -> None:
    """Scores every method on every task and writes scores.csv, curves.csv, metrics.json and the heatmaps.

    Args:
        explainer: with its backbone, on the device to use.
        heads: by task.
        shards: labelled pictures.
        params: the stage's section.
        folder: to write into.

    Raises:
        ValueError: fewer pictures than asked for, or a removal that the backbone cannot serve.
    """
    backbone, trained_for = explainer.backbone, explainer.config.removal
    level_sizes(params.fractions, backbone.patches_per_side**2)
    evaluators = {
        removal: CoalitionEvaluator(backbone, removal, memory_mib=params.memory_mib, precision=params.precision)
        for removal in dict.fromkeys((*params.removals, trained_for))
    }
    empty_D = evaluators[trained_for].empty()
    num_pictures = require_num_pictures(shards, params)
    device = next(backbone.parameters()).device
    clock = Clock(device)
    writer = EvaluationWriter(
        folder,
        backbone,
        num_pictures=num_pictures,
        num_heatmaps=params.num_heatmaps,
        fractions=params.fractions,
        classes={task: head.classes for task, head in heads.items()},
        mask_objects=shards.mask_objects,
    )
    with writer, clock("total"), tqdm(total=num_pictures, unit="picture", desc="evaluate") as progress:
        for samples in batches(shards, params, num_pictures):
            images = torch.stack([backbone.preprocess(decode_image(sample.image)) for sample in samples]).to(device)
            with clock("tve"):
                predicted = explainer(images)
            with clock("exact_windows"):
                exact = exact_windows(evaluators[trained_for], images, explainer.family, empty_D)
            target = {task: head.head(exact.full_BD).argmax(-1) for task, head in heads.items()}
            maps = method_maps(explainer, heads, target, predicted, exact, [s.key for s in samples], params)
            scored = {
                (task, method): ScoredMap(map_BPP, heads[task].head, target[task])
                for (task, method), map_BPP in maps.items()
            }
            with clock("fidelity"):
                scores = {
                    removal: fidelity(evaluators[removal], images, exact.full_BD, scored, params.fractions)
                    for removal in params.removals
                }
            writer.add(BatchResults(samples, images, exact.full_BD, scored, scores))
            progress.update(len(samples))
    suffix = "" if params.window_mean else "_u"
    accuracy = {task: head.test_accuracy for task, head in heads.items()}
    backends = {removal: f"{each.choice.backend}: {each.choice.reason}" for removal, each in evaluators.items()}
    others = {"seconds": clock.seconds, "trained_for": trained_for, "backends": backends}
    writer.finish(Facts(accuracy, "tve" + suffix, "exact_windows" + suffix, params.num_bootstrap, params.seed, others))


def method_maps(
    explainer: Explainer,
    heads: Mapping[str, TaskHead],
    target: Mapping[str, Tensor],
    predicted: MetaAttribution,
    exact: MetaAttribution,
    keys: list[str],
    params: EvaluateParams,
) -> dict[tuple[str, str], Tensor]:
    """Every method's map [B, P, P] of every task's predicted class, by (task, method)."""
    radius = explainer.config.radius
    rules = {suffix: TransferRule(params.output, window_mean=mean) for suffix, mean in (("", True), ("_u", False))}
    device = predicted.full_BD.device
    controls = control_maps(keys, explainer.backbone.patches_per_side, radius, params.seed)
    shared = {name: map_BPP.to(device) for name, map_BPP in controls.items()}
    own_head = explainer.backbone.classifier()
    if own_head is not None:
        rule = rules["" if params.window_mean else "_u"]
        shared["tve_hg"] = class_maps(predicted, own_head, own_head(exact.full_BD).argmax(-1), rule)
    maps = {}
    for task, head in heads.items():
        for method, meta in (("tve", predicted), ("exact_windows", exact)):
            for suffix, rule in rules.items():
                maps[task, method + suffix] = class_maps(meta, head.head, target[task], rule)
        maps |= {(task, method): map_BPP for method, map_BPP in shared.items()}
    return maps


def require_num_pictures(shards: Shards, params: EvaluateParams) -> int:
    """How many pictures are evaluated; a ValueError where the split has fewer than are asked for."""
    available = shards.num_samples(params.split)
    if params.num_pictures is not None and params.num_pictures > available:
        raise ValueError(
            f"evaluate.num_pictures: expected at most the {available} pictures of split {params.split!r}, "
            f"got {params.num_pictures}; null takes all"
        )
    return params.num_pictures or available


def batches(shards: Shards, params: EvaluateParams, num_pictures: int) -> Iterator[list[Sample]]:
    """The pictures that seed draws from the split, in the order of the shards."""
    available = shards.num_samples(params.split)
    rng = np.random.default_rng(params.seed)
    chosen = set(rng.permutation(available)[:num_pictures].tolist())
    samples = (sample for index, sample in enumerate(shards.samples(params.split)) if index in chosen)
    while batch := list(itertools.islice(samples, params.batch_size)):
        yield batch


class Clock:
    """Adds up the seconds that named parts take, on the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[part] = round(self.seconds[part] + self._now() - started, 3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


if __name__ == "__main__":
    run_stage("evaluate", main, "BACKBONE", "DATASET")
