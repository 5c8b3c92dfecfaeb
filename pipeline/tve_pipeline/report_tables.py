"""The report's tables: plain values for the template, and nothing that is not in the results."""

from collections.abc import Iterable
from typing import Any

from tve.fidelity.controls import CONTROLS
from tve.method_styles import style_of
from tve_pipeline.measure_names import FIDELITIES, SIGN_OF_BETTER
from tve_pipeline.report_results import REFERENCES, Results, in_order

# In the order of the tables; a number at the end of a name is a budget of evaluations.
GROUPS = (
    (
        *("tve", "tve_mean", "tve_u", "tve_hg"),
        *("tve_two_networks", "tve_two_networks_mean", "tve_two_networks_u"),
        *("tve_untrained", "tve_untrained_mean", "tve_untrained_u"),
    ),
    ("vit_shapley",),
    ("integrated_gradients", "deep_lift", "gradient_shap", "grad_cam", "rollout", "attn_lrp"),
    ("rise", "kernel_shap", "lime", "occlusion"),
    CONTROLS,
    REFERENCES,
)
DENSITY_METHODS = ("tve", "tve_mean", "tve_u", "tve_hg", "random", *REFERENCES)
# What the tables of other measures are called, and which way is better.
OTHER_MEASURES = {
    "insertion": ("Insertion area", "higher"),
    "deletion": ("Deletion area", "lower"),
    "mass_inside": ("Attribution mass inside the object", "higher"),
    "pointing": ("Pointing game", "higher"),
    "average_precision": ("Average precision as a detector of object patches", "higher"),
    "road": ("ROAD", "higher"),
    "infidelity": ("Infidelity", "lower"),
    "sensitivity": ("Sensitivity", "lower"),
}
MARKS = {"better": "✓", "worse": "✗", "unclear": "○"}  # of a verdict on TVE
Cell = dict[str, Any] | None


def removals_of(results: Results, backbone: str, trained_for: str) -> list[str]:
    """The removal operators that a backbone was evaluated under, the one of its explainer first."""
    found: dict[str, None] = {}
    for (name, _), evaluation in results.evaluations.items():
        if name == backbone:
            for task in evaluation.tasks.values():
                found |= dict.fromkeys(removal for scores in task["methods"].values() for removal in scores)
    return sorted(found, key=lambda removal: (removal != trained_for, removal))


def columns_of(results: Results, backbone: str, *, correct_only: bool = False) -> list[dict[str, Any]]:
    """The columns of a backbone's tables: each task of each dataset, or one that says that a dataset is missing."""
    columns: list[dict[str, Any]] = []
    for dataset in results.datasets:
        evaluation = results.evaluations.get((backbone, dataset))
        if evaluation is None:
            columns.append({"dataset": dataset, "task": dataset, "result": None})
        else:
            tasks = evaluation.correct_only if correct_only else evaluation.tasks
            columns += [{"dataset": dataset, "task": task, "result": found} for task, found in tasks.items()]
    return columns


