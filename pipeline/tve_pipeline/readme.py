"""The README's pictures and tables, made from results and records, so that neither is typed by hand.

python -m tve_pipeline.readme
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tve import figures
from tve.heatmaps import enlarged, overlay
from tve.method_styles import style_of
from tve_pipeline import recorded
from tve_pipeline.compare import read_cell
from tve_pipeline.goals import methods_of
from tve_pipeline.measure_names import FIDELITIES
from tve_pipeline.report_tables import number

BACKBONE, DATASET = "vit_scenes", "scenes"
CELL = Path("results", "scenes", "compare", f"{BACKBONE}-{DATASET}")
EVALUATED = Path("results", "scenes", "evaluate", f"{BACKBONE}-{DATASET}")
PRETRAIN = Path("results", "scenes", "pretrain", BACKBONE, "metrics.json")
HEADS = Path("results", "scenes", "heads", f"{BACKBONE}-{DATASET}", "metrics.json")
PICTURE = Path("docs", "images", "heatmaps.png")
SCENE = Path("docs", "images", "scene.png")  # what the README's example explains
README = Path("README.md")
SCENES = "table"  # what stands between <!-- NAME:start --> and <!-- NAME:end -->
NUM_PICTURES = 4
TASKS = ("digit", "parity", "shape", "colour")
METHODS = (
    *("tve", "tve_mean", "tve_u", "tve_hg", "vit_shapley"),
    *("integrated_gradients", "deep_lift", "gradient_shap", "grad_cam", "rollout", "attn_lrp"),
    *("rise_50", "rise_200", "kernel_shap_50", "kernel_shap_200", "lime_50", "lime_200"),
    *("exact_windows", "exact_windows_mean", "random", "random_blurred", "centre"),
)
SHOWN = ("real", "real_112")  # profiles whose tables stand between <!-- PROFILE table:start --> and its end
RECORDED_METHODS = (
    *("tve", "exact_windows", "vit_shapley"),
    *("integrated_gradients", "deep_lift", "gradient_shap", "rollout", "attn_lrp", "grad_cam"),
    *("occlusion", "rise_50", "rise_200", "kernel_shap_50", "kernel_shap_200", "lime_50", "lime_200"),
    *("random", "random_blurred", "centre"),
)


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figures.save_png(_pictures(), PICTURE, dots_per_inch=110)
    with np.load(CELL / "heatmaps.npz") as arrays:
        Image.fromarray(arrays["images"][0]).save(SCENE)
    README.write_text(with_recorded_tables(between(README.read_text(), SCENES, _table())))


def with_recorded_tables(text: str) -> str:
    """The README with the tables of what is on record."""
    for profile in SHOWN:
        columns = list(recorded.recorded_columns(profile))
        text = between(text, f"{profile} table", recorded.table(columns, RECORDED_METHODS))
    return text


def between(text: str, name: str, table: str) -> str:
    """The text with a table in the place of what its markers enclose."""
    start, end = f"<!-- {name}:start -->\n", f"\n<!-- {name}:end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}{table}{end}{after}"


def _pictures() -> Any:
    document = json.loads((CELL / "heatmaps.json").read_text())
    with np.load(CELL / "heatmaps.npz") as arrays:
        images = arrays["images"]
        maps = {task: arrays[f"{task}/tve"] for task in TASKS}
    rows: list[list[figures.Panel | None]] = []
    for index in range(min(NUM_PICTURES, len(images))):
        panels = []
        for task in TASKS:
            heatmap = overlay(images[index], maps[task][index])
            predicted, label = (document["tasks"][task][name][index] for name in ("predicted", "label"))
            panels.append(figures.Panel(heatmap, predicted if predicted == label else f"{predicted} (is {label})"))
        rows.append([figures.Panel(enlarged(images[index])), *panels])
    return figures.picture_grid(rows, ["picture", *TASKS], [""] * len(rows))


def _table() -> str:
    metrics = json.loads((CELL / "metrics.json").read_text())
    cell = read_cell(EVALUATED, methods_of("scenes", BACKBONE))
    assert cell is not None, EVALUATED
    columns = {column.task: column for column in recorded.columns_of(BACKBONE, cell)}
    learned = json.loads(PRETRAIN.read_text())
    lines = [
        "| F⁺ ↑ / F⁻ ↓, removal `drop` | passes | " + " | ".join(TASKS) + " |",
        "|---|---|" + "---|" * len(TASKS),
    ]
    for method in (name for name in METHODS if name in metrics["maps"]):
        cells = []
        for task in TASKS:
            of_task = metrics["tasks"][task]["methods"][method]["drop"]
            pair = " / ".join(_number(of_task[name]["mean"], 3) for name in FIDELITIES)
            cells.append(pair if method == recorded.REFERENCE else f"{pair} {columns[task].marks(method)}")
        passes = metrics["maps"][method]
        price = f"{passes['forwards']} + {passes['backwards']}" if passes["backwards"] else str(passes["forwards"])
        lines.append(f"| {style_of(method).label} | {price} | " + " | ".join(cells) + " |")
    heads = json.loads(HEADS.read_text())
    (num_test,) = {heads[task]["num_test"] for task in TASKS}
    accuracies = (f"{heads[task]['test_accuracy']:.1%}" for task in TASKS)
    lines.append(f"| *head, accuracy on {num_test:,} test pictures* | | " + " | ".join(accuracies) + " |")
    kept, removed = (_number(learned[name], 2) for name in ("r2_kept", "r2_removed"))
    mean, full = (_number(learned[name], 2) for name in ("trivial_mean_r2_kept", "trivial_full_r2_removed"))
    tve_s, exact_s = (_number(1000 * metrics["maps"][name]["seconds"], 1) for name in ("tve", "exact_windows"))
    lines += [
        "",
        f"R² within a picture: ĝ (window alone) {kept}, against {mean} for the mean of g; "
        f"ĥ (window removed) {removed}, against {full} for G(x).",
        "",
        f"{metrics['num_pictures']} pictures; a map takes {tve_s} ms with TVE and {exact_s} ms with exact windows.",
    ]
    return "\n".join(lines)


def _number(value: float, decimals: int) -> str:
    return number(value, decimals, leading_zero=True)


if __name__ == "__main__":
    main()
