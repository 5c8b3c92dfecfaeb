"""Evaluation of a few scenes, method by method, and their comparison: files agree with what the library computes."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import Method
from tve.baselines.readings import Controls, OwnHead, reading_of_explainer, reading_of_windows
from tve.digests import file_sha256
from tve.explainer import Explainer, ExplainerConfig
from tve.fidelity.road import road
from tve.fidelity.robustness import infidelity, sensitivity
from tve.fidelity.scores import ScoredMap
from tve.heads import save_head
from tve.samples import decode_image
from tve.shards import Shards
from tve.transfer_rule import TransferRule
from tve_pipeline.compare import MEASURES, CompareParams, compare, read_cell
from tve_pipeline.evaluate_measures import EvaluateParams, RobustnessParams, TaskHead, object_patches
from tve_pipeline.evaluate_parts import Parts
from tve_pipeline.evaluate_results import write_results
from tve_pipeline.evaluation import batches, evaluate, load_task_heads, make_evaluators
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
    per_patch="share",
    seed=0,
    num_heatmaps=2,
    robustness=RobustnessParams(
        num_pictures=3,
        road_fractions=(0.25, 0.5),
        infidelity_sets=16,
        sensitivity_radius=0.02,
        sensitivity_draws=2,
    ),
)
MAPS = {
    "tve": {"tve", "tve_mean", "tve_u"},
    "exact_windows": {"exact_windows", "exact_windows_mean", "exact_windows_u"},
    "tve_hg": {"tve_hg"},
    "controls": {"random", "random_blurred", "centre"},
}
ALL_MAPS = set().union(*MAPS.values())
ORIGINS = {f"{name}_sha256": "0" * 64 for name in ("backbone", "explainer", "heads", "shards", "protocol")}


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
    return {task: TaskHead(TASKS[task], nn.Linear(16, len(TASKS[task]))) for task in ("digit", "colour")}


def method_named(name: str, explainer: Explainer) -> Method:
    if name == "tve":
        return reading_of_explainer(explainer)
    if name == "exact_windows":
        evaluator = make_evaluators(explainer.backbone, "drop", PARAMS)["drop"]
        return reading_of_windows(evaluator, explainer.family, explainer.empty_D)
    if name == "tve_hg":
        head = explainer.backbone.classifier()
        assert head is not None
        return OwnHead(explainer, head, TransferRule())
    return Controls(PATCHES_PER_SIDE, radius=1, seed=0)


def evaluated(
    method: Method,
    explainer: Explainer,
    heads: dict[str, TaskHead],
    shards: Shards,
    folder: Path,
    params: EvaluateParams = PARAMS,
    ranks: Sequence[tuple[int, int]] = ((0, 1),),
) -> Path:
    parts = Parts.open(folder.with_name(f"{folder.name}.parts"), {"made": "from this"})
    backbone = explainer.backbone
    for rank, world_size in ranks:
        evaluators = make_evaluators(backbone, "drop", params)
        evaluate(method, backbone, "drop", heads, shards, params, evaluators, parts, rank=rank, world_size=world_size)
    folder.mkdir(parents=True)
    facts = {"method": folder.name, "trained_for": "drop", "origins": ORIGINS, "evaluate": {"seed": params.seed}}
    write_results(parts, params.fractions, list(heads), facts, folder)
    return folder


@pytest.fixture(scope="module")
def results(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for name in MAPS:
        evaluated(method_named(name, explainer), explainer, heads, shards, folder / name)
    return folder


@pytest.fixture(scope="module")
def comparison(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    compare(results, (*MAPS, "lime"), CompareParams(num_bootstrap=200, seed=0), "", folder)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def json_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize("method", MAPS)
def test_there_is_one_row_for_every_picture_task_and_map(results: Path, method: str) -> None:
    rows = rows_of(results / method / "scores.csv")
    cells = {(row["key"], row["task"], row["map"]) for row in rows}
    assert len(cells) == len(rows) == 5 * 2 * len(MAPS[method])
    assert {row["map"] for row in rows} == MAPS[method]
    assert all(row["correct"] == str(int(row["predicted"] == row["label"])) for row in rows)


def test_the_comparison_states_means_of_the_rows_and_differences_to_tve(results: Path, comparison: Path) -> None:
    metrics = json_of(comparison / "metrics.json")
    assert (metrics["num_pictures"], metrics["missing"], metrics["reference"]) == (5, ["lime"], "tve")
    rows = [row for name in MAPS for row in rows_of(results / name / "scores.csv")]
    for task, entry in metrics["tasks"].items():
        assert entry["methods"].keys() == ALL_MAPS
        for removal in ("drop", "zero"):
            for measure in MEASURES:
                of_map = {
                    name: np.array(
                        [float(r[f"{removal}_{measure}"]) for r in rows if (r["task"], r["map"]) == (task, name)]
                    )
                    for name in ALL_MAPS
                }
                for name, values in of_map.items():
                    stated = entry["methods"][name][removal][measure]
                    assert stated["mean"] == pytest.approx(values.mean(), abs=1e-6)
                    assert stated["std"] == pytest.approx(values.std(), abs=1e-6)
                for name, differences in entry["differences"][removal].items():
                    difference = (of_map["tve"] - of_map[name]).mean()
                    assert differences[measure]["mean"] == pytest.approx(difference, abs=1e-6)
                    assert differences[measure]["low"] <= differences[measure]["mean"] <= differences[measure]["high"]
            assert entry["differences"][removal].keys() == ALL_MAPS - {"tve"}


def test_pictures_that_a_head_gets_wrong_are_left_out_of_the_second_statement(results: Path, comparison: Path) -> None:
    metrics = json_of(comparison / "metrics.json")
    rows = [row for row in rows_of(results / "tve" / "scores.csv") if row["map"] == "tve"]
    for task, entry in metrics["correct_only"].items():
        right = [row for row in rows if row["task"] == task and row["correct"] == "1"]
        assert entry["num_pictures"] == len(right)
        if right:
            mean = np.mean([float(row["drop_fidelity_plus"]) for row in right])
            assert entry["methods"]["tve"]["drop"]["fidelity_plus"]["mean"] == pytest.approx(mean, abs=1e-6)


def test_curves_average_to_the_fidelities(comparison: Path) -> None:
    curves, metrics = rows_of(comparison / "curves.csv"), json_of(comparison / "metrics.json")
    for task, entry in metrics["tasks"].items():
        for name, removals in entry["methods"].items():
            for removal, stated in removals.items():
                points = [row for row in curves if (row["task"], row["map"], row["removal"]) == (task, name, removal)]
                assert [float(row["fraction"]) for row in points] == [0.25, 0.75]
                for fidelity, column in (
                    ("fidelity_plus", "removed_probability_drop"),
                    ("fidelity_minus", "kept_probability_drop"),
                ):
                    mean = np.mean([float(row[column]) for row in points])
                    assert stated[fidelity]["mean"] == pytest.approx(mean, abs=1e-5)


def test_heatmaps_are_what_the_explainer_says_of_the_pictures_shown(
    comparison: Path, explainer: Explainer, heads: dict[str, TaskHead], shards: Shards
) -> None:
    described = json_of(comparison / "heatmaps.json")
    of_key = {sample.key: decode_image(sample.image) for sample in shards.samples("test")}
    with np.load(comparison / "heatmaps.npz") as arrays:
        assert arrays["images"].shape == (2, 64, 64, 3)
        for place, key in enumerate(described["keys"]):
            assert np.abs(arrays["images"][place].astype(int) - np.asarray(of_key[key])).max() <= 1
        images = torch.stack([explainer.backbone.preprocess(of_key[key]) for key in described["keys"]])
        for task, head in heads.items():
            expected = explainer.explain(images, head.head.requires_grad_(False)).numpy()
            np.testing.assert_allclose(arrays[f"{task}/tve"], expected, atol=1e-4)
            assert len(described["tasks"][task]["predicted"]) == len(described["tasks"][task]["label"]) == 2
            assert {name for name in arrays.files if name.startswith(task)} == {f"{task}/{m}" for m in ALL_MAPS}


def test_densities_know_which_object_is_the_tasks_own(comparison: Path) -> None:
    tasks = json_of(comparison / "metrics.json")["tasks"]
    for task in ("digit", "colour"):
        assert tasks[task]["density"].keys() == ALL_MAPS
        for density in tasks[task]["density"].values():
            ratio = density["own"] / density["other"] if density["other"] else None
            assert density["ratio"] == pytest.approx(ratio)
    # Noise and the centre are the same maps for both tasks, whose objects are each other's other.
    for control in ("random", "centre"):
        of_digit, of_colour = (tasks[task]["density"][control] for task in ("digit", "colour"))
        assert (of_digit["own"], of_digit["other"]) == pytest.approx((of_colour["other"], of_colour["own"]))


def test_costs_and_seconds_stand_beside_every_map(comparison: Path) -> None:
    maps = json_of(comparison / "metrics.json")["maps"]
    assert maps.keys() == ALL_MAPS
    assert [maps[name]["forwards"] for name in ("tve", "exact_windows", "random")] == [1, 2 * 64 + 1, 0]
    assert all(entry["seconds"] > 0 for entry in maps.values())


def test_methods_measured_on_other_weights_are_not_compared(results: Path, tmp_path: Path) -> None:
    for name in ("tve", "controls"):
        (tmp_path / name).mkdir()
        for file in (results / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    facts = json_of(tmp_path / "tve" / "facts.json")
    facts["origins"]["backbone_sha256"] = "1" * 64
    write_json(tmp_path / "tve" / "facts.json", facts)
    with pytest.raises(ValueError, match="expected one backbone_sha256 for every method"):
        compare(tmp_path, ("tve", "controls"), CompareParams(num_bootstrap=10, seed=0), "", tmp_path)


def test_readings_are_of_one_explainer_and_what_reads_none_may_be_older(results: Path, tmp_path: Path) -> None:
    methods = ("tve", "tve_hg", "controls")
    for name in methods:
        (tmp_path / name).mkdir()
        for file in (results / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for name, accepted in (("controls", True), ("tve_hg", False)):
        facts = json_of(tmp_path / name / "facts.json")
        facts["origins"]["explainer_sha256"] = "1" * 64
        write_json(tmp_path / name / "facts.json", facts)
        if accepted:
            assert read_cell(tmp_path, methods) is not None
        else:
            with pytest.raises(ValueError, match="expected one explainer_sha256 for every method"):
                read_cell(tmp_path, methods)


def test_a_method_that_is_not_defined_for_a_backbone_is_named_with_the_reason(results: Path, tmp_path: Path) -> None:
    for name in ("tve", "controls"):
        (tmp_path / name).symlink_to(results / name)
    (tmp_path / "rollout").mkdir()
    write_json(tmp_path / "rollout" / "facts.json", {"method": "rollout", "not_defined": "no global attention"})
    folder = tmp_path / "compared"
    folder.mkdir()
    compare(tmp_path, ("tve", "controls", "rollout"), CompareParams(num_bootstrap=10, seed=0), "", folder)
    metrics = json_of(folder / "metrics.json")
    assert (metrics["missing"], metrics["not_defined"]) == ([], {"rollout": "no global attention"})


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


def require_equal_scores(one: Path, other: Path) -> None:
    def ordered(path: Path) -> list[dict[str, str]]:
        return sorted(rows_of(path / "scores.csv"), key=lambda row: (row["key"], row["task"], row["map"]))

    for mine, theirs in zip(ordered(one), ordered(other), strict=True):
        assert [mine[name] for name in ("key", "task", "map", "predicted", "label")] == [
            theirs[name] for name in ("key", "task", "map", "predicted", "label")
        ]
        for name in ("probability", "drop_fidelity_plus", "zero_fidelity_minus", "drop_insertion"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-4)


def test_results_do_not_depend_on_the_batch_size(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, results: Path, tmp_path: Path
) -> None:
    params = PARAMS.model_copy(update={"batch_size": 5})
    require_equal_scores(
        results / "tve", evaluated(method_named("tve", explainer), explainer, heads, shards, tmp_path / "tve", params)
    )


def test_two_processes_leave_the_same_bytes_as_one(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, results: Path, tmp_path: Path
) -> None:
    method = method_named("exact_windows", explainer)
    shared = evaluated(method, explainer, heads, shards, tmp_path / "exact_windows", ranks=((1, 2), (0, 2)))
    for name in ("scores.csv", "curves.csv", "heatmaps.npz", "heatmaps.json"):
        assert (shared / name).read_bytes() == (results / "exact_windows" / name).read_bytes(), name


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, tmp_path: Path
) -> None:
    method, asked = method_named("tve", explainer), []
    none = PARAMS.model_copy(update={"robustness": PARAMS.robustness.model_copy(update={"num_pictures": 0})})

    class CutShort:
        variants = method.variants

        def __init__(self, last: int) -> None:
            self.last = last

        def __call__(self, images: Any, keys: Sequence[str], questions: Any) -> Any:
            asked.append(tuple(keys))
            if len(set(asked)) > self.last:
                raise KeyboardInterrupt
            return method(images, keys, questions)

    with pytest.raises(KeyboardInterrupt):
        evaluated(CutShort(last=2), explainer, heads, shards, tmp_path / "tve", none)
    before = len(asked)
    whole = evaluated(CutShort(last=3), explainer, heads, shards, tmp_path / "tve", none)
    assert len(asked) == before + 1, "only the last batch is measured again"
    at_once = evaluated(method, explainer, heads, shards, tmp_path / "at_once", none)
    assert (whole / "scores.csv").read_bytes() == (at_once / "scores.csv").read_bytes()


def test_parts_made_from_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    first = Parts.open(tmp_path, {"seed": 0})
    (first.folder / "000000.npz").write_bytes(b"")
    assert Parts.open(tmp_path, {"seed": 0}).has(0)
    assert not Parts.open(tmp_path, {"seed": 1}).has(0)
    assert not first.folder.exists()


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
    params = PARAMS.model_copy(update={"num_pictures": 9})
    with pytest.raises(ValueError, match="at most the 8 pictures of split 'test', got 9"):
        evaluated(method_named("tve", explainer), explainer, heads, shards, tmp_path / "tve", params)
    assert not (tmp_path / "tve").exists()


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


def test_dear_measures_are_those_of_the_library_on_the_first_pictures_and_empty_on_the_others(
    results: Path, comparison: Path, explainer: Explainer, heads: dict[str, TaskHead], shards: Shards
) -> None:
    rows = [row for row in rows_of(results / "tve" / "scores.csv") if (row["task"], row["map"]) == ("digit", "tve")]
    assert [bool(row["road"]) for row in rows] == [True, True, True, False, False]
    samples = [sample for batch in batches(shards, PARAMS, 5) for sample in batch][:3]
    images = torch.stack([explainer.backbone.preprocess(decode_image(sample.image)) for sample in samples])
    keys, head = [sample.key for sample in samples], heads["digit"].head
    target = head(explainer.backbone(images)).argmax(-1)
    evaluator = make_evaluators(explainer.backbone, "drop", PARAMS)["drop"]
    scored = {"tve": ScoredMap(explainer.explain(images, head, target), head, target)}

    def explain(images_M3SS: torch.Tensor, key: str) -> torch.Tensor:
        return explainer.explain(images_M3SS, head, target[keys.index(key)].expand(len(images_M3SS)))

    expected = {
        "road": road(evaluator, images, keys, scored, (0.25, 0.5), 0)["tve"].score_B,
        "infidelity": infidelity(evaluator, images, keys, scored, 16, 0)["tve"],
        "sensitivity": sensitivity(explain, images, keys, 0.02, 2, 0),
    }
    means = json.loads((comparison / "metrics.json").read_text())["tasks"]["digit"]["robustness"]["tve"]
    for name, values_B in expected.items():
        found = torch.tensor([float(row[name]) for row in rows[:3]], dtype=torch.float64)
        torch.testing.assert_close(found, values_B.double(), rtol=1e-3, atol=1e-6)
        assert means[name] == pytest.approx(float(values_B.mean()), rel=1e-3, abs=1e-6)
    assert expected["sensitivity"].min() > 0


def test_no_dear_measures_are_taken_where_none_are_asked_for(
    explainer: Explainer, heads: dict[str, TaskHead], shards: Shards, tmp_path: Path
) -> None:
    none = PARAMS.model_copy(update={"robustness": PARAMS.robustness.model_copy(update={"num_pictures": 0})})
    evaluated(method_named("controls", explainer), explainer, heads, shards, tmp_path / "controls", none)
    assert "road" not in rows_of(tmp_path / "controls" / "scores.csv")[0]
