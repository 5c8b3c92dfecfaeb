"""`dvc repro` as a flow: a task for each stage that is stale, its log, progress and results in the UI."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from tve_pipeline.flows.ownership import own, sole_writer
from tve_pipeline.flows.stages import (
    DVC,
    MOST_AT_ONCE,
    groups,
    run_stages,
    stage_graph,
    stale_stages,
    with_ancestors,
)
from tve_pipeline.flows.sweep import sweep_up
from tve_pipeline.lineage.git import git
from tve_pipeline.lineage.lock import active_profile, load_lock

LEAST_FREE_BYTES = 2 * 10**9
METRIC_FILES_SHOWN = 40
AT_ONCE = "TVE_STAGES_AT_ONCE"  # the default of how many stages run side by side; two trainings on one GPU only wait


def run_name() -> str:
    """What the UI calls a run: which flow, on which profile and commit."""
    commit = (git("rev-parse", "--short", "HEAD") or b"no commit").decode().strip()
    return f"{flow_run.flow_name}, {active_profile(Path('.')) or 'no profile'} at {commit}"


@flow(
    name="reproduce",
    flow_run_name=run_name,
    log_prints=True,
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_AT_ONCE),  # type: ignore[arg-type]
    persist_result=True,
    result_serializer="json",
)
def reproduce(targets: Sequence[str] | None = None, at_once: int | None = None) -> dict[str, int]:
    """Reproduces the active profile, or some of its stages and what they need.

    Args:
        targets: stages as DVC addresses them; none: all.
        at_once: how many stages run side by side; by default $TVE_STAGES_AT_ONCE, else 1.

    Returns:
        How many stages ran, and how many were up to date.

    Raises:
        RuntimeError: too little space, or a stage that did not end well; those that do not need it have run.
    """
    begin()
    with sole_writer(flow_run.name) as lock:
        require_space()
        before = stages_of_lock()
        graph = stage_graph()
        wanted = with_ancestors(graph, targets or list(graph))
        part = {name: graph[name] for name in wanted}
        order = stale_stages(part)
        create_markdown_artifact(
            plan_text(order, len(wanted)), key="plan", description="What is stale, and on what it runs"
        )
        print(f"{len(order)} of {len(wanted)} stages are stale")
        failed = run_stages(part, order, at_once=at_once or stages_at_once(), keep_open=[lock])
        show_outcome(before)
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(order)} stages did not end well, the first {failed[0]}; see its log"
            )
        if order and (changed := stale_stages(part)):
            raise RuntimeError(f"dvc status: {', '.join(changed)} changed while stages ran; run the flow again")
        push_where_there_is_a_remote()
    return {"ran": len(order), "up_to_date": len(wanted) - len(order)}


def begin() -> None:
    """What every flow does first: says that it lives, and sees to those that do not."""
    own(flow_run.id)
    sweep_up()


def stages_at_once() -> int:
    """Raises ValueError where the setting is no number of stages."""
    text = os.environ.get(AT_ONCE, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{AT_ONCE}: expected a number of stages, 1 or more, got {text!r}")
    return int(text)


def require_space() -> None:
    """Raises RuntimeError where the disk is nearly full: half a checkpoint helps nobody."""
    free = shutil.disk_usage(".").free
    if free < LEAST_FREE_BYTES:
        raise RuntimeError(
            f"disk: expected {LEAST_FREE_BYTES / 1e9:.0f} GB free, got {free / 1e9:.1f}; `dvc gc` makes room"
        )


def plan_text(order: Sequence[str], num_wanted: int) -> str:
    """What will run, from which commit, with which changes, on what."""
    lines = [
        f"{len(order)} of {num_wanted} stages are stale.",
        *surroundings(),
        "",
        *(f"{number}. `{name}`" for number, name in enumerate(order, 1)),
    ]
    return "\n".join(lines)


def surroundings() -> list[str]:
    """Lines on the commit and the machine."""
    commit = (git("rev-parse", "HEAD") or b"unknown").decode().strip()
    changes = ", with changes that the evidence holds" if git("status", "--porcelain") else ""
    return [
        f"Commit `{commit}`{changes}.",
        f"{os.cpu_count()} cores, {gpus()}, {shutil.disk_usage('.').free / 1e9:.0f} GB free.",
    ]


def gpus() -> str:
    """What the driver lists; no library is loaded for it."""
    try:
        finished = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "no GPU"
    names = [line.split(" (UUID")[0] for line in finished.stdout.splitlines() if line.startswith("GPU")]
    return ", ".join(names) or "no GPU"


def show_outcome(before: Mapping[str, Any]) -> None:
    """Artifacts: which entries of dvc.lock are new or other than before, the metrics of these, and a report."""
    after = stages_of_lock()
    changed = [name for name, entry in after.items() if before.get(name) != entry]
    lines = [f"{len(changed)} entries of dvc.lock changed.", "", *(f"- `{name}`" for name in changed)]
    outs = [Path(str(out["path"])) for name in changed for out in after[name].get("outs") or ()]
    for path in [path for path in outs if path.name == "metrics.json" and path.is_file()][:METRIC_FILES_SHOWN]:
        lines += ["", f"`{path.as_posix()}`", "```json", path.read_text()[:4000], "```"]
    create_markdown_artifact("\n".join(lines), key="results", description="What changed in dvc.lock, and the metrics")
    for path in outs:
        if path.name == "report.html" and path.is_file():
            create_link_artifact(path.resolve().as_uri(), link_text=path.as_posix(), key="report")


def stages_of_lock() -> dict[str, Any]:
    return dict(load_lock(Path("."))) if Path("dvc.lock").is_file() else {}


def push_where_there_is_a_remote() -> None:
    """`dvc push`, where a default remote is configured.

    Raises:
        RuntimeError: it failed.
    """
    with Repo() as repo:
        remote = repo.config["core"].get("remote")
    if remote:
        outcome = groups.run([*DVC, "push", "--quiet"], print)
        if outcome.end != "done":
            raise RuntimeError(f"dvc push: {outcome.end}; {' / '.join(outcome.last_lines[-3:])}")
