"""params.yaml: profiles are complete, and a wrong key is one clear error."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tve.backbones import INTERPOLATIONS
from tve_pipeline.evaluate_measures import EvaluateParams
from tve_pipeline.params import (
    BackboneParams,
    PreprocessingParams,
    RunParams,
    active_profile,
    existing_path,
    expand_path,
    load_backbone_params,
    load_dataset,
    load_params,
    load_section,
)
from tve_pipeline.pretraining import PretrainParams

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


def test_one_profile_is_active_and_its_values_are_in_params_yaml_itself() -> None:
    params = ROOT / "params.yaml"
    assert not params.is_symlink()  # DVC follows no links in git's history
    assert [path.stem for path in PROFILES if path.resolve() == params] == [active_profile(params)]


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
        ("backbones.vit_tiny.sha256", "abc", r"sha256: expected 64 lower-case hexadecimal digits, got 'abc'"),
        ("backbones.vit_tiny.patches_per_side", 0, r"patches_per_side: expected at least 1, got 0"),
        (
            "backbones.vit_tiny.preprocessing.crop_pct",
            2,
            r"vit_tiny\.preprocessing\.crop_pct: expected at most 1, got 2",
        ),
        ("backbones.vit_tiny.preprocessing.crop_pct", 0, r"vit_tiny\.preprocessing\.crop_pct: expected more than 0"),
        (
            "backbones.vit_tiny.preprocessing.std",
            [1.0],
            r"preprocessing\.std: expected 3 entries or more, got \[1\.0\]",
        ),
        ("backbones.vit_tiny.preprocessing.size", 3, r"preprocessing\.size: unknown key; known keys: mean, std"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone_params("vit_tiny", changed(tmp_path, key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", 0, "num_steps: expected at least 1, got 0"),
        ("num_steps", 2.5, r"num_steps: expected a whole number, got 2\.5"),
        ("num_steps", "500", "num_steps: expected a whole number, got '500'; write 500"),
        ("num_steps", True, "num_steps: expected a whole number, got true"),
        ("num_steps", ..., "num_steps: missing key; known keys: form"),
        ("batch_size", -1, "batch_size: expected at least 1, got -1"),
        ("centres_per_image", 0, "centres_per_image: expected at least 1, got 0"),
        ("radius", -1, "radius: expected at least 0, got -1"),
        ("learning_rate", 0, "pretrain.learning_rate: expected more than 0, got 0"),
        ("learning_rate", "4e-3", r"learning_rate: expected a number, got '4e-3'; write 0\.004"),
        ("learning_rate", "1e-5", r"learning_rate: expected a number, got '1e-5'; write 1\.0e-05"),
        ("learning_rate", "small", "learning_rate: expected a number, got 'small'$"),
        ("learning_rate", float("nan"), "learning_rate: expected a finite number, got nan"),
        ("trunk_learning_rate", -0.1, "trunk_learning_rate: expected at least 0"),
        ("trained_blocks", 4, "trained_blocks: expected none where the trunk is frozen, got 4"),
        ("weight_decay", -0.1, "weight_decay: expected at least 0"),
        ("whitening_floor", 0, "whitening_floor: expected more than 0, got 0"),
        ("warmup_steps", 1501, "warmup_steps: expected at most num_steps, 1500, got 1501"),
        ("evaluate_every", 0, "evaluate_every: expected at least 1"),
        ("checkpoint_every", 0, "checkpoint_every: expected at least 1"),
        ("num_evaluation_pictures", 0, "num_evaluation_pictures: expected at least 1"),
        ("memory_mib", 0, "memory_mib: expected at least 1"),
        ("seed", -1, "seed: expected at least 0"),
        ("augment", "maybe", "augment: expected true or false, got 'maybe'"),
        ("form", "other", "form: expected 'shared' or 'two_networks', got 'other'"),
        ("mae", [1], r"pretrain\.mae: expected a mapping, got \[1\]"),
    ],
)
def test_a_number_that_pretraining_cannot_use_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_section("pretrain", PretrainParams, changed(tmp_path, f"pretrain.{key}", value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mae.num_steps", 0, r"pretrain\.mae: num_steps: expected at least 1 where `weights` is null, got 0"),
        ("mae.mask_ratio", 1, r"mae\.mask_ratio: expected less than 1, got 1"),
        ("mae.mask_ratio", 0, r"mae\.mask_ratio: expected more than 0, got 0"),
        ("mae.batch_size", 0, r"mae\.batch_size: expected at least 1"),
        ("mae.learning_rate", 0, r"mae\.learning_rate: expected more than 0"),
        ("two_networks.decoder_depth", -1, r"two_networks\.decoder_depth: expected at least 0"),
        ("two_networks.embed_dim", 770, r"pretrain\.two_networks: embed_dim: expected a multiple of 4"),
    ],
)
def test_a_number_that_the_papers_form_cannot_use_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_section("pretrain", PretrainParams, changed(tmp_path, f"pretrain.{key}", value, "paper_dry"))


def test_a_whole_number_may_stand_for_a_float_and_a_list_for_a_tuple(tmp_path: Path) -> None:
    path = changed(tmp_path, "pretrain.learning_rate", 1)
    assert load_section("pretrain", PretrainParams, path).learning_rate == 1.0
    assert load_section("evaluate", EvaluateParams, path).removals == ("drop", "zero")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("drop", "evaluate.removals: expected a list, got 'drop'"),
        (None, "evaluate.removals: expected a list, got null"),
        ([], r"evaluate.removals: expected 1 entries or more, got \[\]"),
    ],
)
def test_a_value_that_is_no_list_is_named_in_the_words_of_yaml(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_section("evaluate", EvaluateParams, changed(tmp_path, "evaluate.removals", value))


def test_a_name_that_no_path_could_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"splits\.a b: expected letters, digits and underscores, got 'a b'"):
        load_dataset("scenes", changed(tmp_path, "datasets.scenes.splits", {"a b": 3}, "scenes"))


def test_preprocessing_offers_the_interpolations_that_the_library_knows() -> None:
    for name in INTERPOLATIONS:
        assert PreprocessingParams(interpolation=name).interpolation == name
    with pytest.raises(ValueError, match="interpolation"):
        PreprocessingParams(interpolation="sinc")  # type: ignore[arg-type]


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
    monkeypatch.delenv("TVE_DATA")
    assert expand_path("$TVE_DATA/a.zip") == Path("../shared/data/a.zip")


def test_a_missing_file_mentions_the_environment_variable_only_where_its_default_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TVE_DATA", raising=False)
    hint = r"\$TVE_DATA is not set, so \.\./shared/data stands for it: export TVE_DATA=/your/folder"
    with pytest.raises(FileNotFoundError, match=rf"^weights: expected .*\.\./shared/data/no\.pth.*; {hint}$"):
        existing_path("$TVE_DATA/no.pth", "weights")
    with pytest.raises(FileNotFoundError, match=r"nowhere/no\.pth, which does not exist$"):
        existing_path("nowhere/no.pth", "weights")
    monkeypatch.setenv("TVE_DATA", "/somewhere")
    with pytest.raises(FileNotFoundError, match=r"/somewhere/no\.pth, which does not exist$"):
        existing_path("$TVE_DATA/no.pth", "weights")


def test_a_link_to_a_profile_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").symlink_to("profiles/mine.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"got one to profiles/mine\.yaml, which does not exist; run `make prof"
    ):
        load_params(tmp_path / "params.yaml")


def make_profile(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "profile", f"NAME={name}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def two_profiles(tmp_path: Path) -> Path:
    """A folder with the profiles `mine`, which is active, and `other`."""
    (tmp_path / "profiles").mkdir()
    shutil.copy(ROOT / "profiles" / "switch.sh", tmp_path / "profiles")
    (tmp_path / "params.yaml").write_text("profile: mine # words\n")
    (tmp_path / "profiles" / "mine.yaml").symlink_to("../params.yaml")
    (tmp_path / "profiles" / "other.yaml").write_text("profile: other\n")
    return tmp_path


def test_switching_profiles_there_and_back_keeps_edits_through_either_name(two_profiles: Path) -> None:
    params, mine, other = (two_profiles / name for name in ("params.yaml", "profiles/mine.yaml", "profiles/other.yaml"))
    mine.write_text(mine.read_text() + "edited: 1\n")
    for _ in range(2):
        assert make_profile(two_profiles, "other").returncode == 0
        assert params.read_text() == "profile: other\n"
        assert not params.is_symlink()
        assert other.readlink() == Path("../params.yaml")
        assert not mine.is_symlink()
    params.write_text("profile: other\nedited: 2\n")
    assert make_profile(two_profiles, "mine").returncode == 0
    assert params.read_text() == "profile: mine # words\nedited: 1\n"
    assert other.read_text() == "profile: other\nedited: 2\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [("nowhere", "one of mine other ; got 'nowhere'"), ("", "got ''"), ("wrong", "expected 'wrong', the name of")],
)
def test_no_profile_is_lost_to_a_wrong_name(two_profiles: Path, name: str, says: str) -> None:
    if name == "wrong":
        (two_profiles / "profiles" / "wrong.yaml").write_text("profile: mine\n")
    done = make_profile(two_profiles, name)
    assert done.returncode != 0
    assert says in done.stderr
    assert (two_profiles / "params.yaml").read_text() == "profile: mine # words\n"


def test_a_params_file_that_is_no_profile_is_not_replaced(two_profiles: Path) -> None:
    (two_profiles / "profiles" / "mine.yaml").unlink()
    done = make_profile(two_profiles, "other")
    assert done.returncode != 0
    assert "move it to profiles/NAME.yaml first" in done.stderr
    assert (two_profiles / "params.yaml").read_text() == "profile: mine # words\n"


def test_a_section_never_changes_after_it_was_read() -> None:
    params = load_backbone_params("vit_scenes", ROOT / "profiles" / "scenes.yaml")
    assert isinstance(params, BackboneParams)
    with pytest.raises(ValueError, match="frozen"):
        params.removal = "zero"  # type: ignore[misc]
