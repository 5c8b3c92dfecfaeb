"""Stage report: one page from whatever results there are."""

import csv
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tve_pipeline.report import main
from tve_pipeline.report_paper import beside_the_paper
from tve_pipeline.report_provenance import provenance
from tve_pipeline.report_results import Pretraining, Results, in_order, read_results
from tve_pipeline.report_tables import (
    columns_of,
    difference_table,
    fidelity_table,
    measure_tables,
    number,
    percent,
)
from tve_pipeline.report_words import TERMS, headline
from tve_pipeline.scenes import TASKS

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"tve": 0.3, "tve_u": 0.25, "random": 0.1, "random_blurred": 0.12, "centre": 0.11, "exact_windows": 0.4}
OUTPUTS = {"report.html", "metrics.json", "fidelity.csv", "training.csv", "heatmaps.png", "curves.png", "training.png"}


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def pair(plus: float, minus: float, **more: float) -> dict[str, dict[str, float]]:
    return {"fidelity_plus": {"mean": plus} | more, "fidelity_minus": {"mean": minus} | more}


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


def task_result(removals: tuple[str, ...], density: bool) -> dict[str, Any]:
    differences = {
        method: {"fidelity_plus": interval(0.3 - score), "fidelity_minus": interval(score - 0.3)}
        for method, score in METHODS.items()
        if method != "tve"
    }
    return {
        "accuracy": 0.95,
        "methods": {m: {r: pair(score, 0.5 - score, std=0.2) for r in removals} for m, score in METHODS.items()},
        "differences": dict.fromkeys(removals, differences),
        "share_of_way": {r: {"fidelity_plus": 0.667, "fidelity_minus": None} for r in removals},
        "density": {"tve": {"own": 0.6, "other": 0.2, "ratio": 3.0}} if density else None,
        "objects": {
            m: {"mass_inside": score / 2, "pointing": 0.9, "average_precision": 0.7} for m, score in METHODS.items()
        }
        if density
        else None,
        "robustness": {m: {"road": score, "infidelity": 0.0123, "sensitivity": None} for m, score in METHODS.items()},
    }


def examination(num_broken: int) -> dict[str, Any]:
    reading = {"random_head": 0.03, "other_picture": -0.12, "blocks": [0.41, None]}
    bound = {"error": 0.2, "bound": 0.6, "loss_bound": 0.9, "bound_over_error": 3.0, "loss_bound_over_error": 4.5}
    return {"tve": reading, "exact_windows": reading, "bound": bound | {"num_broken": num_broken}}


def write_evaluation(folder: Path, tasks: tuple[str, ...], removals: tuple[str, ...] = ("drop",)) -> None:
    rng = np.random.default_rng(0)
    results = {task: task_result(removals, density=task == "digit") for task in tasks}
    right = {
        task: result | {"methods": {"tve": {r: pair(0.777, 0.1, std=0.2) for r in removals}}}
        for task, result in results.items()
    }
    document = {"num_pictures": 30, "reference": "tve", "tasks": results, "correct_only": right}
    write_json(folder / "metrics.json", document)
    with (folder / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "map", "removal", "fraction", "kept_probability_drop", "removed_probability_drop"])
        cells = [(task, method, removal) for task in tasks for method in METHODS for removal in removals]
        rows.writerows((*cell, fraction, 0.5 - fraction / 2, fraction) for cell in cells for fraction in (0.3, 0.7))
    maps = {f"{t}/{m}": rng.normal(size=(2, 4, 4)).astype(np.float32) for t in tasks for m in METHODS}
    np.savez(folder / "heatmaps.npz", images=rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), **maps)
    names = {"predicted": ["<four>", "five"], "label": ["<four>", "six"]}
    described = {"keys": ["000", "001"], "names": ["a", "b"], "tasks": dict.fromkeys(tasks, names)}
    write_json(folder / "heatmaps.json", described)


def write_pretraining(folder: Path) -> None:
    numbers = {"r2_kept": 0.5, "r2_removed": 0.7, "r2_kept_centred": 0.5, "r2_removed_centred": 0.7}
    trivial = {"trivial_mean_r2_kept": -0.05, "trivial_full_r2_removed": -0.1}
    write_json(folder / "metrics.json", numbers | trivial | {"num_steps": 20, "elapsed_s": 240.0, "removal": "drop"})
    bounds = "explanation_error,explanation_bound,loss_bound,bound_over_error"
    text = f"step,loss,r2_kept,r2_removed,{bounds}\n1,2.0,,,,,,\n10,1.5,0.3,0.5,1.25,3.5,4.0,2.6\n20,1.2,0.5,0.7,,,,\n"
    (folder / "training.csv").write_text(text)


