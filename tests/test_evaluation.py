"""The stage `evaluate` on a few scenes: its files agree with one another and with what the library computes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.digests import file_sha256
from tve.explainer import Explainer, ExplainerConfig
from tve.heads import save_head
from tve.shards import Shards
from tve_pipeline.evaluate import EvaluateParams, TaskHead, batches, evaluate, load_task_heads
from tve_pipeline.evaluate_results import object_patches
from tve_pipeline.outputs import write_json
from tve_pipeline.params import ScenesDataset
from tve_pipeline.scenes import PATCH_SIZE, PATCHES_PER_SIDE, TASKS, scene
from tve_pipeline.shards import write_scenes

VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 40}
PARAMS = EvaluateParams(
    split="test",
    num_pictures=5,
    removals=("drop", "zero"),
    fractions=(0.25, 0.75),
    batch_size=2,
    memory_mib=64,
    precision="float32",
    output="logit",
    window_mean=True,
    seed=0,
    num_bootstrap=200,
    num_heatmaps=2,
)
METHODS = {
    *("tve", "tve_u", "exact_windows", "exact_windows_u", "tve_hg"),
    *("random", "random_blurred", "centre"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "scenes"
    dataset = ScenesDataset(kind="scenes", seed=0, labelled=True, splits={"test": 8}, shard_size=5)
    write_scenes(folder, "scenes", dataset)
    return Shards.open(folder)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT, preprocessing={"crop_pct": 1.0})


@pytest.fixture(scope="module")
def explainer(backbone: Backbone) -> Explainer:
    torch.manual_seed(1)
    config = ExplainerConfig(radius=1, removal="drop", num_levels=2, width=16, depth=1)
    explainer = Explainer(backbone, config).eval()
    for parameter in (explainer.network.to_kept.weight, explainer.network.to_removed.weight):
        nn.init.normal_(parameter, std=0.3)
    return explainer


@pytest.fixture(scope="module")
def heads() -> dict[str, TaskHead]:
    torch.manual_seed(2)
    return {task: TaskHead(TASKS[task], 0.5, nn.Linear(16, len(TASKS[task]))) for task in ("digit", "colour")}


@pytest.fixture(scope="module")
def results(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("results")
    evaluate(explainer, heads, shards, PARAMS, folder)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def test_there_is_one_row_for_every_picture_task_method_and_removal(results: Path) -> None:
    rows = rows_of(results / "scores.csv")
    cells = {(row["key"], row["task"], row["method"], row["removal"]) for row in rows}
    assert len(cells) == len(rows) == 5 * 2 * len(METHODS) * 2
    assert {row["method"] for row in rows} == METHODS
    assert all(row["correct"] == str(int(row["predicted"] == row["label"])) for row in rows)


def test_metrics_are_the_means_of_the_rows(results: Path) -> None:
    metrics, rows = metrics_of(results), rows_of(results / "scores.csv")
    assert metrics["num_pictures"] == 5
    for task, entry in metrics["tasks"].items():
        for removal in ("drop", "zero"):
            scores = {
                method: np.array(
                    [
                        (float(row["fidelity_plus"]), float(row["fidelity_minus"]))
                        for row in rows
                        if (row["task"], row["method"], row["removal"]) == (task, method, removal)
                    ]
                )
                for method in METHODS
            }
            for column, fidelity in enumerate(("fidelity_plus", "fidelity_minus")):
                for method in METHODS:
                    stated = entry["methods"][method][removal][fidelity]
                    assert stated["mean"] == pytest.approx(scores[method][:, column].mean(), abs=1e-6)
                    assert stated["std"] == pytest.approx(scores[method][:, column].std(), abs=1e-6)
                for method, stated in entry["differences"][removal].items():
                    difference = (scores["tve"] - scores[method])[:, column].mean()
                    assert stated[fidelity]["mean"] == pytest.approx(difference, abs=1e-6)
                    assert stated[fidelity]["low"] <= stated[fidelity]["mean"] <= stated[fidelity]["high"]
            assert entry["differences"][removal].keys() == METHODS - {"tve"}


def test_curves_average_to_the_fidelities(results: Path) -> None:
    curves, metrics = rows_of(results / "curves.csv"), metrics_of(results)
    for task, entry in metrics["tasks"].items():
        for method, removals in entry["methods"].items():
            for removal, stated in removals.items():
                name = (task, method, removal)
                points = [row for row in curves if (row["task"], row["method"], row["removal"]) == name]
                assert [float(row["fraction"]) for row in points] == [0.25, 0.75]
                for fidelity, column in (
                    ("fidelity_plus", "removed_probability_drop"),
                    ("fidelity_minus", "kept_probability_drop"),
                ):
                    mean = np.mean([float(row[column]) for row in points])
                    assert stated[fidelity]["mean"] == pytest.approx(mean, abs=1e-5)


def test_heatmaps_are_what_the_explainer_says_of_the_pictures_shown(
    results: Path, explainer: Explainer, heads: dict[str, TaskHead], shards: Shards
) -> None:
    described = json.loads((results / "heatmaps.json").read_text())
    of_key = {sample.key: scene(0, "test", index).pixels for index, sample in enumerate(shards.samples("test"))}
    with np.load(results / "heatmaps.npz") as arrays:
        assert arrays["images"].shape == (2, 64, 64, 3)
        for place, key in enumerate(described["keys"]):
            assert np.abs(arrays["images"][place].astype(int) - of_key[key]).max() <= 1
        images = torch.stack([explainer.backbone.preprocess(Image.fromarray(of_key[key])) for key in described["keys"]])
        for task, head in heads.items():
            expected = explainer.explain(images, head.head.requires_grad_(False)).numpy()
            np.testing.assert_allclose(arrays[f"{task}/tve"], expected, atol=1e-4)
            assert len(described["tasks"][task]["predicted"]) == len(described["tasks"][task]["label"]) == 2
            assert {name for name in arrays.files if name.startswith(task)} == {f"{task}/{m}" for m in METHODS}


def test_densities_know_which_object_is_the_tasks_own(results: Path) -> None:
    tasks = metrics_of(results)["tasks"]
    for task in ("digit", "colour"):
        assert tasks[task]["density"].keys() == METHODS
        for density in tasks[task]["density"].values():
            ratio = density["own"] / density["other"] if density["other"] else None
            assert density["ratio"] == pytest.approx(ratio)
    # Noise and the centre are the same maps for both tasks, whose objects are each other's other.
    for control in ("random", "centre"):
        of_digit, of_colour = (tasks[task]["density"][control] for task in ("digit", "colour"))
        assert (of_digit["own"], of_digit["other"]) == pytest.approx((of_colour["other"], of_colour["own"]))


def holds_a_pixel(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Patches with at least one pixel of a mask [64, 64]: bool [8, 8]."""
    tiles = mask.reshape(PATCHES_PER_SIDE, PATCH_SIZE, PATCHES_PER_SIDE, PATCH_SIZE)
    return np.asarray(tiles.any(axis=(1, 3)))


