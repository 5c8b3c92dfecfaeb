"""Stage `check`: everything that can be wrong with params.yaml, said before any long work.

    python -m tve_pipeline.check

Every section is read by the model of its own stage; every name in `run` must be defined, every source and
weights file be there, and every backbone be buildable with its grid, its removal operator and its
explainer. What it writes never changes, so that a passed check makes no other stage run again.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from pydantic import BaseModel

from tve.backbones import Backbone, load_backbone
from tve.evaluator import require_droppable
from tve.sources import open_source
from tve_pipeline import heads
from tve_pipeline.backbone import BackboneStageParams
from tve_pipeline.evaluate import EvaluateParams
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import (
    BackboneParams,
    Dataset,
    PicturesDataset,
    RunParams,
    ScenesDataset,
    Section,
    active_profile,
    load_backbone_params,
    load_dataset,
    load_params,
    load_section,
)
from tve_pipeline.pretrain import HELD_OUT_SPLIT, TRAIN_SPLIT, PretrainParams, build_explainer
from tve_pipeline.report import ReportParams
from tve_pipeline.scenes import SPLIT_IDS, TASKS
from tve_pipeline.shards import plan_pictures


class ExportParams(Section):
    """Section `export` of params.yaml: nothing to choose yet."""


STAGE_SECTIONS: dict[str, type[BaseModel]] = {
    "run": RunParams,
    "backbone": BackboneStageParams,
    "pretrain": PretrainParams,
    "export": ExportParams,
    "heads": heads.HeadsParams,
    "evaluate": EvaluateParams,
    "report": ReportParams,
}
KNOWN_SECTIONS = ("profile", "datasets", "backbones", *STAGE_SECTIONS)


@dataclass(frozen=True, slots=True)
class Profile:
    """A parsed params.yaml."""

    name: str
    run: RunParams
    datasets: dict[str, Dataset]
    backbones: dict[str, BackboneParams]
    backbone: BackboneStageParams
    pretrain: PretrainParams
    evaluate: EvaluateParams


def main(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"check: expected no arguments, got {argv}")
    profile = parse_profile()
    check_run(profile)
    for name in profile.run.datasets:
        check_source(name, profile.datasets[name])
    for name in profile.run.backbones:
        check_backbone(name, profile)
    with whole_folder(Path("results", profile.name, "check")) as folder:
        write_json(folder / "params.json", {"profile": profile.name, "checked": True})


def parse_profile() -> Profile:
    """Every section, read by the model of its stage.

    Raises:
        ValueError: an unknown or missing section or key, or a value out of range.
    """
    document = load_params()
    for name in (*document, *KNOWN_SECTIONS):
        if name not in KNOWN_SECTIONS or name not in document:
            state = "missing" if name in KNOWN_SECTIONS else "unknown"
            known = ", ".join(KNOWN_SECTIONS)
            raise ValueError(f"params.yaml: {state} section {name!r}; known sections: {known}")
    for name, model in STAGE_SECTIONS.items():
        load_section(name, model)
    return Profile(
        name=active_profile(),
        run=load_section("run", RunParams),
        datasets={name: load_dataset(name) for name in document["datasets"]},
        backbones={name: load_backbone_params(name) for name in document["backbones"]},
        backbone=load_section("backbone", BackboneStageParams),
        pretrain=load_section("pretrain", PretrainParams),
        evaluate=load_section("evaluate", EvaluateParams),
    )


def check_run(profile: Profile) -> None:
    """Every name in `run` is defined, and every dataset has the splits and tasks that its readers need.

    Raises:
        ValueError: the first that is not so.
    """
    run, datasets = profile.run, profile.datasets
    _require_known("run.backbones", run.backbones, profile.backbones)
    _require_known("run.datasets", run.datasets, datasets)
    _require_known("run.pretrain_dataset", [run.pretrain_dataset], run.datasets)
    _require_known("run.task_datasets", run.task_datasets, run.datasets)
    for name in run.datasets:
        dataset = datasets[name]
        if isinstance(dataset, ScenesDataset):
            _require_known(f"datasets.{name}.splits", dataset.split_names(), SPLIT_IDS)

    if tasks := task_names(datasets[run.pretrain_dataset]):
        raise ValueError(
            f"run.pretrain_dataset: expected pictures without labels, got {run.pretrain_dataset!r} with "
            f"tasks {', '.join(tasks)}; set its `labelled` to false or its `tasks` to null"
        )
    _require_splits(run.pretrain_dataset, datasets, (TRAIN_SPLIT, HELD_OUT_SPLIT))
    for name in run.task_datasets:
        if not task_names(datasets[name]):
            raise ValueError(f"run.task_datasets: expected labelled pictures, got {name!r}, which has no task")
        _require_splits(name, datasets, (heads.TRAIN_SPLIT, heads.TEST_SPLIT, profile.evaluate.split))

    passed = f"results/{profile.name}/check/params.json"
    reads = {passed}
    if any(profile.backbones[name].weights == "train" for name in run.backbones):
        training = profile.backbone.train
        if training is None:
            raise ValueError("backbone.train: expected values, since a backbone has `weights: train`; got null")
        _require_known("backbone.train.dataset", [training.dataset], run.datasets)
        _require_known("backbone.train.task", [training.task], task_names(datasets[training.dataset]))
        reads = {f"data/{profile.name}/shards/{training.dataset}"}
    if run.backbone_reads not in reads:
        raise ValueError(f"run.backbone_reads: expected {reads.pop()}, got {run.backbone_reads}")


def task_names(dataset: Dataset) -> tuple[str, ...]:
    """The tasks that a dataset's pictures have labels for."""
    if isinstance(dataset, ScenesDataset):
        return tuple(TASKS) if dataset.labelled else ()
    return tuple(dataset.tasks or ())


