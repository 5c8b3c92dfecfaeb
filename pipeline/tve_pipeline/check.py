"""Stage `check`: everything that can be wrong with params.yaml, said before any long work.

    python -m tve_pipeline.check

Every section is read by the model of its own stage; every name in `run` must be defined, every source and
weights file be there, every number of pictures be at hand, and every backbone be buildable with its grid, its
explainer and every removal operator that is asked of it. What it writes never changes, so that a passed check makes
no other stage run again.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from pydantic import BaseModel

from tve.backbones import Backbone
from tve.evaluator import require_droppable
from tve.fidelity.levels import level_sizes
from tve.sources import open_source
from tve_pipeline import heads
from tve_pipeline.backbone import TEST_SPLIT, BackboneStageParams, build_backbone
from tve_pipeline.backbone import TRAIN_SPLIT as BACKBONE_TRAIN_SPLIT
from tve_pipeline.compare import CompareParams
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluate_measures import EvaluateParams
from tve_pipeline.evaluation import served_removals
from tve_pipeline.examine import ExamineParams
from tve_pipeline.methods import method_settings
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import (
    PARAMS_FILE,
    BackboneParams,
    Dataset,
    RunParams,
    ScenesDataset,
    Section,
    active_profile,
    defined,
    existing_path,
    load_backbone_params,
    load_dataset,
    load_entry,
    load_params,
    load_section,
)
from tve_pipeline.pretraining import HELD_OUT_SPLIT, TRAIN_SPLIT, PretrainParams, build_explainer
from tve_pipeline.readings import reading_settings
from tve_pipeline.report import ReportParams
from tve_pipeline.scenes import SPLIT_IDS, TASKS
from tve_pipeline.shapley import ShapleyParams
from tve_pipeline.shards import plan_pictures
from tve_pipeline.two_networks import TwoNetworksStageParams


class ExportParams(Section):
    """Section `export` of params.yaml: nothing to choose yet."""


STAGE_SECTIONS: dict[str, type[BaseModel]] = {
    "run": RunParams,
    "backbone": BackboneStageParams,
    "pretrain": PretrainParams,
    "export": ExportParams,
    "heads": heads.HeadsParams,
    "shapley": ShapleyParams,
    "two_networks": TwoNetworksStageParams,
    "evaluate": EvaluateParams,
    "examine": ExamineParams,
    "compare": CompareParams,
    "report": ReportParams,
}
KNOWN_SECTIONS = ("profile", "datasets", "backbones", "methods", *STAGE_SECTIONS)


@dataclass(frozen=True, slots=True)
class Profile:
    """A parsed params.yaml."""

    name: str
    run: RunParams
    datasets: dict[str, Dataset]
    backbones: dict[str, BackboneParams]
    backbone: BackboneStageParams
    pretrain: PretrainParams
    heads: heads.HeadsParams
    shapley: ShapleyParams
    two_networks: TwoNetworksStageParams
    evaluate: EvaluateParams
    examine: ExamineParams

    def pretrainings(self) -> dict[str, PretrainParams]:
        """By section, how explainers are pre-trained."""
        found = {"pretrain": self.pretrain}
        return found | (
            {"two_networks.train": self.two_networks.beside(self.pretrain)} if self.run.two_networks else {}
        )


def main(argv: list[str]) -> None:
    profile = parse_profile()
    check_profile_name(profile.name)
    check_run(profile)
    num_pictures = {name: check_source(name, profile.datasets[name]) for name in profile.run.datasets}
    check_num_pictures(profile, num_pictures)
    for section, params in profile.pretrainings().items():
        if params.mae is not None and params.mae.weights is not None:
            existing_path(params.mae.weights, f"{section}.mae.weights")
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
        datasets={name: load_dataset(name) for name in defined("datasets")},
        backbones={name: load_backbone_params(name) for name in defined("backbones")},
        backbone=load_section("backbone", BackboneStageParams),
        pretrain=load_section("pretrain", PretrainParams),
        heads=load_section("heads", heads.HeadsParams),
        shapley=load_section("shapley", ShapleyParams),
        two_networks=load_section("two_networks", TwoNetworksStageParams),
        evaluate=load_section("evaluate", EvaluateParams),
        examine=load_section("examine", ExamineParams),
    )


def check_profile_name(name: str) -> None:
    """Raises ValueError where params.yaml is a link to a profile's file that has another name than the profile."""
    if PARAMS_FILE.is_symlink() and (file := PARAMS_FILE.resolve().stem) != name:
        raise ValueError(f"profile: expected {file!r}, the name of its file, got {name!r}; outputs lie under this name")


