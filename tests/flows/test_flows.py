"""The flows on a real DVC project and a real Prefect server, which each run starts for itself."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.flows.service import until
from tests.mini_project import run
from tve_pipeline.flows.stages import Milestones, artifact_key, stale_stages, with_ancestors
from tve_pipeline.lineage.audit import audit

GRAPH = {"draw": [], "train": ["draw"], "export": ["train"], "score": ["export"]}


@pytest.fixture
def server(tmp_path: Path) -> dict[str, str]:
    """Settings of a server of its own, whose database is under this test's folder."""
    return {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }


def rows(server: dict[str, str], query: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(Path(server["PREFECT_HOME"]) / "prefect.db") as database:
        return database.execute(query).fetchall()


def test_every_bar_of_a_stage_is_shown_each_ten_percent() -> None:
    milestones = Milestones()
    one_bar_after_another = [0, 4, 12, 15, 55, 100, 3, 9, 10, 30, 100]
    assert [each for each in one_bar_after_another if milestones.reached(each)] == [12, 55, 100, 10, 30, 100]


def test_what_is_stale_runs_as_tasks_and_the_evidence_names_the_flow_run(project: Path, server: dict[str, str]) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("steps: 3", "steps: 5"))
    run("python", "-m", "tve_pipeline.flows", cwd=project, **server)
    assert [name for (name,) in rows(server, "select name from task_run order by start_time")] == [
        "train",
        "export",
        "score",
    ]
    assert {kind for (kind,) in rows(server, "select state_type from task_run")} == {"COMPLETED"}
    ((flow_run, state),) = rows(server, "select id, state_type from flow_run")
    assert state == "COMPLETED"
    report = audit(project)
    assert {each.severity for each in report.findings} <= {"note"}  # params were not committed
    by_name = {stage.name: stage for stage in report.stages}
    assert {by_name[name].run for name in ("train", "export", "score")} == {flow_run}
    assert by_name["draw"].run != flow_run
    keys = {key for (key,) in rows(server, "select key from artifact")}
    assert {"plan", "results"} <= keys
    (results,) = rows(server, "select data from artifact where key = 'results'")
    assert "3 entries of dvc.lock changed" in json.loads(results[0])
    assert "up to date" in run("dvc", "status", cwd=project).stdout


def test_a_users_mistake_is_not_tried_again_and_names_itself(project: Path, server: dict[str, str]) -> None:
    code = project / "mini" / "train.py"
    code.write_text(
        code.read_text().replace("params = yaml", "raise ValueError('steps: expected less'); params = yaml")
    )
    ended = run("python", "-m", "tve_pipeline.flows", cwd=project, check=False, **server)
    assert ended.returncode != 0
    assert "train: refused; " in ended.stdout + ended.stderr
    assert "steps: expected less" in ended.stdout + ended.stderr
    states = dict(rows(server, "select name, state_type from task_run"))
    assert states["train"] == "FAILED"
    assert not {"export", "score"} & {name for name, state in states.items() if state == "COMPLETED"}
    assert rows(server, "select run_count from task_run where name = 'train'") == [(1,)]


def test_a_broken_lineage_is_a_failed_run_of_the_audit(project: Path, server: dict[str, str]) -> None:
    (project / "models" / "mini" / "model.bin").write_bytes(b"another")
    ended = run("python", "-m", "tve_pipeline.flows", "audit", cwd=project, check=False, **server)
    assert ended.returncode != 0
    assert rows(server, "select state_type from flow_run") == [("FAILED",)]
    ((text,),) = rows(server, "select data from artifact where key = 'audit'")
    assert "models/mini/model.bin was altered" in text
    assert "**BROKEN**" in text


def test_stages_after_a_changed_one_are_stale_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert stale_stages(GRAPH) == []
    code = project / "mini" / "export.py"
    code.write_text(code.read_text() + "\n")
    assert stale_stages(GRAPH) == ["export", "score"]


def test_targets_come_with_what_they_need() -> None:
    assert with_ancestors(GRAPH, ["export"]) == {"draw", "train", "export"}
    with pytest.raises(ValueError, match="expected stages of the active profile, got 'nowhere'"):
        with_ancestors(GRAPH, ["nowhere"])


def test_a_stages_name_becomes_a_key_that_prefect_takes() -> None:
    assert artifact_key("evaluate@scenes-vit_scenes-scenes-tve") == "evaluate-scenes-vit-scenes-scenes-tve"


def test_a_flow_that_is_told_to_end_leaves_no_server(project: Path, server: dict[str, str]) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("steps: 3", "steps: 5"))
    log = project / "flow.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "tve_pipeline.flows"]
        flow = subprocess.Popen(command, cwd=project, env=os.environ | server, stdout=file, stderr=file)
    process = psutil.Process(flow.pid)
    until(lambda: log.read_text().count("Beginning flow run"), "a flow run")
    started = process.children(recursive=True)
    assert any("uvicorn" in " ".join(child.cmdline()) for child in started)
    flow.terminate()
    assert flow.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, 30)
    assert not alive