def test_object_patches_are_the_generators_own(shards: Shards, backbone: Backbone) -> None:
    for index, sample in enumerate(shards.samples("test")):
        masks = scene(0, "test", index).masks
        expected = np.stack([holds_a_pixel(masks[name]) for name in shards.mask_objects])
        assert (object_patches(sample, len(shards.mask_objects), backbone).numpy() == expected).all()


def test_object_patches_follow_the_picture_through_resizing_and_cropping(shards: Shards) -> None:
    """On a grid that the mask's own size does not divide: 7 x 7 patches of 16 px, of which cropping cuts the border."""
    size = VIT | {"img_size": 112, "patch_size": 16}
    resized = load_backbone("vit_tiny_patch16_224", "random", timm_args=size, preprocessing={"crop_pct": 0.875})
    for index, sample in enumerate(shards.samples("test")):
        found = object_patches(sample, len(shards.mask_objects), resized)
        assert found.shape == (3, 7, 7)
        for name, patches_PP in zip(shards.mask_objects, found, strict=True):
            # A pixel at x of 64 is seen at 2 x - 8 of 112.
            rows, columns = np.nonzero(scene(0, "test", index).masks[name])
            centres = np.stack([rows, columns]) * 2 + 1 - 8
            centres = centres[:, ((centres >= 0) & (centres < 112)).all(0)] // 16
            expected = np.zeros((7, 7), dtype=bool)
            expected[centres[0], centres[1]] = True
            assert (patches_PP.numpy() == expected).all()


def test_results_do_not_depend_on_the_batch_size(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, results: Path, tmp_path: Path
) -> None:
    evaluate(explainer, heads, shards, PARAMS.model_copy(update={"batch_size": 5}), tmp_path)
    for one, other in zip(
        rows_of(results / "scores.csv"), sorted_like(results, rows_of(tmp_path / "scores.csv")), strict=True
    ):
        for name in ("key", "task", "method", "removal", "predicted", "label"):
            assert one[name] == other[name]
        for name in ("probability", "fidelity_plus", "fidelity_minus"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)


def sorted_like(results: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    by_cell = {(row["key"], row["task"], row["method"], row["removal"]): row for row in rows}
    return [by_cell[row["key"], row["task"], row["method"], row["removal"]] for row in rows_of(results / "scores.csv")]


def test_pictures_are_drawn_from_the_whole_split_by_seed(shards: Shards) -> None:
    def drawn(seed: int) -> list[str]:
        params = PARAMS.model_copy(update={"seed": seed})
        return [sample.key for batch in batches(shards, params, 5) for sample in batch]

    assert len(set(drawn(0))) == 5
    assert drawn(0) == sorted(drawn(0))
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_more_pictures_than_there_are_is_an_error_before_any_work(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="at most the 8 pictures of split 'test', got 9"):
        evaluate(explainer, heads, shards, PARAMS.model_copy(update={"num_pictures": 9}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_of_another_backbone_or_other_classes_are_errors(backbone: Backbone, tmp_path: Path) -> None:
    save_head(nn.Linear(16, 10), tmp_path / "digit.safetensors")
    digest = file_sha256(tmp_path / "digit.safetensors")
    entry = {
        "classes": list(TASKS["digit"]), "test_accuracy": 0.5, "file": "digit.safetensors", "sha256": digest
    }  # fmt: skip
    document = {"backbone_sha256": backbone.weights_sha256, "tasks": {"digit": entry}}
    write_json(tmp_path / "heads.json", document)
    assert load_task_heads(tmp_path, backbone, TASKS)["digit"].classes == TASKS["digit"]
    with pytest.raises(ValueError, match="expected classes"):
        load_task_heads(tmp_path, backbone, {"digit": ("zero", "one")})
    write_json(tmp_path / "heads.json", document | {"backbone_sha256": "0" * 64})
    with pytest.raises(ValueError, match="run the stage `heads` again"):
        load_task_heads(tmp_path, backbone, TASKS)
