"""Stage `report`: one self-contained page, and the figures and numbers that DVC shows, from whatever results there are.

    python -m tve_pipeline.report

Writes results/P/report/: report.html, metrics.json (flat), fidelity.csv, training.csv, heatmaps.png, curves.png,
training.png.
"""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from tve import figures
from tve.method_styles import INK, style_of
from tve_pipeline.entry import run_stage
from tve_pipeline.measure_names import FIDELITIES
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import RunParams, Section, active_profile, load_params, load_section
from tve_pipeline.report_heatmaps import HeatmapBoard, board_figure, galleries, heatmap_boards
from tve_pipeline.report_paper import PAPER_TASKS, beside_the_paper
from tve_pipeline.report_provenance import Origin, provenance
from tve_pipeline.report_results import Results, read_results
from tve_pipeline.report_tables import (
    MARKS,
    columns_of,
    density_table,
    difference_table,
    examination_table,
    fidelity_table,
    measure_tables,
    methods_of,
    number,
    removals_of,
    share_row,
    times,
)
from tve_pipeline.report_words import GLOSSARY, TERMS, cut_short, headline, protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_GALLERY_PICTURES = 2  # whose maps of all methods are shown
TEMPLATE = Path(__file__).with_name("report.html.j2")
# One of each kind: the tables have all.
CURVE_METHODS = (
    *("random", "centre", "integrated_gradients", "attn_lrp"),
    *("rise_200", "vit_shapley", "exact_windows", "tve"),
)
PANEL_INCHES = (2.35, 2.0)  # small, so that four of them side by side on the page are still read
# What a panel shows, what to wish for, and where the value stands in a curve's points.
PANELS = (("S* removed", "higher is better", 2), ("S* kept alone", "lower is better", 1))


class ReportParams(Section):
    """Section `report` of params.yaml."""

    title: str
    num_heatmaps: int = Field(ge=1)  # pictures shown


@dataclass(frozen=True, slots=True)
class Report:
    """What is reported, and how."""

    profile: str
    params: ReportParams
    results: Results
    sections: Mapping[str, Any]  # of params.yaml: the protocol in words is written from them
    origins: Sequence[Origin]

    @property
    def trained_for(self) -> dict[str, str]:
        """The removal operator of each backbone's explainer."""
        return {name: self.sections["backbones"][name]["removal"] for name in self.results.backbones}


def main(argv: list[str]) -> None:
    profile, run = active_profile(), load_section("run", RunParams)
    params, sections = load_section("report", ReportParams), load_params()
    results = read_results(Path("results", profile), run.backbones, run.task_datasets)
    origins = provenance(Path("models", profile, "export"), run.backbones, sections)
    with whole_folder(Path("results", profile, "report")) as folder:
        write_report(Report(profile, params, results, sections, origins), folder)


def write_report(report: Report, folder: Path) -> None:
    """Writes every output into `folder`."""
    boards = heatmap_boards(report.results, report.params.num_heatmaps)
    (folder / "report.html").write_text(render(report, boards), encoding="utf-8")
    write_json(folder / "metrics.json", flat_metrics(report))
    _write_fidelity(report.results, folder / "fidelity.csv")
    _write_training(report.results, folder / "training.csv")
    results, names = report.results, report.results.backbones
    prefixes = {name: f"{name}, " if len(names) > 1 else "" for name in names}
    panels = [panel for name in names for panel in _curves(report, name, report.trained_for[name], prefixes[name])]
    trainings = [training for name in names if (training := _training(results, name))]
    _save(board_figure(boards) if boards else None, folder / "heatmaps.png", "heatmaps", dots_per_inch=120)
    _save(figures.fidelity_curves(panels, 2) if panels else None, folder / "curves.png", "fidelity curves")
    _save(figures.training_curves(trainings) if trainings else None, folder / "training.png", "training curves")


