"""Retraining: what it decides, and, on a real server with a real worker, that the schedule alone does all of it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tests.flows.service import Service, until
from tests.mini_project import ROOT, commit, run
from tve_pipeline.flows import registry
from tve_pipeline.flows.registry import Figures, Verdict
from tve_pipeline.flows.retrain import Gate, new_in_timm, shortcomings

GOOD = Figures(0.9, 0.8, -0.2, -0.1, 0.7, 0.01)
PROFILE = "scenes_short"
FULL = bool(os.environ.get("TVE_FULL"))  # a second backbone, too


@pytest.mark.parametrize(
    ("figures", "served", "gate", "says"),
    [
        (GOOD, None, Gate(), []),
        (GOOD, replace(GOOD, r2_kept=0.91), Gate(), []),
        (
            GOOD,
            replace(GOOD, r2_kept=0.93),
            Gate(),
            ["R² of ĝ: expected at least 0.910 (the one in service less 0.02)"],
        ),
        (GOOD, replace(GOOD, fidelity_plus=0.8), Gate(), ["F⁺ − F⁻: expected at least 0.770 (the one in service"]),
        (replace(GOOD, r2_removed=-0.3), None, Gate(), ["R² of ĥ: expected at least -0.100 (G(x)), got -0.300"]),
        (
            replace(GOOD, r2_kept=float("nan")),
            None,
            Gate(),
            ["R² of ĝ: expected at least -0.200 (the mean of g), got nan"],
        ),
        (replace(GOOD, fidelity_minus=0.8), None, Gate(), ["F⁺ − F⁻: expected at least 0.000 (the gate's least)"]),
        (GOOD, None, Gate(least_r2_kept=0.95), ["R² of ĝ: expected at least 0.950 (the gate's least), got 0.900"]),
        (replace(GOOD, fidelity_plus=None, fidelity_minus=None), GOOD, Gate(), []),
    ],
)
def test_a_gate_says_what_is_missing(figures: Figures, served: Figures | None, gate: Gate, says: list[str]) -> None:
    found = shortcomings(figures, served, gate)
    assert len(found) == len(says)
    assert all(each.startswith(word) for each, word in zip(found, says, strict=True))


def test_timms_registry_is_searched_for_names_that_no_backbone_has() -> None:
    found = new_in_timm("vit_tiny_patch16_224*", ["vit_tiny_patch16_224.augreg_in21k"])
    assert "vit_tiny_patch16_224.augreg_in21k" not in found
    assert "vit_tiny_patch16_224.augreg_in21k_ft_in1k" in found
    assert new_in_timm(None, []) == []


def verdict(number: int, passed: bool = True) -> Verdict:
    reasons = () if passed else ("R² of ĝ: too low",)
    return Verdict(f"e{number}", "b", None, GOOD, passed, reasons, "2026-01-01T00:00:00Z", "run")


def export(number: int) -> None:
    """Puts an explainer in the place of the one that was there."""
    config = Path("models/mini/export/vit_a/config.json")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"explainer_sha256": f"e{number}"}))


def test_what_was_turned_down_or_never_judged_gets_no_version(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    registry.record("mini", "vit_a", verdict(1))  # passed, and was never published
    export(2)
    assert registry.publish("mini", "vit_a") is None
    registry.record("mini", "vit_a", verdict(2, passed=False))
    assert registry.publish("mini", "vit_a") is None
    assert run("git", "tag", cwd=project).stdout == ""


def test_the_same_explainer_of_another_file_is_no_second_verdict(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    registry.record("mini", "vit_a", verdict(1))
    registry.note_source("mini", "vit_a", verdict(1), "abc")
    (known,) = registry.verdicts("mini", "vit_a")
    assert (known.source_sha256, known.passed) == ("abc", True)


def test_a_verdict_is_committed_and_what_passes_gets_a_version_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    (project / "notes.txt").write_text("not part of it")
    registry.record("mini", "vit_a", verdict(1))
    export(1)
    assert registry.publish("mini", "vit_a") == "v0.0.1"
    assert registry.publish("mini", "vit_a") is None
    registry.record("mini", "vit_a", verdict(2, passed=False))
    assert registry.publish("mini", "vit_a") is None
    assert registry.in_service("mini", "vit_a") == verdict(1)
    registry.record("mini", "vit_a", verdict(3))
    export(3)
    run("git", "add", "registry", cwd=project)  # cut short before the commit: the next run makes it whole
    assert registry.publish("mini", "vit_a") == "v0.0.2"
    log = run("git", "log", "--format=%s", cwd=project).stdout.splitlines()
    assert log[:3] == [
        "vit_a (mini): in service",
        "vit_a (mini): turned down: R² of ĝ: too low",
        "vit_a (mini): in service",
    ]
    assert run("git", "tag", cwd=project).stdout.split() == ["registry=mini-vit-a@v0.0.1", "registry=mini-vit-a@v0.0.2"]
    assert run("git", "status", "--porcelain", cwd=project).stdout == "?? notes.txt\n"
    assert "vit_a" not in run("dvc", "status", cwd=project).stdout
    assert "mini-vit-a" in yaml.safe_load(Path("registry/dvc.yaml").read_text())["artifacts"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "prefect")
    service.home.mkdir()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This repository as it stands, without a result, its shortest profile with one method and one backbone."""
    root = tmp_path / "clone"
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (
            name
            and not name.startswith(("docs/records", "docs/images", "evidence", "keys"))
            and (ROOT / name).is_file()
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name, follow_symlinks=False)
    (root / "dvc.lock").unlink()
    edit_profile(root, cut_shorter)
    run("make", "-s", "profile", f"NAME={PROFILE}", cwd=root)
    run("git", "init", "-q", "-b", "main", cwd=root)
    commit(root, "project")
    return root