def check_source(name: str, dataset: Dataset) -> None:
    """The source of a dataset is there, is what was pinned, and holds the splits and labels asked for.

    Raises:
        ValueError: it is not, or does not.
    """
    if isinstance(dataset, PicturesDataset):
        try:
            with open_source(dataset.path, dataset.sha256) as source:
                plan_pictures(source, dataset)
        except ValueError as error:
            raise ValueError(f"datasets.{name}: {error}") from error


def check_backbone(name: str, profile: Profile) -> None:
    """timm knows the architecture, the weights fit, and grid, removal and explainer suit it.

    Raises:
        ValueError: the first that is not so.
        FileNotFoundError: no such weights file.
    """
    params = profile.backbones[name]
    given = params.weights not in ("train", "timm", "random")
    try:
        backbone = load_backbone(
            params.architecture,
            params.weights if given else "random",
            name=name,
            sha256=params.sha256 if given else None,
            timm_args=params.timm_args,
            preprocessing=params.preprocessing,
            patches_per_side=params.patches_per_side,
        )
        if params.weights == "timm" and not timm.is_model_pretrained(params.architecture):
            raise ValueError("weights: expected a file or `random`, since timm has none for this architecture")
        if params.weights == "train":
            _require_classes(backbone, profile)
        if params.removal == "drop":
            require_droppable(backbone)
        with torch.device("meta"):  # shapes only
            build_explainer(backbone, profile.pretrain, params.removal)
    except ValueError as error:
        raise ValueError(f"backbones.{name}: {error}") from error


def _require_classes(backbone: Backbone, profile: Profile) -> None:
    training = profile.backbone.train
    assert training is not None
    classifier = backbone.classifier()
    if isinstance(profile.datasets[training.dataset], ScenesDataset):
        expected = len(TASKS[training.task])
        if classifier is None or classifier.out_features != expected:
            got = None if classifier is None else classifier.out_features
            task = training.task
            raise ValueError(f"timm_args.num_classes: expected {expected} for task {task!r}, got {got}")


def _require_known(where: str, names: Sequence[str], known: Collection[str]) -> None:
    options = list(known)
    for name in names:
        if name not in options:
            raise ValueError(f"{where}: expected one of {', '.join(options)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: expected each name once, got {', '.join(names)}")


def _require_splits(name: str, datasets: dict[str, Dataset], splits: Sequence[str]) -> None:
    for split in splits:
        if split not in datasets[name].split_names():
            known = ", ".join(datasets[name].split_names())
            raise ValueError(f"datasets.{name}: expected a split {split!r}, got splits {known}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"check: {error}")