def write_params() -> None:
    """A profile of two backbones and two datasets."""
    params = yaml.safe_load((ROOT / "profiles/scenes.yaml").read_text())
    params["run"] |= {"backbones": ["vit", "deit"], "task_datasets": ["scenes", "photos"]}
    params["backbones"] = dict.fromkeys(["vit", "deit"], params["backbones"]["vit_scenes"])
    Path("params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results folder of a profile that has none yet."""
    monkeypatch.chdir(tmp_path)
    write_params()
    return tmp_path / "results/scenes"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `write_some`."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params()
        write_some(folder / "results/scenes")
        main([])
    return folder / "results/scenes/report"


def write_some(results: Path) -> None:
    """All of vit; of deit the photos alone."""
    write_evaluation(results / "compare/vit-scenes", ("shape", "digit"), ("drop", "zero"))
    write_evaluation(results / "compare/vit-photos", ("animals",))
    write_evaluation(results / "compare/deit-photos", ("animals",))
    write_pretraining(results / "pretrain/vit")
    write_json(
        results / "examine/vit-scenes/metrics.json",
        {"num_pictures": 8, "tasks": {"shape": examination(0), "digit": examination(3)}},
    )
    cells = {"vit-scenes": ("digit", "shape"), "vit-photos": ("animals",), "deit-photos": ("animals",)}
    for name, tasks in cells.items():
        numbers = {
            "test_accuracy": 0.91,
            "halves_accuracy": 0.7,
            "train_accuracy": 0.99,
            "num_train": 100,
            "num_test": 2000,
        }
        write_json(results / f"heads/{name}/metrics.json", dict.fromkeys(tasks, numbers))


class Tags(HTMLParser):
    """Collects tags, addresses and text, and checks that tags close."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))  # a no-break space becomes a plain one


def test_the_page_refers_to_nothing_outside_itself(report: Path) -> None:
    page = (report / "report.html").read_text()
    found = Tags(page)
    assert not {tag for tag, _ in found.seen} & {"script", "link", "iframe", "object", "embed", "base"}
    addresses = [
        value or "" for _, attrs in found.seen for name, value in attrs.items() if name in ("src", "href", "xlink:href")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_every_output_is_there_and_dvc_can_show_the_numbers(report: Path) -> None:
    assert {path.name for path in report.iterdir()} == OUTPUTS
    metrics = json.loads((report / "metrics.json").read_text())
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["vit/r2_kept"] == 0.5
    assert metrics["vit/scenes/digit/drop/tve/fidelity_plus"] == 0.3
    assert {"vit/scenes/digit/drop/random/fidelity_minus", "vit/scenes/digit/zero/tve/fidelity_minus"} <= metrics.keys()
    assert "vit/scenes/digit/zero/random/fidelity_minus" not in metrics
    assert metrics["vit/scenes/digit/density_ratio"] == 3.0
    with (report / "fidelity.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [
        row
        for row in rows
        if (row["backbone"], row["task"], row["method"], row["removal"], row["fidelity"], row["fraction"])
        == ("vit", "digit", "tve", "zero", "plus", "0.7")
    ]
    assert float(row["value"]) == 0.7
    assert (report / "training.csv").read_text().splitlines()[1] == "vit,1,2.0,,,,,,"


def test_missing_parts_are_marked_missing(report: Path) -> None:
    text = Tags((report / "report.html").read_text()).text
    unexamined = "vit on photos, examination of deit on scenes, examination of deit on photos"
    stated = f"pre-training of deit, heads of deit on scenes, examination of {unexamined}, evaluation of deit on scenes"
    assert f"Missing: {stated}." in text
    assert text.count("missing") > 5


def test_a_report_of_nothing_says_so(project: Path) -> None:
    main([])
    assert {path.name for path in (project / "report").iterdir()} == OUTPUTS
    assert "Nothing has been evaluated yet" in Tags((project / "report/report.html").read_text()).text


def test_pictures_stand_side_by_side_over_tasks_and_over_backbones(report: Path) -> None:
    found = Tags((report / "report.html").read_text())
    pictures = [attrs["alt"] for tag, attrs in found.seen if tag == "img"]
    over_tasks, over_backbones = 2 * (1 + 2 * 2), 2 * (1 + 2 * 2)
    galleries = 2 * (1 + 2 * len(METHODS)) + 2 * 2 * (1 + len(METHODS))  # of vit on scenes, and of both on photos
    assert len(pictures) == over_tasks + over_backbones + galleries
    assert pictures.count("Random, blurred, heatmap for <four>") == 4
    assert "heatmap for <four>" in pictures
    assert "five (is six)" in found.text


def test_every_other_measure_has_a_table_of_the_methods_that_have_it(project: Path) -> None:
    write_some(project)
    columns = columns_of(read_results(project, ("vit",), ("scenes",)), "vit")
    tables = {table["label"]: table for table in measure_tables(columns, "drop")}
    assert list(tables) == [
        *("Attribution mass inside the object", "Pointing game"),
        *("Average precision as a detector of object patches", "ROAD", "Infidelity"),
    ]
    assert tables["ROAD"]["tasks"] == ["digit", "shape"]
    inside = tables["Attribution mass inside the object"]
    assert inside["tasks"] == ["digit"]
    assert inside["rows"][0] == {"label": "TVE", "cells": [".150"]}
    assert [row["label"] for row in inside["rows"]] == [
        *("TVE", "TVE, windows", "Random", "Random, blurred", "Centre", "Exact windows")
    ]


def test_pictures_that_are_classified_right_have_a_table_of_their_own(report: Path) -> None:
    _, after = Tags((report / "report.html").read_text()).text.split("right alone", maxsplit=1)
    assert ".777" in after


def test_the_examination_and_the_bound_on_the_way_are_stated(report: Path) -> None:
    text = Tags((report / "report.html").read_text()).text
    assert "digit, TVE .03 −.12 .41 –" in text
    assert "digit .20 .60 .90 3.0 × 4.5 × 3" in text
    assert "10 1.25 3.50 4.00 2.6 ×" in text


def test_the_papers_rows_stand_beside_ours_with_a_mark_for_each_fidelity(project: Path) -> None:
    write_some(project)
    results = read_results(project, ("vit",), ("scenes",))
    digit = results.evaluations["vit", "scenes"].metrics["tasks"]["digit"]
    digit["methods"]["tve_hg"] = digit["methods"]["random"]
    won_and_lost = {"fidelity_plus": interval(0.1), "fidelity_minus": interval(0.1)}
    digit["differences"]["drop"] = digit["differences"]["drop"] | {"tve_hg": won_and_lost}
    found = beside_the_paper(results, "vit", "vit_tiny_patch16_224", "drop")
    assert found is not None
    assert (found["called"], found["tasks"]) == ("ViT-Base", ["digit", "shape"])
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == ["ViT-Shapley", "TVE-Hg", "TVE, window mean", "TVE"]
    assert rows["TVE, window mean"]["paper"] == [".16 / .09", ".33 / .19", ".40 / .31"]
    assert rows["TVE"]["paper"] == ["–"] * 3
    assert rows["TVE-Hg"]["ours"][0] == [
        {"mean": ".100", "verdict": "better"},
        {"mean": ".400", "verdict": "worse"},
    ]
    assert rows["ViT-Shapley"]["ours"][1] == [{"mean": "–", "verdict": ""}] * 2
    assert rows["TVE"]["ours"][0][0] == {"mean": ".300", "verdict": ""}
    assert beside_the_paper(results, "vit", "convnext_tiny", "drop") is None


def test_the_page_states_accuracies_and_what_was_cut_short(report: Path) -> None:
    text = Tags((report / "report.html").read_text()).text
    for words in ("91.0 %", "30 of 2,000 test pictures", "20 steps in 4 minutes", "70.0 %"):
        assert words in text


def test_symbols_are_said_in_words_before_the_first_section(report: Path) -> None:
    before, _ = Tags((report / "report.html").read_text()).text.split("Heatmaps", maxsplit=1)
    for name, meaning in TERMS:
        assert f"{name} {meaning}" in before


def test_tasks_stand_in_the_order_of_the_scenes_and_others_by_name(report: Path) -> None:
    assert in_order({"colour", "zebra", "shape", "ant", "parity", "digit"}) == [*list(TASKS)[:4], "ant", "zebra"]
    found = Tags((report / "report.html").read_text())
    columns = [word for word in found.words if word in ("digit", "shape")]
    assert columns[:4] == ["digit", "shape"] * 2


def test_the_footer_names_what_the_page_was_made_from_and_no_date(project: Path) -> None:
    write_some(project)
    digests = {"backbone_sha256": "ab" * 32, "explainer_sha256": "cd" * 32}
    write_json(Path("models/scenes/export/vit/config.json"), digests)
    main([])
    page = (project / "report/report.html").read_text()
    footer = Tags(page).text.rpartition("Made from ")[2]
    assert footer.startswith("backbone vit abababababab , explainer of vit cdcdcdcdcdcd ,")
    assert "explainer of deit missing" in footer
    assert f"torch {version('torch')}" in footer
    assert f'title="{"cd" * 32}"' in page
    assert not re.search(r"20\d\d-\d\d", footer)


def test_the_params_digest_changes_with_a_value_and_not_with_the_order_of_keys(project: Path) -> None:
    def digest_of(sections: dict[str, Any]) -> str:
        (digest,) = [origin.whole for origin in provenance(Path("none"), (), sections) if origin.name == "params.yaml"]
        return digest

    assert digest_of({"a": 1, "b": {"c": 2, "d": 3}}) == digest_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_backbone_is_described_with_the_arguments_that_shape_it(report: Path) -> None:
    text = Tags((report / "report.html").read_text()).text
    assert re.search(r"Backbone vit: timm's vit_tiny_patch16_224 with [^.]*patch_size=8, trained in", text)


def test_the_best_is_marked_and_the_exact_windows_compete_for_no_mark(project: Path) -> None:
    write_some(project)
    results = read_results(project, ("vit",), ("scenes",))
    rows = {row["method"]: row for group in fidelity_table(columns_of(results, "vit"), "drop") for row in group}
    assert list(rows) == ["tve", "tve_u", "random", "random_blurred", "centre", "exact_windows"]
    assert [name for name, row in rows.items() if any(cell["best"] for cell in row["cells"])] == ["tve"]
    assert rows["tve"]["cells"][:2] == [
        {"mean": ".300", "std": ".200", "best": True},
        {"mean": ".200", "std": ".200", "best": True},
    ]


def test_a_difference_counts_only_when_its_interval_is_clear_of_zero_on_the_better_side(project: Path) -> None:
    write_some(project)
    results = read_results(project, ("vit",), ("scenes",))
    rows = {row["label"]: row["cells"] for row in difference_table(columns_of(results, "vit"), "drop")}
    assert [cell["verdict"] for cell in rows["Random"][:2]] == ["better", "better"]
    assert [cell["verdict"] for cell in rows["Exact windows"][:2]] == ["worse", "worse"]
    assert rows["Random"][1]["mean"] == "−.200"
    metrics = results.evaluations["vit", "scenes"].metrics
    holds_zero = {"mean": 0.1, "low": -0.01, "high": 0.2}
    metrics["tasks"]["digit"]["differences"]["drop"]["random"]["fidelity_plus"] = holds_zero
    (first, _) = difference_table(columns_of(results, "vit"), "drop")[0]["cells"][:2]
    assert first["verdict"] == "unclear"


def test_a_difference_that_rounds_to_nothing_is_none_however_narrow_its_interval(project: Path) -> None:
    write_some(project)
    results = read_results(project, ("vit",), ("scenes",))
    differences = results.evaluations["vit", "scenes"].tasks["digit"]["differences"]["drop"]
    differences["random"]["fidelity_plus"] = {"mean": 0.0002, "low": 0.0001, "high": 0.0003}
    cell = difference_table(columns_of(results, "vit"), "drop")[0]["cells"][0]
    assert (cell["mean"], cell["verdict"]) == (".000", "unclear")


def test_the_headline_counts_the_tasks_on_which_every_control_is_beaten(project: Path) -> None:
    write_some(project)
    results = read_results(project, ("vit",), ("scenes",))
    trained_for = {"vit": "drop"}
    assert "On all 2 tasks, TVE beats" in " ".join(headline(results, trained_for)[0])
    digit = results.evaluations["vit", "scenes"].tasks["digit"]
    digit["differences"] = {"drop": digit["differences"]["drop"] | {"centre": {f: interval(0.0) for f in pair(0, 0)}}}
    sentences, figures = headline(results, trained_for)
    assert "On 1 of 2 tasks (not on digit), TVE beats" in " ".join(sentences)
    assert {"value": "1 / 2", "label": "tasks on which every control is beaten"} in figures


def test_numbers_lose_their_leading_zero_and_keep_a_true_minus() -> None:
    assert [number(value) for value in (0.25, -0.25, 1.5, -0.0001, None)] == [".250", "−.250", "1.500", ".000", "–"]
    assert [number(value, 2, leading_zero=True) for value in (0.25, -0.2, -0.001)] == ["0.25", "−0.20", "0.00"]
    assert (percent(0.8), percent(-0.05), percent(None)) == ("80\u00a0%", "−5\u00a0%", None)


def test_an_r2_below_zero_is_said_to_be_no_share_at_all() -> None:
    metrics = {"r2_kept": 0.2, "r2_removed": -0.09}
    pretraining = {"vit": Pretraining(metrics, [])}
    (sentence, *_), _ = headline(Results(("vit",), (), {}, pretraining, {}, {}), {})
    assert "predicts 20\u00a0% of what differs" in sentence
    assert "less than each picture's own mean would, −.090, when it is taken away" in sentence
