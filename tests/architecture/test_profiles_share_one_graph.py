"""DVC's own view of dvc.yaml: profiles side by side, the right order, and nothing left in git status."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tve_pipeline.flows.stages import stages_in_order
from tve_pipeline.goals_lineage import EMPTY_STAGE, SALT, empty_command
from tve_pipeline.graph import ROOT


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "TVE_DATA": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """This project's graph, profiles and settings in a new repository; its stages only make their outputs."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for stage in graph["stages"].values():
        stage["deps"] = [path for path in stage["deps"] if not path.endswith((".py", ".j2"))]
        stage["cmd"] = empty_command(stage).replace("python", sys.executable, 1)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (tmp_path / "stage.py").write_text(EMPTY_STAGE)
    (tmp_path / SALT).write_text("{}")
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for folder in (".dvc", "docs"):
        (tmp_path / folder).mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "docs/protocol.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    switch(tmp_path, "scenes")
    run(tmp_path, "git", "init", "-q")
    commit(tmp_path)
    return tmp_path


def switch(folder: Path, profile: str) -> None:
    (folder / "params.yaml").unlink(missing_ok=True)
    (folder / "params.yaml").symlink_to(Path("profiles", f"{profile}.yaml"))


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "state")


def test_profiles_keep_each_others_entries_and_outputs_and_leave_git_clean(project: Path) -> None:
    dvc(project, "repro")
    assert run(project, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]
    commit(project)
    assert (project / "results/scenes/report/report.html").is_file()

    switch(project, "real")
    dvc(project, "repro", "shards")
    names = set(yaml.safe_load((project / "dvc.lock").read_text())["stages"])
    assert {"report@scenes", "pretrain@scenes-vit_scenes", "check@real", "shards@real-cifar10"} <= names
    assert run(project, "git", "status", "--porcelain").split() == ["M", "dvc.lock", "M", "params.yaml"]

    switch(project, "scenes")
    assert "didn't change" in dvc(project, "repro")
    assert dvc(project, "status").strip() == "Data and pipelines are up to date."


def test_the_report_comes_after_every_evaluation_and_the_check_before_everything(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(project, "real")
    monkeypatch.chdir(project)
    order = stages_in_order()
    assert order[0] == "check@real"
    assert order[-1] == "report@real"
    cells = [f"{name}-{task}" for name in ("vit_tiny", "deit_tiny") for task in ("cats_dogs", "imagenette", "cifar10")]
    for stage in ("evaluate_tve@real-{}-tve", "evaluate@real-{}-rise", "evaluate_shapley@real-{}", "compare@real-{}"):
        assert {stage.format(cell) for cell in cells} <= set(order)
    for name in ("vit_tiny", "deit_tiny"):
        stages = [f"{stage}@real-{name}" for stage in ("backbone", "pretrain", "export")]
        assert sorted(stages, key=order.index) == stages
