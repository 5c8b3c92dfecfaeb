"""Stage `compare`: the methods of one backbone and dataset side by side, from whatever of them has been evaluated.

    python -m tve_pipeline.compare BACKBONE DATASET

Reads results/P/evaluate/BACKBONE-DATASET/METHOD/ and writes results/P/compare/BACKBONE-DATASET/: metrics.json (means,
intervals, shares of the way; over all pictures, and over those that the head gets right), and the curves and heatmaps
of all methods in one file each.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tve.baselines.method import SUFFIXES
from tve.fidelity.statistics import Interval, paired_bootstrap, share_of_way
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluate_results import CURVES_HEADER
from tve_pipeline.measure_names import FIDELITIES, MEASURES
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import READINGS, Count, RunParams, Section, Seed, active_profile, load_params, load_section

REFERENCE, EXACT = "tve", "exact_windows"
ROBUSTNESS_MEASURES = ("road", "infidelity", "sensitivity")  # of the first pictures alone
OBJECT_MEASURES = ("mass_inside", "pointing", "average_precision")
DENSITIES = ("density_own", "density_other")
WORDS = ("key", "task", "map", "predicted", "label")  # columns that hold no number

Scores = dict[str, NDArray[np.float64]]  # column -> [N], pictures in the order of their keys


class CompareParams(Section):
    """Section `compare` of params.yaml."""

    num_bootstrap: Count
    seed: Seed


@dataclass(frozen=True, slots=True)
class CellScores:
    """All methods on one dataset of one backbone."""

    scores: dict[tuple[str, str], Scores]  # (task, map)
    removals: tuple[str, ...]
    facts: dict[str, dict[str, Any]]  # by method
    not_defined: dict[str, str]  # method -> why it is not, for this backbone
    keys: tuple[str, ...]  # of the pictures

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for task, _ in self.scores))

    def maps(self, task: str) -> tuple[str, ...]:
        return tuple(name for of, name in self.scores if of == task)


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    profile, cell = active_profile(), f"{backbone}-{dataset}"
    params, run = load_section("compare", CompareParams), load_section("run", RunParams)
    suffix = SUFFIXES[load_params()["evaluate"]["per_patch"]]
    with whole_folder(Path("results", profile, "compare", cell)) as folder:
        compare(Path("results", profile, "evaluate", cell), run.methods_of(backbone), params, suffix, folder)


def compare(evaluated: Path, methods: Sequence[str], params: CompareParams, suffix: str, folder: Path) -> None:
    """Writes metrics.json, curves.csv, heatmaps.npz and heatmaps.json.

    Args:
        evaluated: a folder a method.
        methods: that are expected.
        params: the stage's section.
        suffix: of the maps of TVE and of the exact windows that are compared (`SUFFIXES`).
        folder: to write into.

    Raises:
        ValueError: no method has been evaluated, or methods that were measured on different pictures or weights.
    """
    cell = read_cell(evaluated, methods)
    if cell is None:
        raise ValueError(f"{evaluated}: expected a folder for one of {', '.join(methods)}, got none; run `dvc repro`")
    both = {
        name: compared(
            cell, REFERENCE + suffix, EXACT + suffix, params.num_bootstrap, params.seed, correct_only=correct_only
        )
        for name, correct_only in (("tasks", False), ("correct_only", True))
    }
    origins = {name: value for facts in cell.facts.values() for name, value in facts["origins"].items()}
    document = {
        "num_pictures": len(cell.keys),
        "reference": REFERENCE + suffix,
        "missing": [name for name in methods if name not in cell.facts and name not in cell.not_defined],
        "not_defined": cell.not_defined,
        "maps": seconds_and_costs(cell),
        "trained_for": next(iter(cell.facts.values()))["trained_for"],
        "origins": origins,
    }
    write_json(folder / "metrics.json", document | both)
    folders = [evaluated / name for name in cell.facts]
    _join_curves(folders, folder / "curves.csv")
    _join_heatmaps(folders, folder)


def read_cell(folder: Path, methods: Sequence[str]) -> CellScores | None:
    """The methods of one (backbone, dataset) that are there; None where none is.

    Raises:
        ValueError: two methods that were measured on different pictures, or under different protocols.
    """
    there = {name: folder / name for name in methods if (folder / name / "scores.csv").is_file()}
    if not there:
        return None
    others = {name: _facts(folder / name) for name in methods if name not in there}
    not_defined = {name: facts["not_defined"] for name, facts in others.items() if "not_defined" in facts}
    scores: dict[tuple[str, str], Scores] = {}
    explained: dict[str, tuple[str, ...]] = {}  # by task, the class of each picture
    facts: dict[str, dict[str, Any]] = {}
    keys: tuple[str, ...] = ()
    for method, path in there.items():
        facts[method] = _facts(path)
        for column, mine, classes, found in _read_scores(path / "scores.csv"):
            if keys and mine != keys:
                raise ValueError(
                    f"{path}: expected the {len(keys)} pictures of the other methods, got others; run `dvc repro`"
                )
            if explained.setdefault(column[0], classes) != classes:
                raise ValueError(
                    f"{path}: {column[0]}: expected the classes that the other methods explain, got others; evaluate "
                    "all methods on one kind of device"
                )
            keys, scores[column] = mine, found
    _require_one_origin(folder, facts)
    first = next(iter(scores.values()))
    removals = tuple(name.removesuffix("_fidelity_plus") for name in first if name.endswith("_fidelity_plus"))
    return CellScores(scores, removals, facts, not_defined, keys)


def compared(
    cell: CellScores, reference: str, exact: str, num_resamples: int, seed: int, *, correct_only: bool = False
) -> dict[str, Any]:
    """By task: what each map scores, how far `reference` is from it, and how far on the way from random to `exact`.

    Args:
        cell: the methods.
        reference: the map that the others are compared with.
        exact: the map that it imitates.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
        correct_only: whether pictures that the head gets wrong are left out.
    """
    return {
        task: _compared_task(cell, task, reference, exact, num_resamples, seed, correct_only) for task in cell.tasks
    }


def seconds_and_costs(cell: CellScores) -> dict[str, dict[str, Any]]:
    """By map: the backbone's passes for one map, and its seconds, of the dearest of a method's maps alone.

    All maps of a method are made together, so nothing is known of the cheaper ones.
    """
    found: dict[str, dict[str, Any]] = {}
    for facts in cell.facts.values():
        dearest = max(cost["forwards"] for cost in facts["costs"].values())
        for name, cost in facts["costs"].items():
            found[name] = {"seconds": facts["seconds_per_map"] if cost["forwards"] == dearest else None, **cost}
    return found


def _compared_task(
    cell: CellScores, task: str, reference: str, exact: str, num_resamples: int, seed: int, correct_only: bool
) -> dict[str, Any]:
    maps = cell.maps(task)
    right_N = cell.scores[task, maps[0]]["correct"] > 0
    chosen_N = right_N if correct_only else np.ones_like(right_N)
    columns = {
        (name, removal, measure): cell.scores[task, name][f"{removal}_{measure}"][chosen_N]
        for name in maps
        for removal in cell.removals
        for measure in MEASURES
    }
    entry: dict[str, Any] = {
        "num_pictures": int(chosen_N.sum()),
        "accuracy": float(right_N.mean()),
        "methods": {},
        "differences": {},
        "share_of_way": {},
        "objects": _means(cell, task, chosen_N, OBJECT_MEASURES),
        "robustness": _means(cell, task, chosen_N, ROBUSTNESS_MEASURES),
        "density": _densities(cell, task, chosen_N),
    }
    if not chosen_N.any():
        return entry
    for (name, removal, measure), values_N in columns.items():
        stated = {"mean": float(values_N.mean()), "std": float(values_N.std())}
        entry["methods"].setdefault(name, {}).setdefault(removal, {})[measure] = stated
    if reference not in maps:
        return entry
    others = [name for name in maps if name != reference]
    pairs = [(removal, name, reference) for removal in cell.removals for name in others]
    if exact in maps and "random" in maps:
        pairs += [(removal, "random", exact) for removal in cell.removals]
    intervals = _intervals(columns, pairs, num_resamples, seed)
    for removal in cell.removals:
        entry["differences"][removal] = {
            name: {m: _as_json(intervals[removal, name, reference, m]) for m in MEASURES} for name in others
        }
        if exact not in maps or "random" not in maps:
            continue
        means = {(n, m): float(columns[n, removal, m].mean()) for n in (reference, "random", exact) for m in FIDELITIES}
        entry["share_of_way"][removal] = {
            m: share_of_way(means[reference, m], means["random", m], means[exact, m])
            if intervals[removal, "random", exact, m].excludes_zero
            else None
            for m in FIDELITIES
        }
    return entry


def _intervals(
    columns: Mapping[tuple[str, str, str], NDArray[np.float64]],
    pairs: Sequence[tuple[str, str, str]],
    num_resamples: int,
    seed: int,
) -> dict[tuple[str, str, str, str], Interval]:
    """(removal, map, minuend, measure) -> the interval of minuend - map; pictures are resampled together for all."""
    names = [(*pair, measure) for pair in pairs for measure in MEASURES]
    if not names:
        return {}
    differences_NK = np.stack([columns[top, r, m] - columns[name, r, m] for r, name, top, m in names], axis=1)
    return dict(zip(names, paired_bootstrap(differences_NK, num_resamples, seed), strict=True))


def _means(
    cell: CellScores, task: str, chosen_N: NDArray[np.bool_], measures: Sequence[str]
) -> dict[str, dict[str, float | None]] | None:
    """By map, means over the pictures in which each measure exists; None where some map has none of one."""
    found: dict[str, dict[str, float | None]] = {}
    for name in cell.maps(task):
        scores = cell.scores[task, name]
        if not all(measure in scores and np.isfinite(scores[measure]).any() for measure in measures):
            return None
        found[name] = {measure: _mean(scores[measure][chosen_N]) for measure in measures}
    return found


def _densities(cell: CellScores, task: str, chosen_N: NDArray[np.bool_]) -> dict[str, dict[str, float | None]] | None:
    found: dict[str, dict[str, float | None]] = {}
    for name in cell.maps(task):
        scores = cell.scores[task, name]
        if not all(column in scores and np.isfinite(scores[column]).any() for column in DENSITIES):
            return None
        own, other = (_mean(scores[column][chosen_N]) for column in DENSITIES)
        found[name] = {"own": own, "other": other, "ratio": own / other if own is not None and other else None}
    return found


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "facts.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return facts


def _mean(values_N: NDArray[np.float64]) -> float | None:
    """The mean over the pictures in which a measure exists, if there are any."""
    there = values_N[np.isfinite(values_N)]
    return float(there.mean()) if len(there) else None


def _read_scores(path: Path) -> Iterator[tuple[tuple[str, str], tuple[str, ...], tuple[str, ...], Scores]]:
    """(task, map), the pictures' keys in order, their classes, and each numeric column; what is empty is NaN."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault((row["task"], row["map"]), []).append(row)
    for column, mine in rows.items():
        mine.sort(key=lambda row: row["key"])
        numbers = [name for name in mine[0] if name not in WORDS]
        arrays = {name: np.array([float(row[name] or "nan") for row in mine]) for name in numbers}
        yield column, tuple(row["key"] for row in mine), tuple(row["predicted"] for row in mine), arrays


