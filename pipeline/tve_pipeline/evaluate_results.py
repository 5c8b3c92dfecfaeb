"""What the stage `evaluate` writes: scores.csv, curves.csv, metrics.json, heatmaps.npz, heatmaps.json.

Rows of scores.csv are written as they come. What is held until the end is a few numbers a picture, and the
maps of the few pictures that are shown.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tve.backbones import Backbone
from tve.fidelity.scores import Fidelity, ScoredMap, target_probability
from tve.fidelity.statistics import Interval, paired_bootstrap, positive_density, share_of_way
from tve.removal import Removal
from tve.samples import Sample, decode_masks
from tve_pipeline.outputs import write_json
from tve_pipeline.scenes import OBJECT_OF_TASK

SCORES_HEADER = (
    *("key", "task", "method", "removal", "predicted", "label", "correct", "probability"),
    *("fidelity_plus", "fidelity_minus"),
)
CURVES_HEADER = ("task", "method", "removal", "fraction", "kept_probability_drop", "removed_probability_drop")
FIDELITIES = ("fidelity_plus", "fidelity_minus")

Cell = tuple[str, str]  # task, method


@dataclass(frozen=True, slots=True)
class BatchResults:
    """What was found about some pictures."""

    samples: list[Sample]
    images_B3SS: Tensor
    full_BD: Tensor
    maps: Mapping[Cell, ScoredMap]
    scores: Mapping[Removal, Mapping[Cell, Fidelity]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What metrics.json states and compares, beyond the scores."""

    accuracy: Mapping[str, float]  # of each task's head, on all test pictures
    reference: str  # the method that the others are compared with
    exact: str  # the method that it imitates
    num_bootstrap: int
    seed: int
    others: Mapping[str, Any]