def methods_of(columns: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Groups of methods in the order of the tables, the references last; unknown ones stand beside TVE."""
    present = dict.fromkeys(method for column in columns if column["result"] for method in column["result"]["methods"])
    groups: list[list[str]] = [[] for _ in GROUPS]
    for method in sorted(present, key=_place):
        groups[_place(method)[0]].append(method)
    return [tuple(group) for group in groups if group]


def in_table_order(methods: Iterable[str]) -> list[str]:
    """Methods as the tables list them."""
    return sorted(methods, key=_place)


def _place(method: str) -> tuple[int, int, int]:
    """Where a method stands: its group, its place there, its budget."""
    base, _, budget = method.rpartition("_") if method.rpartition("_")[2].isdigit() else (method, "", "0")
    for number, group in enumerate(GROUPS):
        if base in group:
            return number, group.index(base), int(budget)
    return 0, len(GROUPS[0]), int(budget)


def fidelity_table(columns: list[dict[str, Any]], removal: str) -> list[list[dict[str, Any]]]:
    """Groups of rows {"label", "reference", "cells"}; a cell holds a mean, its std, and whether it is the best.

    The references are evaluated exactly, at many passes a picture, and compete for no mark.
    """
    cells: dict[tuple[str, int, str], Cell] = {}
    for index, column in enumerate(columns):
        methods = column["result"]["methods"] if column["result"] else {}
        for fidelity in FIDELITIES:
            means = {name: scores[removal][fidelity]["mean"] for name, scores in methods.items() if removal in scores}
            rivals = [SIGN_OF_BETTER[fidelity] * mean for name, mean in means.items() if name not in REFERENCES]
            for name, mean in means.items():
                best = name not in REFERENCES and round(SIGN_OF_BETTER[fidelity] * mean, 3) == round(max(rivals), 3)
                std = methods[name][removal][fidelity]["std"]
                cells[name, index, fidelity] = {"mean": number(mean), "std": number(std), "best": best}
    return [
        [
            {
                "method": method,
                "label": style_of(method).label,
                "reference": method in REFERENCES,
                "cells": [cells.get((method, i, f)) for i in range(len(columns)) for f in FIDELITIES],
            }
            for method in group
        ]
        for group in methods_of(columns)
    ]


def share_row(columns: list[dict[str, Any]], removal: str) -> list[str | None]:
    """Per column and fidelity, how far TVE is on the way from random to the exact windows, in percent."""
    shares = [(column["result"] or {}).get("share_of_way", {}).get(removal, {}) for column in columns]
    return [percent(share.get(fidelity)) for share in shares for fidelity in FIDELITIES]


def difference_table(columns: list[dict[str, Any]], removal: str) -> list[dict[str, Any]]:
    """Rows {"label", "cells"} of TVE minus each method: difference, 95 % interval, and the verdict on TVE."""
    rows = []
    found = [(column["result"] or {}).get("differences", {}).get(removal, {}) for column in columns]
    present = dict.fromkeys(method for differences in found for method in differences)
    for method in sorted(present, key=lambda name: (name not in CONTROLS, _place(name))):
        cells = [
            _difference(differences[method][fidelity], fidelity) if method in differences else None
            for differences in found
            for fidelity in FIDELITIES
        ]
        rows.append({"label": style_of(method).label, "control": method in CONTROLS, "cells": cells})
    return rows


def measure_tables(columns: list[dict[str, Any]], removal: str) -> list[dict[str, Any]]:
    """Every other measure of every map: {"label", "better", "tasks", "rows"}, a row {"label", "cells"} per method."""
    tables = []
    for measure, (label, better) in OTHER_MEASURES.items():
        found = {column["task"]: _of_measure(column["result"], measure, removal) for column in columns}
        tasks = [task for task, values in found.items() if values]
        methods = [method for group in methods_of(columns) for method in group]
        rows = [
            {"label": style_of(method).label, "cells": [number(found[task].get(method)) for task in tasks]}
            for method in methods
            if any(found[task].get(method) is not None for task in tasks)
        ]
        if rows:
            tables.append({"label": label, "better": better, "tasks": tasks, "rows": rows})
    return tables


def _of_measure(result: dict[str, Any] | None, measure: str, removal: str) -> dict[str, float | None]:
    """By method, the mean of a measure, which is either one under a removal or one of a map."""
    if result is None:
        return {}
    for section in ("objects", "robustness"):
        of_section = result.get(section) or {}
        if any(measure in values for values in of_section.values()):
            return {method: values.get(measure) for method, values in of_section.items()}
    scores = {method: by_removal.get(removal, {}) for method, by_removal in result["methods"].items()}
    return {method: found[measure]["mean"] for method, found in scores.items() if measure in found}


def examination_table(examined: dict[str, Any]) -> dict[str, Any]:
    """Rank correlations by task and reading, and the bound by task: {"num_blocks", "correlations", "bounds"}."""
    correlations, bounds = [], []
    num_blocks = max((len(found["exact_windows"]["blocks"]) for found in examined.values()), default=0)
    for task in in_order(examined):
        found = examined[task]
        for reading in ("tve", "exact_windows"):
            values = found[reading]
            blocks = values["blocks"] or [None] * num_blocks
            cells = [values["random_head"], values["other_picture"], *blocks]
            label = f"{task}, {style_of(reading).label}"
            correlations.append({"label": label, "cells": [number(cell, 2) for cell in cells]})
        bound = found["bound"]
        bounds.append(
            {
                "label": task,
                "cells": [
                    *(number(bound[name], 2) for name in ("error", "bound", "loss_bound")),
                    *(times(bound[name]) for name in ("bound_over_error", "loss_bound_over_error")),
                    str(bound["num_broken"]),
                ],
            }
        )
    return {"num_blocks": num_blocks, "correlations": correlations, "bounds": bounds}


def density_table(columns: list[dict[str, Any]]) -> dict[str, Any]:
    """Object density of the tasks that are about one object: {"tasks", "rows"}, a row {"label", "cells"} per method."""
    densities = {column["task"]: found for column in columns if (found := (column["result"] or {}).get("density"))}
    present = {method for found in densities.values() for method in found}
    rows = []
    for method in (method for method in DENSITY_METHODS if method in present):
        found = [density.get(method) for density in densities.values()]
        rows.append({"label": style_of(method).label, "cells": [_density(cell) if cell else None for cell in found]})
    return {"tasks": list(densities), "rows": rows}


def verdict_of(difference: dict[str, float], fidelity: str) -> str:
    """Whether TVE is "better" or "worse" with its interval clear of zero, or "unclear"."""
    low, high = sorted(SIGN_OF_BETTER[fidelity] * difference[end] for end in ("low", "high"))
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def number(value: float | None, decimals: int = 3, leading_zero: bool = False) -> str:
    """A figure, by default without its leading zero, with a true minus sign; a dash where there is none.

    >>> number(-0.1234), number(12.0), number(None)
    ('−.123', '12.000', '–')
    """
    if value is None:
        return "–"
    text = f"{abs(value):.{decimals}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") and not leading_zero else text)


def times(ratio: float | None) -> str:
    """A ratio; one above 100 says nothing more than that."""
    return "–" if ratio is None else "> 100 ×" if ratio > 100 else f"{ratio:.1f} ×"


def percent(value: float | None) -> str | None:
    """A share in whole percent; None where there is none."""
    return None if value is None else f"{value * 100:.0f}\u00a0%".replace("-", "−")


def _difference(difference: dict[str, float], fidelity: str) -> dict[str, str]:
    """What is shown of a difference; one that rounds to nothing is no difference, however sure its sign."""
    mean, nothing = number(difference["mean"]), number(0.0)
    return {
        "mean": "+" + mean if difference["mean"] > 0 and mean != nothing else mean,
        "interval": f"{number(difference['low'])} … {number(difference['high'])}",
        "verdict": "unclear" if mean == nothing else verdict_of(difference, fidelity),
    }


def _density(density: dict[str, float | None]) -> dict[str, str]:
    ratio = density["ratio"]
    return {
        "ratio": times(ratio),
        "own": number(density["own"]),
        "other": number(density["other"]),
    }