def _require_one_origin(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError where methods were measured on other weights, pictures or another protocol than each other."""
    for name in ("backbone_sha256", "heads_sha256", "shards_sha256", "protocol_sha256", "explainer_sha256"):
        asked = [method for method in facts if name != "explainer_sha256" or method in READINGS]
        values = {method: facts[method]["origins"][name] for method in asked}
        if len(set(values.values())) > 1:
            raise ValueError(f"{folder}: expected one {name} for every method, got {values}; run `dvc repro`")
    settings = {method: json.dumps(found["evaluate"], sort_keys=True) for method, found in facts.items()}
    if len(set(settings.values())) > 1:
        raise ValueError(f"{folder}: expected one section `evaluate` for every method, got {settings}; run `dvc repro`")


def _join_curves(folders: Sequence[Path], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, CURVES_HEADER, lineterminator="\n")
        rows.writeheader()
        for folder in folders:
            with (folder / "curves.csv").open(newline="") as mine:
                rows.writerows(csv.DictReader(mine))


def _join_heatmaps(folders: Sequence[Path], folder: Path) -> None:
    """All methods' maps of the pictures that are shown, which are the same for every method."""
    arrays: dict[str, NDArray[Any]] = {}
    there = [each for each in folders if (each / "heatmaps.npz").is_file()]
    for each in there:
        with np.load(each / "heatmaps.npz", allow_pickle=False) as mine:
            arrays |= {name: mine[name] for name in mine.files}
    if there:
        np.savez_compressed(folder / "heatmaps.npz", **arrays)  # type: ignore[arg-type]
        (folder / "heatmaps.json").write_bytes((there[0] / "heatmaps.json").read_bytes())


def _as_json(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


if __name__ == "__main__":
    run_stage("compare", main, "BACKBONE", "DATASET")