def cut_shorter(profile: dict[str, Any]) -> None:
    profile["run"] |= {"readings": ["tve"], "methods": []}
    profile["datasets"]["scenes_unlabelled"]["splits"] = {"pretrain": 256, "pretrain_val": 64}
    profile["datasets"]["scenes"]["splits"] = {"train": 256, "test": 64}
    profile["backbone"]["train"]["num_steps"] = 10


def edit_profile(root: Path, change: Any) -> None:
    path = root / "profiles" / f"{PROFILE}.yaml"
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def artifacts(service: Service, key: str) -> list[str]:
    """Texts of the artifacts of this key, oldest first."""
    with service.client() as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [str(each.data) for each in sorted(found, key=lambda each: each.created or 0)]


def tags(root: Path) -> list[str]:
    return run("git", "tag", cwd=root).stdout.split()


def in_service(clone: Path, service: Service, tag: str) -> bool:
    """Whether it is; fails at once where a run did."""
    bad = [each.state.message for each in service.runs() if each.state and each.state_type in ("FAILED", "CRASHED")]
    assert not bad, bad
    return tag in tags(clone)


def test_a_backbone_in_params_is_planned_trained_gated_and_registered_by_the_schedule_alone(
    clone: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TVE_SIGNING_KEY", raising=False)
    service.deploy(clone, TVE_RETRAIN_CRON="* * * * *")
    service.start_worker(clone)
    first = "registry=scenes-short-vit-scenes@v0.0.1"
    until(lambda: in_service(clone, service, first), "the first is in service", 900)

    until(
        lambda: any("| `vit_scenes` | valid |" in text for text in artifacts(service, "retrain-plan")), "no more to do"
    )
    assert any("| `vit_scenes` | no explainer was made for it |" in text for text in artifacts(service, "retrain-plan"))
    (judged,) = json.loads((clone / "registry" / PROFILE / "vit_scenes.json").read_text())
    assert judged["passed"]
    assert judged["figures"]["r2_kept"] > judged["figures"]["trivial_r2_kept"]
    assert "vit_scenes" in run("git", "log", "-1", "--format=%s", cwd=clone).stdout
    if not FULL:
        return

    def add(profile: dict[str, Any]) -> None:
        known = profile["backbones"]["vit_scenes"]
        profile["backbones"]["vit_second"] = known | {"timm_args": known["timm_args"] | {"embed_dim": 96}}
        profile["run"]["backbones"] = ["vit_scenes", "vit_second"]

    edit_profile(clone, add)
    commit(clone, "another backbone")
    second = "registry=scenes-short-vit-second@v0.0.1"
    until(lambda: in_service(clone, service, second), "the second is in service", 900)
    assert any("| `vit_second` | no explainer was made for it |" in text for text in artifacts(service, "retrain-plan"))
    assert len(tags(clone)) == 2  # the first was not registered again
    assert len(json.loads((clone / "registry" / PROFILE / "vit_scenes.json").read_text())) == 1
    assert "vit_second" in run("git", "log", "-1", "--format=%s", cwd=clone).stdout