def check_run(profile: Profile) -> None:
    """Every name that a section refers to is defined, and every dataset has the splits and tasks that its readers need.

    Raises:
        ValueError: the first that is not so.
    """
    run, datasets = profile.run, profile.datasets
    _require_known("run.backbones", run.backbones, profile.backbones)
    _require_known("run.vit_shapley", run.vit_shapley, run.backbones)
    _require_known("run.two_networks", run.two_networks, run.backbones)
    _require_known("run.datasets", run.datasets, datasets)
    _require_known("run.pretrain_dataset", [run.pretrain_dataset], run.datasets)
    _require_known("run.task_datasets", run.task_datasets, run.datasets)
    _require_known("run.methods", run.methods, list(defined("methods")))
    for name in run.methods:
        load_entry("methods", name, method_settings(name))
    _require_known("run.readings", run.readings, list(defined("methods")))
    for name in run.readings:
        load_entry("methods", name, reading_settings(name))
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
    _check_skipped_tasks(profile)

    passed = f"results/{profile.name}/check/params.json"
    reads = {passed}
    if any(profile.backbones[name].weights == "train" for name in run.backbones):
        training = profile.backbone.train
        if training is None:
            raise ValueError("backbone.train: expected values, since a backbone has `weights: train`; got null")
        _require_known("backbone.train.dataset", [training.dataset], run.datasets)
        tasks = task_names(datasets[training.dataset])
        if not tasks:
            raise ValueError(
                f"backbone.train.dataset: expected pictures with tasks, got {training.dataset!r}, which have none"
            )
        _require_known("backbone.train.task", [training.task], tasks)
        _require_splits(training.dataset, datasets, (BACKBONE_TRAIN_SPLIT, TEST_SPLIT))
        reads = {f"data/{profile.name}/shards/{training.dataset}"}
    if run.backbone_reads not in reads:
        raise ValueError(f"run.backbone_reads: expected {reads.pop()}, got {run.backbone_reads}")


def task_names(dataset: Dataset) -> tuple[str, ...]:
    """The tasks that a dataset's pictures have labels for."""
    if isinstance(dataset, ScenesDataset):
        return tuple(TASKS) if dataset.labelled else ()
    return tuple(dataset.tasks or ())


def check_source(name: str, dataset: Dataset) -> dict[str, int]:
    """How many pictures each split has, of a source that is what was pinned and has the splits and labels asked for.

    Raises:
        ValueError: it is not, or has not.
        FileNotFoundError: no such source.
    """
    if isinstance(dataset, ScenesDataset):
        return dict(dataset.splits)
    with _located(f"datasets.{name}"), open_source(existing_path(dataset.source, "source"), dataset.sha256) as source:
        splits, _ = plan_pictures(source, dataset)
        return {split: len(pictures) for split, pictures in splits.items()}


