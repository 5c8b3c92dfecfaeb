"""params.yaml: profiles are complete, and a wrong key is one clear error."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tve_pipeline.params import (
    BackboneParams,
    PicturesDataset,
    RunParams,
    active_profile,
    expand_path,
    load_backbone_params,
    load_dataset,
    load_section,
)

ROOT = Path(__file__).resolve().parents[1]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


def changed(tmp_path: Path, path: str, value: Any, profile: str = "real") -> Path:
    """The profile with one key set, or removed where value is `...`."""
    document = yaml.safe_load((ROOT / "profiles" / f"{profile}.yaml").read_text())
    *parents, key = path.split(".")
    section = document
    for parent in parents:
        section = section[parent]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_has_the_name_of_its_file_and_defines_what_it_runs(path: Path) -> None:
    assert active_profile(path) == path.stem
    run = load_section("run", RunParams, path)
    for name in run.datasets:
        assert load_dataset(name, path).split_names()
    for name in run.backbones:
        assert load_backbone_params(name, path).architecture
    assert {run.pretrain_dataset, *run.task_datasets} <= set(run.datasets)


def test_params_yaml_is_a_link_to_a_profile() -> None:
    link = ROOT / "params.yaml"
    assert link.is_symlink()
    assert link.resolve() in PROFILES


def test_the_dry_run_of_the_paper_differs_in_sizes_and_sources_alone() -> None:
    paper, dry = (yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text()) for name in ("paper", "paper_dry"))
    shrunk = {
        "num_steps",
        "batch_size",
        "centres_per_image",
        "warmup_steps",
        "evaluate_every",
        "checkpoint_every",
    }
    shrunk |= {"num_evaluation_pictures", "memory_mib", "mae"}
    for key in set(paper["pretrain"]) - shrunk:
        assert dry["pretrain"][key] == paper["pretrain"][key], key
    for name, backbone in paper["backbones"].items():
        assert dry["backbones"][name] == backbone | {"weights": "random"}
    assert dry["run"]["backbones"] == paper["run"]["backbones"]


def test_an_unknown_key_is_named_by_its_full_path_beside_the_known_ones(tmp_path: Path) -> None:
    path = changed(tmp_path, "datasets.cats_dogs.splits.test.limt", 3)
    with pytest.raises(
        ValueError, match=r"datasets\.cats_dogs\.splits\.test\.limt: unknown key.*known keys: value, limit"
    ):
        load_dataset("cats_dogs", path)


def test_a_missing_key_is_named_by_its_full_path_beside_the_known_ones(tmp_path: Path) -> None:
    path = changed(tmp_path, "backbones.vit_tiny.removal", ...)
    with pytest.raises(
        ValueError, match=r"backbones\.vit_tiny\.removal: missing key; known keys: architecture, weights"
    ):
        load_backbone_params("vit_tiny", path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "backbones.vit_tiny.removal",
            "blur",
            r"backbones\.vit_tiny\.removal: .*'zero' or 'drop', got 'blur'",
        ),
        ("backbones.vit_tiny.sha256", "abc", r"backbones\.vit_tiny\.sha256: .*got 'abc'"),
        ("backbones.vit_tiny.patches_per_side", 0, r"patches_per_side: .*greater than or equal to 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone_params("vit_tiny", changed(tmp_path, key, value))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    path = changed(tmp_path, "profile", "real")
    with pytest.raises(ValueError, match="no 'resnet'; known backbones: deit_tiny, vit_tiny"):
        load_backbone_params("resnet", path)
    with pytest.raises(ValueError, match="no 'cats'; known datasets: cats_dogs, cifar10"):
        load_dataset("cats", path)
    with pytest.raises(ValueError, match="no 'pretran'; known sections: backbone, backbones"):
        load_section("pretran", RunParams, path)


def test_an_unknown_kind_of_dataset_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"datasets\.pool\.kind: expected one of \['pictures', 'scenes'\], got 'zip'"):
        load_dataset("pool", changed(tmp_path, "datasets.pool.kind", "zip"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("datasets.pool.rest", None, "either `splits`, or `hold_out`"),
        ("datasets.pool.rest", "pretrain_val", "expected two names"),
        ("datasets.pool.split_column", "split", "expected null where `table` is null"),
        ("datasets.pool.tasks", {"things": "class"}, "NAME: folder"),
    ],
)
def test_splits_are_either_named_or_drawn_and_need_their_table(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("pool", changed(tmp_path, key, value))


def test_a_profile_name_that_is_no_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile: expected letters, digits and underscores, got '\.\./x'"):
        active_profile(changed(tmp_path, "profile", "../x"))


def test_data_paths_follow_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVE_DATA", "/somewhere")
    assert expand_path("$TVE_DATA/a.zip") == Path("/somewhere/a.zip")
    pool = load_dataset("pool", ROOT / "profiles" / "real.yaml")
    assert isinstance(pool, PicturesDataset)
    assert pool.path == Path("/somewhere/pretrain_pool_160.zip")
    weights = load_backbone_params("vit_tiny", ROOT / "profiles" / "real.yaml").weights
    assert weights == "/somewhere/vit_tiny_patch16_224.safetensors"


def test_a_section_never_changes_after_it_was_read() -> None:
    params = load_backbone_params("vit_scenes", ROOT / "profiles" / "scenes.yaml")
    assert isinstance(params, BackboneParams)
    with pytest.raises(ValueError, match="frozen"):
        params.removal = "zero"  # type: ignore[misc]