def render(report: Report, boards: list[HeatmapBoard]) -> str:
    """The page, as HTML that refers to nothing outside itself."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    results = report.results
    sentences, large_figures = headline(results, report.trained_for)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=report.params.title,
        profile=report.profile,
        sentences=sentences,
        terms=TERMS,
        large_figures=large_figures,
        missing=results.missing(),
        boards=boards,
        galleries=galleries(results, NUM_GALLERY_PICTURES),
        paper_tasks=PAPER_TASKS,
        marks=MARKS,
        jpeg=_jpeg,
        learned=[_learned(results, name) for name in results.backbones],
        backbones=[_backbone_section(report, name) for name in results.backbones],
        ink=INK,
        protocol=protocol(results, report.sections),
        glossary=GLOSSARY,
        cut_short=cut_short(results, report.sections),
        origins=report.origins,
    )


def flat_metrics(report: Report) -> dict[str, float]:
    """The numbers that a comparison of two runs needs, in one level: "vit_scenes/scenes/digit/drop/tve/fidelity_plus".

    Fidelities are of every method under the removal operator that the explainer was trained for, of TVE under all.
    """
    flat: dict[str, float | None] = {}
    for name, found in report.results.pretraining.items():
        flat |= {f"{name}/{key}": value for key, value in found.metrics.items() if "r2_" in key}
    for (backbone, dataset), evaluation in report.results.evaluations.items():
        method = evaluation.reference
        for task, result in evaluation.tasks.items():
            prefix = f"{backbone}/{dataset}/{task}"
            flat[f"{prefix}/accuracy"] = result.get("accuracy")
            for removal, share in result.get("share_of_way", {}).items():
                flat |= {f"{prefix}/{removal}/share_of_way/{fidelity}": share.get(fidelity) for fidelity in FIDELITIES}
            for each, by_removal in result["methods"].items():
                for removal, scores in by_removal.items():
                    if each == method or removal == report.trained_for[backbone]:
                        place = f"{prefix}/{removal}/{each}"
                        flat |= {f"{place}/{fidelity}": scores[fidelity]["mean"] for fidelity in FIDELITIES}
            flat[f"{prefix}/density_ratio"] = ((result.get("density") or {}).get(method) or {}).get("ratio")
    return {key: value for key, value in flat.items() if value is not None}


def _backbone_section(report: Report, backbone: str) -> dict[str, Any]:
    trained_for = report.trained_for[backbone]
    columns = [
        column | {"accuracies": _accuracies(report.results, backbone, column)}
        for column in columns_of(report.results, backbone)
    ]
    datasets = {column["dataset"]: sum(c["dataset"] == column["dataset"] for c in columns) for column in columns}
    present = {method for group in methods_of(columns) for method in group}
    return {
        "name": backbone,
        "columns": columns,
        "datasets": datasets,
        "name_datasets": len(datasets) > 1 and any(column["dataset"] != column["task"] for column in columns),
        "legend": [style_of(method) for method in reversed(CURVE_METHODS) if method in present],
        "density": density_table(columns),
        "paper": beside_the_paper(
            report.results, backbone, report.sections["backbones"][backbone]["architecture"], trained_for
        ),
        "measures": measure_tables(columns, trained_for),
        "correct_only": fidelity_table(columns_of(report.results, backbone, correct_only=True), trained_for),
        "examined": [
            {"dataset": dataset, **examination_table(found)}
            for (name, dataset), found in report.results.examined.items()
            if name == backbone
        ],
        "prices": _prices(report, backbone),
        "removals": [
            {
                "name": removal,
                "trained": removal == trained_for,
                "groups": fidelity_table(columns, removal),
                "shares": share_row(columns, removal),
                "differences": difference_table(columns, removal),
                "curves": [
                    _svg(figures.fidelity_curves([panel], 1, legend=False, panel_inches=PANEL_INCHES), panel.title)
                    for panel in _curves(report, backbone, removal)
                ],
            }
            for removal in removals_of(report.results, backbone, trained_for)
        ],
    }


def _prices(report: Report, backbone: str) -> dict[str, Any]:
    """What a map takes, by method, and a figure of it against the fidelities' means over all tasks."""
    trained_for = report.trained_for[backbone]
    maps: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[dict[str, Any]]] = {}
    for (name, _), evaluation in report.results.evaluations.items():
        if name == backbone:
            maps |= evaluation.metrics.get("maps", {})
            for result in evaluation.tasks.values():
                for method, by_removal in result["methods"].items():
                    scores.setdefault(method, []).append(by_removal.get(trained_for, {}))
    points = [
        figures.Price(
            method,
            found["seconds"],
            *(sum(each[f]["mean"] for each in scores[method]) / len(scores[method]) for f in FIDELITIES),
        )
        for method, found in maps.items()
        if found["seconds"] is not None and found["forwards"] and all(scores.get(method, [{}])) and _in_figure(method)
    ]
    order = [method for group in methods_of(columns_of(report.results, backbone)) for method in group]
    return {
        "rows": [
            {
                "label": style_of(method).label,
                "forwards": maps[method]["forwards"],
                "backwards": maps[method]["backwards"] or "",
                "milliseconds": number((s := maps[method]["seconds"]) and 1000 * s, 1, leading_zero=True),
            }
            for method in order
            if method in maps
        ],
        "figure": _svg(figures.price_against_fidelity(points), f"price against fidelity, {backbone}")
        if points
        else None,
    }