def check_num_pictures(profile: Profile, num_pictures: Mapping[str, Mapping[str, int]]) -> None:
    """Every split, by dataset in `num_pictures`, has as many pictures as are asked of it.

    Raises:
        ValueError: the first that has fewer.
    """

    def require(where: str, asked: int | None, dataset: str, split: str) -> None:
        available = num_pictures[dataset][split]
        if asked is not None and asked > available:
            raise ValueError(
                f"{where}: expected at most the {available} pictures of split {split!r} of {dataset!r}, got {asked}"
            )

    run, params, training = profile.run, profile.pretrain, profile.backbone.train
    require("pretrain.batch_size", params.batch_size, run.pretrain_dataset, TRAIN_SPLIT)
    for section, each in profile.pretrainings().items():
        if each.mae is not None and each.mae.weights is None:
            require(f"{section}.mae.batch_size", each.mae.batch_size, run.pretrain_dataset, TRAIN_SPLIT)
    require("pretrain.num_evaluation_pictures", params.num_evaluation_pictures, run.pretrain_dataset, HELD_OUT_SPLIT)
    shapley = profile.shapley
    require("shapley.batch_size", shapley.batch_size, run.pretrain_dataset, TRAIN_SPLIT)
    require("shapley.num_evaluation_pictures", shapley.num_evaluation_pictures, run.pretrain_dataset, HELD_OUT_SPLIT)
    for name in run.task_datasets:
        require("evaluate.num_pictures", profile.evaluate.num_pictures, name, profile.evaluate.split)
        require("examine.num_pictures", profile.examine.num_pictures, name, profile.evaluate.split)
    if training is not None and any(profile.backbones[name].weights == "train" for name in run.backbones):
        require("backbone.train.batch_size", training.batch_size, training.dataset, BACKBONE_TRAIN_SPLIT)


def check_backbone(name: str, profile: Profile) -> None:
    """timm knows the architecture, the weights fit, and grid, removals, windows and explainer suit it.

    Raises:
        ValueError: the first that is not so.
        FileNotFoundError: no such weights file.
    """
    params = profile.backbones[name]
    given = params.weights not in ("train", "timm", "random")
    with _located(f"backbones.{name}"):
        backbone = build_backbone(name, params, params.weights if given else "random")
        if params.weights == "timm" and not timm.is_model_pretrained(params.architecture):
            raise ValueError("weights: expected a file or `random`, since timm has none for this architecture")
        if params.weights == "train":
            _require_classes(backbone, profile)
        if params.removal == "drop":
            require_droppable(backbone)
        with torch.device("meta"):  # shapes only
            for each in profile.pretrainings().values():
                build_explainer(backbone, each, params.removal)
        _check_grid(backbone, profile)


def _check_grid(backbone: Backbone, profile: Profile) -> None:
    if "occlusion" in profile.run.methods and 2 * profile.pretrain.radius >= backbone.patches_per_side:
        side, grid = 2 * profile.pretrain.radius + 1, backbone.patches_per_side
        raise ValueError(
            f"run.methods: expected no occlusion where its windows of {side} patches a side, those of pretrain.radius, "
            f"do not lie inside a grid of {grid} per side"
        )
    with _located("evaluate.removals"):
        served_removals(backbone, profile.evaluate.removals)
    patches_per_side = backbone.patches_per_side
    num_patches = patches_per_side**2
    if profile.pretrain.centres_per_image > num_patches:
        raise ValueError(
            f"pretrain.centres_per_image: expected at most the {num_patches} windows of {patches_per_side} x "
            f"{patches_per_side} patches, got {profile.pretrain.centres_per_image}"
        )
    with _located("evaluate"):
        level_sizes(profile.evaluate.fractions, num_patches)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """An error that arises inside says where."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_skipped_tasks(profile: Profile) -> None:
    skipped = profile.heads.skip_tasks
    tasks = {name: task_names(profile.datasets[name]) for name in profile.run.task_datasets}
    _require_known("heads.skip_tasks", skipped, list(dict.fromkeys(task for names in tasks.values() for task in names)))
    for name, names in tasks.items():
        if set(names) <= set(skipped):
            raise ValueError(f"heads.skip_tasks: expected to leave a task of {name!r}, got {', '.join(skipped)}")


def _require_classes(backbone: Backbone, profile: Profile) -> None:
    training = profile.backbone.train
    assert training is not None
    if isinstance(profile.datasets[training.dataset], ScenesDataset):
        expected, got = len(TASKS[training.task]), int(backbone.model.num_classes)  # type: ignore[arg-type]
        if got != expected:
            raise ValueError(f"timm_args.num_classes: expected {expected} for task {training.task!r}, got {got}")


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
    run_stage("check", main)
