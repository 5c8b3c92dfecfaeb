"""Finds what a killed flow or worker left behind: its processes are ended, its run is marked, and begun again.

Prefect's server calls a run `Running` until somebody says otherwise; a process that was killed with -9 says nothing. A
run's process holds a lock for as long as it lives (`ownership`), so that whoever comes next can tell.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psutil
from prefect import flow, get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from tve_pipeline.flows import FLOWS
from tve_pipeline.flows.ownership import dead_runs, forget, own
from tve_pipeline.flows.processes import GRACE_S
from tve_pipeline.lineage.evidence import FLOW_RUN

MOST_ATTEMPTS = 3
ATTEMPT = "attempt:"  # tag of a run that was begun again
PENDING_LIMIT_S = "TVE_PENDING_LIMIT_S"  # a worker that lives starts a run within seconds


@flow(name="sweep", log_prints=True, persist_result=True, result_serializer="json")
def sweep() -> list[str]:
    """Looks for runs whose process is gone; returns a line for each."""
    own(str(flow_run.id))
    found = sweep_up()
    if found:
        create_markdown_artifact("\n".join(f"- {line}" for line in found), key="sweep", description="What was left")
    return found


def sweep_up() -> list[str]:
    """Ends the processes of dead runs, marks the runs, and begins those of a deployment again; a line for each run."""
    found: list[str] = []
    with get_client(sync_client=True) as client:
        for name in dead_runs():
            ended = end_orphans(name)
            try:
                run = client.read_flow_run(UUID(name))
            except (ObjectNotFound, ValueError):  # of another server
                run = None
            if run is not None and run.state is not None and not run.state.is_final():
                found.append(_put_right(client, run, f"its process is gone; {ended} of its processes were ended"))
            forget(name)
        found += [_put_right(client, run, "its worker never started it") for run in _never_started(client)]
    for line in found:
        print(line)
    return found


def end_orphans(flow_run: str) -> int:
    """Ends processes that a flow run started and that outlived it; returns how many there were."""
    ours = list(_processes_of(flow_run))
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, deaf = psutil.wait_procs(ours, timeout=GRACE_S)
    for process in deaf:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(deaf, timeout=GRACE_S)
    return len(ours)


def _processes_of(flow_run: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(FLOW_RUN) == flow_run:
                yield process


def _put_right(client: SyncPrefectClient, run: FlowRun, why: str) -> str:
    assert run.state is not None
    cancelled = run.state.type == StateType.CANCELLING
    state: State[None] = Cancelled(message=why) if cancelled else Crashed(message=why)
    client.set_flow_run_state(run.id, state, force=True)
    for task_run in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, Crashed(message=why), force=True)
    again = None if cancelled else _begin_again(client, run)
    return f"{run.name}: {state.name}, {why}" + (f"; begun again as {again.name}" if again else "")


def _begin_again(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """A new run of the same deployment: DVC knows what is done, so nothing is done twice."""
    attempt = 1 + next((int(tag.removeprefix(ATTEMPT)) for tag in run.tags if tag.startswith(ATTEMPT)), 1)
    if run.deployment_id is None or attempt > MOST_ATTEMPTS:
        return None
    tags = [*(tag for tag in run.tags if not tag.startswith(ATTEMPT)), f"{ATTEMPT}{attempt}"]
    return client.create_flow_run_from_deployment(
        run.deployment_id, parameters=run.parameters, tags=tags, idempotency_key=f"again-{run.id}"
    )


def _never_started(client: SyncPrefectClient) -> Iterable[FlowRun]:
    limit = timedelta(seconds=float(os.environ.get(PENDING_LIMIT_S, "300")))
    pending = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))),
    )
    now = datetime.now(UTC)
    return [run for run in pending if run.deployment_id and run.state and now - run.state.timestamp > limit]
