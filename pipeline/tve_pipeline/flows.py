"""A thin Prefect flow over DVC's own stage graph: one task per stage, in order.

    python -m tve_pipeline.flows

DVC decides what is stale and keeps the outputs; Prefect shows and records what ran. A stage that is up to
date is a task of a second that says so.
"""

import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from dvc.repo import Repo
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE


@flow(name="reproduce", log_prints=True)
def reproduce() -> None:
    """Reproduces every stage of the active profile; stops at the first that fails."""
    for stage in stages_in_order():
        reproduce_stage.with_options(task_run_name=stage)(stage)


@task(cache_policy=NO_CACHE, persist_result=False)
def reproduce_stage(stage: str) -> None:
    """Runs `dvc repro` for this stage alone; its output goes to the task's log.

    Raises:
        RuntimeError: the stage failed.
    """
    logger = get_run_logger()
    # Stages call `python`, which must be the one that runs this flow.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    with subprocess.Popen(
        command, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            logger.info(line.rstrip())
    if process.returncode != 0:
        raise RuntimeError(f"{stage}: expected exit code 0 of `dvc repro`, got {process.returncode}; see its log")


def stages_in_order() -> list[str]:
    """The active profile's stages, each after those that it depends on."""
    with Repo() as repo:
        graph = repo.index.graph  # edges lead from a stage to those that it depends on
        order = TopologicalSorter({stage: list(graph.successors(stage)) for stage in graph})
        return [stage.addressing for stage in order.static_order()]


if __name__ == "__main__":
    reproduce()
