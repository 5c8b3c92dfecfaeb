"""Stage check: everything wrong with a profile is one clear error, before any long work."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tve_pipeline.check import check_backbone, check_num_pictures, check_run, check_source, main, parse_profile

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(source: str = "scenes", /, **changes: Any) -> None:
    """The profile as ./params.yaml, with keys such as `run__datasets` changed; `...` takes the key away."""
    document = yaml.safe_load((ROOT / "profiles" / f"{source}.yaml").read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = document
        for parent in parents:
            section = section[parent]
        section[key] = value
        if value is ...:
            del section[key]
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.mark.parametrize("profile", ["scenes", "real", "paper", "paper_dry"])
def test_every_profile_names_only_what_it_defines(project: Path, profile: str) -> None:
    write(profile)
    check_run(parse_profile())


def test_a_passed_check_writes_the_same_whatever_the_numbers(project: Path) -> None:
    written = []
    for num_steps in (100, 200):
        write(pretrain__num_steps=num_steps)
        main([])
        written.append((project / "results/scenes/check/params.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hedas": {}}, "unknown section 'hedas'; known sections: profile, datasets"),
        ({"heads": ...}, "missing section 'heads'"),
        (
            {"heads__max_iters": 3},
            "heads.max_iters: unknown key; known keys: skip_tasks, max_train, regularization, max_iter",
        ),
        ({"evaluate__removals": ["blur"]}, "evaluate.removals.0: expected 'zero' or 'drop', got 'blur'"),
        ({"backbones": None}, "params.yaml: backbones: expected a mapping, got null"),
        ({"datasets": ["scenes"]}, r"params.yaml: datasets: expected a mapping, got \['scenes'\]"),
        ({"backbones": {1: {}}}, "backbones: expected names of letters, digits and underscores, got 1"),
        ({"heads": None}, "params.yaml: heads: expected a mapping, got null"),
        ({"datasets__scenes__kind": ["scenes"]}, "datasets.scenes.kind: expected one of"),
    ],
)
def test_a_wrong_section_or_key_is_named(project: Path, changes: dict[str, Any], message: str) -> None:
    write(**changes)
    with pytest.raises(ValueError, match=message):
        parse_profile()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__backbones": ["resnet"]}, "run.backbones: expected one of vit_scenes, got 'resnet'"),
        ({"run__vit_shapley": ["resnet"]}, "run.vit_shapley: expected one of vit_scenes, got 'resnet'"),
        ({"run__two_networks": ["resnet"]}, "run.two_networks: expected one of vit_scenes, got 'resnet'"),
        ({"run__datasets": ["scenes", "scenes"]}, "run.datasets: expected each name once"),
        ({"run__task_datasets": ["birds"]}, "run.task_datasets: expected one of scenes_unlabelled, scenes"),
        ({"run__pretrain_dataset": "scenes"}, "expected pictures without labels, got 'scenes'"),
        ({"run__task_datasets": ["scenes_unlabelled"]}, "expected labelled pictures, got 'scenes_unlabelled'"),
        ({"backbone__train": None}, "backbone.train: expected values"),
        ({"backbone__train__task": "size"}, "backbone.train.task: expected one of digit, parity"),
        ({"run__backbone_reads": "elsewhere"}, "expected data/scenes/shards/scenes, got elsewhere"),
        ({"evaluate__split": "val"}, "datasets.scenes: expected a split 'val', got splits train, test"),
        ({"datasets__scenes__splits": {"training": 3}}, "datasets.scenes.splits: expected one of pretrain"),
        ({"heads__skip_tasks": ["size"]}, "heads.skip_tasks: expected one of digit, parity, .*, got 'size'"),
        (
            {"heads__skip_tasks": ["digit", "parity", "shape", "colour", "joint"]},
            "heads.skip_tasks: expected to leave a task of 'scenes'",
        ),
        ({"backbone__train__dataset": "scenes_unlabelled"}, "backbone.train.dataset: expected pictures with tasks"),
    ],
)
def test_a_name_that_is_not_defined_is_refused(project: Path, changes: dict[str, Any], message: str) -> None:
    write(**changes)
    with pytest.raises(ValueError, match=message):
        check_run(parse_profile())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tinny"}, "backbones.vit_scenes: .*expected a timm model name, got 'vit_tinny'"),
        ({"patches_per_side": 7}, "patches_per_side: expected a divisor of 64 pixels, got 7"),
        ({"patches_per_side": 16}, "got 'drop': .* a grid of 8 per side, which a grid of 16 does not divide"),
        ({"timm_args": {"img_size": 64, "patch_size": 8, "num_classes": 10}}, "num_classes: expected 40 .*got 10"),
        ({"weights": "gone.pth"}, "^backbones.vit_scenes: weights: expected a file or a folder, got gone.pth"),
        ({"weights": "."}, "^backbones.vit_scenes: weights of .*: expected a .safetensors or .pth file, got"),
    ],
)
def test_a_backbone_that_cannot_be_built_or_dropped_from_is_refused(
    project: Path, changes: dict[str, Any], message: str
) -> None:
    write(**{f"backbones__vit_scenes__{key}": value for key, value in changes.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_backbone("vit_scenes", parse_profile())


def test_a_window_as_large_as_the_picture_is_refused(project: Path) -> None:
    write(pretrain__radius=8)
    with pytest.raises(ValueError, match=r"backbones\.vit_scenes: radius: expected 0 to 7"):
        check_backbone("vit_scenes", parse_profile())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain__centres_per_image": 65}, "centres_per_image: expected at most the 64 windows of 8 x 8 .* got 65"),
        ({"evaluate__fractions": [0.001]}, "evaluate: fractions: expected some that give 1 to 63 of 64 patches"),
    ],
)
def test_numbers_that_the_grid_of_a_backbone_cannot_serve_are_refused(
    project: Path, changes: dict[str, Any], message: str
) -> None:
    write(**changes)
    with pytest.raises(ValueError, match=f"^backbones.vit_scenes: .*{message}"):
        check_backbone("vit_scenes", parse_profile())


def test_an_evaluation_all_of_whose_removals_a_backbone_cannot_serve_is_refused(project: Path) -> None:
    write(backbones__vit_scenes__removal="zero", backbones__vit_scenes__patches_per_side=16)
    check_backbone("vit_scenes", parse_profile())
    write(
        backbones__vit_scenes__removal="zero", backbones__vit_scenes__patches_per_side=16, evaluate__removals=["drop"]
    )
    with pytest.raises(ValueError, match=r"^backbones\.vit_scenes: evaluate\.removals: .*got 'drop': "):
        check_backbone("vit_scenes", parse_profile())


@pytest.mark.parametrize(
    ("key", "available", "split"),
    [
        ("pretrain__batch_size", 16000, "pretrain"),
        ("pretrain__num_evaluation_pictures", 256, "pretrain_val"),
        ("evaluate__num_pictures", 2000, "test"),
        ("examine__num_pictures", 2000, "test"),
        ("shapley__batch_size", 16000, "pretrain"),
        ("shapley__num_evaluation_pictures", 256, "pretrain_val"),
        ("backbone__train__batch_size", 16000, "train"),
    ],
)
def test_more_pictures_than_a_split_has_are_refused(project: Path, key: str, available: int, split: str) -> None:
    def check() -> None:
        profile = parse_profile()
        check_num_pictures(profile, {name: check_source(name, entry) for name, entry in profile.datasets.items()})

    write(**{key: available})
    check()
    write(**{key: available + 1})
    where = key.replace("__", ".")
    message = rf"^{where}: expected at most the {available} pictures of split '{split}' of .*, got {available + 1}$"
    with pytest.raises(ValueError, match=message):
        check()


def test_occlusion_is_refused_where_its_windows_do_not_lie_inside_the_grid(project: Path) -> None:
    write(pretrain__radius=3, run__methods=["tve", "occlusion"])
    check_backbone("vit_scenes", parse_profile())
    write(pretrain__radius=4, run__methods=["tve", "occlusion"])
    with pytest.raises(ValueError, match=r"run\.methods: expected no occlusion where its windows of 9 patches a side"):
        check_backbone("vit_scenes", parse_profile())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods__rise__budgets", [50, 20], r"methods\.rise\.budgets: expected ascending numbers of evaluations"),
        ("evaluate__fractions", [0.5, 0.5], r"evaluate\.fractions: expected ascending fractions, got \[0\.5, 0\.5\]"),
    ],
)
def test_numbers_that_do_not_ascend_are_refused(project: Path, key: str, value: list[float], message: str) -> None:
    write(**{key: value})
    with pytest.raises(ValueError, match=message):
        main([])


def test_a_copied_profile_is_refused_until_it_has_the_name_of_its_file(project: Path) -> None:
    (project / "profiles").mkdir()
    (project / "params.yaml").symlink_to("profiles/mine.yaml")
    write()
    with pytest.raises(ValueError, match=r"^profile: expected 'mine', the name of its file, got 'scenes'; outputs"):
        main([])
    assert not (project / "results").exists()
    write(profile="mine", run__backbone_reads="data/mine/shards/scenes")
    main([])
    assert (project / "results/mine/check/params.json").is_file()


def test_missing_weights_and_sources_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVE_DATA", str(project))
    write("real")
    profile = parse_profile()
    with pytest.raises(FileNotFoundError, match=r"^backbones\.vit_tiny: .*vit_tiny_patch16_224\.safetensors"):
        check_backbone("vit_tiny", profile)
    with pytest.raises(FileNotFoundError, match=r"^datasets\.pool: source: .*pretrain_pool_160\.zip"):
        check_source("pool", profile.datasets["pool"])


def test_a_source_without_pictures_is_refused(project: Path) -> None:
    (project / "pictures").mkdir()
    write("real", datasets__pool__source="pictures", datasets__pool__sha256=None)
    with pytest.raises(ValueError, match=r"datasets\.pool: "):
        check_source("pool", parse_profile().datasets["pool"])