class EvaluationWriter:
    """Takes results batch by batch; a context manager that holds scores.csv open."""

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        *,
        num_pictures: int,
        num_heatmaps: int,
        fractions: Sequence[float],
        classes: Mapping[str, Sequence[str]],
        mask_objects: Sequence[str],
    ) -> None:
        self.folder = folder
        self.backbone = backbone
        self.fractions = tuple(fractions)
        self.classes = classes
        self.mask_objects = tuple(mask_objects)
        self.num_pictures = num_pictures
        self.num_seen = 0
        # Spread evenly: where shards are sorted by class, the first pictures would all be of one.
        self.shown = set(np.linspace(0, num_pictures - 1, min(num_heatmaps, num_pictures)).round().astype(int).tolist())
        self.scores: dict[tuple[str, Cell], list[NDArray[np.float64]]] = defaultdict(list)  # each [B, 2]
        self.curves: dict[tuple[str, Cell], NDArray[np.float64]] = {}  # sums over pictures [2, F]: removed, kept
        self.densities: dict[Cell, list[NDArray[np.float64]]] = defaultdict(list)  # each [B, 2]: own, other
        self.images: list[NDArray[np.uint8]] = []
        self.maps: dict[Cell, list[NDArray[np.float32]]] = defaultdict(list)
        self.described: dict[str, Any] = {
            "keys": [],
            "names": [],
            "tasks": {task: {"predicted": [], "label": []} for task in classes},
        }

    def __enter__(self) -> "EvaluationWriter":
        self.file = (self.folder / "scores.csv").open("w", newline="")
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.rows.writerow(SCORES_HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, batch: BatchResults) -> None:
        """Writes the pictures' rows and adds them to the sums.

        Raises:
            ValueError: pictures without labels.
        """
        self._add_scores(batch)
        if self.mask_objects:
            self._add_densities(batch)
        self._add_heatmaps(batch)
        self.num_seen += len(batch.samples)

    def finish(self, facts: Facts) -> None:
        """Writes everything but scores.csv, which is there already."""
        assert self.num_seen == self.num_pictures, f"{self.num_seen} of {self.num_pictures} pictures"
        scores = {column: np.concatenate(parts) for column, parts in self.scores.items()}
        with (self.folder / "curves.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(CURVES_HEADER)
            for (removal, (task, method)), sums_2F in self.curves.items():
                removed_F, kept_F = sums_2F / self.num_pictures
                for fraction, kept, removed in zip(self.fractions, kept_F, removed_F, strict=True):
                    rows.writerow((task, method, removal, fraction, f"{kept:.6g}", f"{removed:.6g}"))
        write_json(self.folder / "metrics.json", self._metrics(scores, facts))
        arrays = {f"{task}/{method}": np.stack(maps) for (task, method), maps in self.maps.items()}
        if self.images:
            np.savez_compressed(self.folder / "heatmaps.npz", images=np.stack(self.images), **arrays)  # type: ignore[arg-type]
            write_json(self.folder / "heatmaps.json", self.described)

    def _add_scores(self, batch: BatchResults) -> None:
        for removal, cells in batch.scores.items():
            for (task, method), fidelity in cells.items():
                scored = batch.maps[task, method]
                pair_B2 = torch.stack([fidelity.plus_B, fidelity.minus_B], dim=1).double().cpu().numpy()
                drops_B2F = torch.stack([fidelity.removed_drop_BF, fidelity.kept_drop_BF], dim=1)
                column = (removal, (task, method))
                self.scores[column].append(pair_B2)
                self.curves[column] = self.curves.get(column, 0) + drops_B2F.double().sum(0).cpu().numpy()
                probability_B = target_probability(scored.head, batch.full_BD, scored.target_B).tolist()
                for sample, predicted, probability, (plus, minus) in zip(
                    batch.samples, scored.target_B.tolist(), probability_B, pair_B2, strict=True
                ):
                    label = label_of(sample, task)
                    classes, numbers = (
                        self.classes[task],
                        (f"{number:.7g}" for number in (probability, plus, minus)),
                    )
                    names = (classes[predicted], classes[label], int(predicted == label))
                    self.rows.writerow((sample.key, task, method, removal, *names, *numbers))

    def _add_densities(self, batch: BatchResults) -> None:
        objects_BOPP = torch.stack(
            [object_patches(sample, len(self.mask_objects), self.backbone) for sample in batch.samples]
        ).to(batch.images_B3SS.device)
        present = dict(zip(self.mask_objects, objects_BOPP.unbind(1), strict=True))
        for (task, method), scored in batch.maps.items():
            if (own := OBJECT_OF_TASK.get(task)) is not None:
                (other,) = set(OBJECT_OF_TASK.values()) - {own}
                pair = [positive_density(scored.map_BPP, present[name]) for name in (own, other)]
                self.densities[task, method].append(torch.stack(pair, dim=1).double().cpu().numpy())

    def _add_heatmaps(self, batch: BatchResults) -> None:
        for place, sample in enumerate(batch.samples):
            if self.num_seen + place not in self.shown:
                continue
            self.images.append(self.backbone.pixels(batch.images_B3SS[place]))
            self.described["keys"].append(sample.key)
            self.described["names"].append(sample.name)
            for (task, method), scored in batch.maps.items():
                self.maps[task, method].append(scored.map_BPP[place].float().cpu().numpy())
            targets = {task: int(scored.target_B[place]) for (task, _), scored in batch.maps.items()}
            for task, predicted in targets.items():
                entry = self.described["tasks"][task]
                entry["predicted"].append(self.classes[task][predicted])
                entry["label"].append(self.classes[task][label_of(sample, task)])

    def _metrics(self, scores: Mapping[tuple[str, Cell], NDArray[np.float64]], facts: Facts) -> dict[str, Any]:
        intervals = differences(scores, facts)
        tasks: dict[str, Any] = {
            task: {
                "accuracy": facts.accuracy[task],
                "methods": {},
                "differences": {},
                "share_of_way": {},
                "density": None,
            }
            for task in self.classes
        }
        for (removal, (task, method)), pairs_N2 in scores.items():
            stated = {
                name: {"mean": float(column.mean()), "std": float(column.std())}
                for name, column in zip(FIDELITIES, pairs_N2.T, strict=True)
            }
            tasks[task]["methods"].setdefault(method, {})[removal] = stated
            if method != facts.reference:
                tasks[task]["differences"].setdefault(removal, {})[method] = {
                    name: {"mean": i.mean, "low": i.low, "high": i.high}
                    for name, i in zip(FIDELITIES, intervals[removal, (task, method), facts.reference], strict=True)
                }
        for task, entry in tasks.items():
            for removal in dict.fromkeys(removal for removal, _ in scores):
                means = {
                    method: scores[removal, (task, method)].mean(0)
                    for method in (facts.reference, "random", facts.exact)
                }
                entry["share_of_way"][removal] = {
                    name: share_of_way(*(float(means[m][i]) for m in (facts.reference, "random", facts.exact)))
                    if intervals[removal, (task, "random"), facts.exact][i].excludes_zero
                    else None
                    for i, name in enumerate(FIDELITIES)
                }
        for (task, method), parts in self.densities.items():
            own, other = np.concatenate(parts).mean(0).tolist()
            density = {"own": own, "other": other, "ratio": own / other if other > 0 else None}
            tasks[task]["density"] = (tasks[task]["density"] or {}) | {method: density}
        return {
            "num_pictures": self.num_pictures,
            "reference": facts.reference,
            "tasks": tasks,
            **facts.others,
        }


def differences(
    scores: Mapping[tuple[str, Cell], NDArray[np.float64]], facts: Facts
) -> dict[tuple[str, Cell, str], list[Interval]]:
    """(removal, (task, method), minuend) -> intervals of the minuend's two fidelities minus the method's.

    The minuend is the reference, against every method, or the exact windows, against random maps. Pictures
    are resampled together for all of them.
    """
    pairs = [
        (removal, (task, method), minuend)
        for removal, (task, method) in scores
        for minuend in (facts.reference, facts.exact)
        if method != minuend and (minuend == facts.reference or method == "random")
    ]
    columns = [scores[removal, (cell[0], minuend)] - scores[removal, cell] for removal, cell, minuend in pairs]
    intervals = paired_bootstrap(np.concatenate(columns, axis=1), facts.num_bootstrap, facts.seed)
    return {pair: intervals[2 * i : 2 * i + 2] for i, pair in enumerate(pairs)}


def label_of(sample: Sample, task: str) -> int:
    """The picture's true class.

    Raises:
        ValueError: it has none.
    """
    if sample.labels is None or task not in sample.labels:
        raise ValueError(f"picture {sample.key}: expected a label for {task}, got {sample.labels}")
    return sample.labels[task]


def object_patches(sample: Sample, num_objects: int, backbone: Backbone) -> Tensor:
    """Patches that hold at least one pixel of each object, as the backbone sees the picture: bool [O, P, P]."""
    assert sample.masks is not None
    seen = []
    for mask_HW in decode_masks(sample.masks, num_objects):
        # The mask goes where the picture goes: resized, cropped.
        shown = backbone.pixels(backbone.preprocess(Image.fromarray(mask_HW.astype(np.uint8) * 255)))
        seen.append(torch.from_numpy(shown[..., 0] > 127))
    masks_OSS = torch.stack(seen)
    patches = backbone.patches_per_side
    pixels = backbone.image_size // patches
    return masks_OSS.reshape(num_objects, patches, pixels, patches, pixels).any(4).any(2)
