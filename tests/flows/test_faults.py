"""Faults at seeded moments: whatever is killed or goes away, the next run ends with the same bytes.

The first four kinds by default; with TVE_FULL set, twenty faults of all kinds. A stage notes when it begins, so that a
fault strikes it in the middle of its work, and says so when it is not alone.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.flows.service import Service, until
from tests.mini_project import run

KINDS = ("stage killed", "flow killed", "worker killed", "server restarted", "disk full", "mount gone")
NUM_FAULTS = 20 if os.environ.get("TVE_FULL") else 4
OUTPUTS = ("models/mini/model.bin", "models/mini/export/weights.bin", "results/mini/metrics.json")
OPEN = ("RUNNING", "PENDING", "CANCELLING")
WORKS_FOR_S = 3.0
SLOW = f"""
import fcntl, os, time
from pathlib import Path
import yaml
from tve_pipeline.entry import run_stage

def main(argv):
    params = yaml.safe_load(Path("params.yaml").read_text())
    with open(".writing", "w") as alone, open(".journal", "a", buffering=1) as journal:
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.write("two writers\\n")
        journal.write(f"begin {{os.getpid()}}\\n")
        Path("models/mini").mkdir(parents=True, exist_ok=True)
        shards = b"".join(file.read_bytes()[:9] for file in sorted(Path("data/mini/shards").iterdir()))
        with open("models/mini/model.bin", "wb", buffering=0) as model:
            for part in range(30):
                model.write(shards * params["train"]["steps"])
                with open("scratch/part", "wb", buffering=0) as scratch:
                    scratch.write(b"part")
                time.sleep({WORKS_FOR_S} / 30)
        journal.write("end\\n")

if __name__ == "__main__":
    run_stage("train", main)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("prefect"))
    service.start()
    yield service
    service.stop()


@pytest.fixture
def slow(project: Path) -> Path:
    """The project with a slow, noting stage `train`, which is stale now, as is what comes after it."""
    (project / "mini" / "train.py").write_text(SLOW)
    with_scratch(project)
    return project


def with_scratch(project: Path) -> None:
    """`scratch`, where the stage writes as it works: a link, so that it can be another place in one step."""
    (project / "storage").mkdir()
    (project / "scratch").symlink_to("storage")
    (project / "full").mkdir()
    (project / "full" / "part").symlink_to("/dev/full")


def point_scratch(project: Path, place: str) -> None:
    (project / "other").symlink_to(place)
    (project / "other").replace(project / "scratch")


@pytest.fixture(scope="module")
def expected(finished: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes."""
    root = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(finished[0], root, symlinks=True)
    (root / "mini" / "train.py").write_text(SLOW)
    with_scratch(root)
    run("dvc", "repro", "-q", cwd=root, XDG_CONFIG_HOME=str(finished[1]))
    return {path: (root / path).read_bytes() for path in OUTPUTS}


def flow(project: Path, service: Service) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tve_pipeline.flows"],
        cwd=project,
        env=os.environ | service.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_in(project: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()) == project and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def journal(project: Path) -> list[str]:
    path = project / ".journal"
    return path.read_text().splitlines() if path.is_file() else []


def stage(project: Path) -> int:
    """The process of the stage that began last."""
    return int(next(line for line in reversed(journal(project)) if line.startswith("begin")).split()[1])


@pytest.mark.parametrize("seed", range(NUM_FAULTS), ids=lambda seed: f"{seed}-{KINDS[seed % len(KINDS)]}")
def test_after_a_fault_the_next_run_ends_with_the_same_bytes(
    seed: int, slow: Path, service: Service, expected: dict[str, bytes]
) -> None:
    kind, chance = KINDS[seed % len(KINDS)], random.Random(seed)
    begun = {each.id for each in service.runs()}
    if kind == "worker killed":
        service.deploy(slow)
        worker = service.start_worker(slow)
        service.run_deployment("reproduce/tve")
        started = None
    else:
        started = flow(slow, service)
    until(lambda: any(line.startswith("begin") for line in journal(slow)), "the stage begins", 180)
    time.sleep(chance.uniform(0, 0.8 * WORKS_FOR_S))
    if kind == "stage killed":
        os.kill(stage(slow), signal.SIGKILL)
    elif kind == "flow killed":
        assert started is not None
        os.killpg(started.pid, signal.SIGKILL)
    elif kind == "worker killed":  # and, as when a machine dies, what it had started
        boss = psutil.Process(worker.pid)
        for each in (boss, *(child for child in boss.children(recursive=True) if "prefect" in str(child.cmdline()))):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    elif kind == "server restarted":
        service.kill()
        time.sleep(chance.uniform(0, 2))
        service.start()
    elif kind == "disk full":
        point_scratch(slow, "full")
    else:
        (slow / "storage").rename(slow / "elsewhere")
    output = started.communicate(timeout=240)[0] if started is not None else ""
    if kind == "disk full":
        assert "train: disk full" in output
        point_scratch(slow, "storage")
    elif kind == "mount gone":
        assert started is not None
        assert started.returncode != 0
        (slow / "elsewhere").rename(slow / "storage")
    elif kind == "stage killed":
        assert started is not None
        assert started.returncode == 0, output  # it was tried again by itself
    elif kind == "worker killed":
        service.start_worker(slow)
        service.run_deployment("sweep/tve")
        until(
            lambda: [each.state_type for each in service.runs("attempt:2") if each.id not in begun] == ["COMPLETED"],
            "it is begun again and completes",
            240,
        )

    again = flow(slow, service)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said
    assert {path: (slow / path).read_bytes() for path in OUTPUTS} == expected
    assert "two writers" not in journal(slow)
    mine = [each for each in service.runs() if each.id not in begun]
    assert not [each.name for each in mine if each.state_type in OPEN]
    with service.client() as client:
        tasks = [each for each in client.read_task_runs() if each.flow_run_id in {run.id for run in mine}]
    assert not [each.name for each in tasks if each.state_type in OPEN]
    if kind == "flow killed":
        assert [each.state_type for each in mine].count("CRASHED") == 1
        assert "Crashed, its process is gone" in said
    if kind == "worker killed":
        service.stop_workers()
    assert not processes_in(slow)
