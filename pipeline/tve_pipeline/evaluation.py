"""Explanation methods evaluated picture by picture: what the stage `evaluate` and those named `evaluate_…` do.

All tasks of a dataset share their pictures, and a method is asked about all of them at once. Each batch is written when
it is done, so that a run that was cut short goes on from there; several processes share the batches between them, and
the numbers are the same however many there are. Nothing is compared here: that is the stage `compare`.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

from tve.backbones import Backbone, open_backbone
from tve.baselines.method import Method
from tve.coalitions import Windows
from tve.digests import file_sha256
from tve.evaluator import CoalitionEvaluator, drop_obstacle, require_droppable
from tve.fidelity.levels import level_sizes
from tve.heads import load_head
from tve.removal import Removal
from tve.samples import Sample
from tve.shards import INDEX_FILE, Shards
from tve_pipeline.evaluate_measures import EvaluateParams, Measuring, TaskHead
from tve_pipeline.evaluate_parts import Parts, code_digest
from tve_pipeline.evaluate_results import write_results
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import WindowsParams, active_profile, load_backbone_params, load_section

PROTOCOL = Path("docs", "protocol.md")


@dataclass(frozen=True, slots=True)
class Subject:
    """A backbone of a profile on the device to use, and the operator and windows that explanations of it are about."""

    name: str  # of section `backbones`
    backbone: Backbone
    removal: Removal
    windows: Windows


@dataclass(frozen=True, slots=True)
class Given:
    """What methods are made from."""

    backbone: Backbone
    windows: Windows
    evaluator: CoalitionEvaluator  # under the removal operator that the profile's explainer is for
    params: EvaluateParams


def open_subject(name: str) -> Subject:
    """A backbone of the active profile with its `backbones.NAME.removal` and windows of `pretrain.radius`."""
    backbone = open_backbone(Path("models", active_profile(), "backbone", name)).to(own_device())
    radius = load_section("pretrain", WindowsParams).radius
    return Subject(name, backbone, load_backbone_params(name).removal, Windows(backbone.patches_per_side, radius))


def run_cell(
    subject: Subject,
    dataset: str,
    name: str,
    settings: Mapping[str, Any],
    build: Callable[[Given], Method],
    *,
    obstacle: str = "",
    origins: Mapping[str, str] | None = None,
) -> None:
    """Evaluates one method on the tasks of a dataset, into results/P/evaluate/BACKBONE-DATASET/METHOD.

    Args:
        subject: the backbone.
        dataset: of section `datasets`.
        name: of the method.
        settings: of the method; a run that was cut short under others is not gone on with.
        build: makes the method.
        obstacle: why the method is not defined for the backbone, "" where it is; then that is all that is written.
        origins: digests of what else the method reads, such as its explainer.
    """
    profile, cell = active_profile(), f"{subject.name}-{dataset}"
    results_folder = Path("results", profile, "evaluate", cell, name)
    if obstacle:
        if os.environ.get("RANK", "0") == "0":
            with whole_folder(results_folder) as results:
                write_json(results / "facts.json", {"method": name, "not_defined": obstacle})
        return
    backbone, removal = subject.backbone, subject.removal
    params = load_section("evaluate", EvaluateParams)
    params = params.model_copy(update={"removals": served_removals(backbone, params.removals)})
    shards = Shards.open(Path("data", profile, "shards", dataset))
    head_folder = Path("models", profile, "heads", cell)
    heads = load_task_heads(head_folder, backbone, shards.tasks)
    evaluators = make_evaluators(backbone, removal, params)
    method = build(Given(backbone, subject.windows, evaluators[removal], params))
    all_origins = {
        "backbone_sha256": backbone.weights_sha256,
        "heads_sha256": file_sha256(head_folder / "heads.json"),
        "shards_sha256": file_sha256(shards.folder / INDEX_FILE),
        "protocol_sha256": file_sha256(PROTOCOL),
        "code_sha256": code_digest(),
        **(origins or {}),
    }
    made_from = {
        "origins": all_origins,
        "evaluate": params.model_dump(mode="json"),
        "method": dict(settings),
        "device": own_device().type,
        "torch": torch.__version__,
    }
    with several_processes() as (rank, world_size):
        parts = Parts.open(Path(".tve", "evaluate", profile, cell, name), made_from)
        evaluate(method, backbone, removal, heads, shards, params, evaluators, parts, rank=rank, world_size=world_size)
        if world_size > 1:
            torch.distributed.barrier()
        if rank == 0:
            arithmetic = evaluators[removal].arithmetic
            with whole_folder(results_folder) as results:
                facts = {
                    "method": name,
                    "settings": dict(settings),
                    "evaluate": params.model_dump(mode="json"),
                    "num_processes": world_size,  # which slow each other down
                    "trained_for": removal,
                    "backends": {r: f"{each.choice.backend}: {each.choice.reason}" for r, each in evaluators.items()},
                    "precision": f"{arithmetic.precision}: {arithmetic.reason}",
                    "origins": all_origins,
                }
                write_results(parts, params.fractions, list(heads), facts, results)
            parts.remove()


def served_removals(backbone: Backbone, removals: Sequence[Removal]) -> tuple[Removal, ...]:
    """Those of the removal operators that are defined for a backbone: a Swin has no `drop`.

    Raises:
        ValueError: none is.
    """
    served = tuple(removal for removal in removals if removal == "zero" or not drop_obstacle(backbone))
    if not served:
        require_droppable(backbone)
    return served


def make_evaluators(backbone: Backbone, own: Removal, params: EvaluateParams) -> dict[str, CoalitionEvaluator]:
    """One for each removal operator that is evaluated, and for the profile's own.

    Raises:
        ValueError: a removal that the backbone cannot serve.
    """
    return {
        removal: CoalitionEvaluator(backbone, removal, memory_mib=params.memory_mib, precision=params.precision)
        for removal in dict.fromkeys((*params.removals, own))
    }


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
        heads[task] = TaskHead(tuple(entry["classes"]), head)
    return heads


def evaluate(
    method: Method,
    backbone: Backbone,
    removal: Removal,
    heads: Mapping[str, TaskHead],
    shards: Shards,
    params: EvaluateParams,
    evaluators: Mapping[str, CoalitionEvaluator],
    parts: Parts,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Measures every map of the method on every task, and writes a part for each batch that has none yet.

    Args:
        method: what explains.
        backbone: what is explained, on the device to use.
        removal: the operator that the profile's explainer is for.
        heads: by task.
        shards: labelled pictures.
        params: the stage's section.
        evaluators: by removal operator.
        parts: where batches are kept until all are there.
        rank: of this process; it takes every `world_size`-th batch.
        world_size: number of processes.

    Raises:
        ValueError: fewer pictures than asked for.
    """
    level_sizes(params.fractions, backbone.patches_per_side**2)
    num_pictures = require_num_pictures(shards, params)
    measuring = Measuring.of(method, backbone, removal, heads, params, evaluators, shards.mask_objects, num_pictures)
    with tqdm(total=num_pictures, unit="picture", desc=method.variants[0], disable=rank > 0) as progress:
        for number, samples in enumerate(batches(shards, params, num_pictures)):
            if number % world_size == rank and not parts.has(number):
                parts.add(number, measuring.part(samples, first=number * params.batch_size))
            progress.update(len(samples))


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


def own_device() -> torch.device:
    """The GPU of this process, of those that torchrun started, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def several_processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that torchrun started, or of one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    # Processes wait for the slowest, however long its share takes.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield torch.distributed.get_rank(), world_size
    finally:
        torch.distributed.destroy_process_group()
