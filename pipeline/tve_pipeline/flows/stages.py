"""DVC's stages as Prefect tasks: which are stale, in what order they may run, each in a process group of its own.

The graph is DVC's; a stage is run by `dvc repro --single-item`, so that a flow and the command line leave the same
files. What is transient (a process that was killed, a lock that another holds, storage that went away) is tried again;
a mistake in the parameters, a full disk or an error is not.
"""

import queue
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any, cast
from uuid import UUID

from dvc.repo import Repo
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from tve_pipeline.flows.processes import TRANSIENT, End, Groups
from tve_pipeline.lineage.evidence import FLOW_RUN

RETRIES, RETRY_DELAY_S = 2, 5
PERCENT = re.compile(r"(\d+)%\|")
PROGRESS_STEP = 10  # percent, between two messages to the server
MOST_AT_ONCE = 64  # threads of a flow's runner; how many are used is each flow's own limit
# Other commands of DVC hold its lock for moments: a stage that trained for hours must not be lost to one.
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")

groups = Groups()
Graph = Mapping[str, Sequence[str]]  # stages, and of each those that it depends on


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


def stage_graph() -> dict[str, list[str]]:
    """The active profile's stages, and of each those that it depends on, as DVC sees them."""
    with Repo() as repo:
        graph = repo.index.graph  # edges lead from a stage to those that it depends on
        return {stage.addressing: [each.addressing for each in graph.successors(stage)] for stage in graph}


def stages_in_order() -> list[str]:
    """The active profile's stages, each after those that it depends on."""
    return list(TopologicalSorter(stage_graph()).static_order())


def with_ancestors(graph: Graph, names: Sequence[str]) -> set[str]:
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


def stale_stages(graph: Graph) -> list[str]:
    """Stages that DVC says have changed, and those after them, each after those that it depends on."""
    with Repo() as repo:
        changed = set(repo.status(targets=list(graph))) & set(graph)
    return with_later(graph, changed)


def with_later(graph: Graph, changed: Collection[str]) -> list[str]:
    """Those of the graph's stages that changed or come after one that did, each after those that it depends on."""
    order = [name for name in TopologicalSorter(graph).static_order() if name in graph]
    found = set(changed)
    for name in order:
        if any(each in found for each in graph[name]):
            found.add(name)
    return [name for name in order if name in found]


def run_stages(
    graph: Graph, order: Sequence[str], *, at_once: int = 1, force: Collection[str] = (), keep_open: Sequence[int] = ()
) -> list[str]:
    """Runs stages as tasks, each when those of them that it depends on have ended well; returns those that did not.

    Args:
        graph: what depends on what.
        order: the stages that run.
        at_once: how many at a time.
        force: of these, stages that run although DVC calls them up to date.
        keep_open: descriptors that stay open while a stage's processes live.
    """
    chosen = set(order)
    sorter = TopologicalSorter({name: [each for each in graph[name] if each in chosen] for name in order})
    sorter.prepare()
    futures: dict[str, PrefectFuture[None]] = {}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    ready, running, done = list[str](), set[str](), set[str]()
    try:
        while True:
            ready += sorted(sorter.get_ready(), key=order.index)
            while ready and len(running) < at_once:
                name = ready.pop(0)
                needs = [futures[each] for each in graph[name] if each in futures]
                run = reproduce_stage.with_options(task_run_name=name)
                future = run.submit(name, name in force, tuple(keep_open), wait_for=needs)  # type: ignore[call-overload]
                future.add_done_callback(lambda _, name=name: ended.put(name))
                futures[name] = future
                running.add(name)
            if not running:
                return [name for name in order if name not in done]
            name = ended.get()
            running.discard(name)
            futures[name].wait()  # it is done; only so is its state the last one
            if futures[name].state.is_completed():
                done.add(name)
                sorter.done(name)
    finally:
        groups.end_all()


class Milestones:
    """Which states of a stage's progress bars are worth a message. A stage draws one bar after another."""

    def __init__(self) -> None:
        self.percent = 0
        self.shown = 0

    def reached(self, percent: int) -> bool:
        """Whether a bar is `PROGRESS_STEP` on since its last message; a percentage that fell is a new bar's."""
        if percent < self.percent:
            self.shown = 0
        self.percent = percent
        if percent < self.shown + PROGRESS_STEP:
            return False
        self.shown = percent
        return True


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=is_transient,
)
def reproduce_stage(stage: str, force: bool, keep_open: tuple[int, ...]) -> None:
    """Runs `dvc repro` for this stage alone; its output goes to the task's log, its progress to an artifact.

    Raises:
        StageError: the stage did not end well.
    """
    logger = get_run_logger()
    progress: UUID | None = None
    milestones = Milestones()

    def on_line(line: str) -> None:
        nonlocal progress
        found = PERCENT.search(line)
        if found is None:
            logger.info(line)
        elif milestones.reached(percent := int(found[1])):
            if progress is None:
                made = create_progress_artifact(float(percent), key=artifact_key(stage), description=stage)
                progress = cast(UUID, made)
            else:
                update_progress_artifact(progress, progress=float(percent))
            logger.info(line)

    context = FlowRunContext.get()
    run = {FLOW_RUN: str(context.flow_run.id)} if context and context.flow_run else {}
    command = [*DVC, "repro", "--single-item", *(["--force"] if force else []), "--", stage]
    outcome = groups.run(command, on_line, run, keep_open)
    if outcome.end != "done":
        raise StageError(stage, outcome.end, outcome.last_lines)
    if progress is not None:
        update_progress_artifact(progress, progress=100.0)


def artifact_key(stage: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")