def _in_figure(method: str) -> bool:
    """Leaves out of the figure of prices what differs from another point by how u is read or by the training alone."""
    return not method.endswith(("_mean", "_u")) and method not in ("tve_hg", "tve_untrained")


def _accuracies(results: Results, backbone: str, column: dict[str, Any]) -> dict[str, str]:
    head = results.heads.get((backbone, column["dataset"]), {}).get(column["task"], {})
    return {name: _accuracy(head.get(f"{name}_accuracy")) for name in ("test", "halves", "train")}


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", "\u00a0%")


def _learned(results: Results, backbone: str) -> dict[str, Any]:
    """One backbone's rows of the table of R², and its training curve."""
    found = results.pretraining.get(backbone)
    if found is None:
        return {"name": backbone, "rows": None, "curve": None, "bounds": []}
    metrics = found.metrics
    trivial = {"kept": metrics.get("trivial_mean_r2_kept"), "removed": metrics.get("trivial_full_r2_removed")}
    about = {"kept": ("ĝ, window kept", "the mean of g"), "removed": ("ĥ, window removed", "G(x)")}
    training = _training(results, backbone)
    return {
        "name": backbone,
        "bounds": [
            {
                "step": f"{row['step']:,.0f}",
                "cells": [number(row[name], 2) for name in ("explanation_error", "explanation_bound", "loss_bound")],
                "tightness": times(row["bound_over_error"]),
            }
            for row in found.bounds()
        ],
        "rows": [
            {
                "label": label,
                "r2": number(metrics[f"r2_{name}"]),
                "centred": number(metrics.get(f"r2_{name}_centred")),
                "trivial": number(trivial[name]),
                "answer": answer,
            }
            for name, (label, answer) in about.items()
        ],
        "curve": _svg(figures.training_curves([training]), f"R² during pre-training, {backbone}") if training else None,
    }


def _curves(report: Report, backbone: str, removal: str, prefix: str = "") -> list[figures.Curves]:
    """Two panels a task: patches removed, patches kept alone."""
    panels = []
    for dataset in report.results.datasets:
        evaluation = report.results.evaluations.get((backbone, dataset))
        if evaluation is None:
            continue
        for task in evaluation.tasks:
            found = {method: evaluation.curves.get((task, removal, method)) for method in CURVE_METHODS}
            lines = {method: points for method, points in found.items() if points}
            for what, direction, value in PANELS if lines else ():
                fractions = [point[0] for point in next(iter(lines.values()))]
                values = {method: [point[value] for point in points] for method, points in lines.items()}
                panels.append(figures.Curves(f"{prefix}{task}: {what}", direction, fractions, values))
    return panels


def _training(results: Results, backbone: str) -> figures.Training | None:
    found = results.pretraining.get(backbone)
    measured = found.evaluations() if found else {"step": []}
    if found is None or not measured["step"]:
        return None
    trivial = {
        "kept": found.metrics.get("trivial_mean_r2_kept"),
        "removed": found.metrics.get("trivial_full_r2_removed"),
    }
    return figures.Training(backbone, measured["step"], {name: measured[name] for name in trivial}, trivial)


def _save(figure: "Figure | None", path: Path, what: str, dots_per_inch: int = 160) -> None:
    figures.save_png(figures.note(f"{what}: missing") if figure is None else figure, path, dots_per_inch)


def _write_fidelity(results: Results, path: Path) -> None:
    """One row for each point of each curve; `value` is the drop of p(y|x), S* removed (plus) or kept alone (minus)."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["backbone", "dataset", "task", "method", "removal", "fidelity", "fraction", "value"])
        for pair, evaluation in results.evaluations.items():
            for (task, removal, method), points in evaluation.curves.items():
                for fraction, kept, removed in points:
                    rows.writerow([*pair, task, method, removal, "plus", fraction, removed])
                    rows.writerow([*pair, task, method, removal, "minus", fraction, kept])


def _write_training(results: Results, path: Path) -> None:
    """The training tables of all backbones, one below the other."""
    columns = dict.fromkeys(column for found in results.pretraining.values() for row in found.rows for column in row)
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["backbone", *columns], restval="", lineterminator="\n")
        rows.writeheader()
        for name, found in results.pretraining.items():
            rows.writerows({"backbone": name, **row} for row in found.rows)


def _svg(figure: "Figure", label: str) -> Markup:
    return Markup(figures.inline_svg(figure, label))


def _jpeg(image: NDArray[np.uint8]) -> str:
    """A picture as a data address; full chroma, since patch edges are edges of colour."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    run_stage("report", main)
