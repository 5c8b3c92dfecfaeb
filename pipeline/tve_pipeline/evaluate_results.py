"""What the stage `evaluate` leaves: scores.csv, curves.csv, facts.json, heatmaps.npz and heatmaps.json of one method.

Parts are read one after the other: what is held at once is a batch, sums, and the maps of the pictures that are shown.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tve_pipeline.evaluate_parts import Parts
from tve_pipeline.outputs import write_json

CURVES_HEADER = ("task", "map", "removal", "fraction", "kept_probability_drop", "removed_probability_drop")


def write_results(
    parts: Parts,
    fractions: Sequence[float],
    tasks: Sequence[str],
    facts: Mapping[str, Any],
    folder: Path,
) -> None:
    """Writes every file of one method into `folder`.

    Args:
        parts: every batch.
        fractions: of the levels.
        tasks: that were evaluated.
        facts: what facts.json states beside what the parts tell.
        folder: to write into.
    """
    keys: set[str] = set()
    curves: dict[str, NDArray[np.float64]] = {}  # sums over pictures [2, F]: removed, kept
    seconds: dict[str, float] = defaultdict(float)
    about: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []
    arrays: dict[str, list[NDArray[Any]]] = defaultdict(list)
    with (folder / "scores.csv").open("w", newline="") as file:
        rows: csv.DictWriter[str] | None = None
        for part in parts:
            if rows is None:
                rows = csv.DictWriter(file, list(_columns(part.rows)), restval="", lineterminator="\n")
                rows.writeheader()
            rows.writerows(map(_written, part.rows))
            keys |= {row["key"] for row in part.rows}
            for name, sums in part.curves.items():
                curves[name] = curves.get(name, 0) + np.array(sums)
            for name, value in part.seconds.items():
                seconds[name] += value
            about |= part.about
            shown += part.shown
            for name, array in part.arrays.items():
                arrays[name].append(array)
    _write_curves(curves, fractions, len(keys), folder / "curves.csv")
    spent = {name: round(value, 3) for name, value in seconds.items()}
    write_json(folder / "facts.json", {**facts, **about, "num_pictures": len(keys), "seconds": spent})
    if shown:
        np.savez_compressed(folder / "heatmaps.npz", **{n: np.concatenate(each) for n, each in arrays.items()})  # type: ignore[arg-type]
        named = {
            task: {name: [each["tasks"][task][name] for each in shown] for name in ("predicted", "label")}
            for task in tasks
        }
        described = {"keys": [each["key"] for each in shown], "names": [each["name"] for each in shown]}
        write_json(folder / "heatmaps.json", described | {"tasks": named})


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Every column of the rows, in their order; some tasks have columns that others lack."""
    return {column: None for row in rows for column in row}


def _written(row: Mapping[str, Any]) -> dict[str, str]:
    """Values as text; what does not exist for a picture, NaN, stays empty."""
    return {
        name: ("" if math.isnan(value) else f"{value:.7g}") if isinstance(value, float) else str(value)
        for name, value in row.items()
    }


def _write_curves(sums: Mapping[str, NDArray[np.float64]], fractions: Sequence[float], count: int, path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(CURVES_HEADER)
        for name, sums_2F in sums.items():
            removal, task, map_name = name.split("/")
            removed_F, kept_F = sums_2F / count
            for fraction, kept, removed in zip(fractions, kept_F, removed_F, strict=True):
                rows.writerow((task, map_name, removal, fraction, f"{kept:.6g}", f"{removed:.6g}"))
