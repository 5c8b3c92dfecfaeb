"""What the report reads: the results folders of a profile, whatever of them is there.

    results/P/compare/<backbone>-<dataset>/{metrics.json, curves.csv, heatmaps.npz, heatmaps.json}
    results/P/pretrain/<backbone>/{metrics.json, training.csv}
    results/P/heads/<backbone>-<dataset>/metrics.json

A missing folder is not an error: the report marks it missing.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tve_pipeline.scenes import TASKS

REFERENCES = ("exact_windows", "exact_windows_mean", "exact_windows_u")


@dataclass(frozen=True, slots=True)
class Heatmaps:
    """The maps of a few pictures."""

    keys: list[str]
    images: NDArray[np.uint8]  # [n, S, S, 3]
    maps: dict[tuple[str, str], NDArray[np.float32]]  # (task, method) -> [n, P, P]
    predicted: dict[str, list[str]]  # task -> class names
    labels: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One backbone on one dataset."""

    metrics: dict[str, Any]
    curves: dict[
        tuple[str, str, str], list[tuple[float, float, float]]
    ]  # (task, removal, method) -> fraction, kept, removed
    heatmaps: Heatmaps | None

    @property
    def reference(self) -> str:
        """The method that the others are compared with: "tve", "tve_mean" or "tve_u"."""
        return str(self.metrics.get("reference", "tve"))

    @property
    def tasks(self) -> dict[str, Any]:
        """What was measured of each task, in the order of the report."""
        return self._in_order("tasks")

    @property
    def correct_only(self) -> dict[str, Any]:
        """The same over the pictures that the head gets right; nothing where it was not stated."""
        return self._in_order("correct_only")

    def _in_order(self, section: str) -> dict[str, Any]:
        tasks: dict[str, Any] = self.metrics.get(section, {})
        return {task: tasks[task] for task in in_order(tasks)}


@dataclass(frozen=True, slots=True)
class Pretraining:
    """One backbone's explainer."""

    metrics: dict[str, Any]
    rows: list[dict[str, str]]

    def evaluations(self) -> dict[str, list[float]]:
        """Steps and R² of the rows at which R² was measured: "step", "kept", "removed"."""
        measured = self._measured()
        columns = {"step": "step", "kept": "r2_kept", "removed": "r2_removed"}
        return {name: [float(row[column]) for row in measured] for name, column in columns.items()}

    def bounds(self) -> list[dict[str, float]]:
        """The error of maps and its bounds at those rows, where the backbone has a classifier of its own."""
        names = ("step", "explanation_error", "explanation_bound", "loss_bound", "bound_over_error")
        return [{name: float(row[name]) for name in names} for row in self._measured() if row.get("explanation_error")]

    def _measured(self) -> list[dict[str, str]]:
        return [row for row in self.rows if row.get("r2_kept") and row.get("r2_removed")]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was found, by backbone and by (backbone, dataset)."""

    backbones: tuple[str, ...]
    datasets: tuple[str, ...]
    evaluations: dict[tuple[str, str], Evaluation]
    pretraining: dict[str, Pretraining]
    heads: dict[tuple[str, str], dict[str, Any]]
    examined: dict[tuple[str, str], dict[str, Any]]  # by task

    def missing(self) -> list[str]:
        """The expected results that are not there, in words."""
        pairs = [(backbone, dataset) for backbone in self.backbones for dataset in self.datasets]
        return (
            [f"pre-training of {name}" for name in self.backbones if name not in self.pretraining]
            + [f"heads of {name} on {dataset}" for name, dataset in pairs if (name, dataset) not in self.heads]
            + [f"examination of {name} on {dataset}" for name, dataset in pairs if (name, dataset) not in self.examined]
            + [
                f"evaluation of {name} on {dataset}"
                for name, dataset in pairs
                if (name, dataset) not in self.evaluations
            ]
            + [
                f"{method} of {name} on {dataset}"
                for (name, dataset), evaluation in self.evaluations.items()
                for method in evaluation.metrics.get("missing", [])
            ]
        )


def read_results(folder: Path, backbones: tuple[str, ...], datasets: tuple[str, ...]) -> Results:
    """The results under `folder` (results/P) for these backbones and datasets."""
    pairs = {(backbone, dataset): f"{backbone}-{dataset}" for backbone in backbones for dataset in datasets}
    evaluations = {pair: _evaluation(folder / "compare" / name) for pair, name in pairs.items()}
    pretraining = {name: _pretraining(folder / "pretrain" / name) for name in backbones}
    heads = {pair: _metrics(folder / "heads" / name) for pair, name in pairs.items()}
    examined = {pair: _metrics(folder / "examine" / name).get("tasks") for pair, name in pairs.items()}
    return Results(
        backbones,
        datasets,
        {pair: found for pair, found in evaluations.items() if found},
        {name: found for name, found in pretraining.items() if found},
        {pair: found for pair, found in heads.items() if found},
        {pair: found for pair, found in examined.items() if found},
    )


def in_order(tasks: Iterable[str]) -> list[str]:
    """Tasks as the report lists them: those of the scenes as they stand there, then the others by their names."""
    of_scenes = list(TASKS)
    return sorted(tasks, key=lambda task: (of_scenes.index(task) if task in of_scenes else len(of_scenes), task))


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return document


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _pretraining(folder: Path) -> Pretraining | None:
    metrics = _metrics(folder)
    return Pretraining(metrics, _rows(folder / "training.csv")) if metrics else None


def _evaluation(folder: Path) -> Evaluation | None:
    metrics = _metrics(folder)
    if not metrics:
        return None
    curves: dict[tuple[str, str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for row in _rows(folder / "curves.csv"):
        point = (float(row["fraction"]), float(row["kept_probability_drop"]), float(row["removed_probability_drop"]))
        curves[row["task"], row["removal"], row["map"]].append(point)
    return Evaluation(metrics, {key: sorted(points) for key, points in curves.items()}, _heatmaps(folder))


def _heatmaps(folder: Path) -> Heatmaps | None:
    if not (folder / "heatmaps.npz").is_file():
        return None
    described = json.loads((folder / "heatmaps.json").read_text())
    with np.load(folder / "heatmaps.npz", allow_pickle=False) as arrays:
        images = arrays["images"]
        maps = {(name.split("/")[0], name.split("/")[1]): arrays[name] for name in arrays.files if "/" in name}
    return Heatmaps(
        described["keys"],
        images,
        maps,
        predicted={task: entry["predicted"] for task, entry in described["tasks"].items()},
        labels={task: entry["label"] for task, entry in described["tasks"].items()},
    )
