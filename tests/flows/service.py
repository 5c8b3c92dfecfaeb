"""A real Prefect server and workers for tests: on the loopback address, with a database of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun

from tests.mini_project import ROOT

BIN = Path(sys.executable).parent
STARTED_WITHIN_S = 120.0


class Service:
    """A server that can be killed and started again with what it knew, and workers beside it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._server: subprocess.Popen[bytes] | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Of every process that is to use this server."""
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "pipeline"))),
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_UI_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "TVE_PENDING_LIMIT_S": "20",
        }

    def start(self) -> None:
        self._server = self._begin(["prefect", "server", "start", "--host", "127.0.0.1"], self.home)
        until(self._answers, "the server answers", STARTED_WITHIN_S)

    def kill(self) -> None:
        """As a machine that loses power would: no goodbye."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def deploy(self, project: Path, **settings: str) -> None:
        """The deployments of prefect.yaml, for the working copy `project`."""
        defaults = {"TVE_RETRAIN_CRON": "0 2 1 1 *", "TVE_AUDIT_CRON": "0 2 1 1 *", "TVE_TIMEZONE": "UTC"}
        environment = os.environ | self.environment | defaults | {"TVE_ROOT": str(project)} | settings
        for command in (
            ["prefect", "work-pool", "create", "tve", "--type", "process", "--overwrite"],
            ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml")],
        ):
            done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    def start_worker(self, project: Path) -> "subprocess.Popen[bytes]":
        worker = self._begin(["prefect", "worker", "start", "--pool", "tve"], project)
        self._workers.append(worker)
        return worker

    def run_deployment(self, name: str, **parameters: Any) -> UUID:
        with self.client() as client:
            deployment = client.read_deployment_by_name(name)
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    def runs(self, *tags: str) -> list[FlowRun]:
        chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=list(tags))) if tags else None
        with self.client() as client:
            return client.read_flow_runs(flow_run_filter=chosen)

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.url)

    def stop_workers(self) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGTERM)
                worker.wait(60)
        self._workers.clear()

    def stop(self) -> None:
        self.stop_workers()
        self.kill()

    def _begin(self, command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
        log = (self.home / f"{command[1]}.log").open("ab")
        # A worker that is asked to end sends itself SIGINT, which what a shell runs in the background ignores.
        return subprocess.Popen(
            ["env", "--default-signal=INT", *command],
            cwd=folder,
            env=os.environ | self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(json.loads(answer.read()))
        except OSError:
            return False


def until(holds: Callable[[], object], what: str, within_s: float = 120.0) -> None:
    """Waits until it holds; fails, naming it, where it does not in time."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"{what}: expected within {within_s:.0f} s"
        time.sleep(0.2)
