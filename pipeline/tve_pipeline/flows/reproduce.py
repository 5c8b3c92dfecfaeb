"""`dvc repro` as a flow: a task for each stage that is stale, its log, progress and results in the UI.

The graph is DVC's; stages that are up to date are not run, and not asked about one by one. What is transient (a
process that was killed, a lock that another holds) is tried again; a mistake in the parameters, a full disk or an error
is not.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from dvc.repo import Repo
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from tve_pipeline.flows.processes import TRANSIENT, End, Groups
from tve_pipeline.lineage.evidence import FLOW_RUN
from tve_pipeline.lineage.git import git
from tve_pipeline.lineage.lock import load_lock

RETRIES, RETRY_DELAY_S = 2, 5
LEAST_FREE_BYTES = 2 * 10**9
PERCENT = re.compile(r"(\d+)%\|")
PROGRESS_STEP = 10  # percent, between two messages to the server
METRIC_FILES_SHOWN = 40

groups = Groups()


class StageError(RuntimeError):
    """A stage that did not end well."""

    def __init__(self, stage: str, end: End, last_lines: Sequence[str]) -> None:
        super().__init__(f"{stage}: {end}; {' / '.join(last_lines[-3:])}")
        self.end = end


def is_transient(task: object, run: object, state: Any) -> bool:
    """Whether another try may mend a task: what Prefect asks before it retries."""
    del task, run
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.end in TRANSIENT


@flow(name="reproduce", log_prints=True, task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def reproduce(targets: Sequence[str] | None = None) -> dict[str, int]:
    """Reproduces the active profile, or some of its stages and what they need.

    Args:
        targets: stages as DVC addresses them; none: all.

    Returns:
        How many stages ran, and how many were up to date.

    Raises:
        RuntimeError: too little space, or a stage that did not end well; those that do not need it have run.
    """
    require_space()
    before = stages_of_lock()
    graph = stage_graph()
    wanted = with_ancestors(graph, targets or list(graph))
    stale = stale_stages({name: graph[name] for name in wanted})
    order = [name for name in TopologicalSorter(graph).static_order() if name in stale]
    create_markdown_artifact(
        plan_text(order, len(wanted)), key="plan", description="What is stale, and on what it runs"
    )
    print(f"{len(order)} of {len(wanted)} stages are stale")
    futures: dict[str, PrefectFuture[None]] = {}
    try:
        for name in order:
            needs = [futures[each] for each in graph[name] if each in futures]
            run = reproduce_stage.with_options(task_run_name=name)
            futures[name] = run.submit(name, wait_for=needs)  # type: ignore[call-overload]
        for future in futures.values():
            future.wait()
    finally:
        groups.end_all()
    failed = [name for name, future in futures.items() if not future.state.is_completed()]
    create_markdown_artifact(
        outcome_text(before), key="results", description="What changed in dvc.lock, and the metrics"
    )
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(order)} stages did not end well, the first {failed[0]}; see its log")
    push_where_there_is_a_remote()
    return {"ran": len(order), "up_to_date": len(wanted) - len(order)}


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=is_transient,
)
def reproduce_stage(stage: str) -> None:
    """Runs `dvc repro` for this stage alone; its output goes to the task's log, its progress to an artifact.

    Raises:
        StageError: the stage did not end well.
    """
    logger = get_run_logger()
    progress = cast(UUID, create_progress_artifact(0.0, key=artifact_key(stage), description=stage))
    shown = 0

    def on_line(line: str) -> None:
        nonlocal shown
        found = PERCENT.search(line)
        if found is None:
            logger.info(line)
        elif int(found[1]) >= shown + PROGRESS_STEP:
            shown = int(found[1])
            update_progress_artifact(progress, progress=float(shown))
            logger.info(line)

    context = FlowRunContext.get()
    run = {FLOW_RUN: str(context.flow_run.id)} if context and context.flow_run else {}
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "--", stage]
    outcome = groups.run(command, on_line, run)
    if outcome.end != "done":
        raise StageError(stage, outcome.end, outcome.last_lines)
    update_progress_artifact(progress, progress=100.0)


def stage_graph() -> dict[str, list[str]]:
    """The active profile's stages, and of each those that it depends on, as DVC sees them."""
    with Repo() as repo:
        graph = repo.index.graph  # edges lead from a stage to those that it depends on
        return {stage.addressing: [each.addressing for each in graph.successors(stage)] for stage in graph}


def stages_in_order() -> list[str]:
    """The active profile's stages, each after those that it depends on."""
    return list(TopologicalSorter(stage_graph()).static_order())


def with_ancestors(graph: Mapping[str, Sequence[str]], names: Sequence[str]) -> set[str]:
    """These stages and all that they need.

    Raises:
        ValueError: a name that is no stage.
    """
    found: set[str] = set()
    asked = list(names)
    while asked:
        name = asked.pop()
        if name not in graph:
            raise ValueError(f"targets: expected stages of the active profile, got {name!r}; `dvc stage list` has them")
        if name not in found:
            found.add(name)
            asked += graph[name]
    return found


def stale_stages(graph: Mapping[str, Sequence[str]]) -> set[str]:
    """Stages that DVC says have changed, and those after them."""
    with Repo() as repo:
        changed = set(repo.status(targets=list(graph))) & set(graph)
    for name in TopologicalSorter(graph).static_order():
        if any(each in changed for each in graph.get(name, ())):
            changed.add(name)
    return changed & set(graph)


def require_space() -> None:
    """Raises RuntimeError where the disk is nearly full: half a checkpoint helps nobody."""
    free = shutil.disk_usage(".").free
    if free < LEAST_FREE_BYTES:
        raise RuntimeError(
            f"disk: expected {LEAST_FREE_BYTES / 1e9:.0f} GB free, got {free / 1e9:.1f}; `dvc gc` makes room"
        )


def plan_text(order: Sequence[str], num_wanted: int) -> str:
    """What will run, from which commit, with which changes, on what."""
    commit = (git("rev-parse", "HEAD") or b"unknown").decode().strip()
    changes = ", with changes that the evidence holds" if git("status", "--porcelain") else ""
    lines = [
        f"{len(order)} of {num_wanted} stages are stale.",
        f"Commit `{commit}`{changes}.",
        f"{os.cpu_count()} cores, {shutil.disk_usage('.').free / 1e9:.0f} GB free.",
        "",
        *(f"{number}. `{name}`" for number, name in enumerate(order, 1)),
    ]
    return "\n".join(lines)


def outcome_text(before: Mapping[str, Any]) -> str:
    """Which entries of dvc.lock are new or other than before, and the metrics of these."""
    after = stages_of_lock()
    changed = [name for name, entry in after.items() if before.get(name) != entry]
    lines = [f"{len(changed)} entries of dvc.lock changed.", "", *(f"- `{name}`" for name in changed)]
    outs = [str(out["path"]) for name in changed for out in after[name].get("outs") or ()]
    metrics = [path for path in outs if path.endswith("metrics.json") and Path(path).is_file()]
    for path in metrics[:METRIC_FILES_SHOWN]:
        lines += ["", f"`{path}`", "```json", Path(path).read_text()[:4000], "```"]
    lines += ["", *(f"Report: `{path}`" for path in outs if path.endswith("report.html"))]
    return "\n".join(lines)


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
        outcome = groups.run([sys.executable, "-m", "dvc", "push", "--quiet"], print)
        if outcome.end != "done":
            raise RuntimeError(f"dvc push: {outcome.end}; {' / '.join(outcome.last_lines[-3:])}")


def artifact_key(stage: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")
