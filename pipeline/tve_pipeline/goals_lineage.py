"""The goals of the lineage, measured here and now: one JSON line each, and a non-zero exit where one falls short.

    python -m tve_pipeline.goals_lineage [--gigabytes 5] [--rounds 3] [--only lineage flows]

Tampering, faults and scheduled retraining are tried by tests, on real DVC projects with real signatures and a real
server; here in their full form, some forty minutes on two cores. Times of the audit are those of the command
`tve audit` beside `sha256sum` over the same files, in turn, medians of the rounds; those of a flow are beside
`dvc repro` of the same stages, of a chain and of this project's own graph.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tve_pipeline.goal_lines import Goals
from tve_pipeline.lineage.audit import audit, is_generated
from tve_pipeline.lineage.files import listed

ROOT = Path(__file__).resolve().parents[2]
TAMPERING = "tests/lineage/test_audit.py"
FAULTS = "tests/flows/test_faults.py"
RETRAINING = "tests/flows/test_retrain.py"
NUM_STAGES = 8  # of the project on which a flow is timed
SECONDS_A_STAGE, SECONDS_A_FLOW = 2.0, 3.0  # that a flow may take beyond `dvc repro`
RATIO, GRACE_S = 1.3, 2.0  # of the audit's time over that of sha256sum
NUM_SHARDS = 50
STAGE = '''"""Fills files with random bytes."""

import os
from pathlib import Path

from tve_pipeline.entry import run_stage


def main(argv: list[str]) -> None:
    folder = Path("data/big/shards")
    folder.mkdir(parents=True)
    for number in range({num_shards}):
        with (folder / f"{{number:03}}.tar").open("wb") as file:
            for _ in range({mebibytes}):
                file.write(os.urandom(2**20))


if __name__ == "__main__":
    run_stage("draw", main)
'''
GRAPH = """stages:
  draw:
    cmd: python -m big.draw
    deps: [big/draw.py]
    outs:
      - data/big/shards
"""
SALT = "salt"  # a file that every stage reads
CHAINED_STAGE = '''"""Reads what the stage before it wrote, and writes one more."""

import sys
from pathlib import Path

number = int(sys.argv[1])
before = Path(f"out/{number - 1}").read_text() if number else Path("salt").read_text()
Path("out").mkdir(exist_ok=True)
Path(f"out/{number}").write_text(before + "+")
'''
EMPTY_STAGE = '''"""Makes the outputs that it is told: files, and folders with a file, of what salt says."""

import sys
from pathlib import Path

for name in map(Path, sys.argv[1:]):
    file = name if name.suffix else name / "params.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(Path("salt").read_text())
'''


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of the large tree")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--only", nargs="+", choices=("lineage", "flows"), default=("lineage", "flows"))
    arguments = parser.parse_args(argv)
    goals = Goals()
    if "lineage" in arguments.only:
        tests_that_pass(goals, "tampering found and named", TAMPERING)
        demo_run(goals, arguments.rounds)
        large_tree(goals, arguments.gigabytes, arguments.rounds)
    if "flows" in arguments.only:
        flow_overhead(goals, arguments.rounds)
        tests_that_pass(goals, "twenty faults, after which the next run ends with the same bytes", FAULTS)
        tests_that_pass(goals, "a backbone in params is in service by the schedule alone", RETRAINING)
    return 1 if goals.fell_short else 0


def tests_that_pass(goals: Goals, goal: str, tests: str) -> None:
    """The share of tests that pass, in their full form; a skipped one did not."""
    output = _run([sys.executable, "-m", "pytest", tests], ROOT, TVE_FULL="1").stdout
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    if found.get("passed", 0) < sum(found.values()):
        print(output[-4000:], file=sys.stderr)
    goals.at_least(goal, found.get("passed", 0) / max(1, sum(found.values())), 1.0, "share")


def flow_overhead(goals: Goals, rounds: int) -> None:
    """Seconds a stage that a flow takes beyond `dvc repro`, less what it may take once; the server is running."""
    for what, write in (("a chain", write_chain), ("this project's graph, its stages empty", write_own_graph)):
        seconds: list[float] = []
        with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as environment:
            root = Path(folder, "project")
            root.mkdir()
            write(root)
            for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
                _run(command, root).check_returncode()
            count = len(_run(["dvc", "stage", "list", "--name-only"], root).stdout.split())
            for number in range(2 * rounds):
                (root / SALT).write_text(str(number))  # so that every stage is stale
                start = time.perf_counter()
                flow = number % 2 == 0
                command = [sys.executable, "-m", "tve_pipeline.flows"] if flow else ["dvc", "repro", "-q"]
                _run(command, root, **environment).check_returncode()
                seconds.append(time.perf_counter() - start)
        flows, repros = (statistics.median(seconds[first::2]) for first in (0, 1))
        print(f"# {what}, {count} stages: flow {flows:.1f} s, dvc repro {repros:.1f} s", file=sys.stderr)
        value = (flows - repros - SECONDS_A_FLOW) / count
        goals.at_most(f"{what}: flow beyond dvc repro, less 3 s, server running", value, SECONDS_A_STAGE, "s a stage")


def write_chain(root: Path) -> None:
    """A project of small stages, one after the other."""
    (root / "stage.py").write_text(CHAINED_STAGE)
    shutil.copy(ROOT / "requirements.lock", root)
    stages: dict[str, Any] = {}
    for number in range(NUM_STAGES):
        before = [f"out/{number - 1}"] if number else []
        deps = ["stage.py", SALT, *before]
        stages[f"stage{number}"] = {"cmd": f"python stage.py {number}", "deps": deps, "outs": [f"out/{number}"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def empty_command(stage: Mapping[str, Any]) -> str:
    """The command by which EMPTY_STAGE, as stage.py, makes what a stage of dvc.yaml makes."""
    outs = [*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])]
    return " ".join(["python stage.py", *(next(iter(out)) if isinstance(out, dict) else out for out in outs)])


def write_own_graph(root: Path) -> None:
    """This project's graph and code, for the active profile; its stages only make their outputs, out of nothing."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for stage in graph["stages"].values():
        stage["cmd"] = empty_command(stage)
        stage["deps"].append(SALT)
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (root / "stage.py").write_text(EMPTY_STAGE)
    for name in sorted({path.split("/")[0] for stage in graph["stages"].values() for path in stage["deps"]} - {SALT}):
        if (ROOT / name).is_dir() and not is_generated(name):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "records", "images"))
    for name in ("params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, root)


@contextlib.contextmanager
def prefect_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server on the loopback address; yields the settings of those who use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    settings = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url, "PREFECT_SERVER_API_PORT": port}
    settings |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--host", "127.0.0.1"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            time.sleep(0.5)
        yield settings
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def demo_run(goals: Goals, rounds: int) -> None:
    """The audit of the active profile's run; null where its outputs are not here."""
    seconds: float | None = None
    found: float | None = None
    try:
        report = audit(ROOT)
    except ValueError:
        report = None
    if report is not None and report.stages and not any(finding.kind == "absent" for finding in report.findings):
        found = float(len([finding for finding in report.findings if finding.severity != "note"]))
        for finding in report.findings:
            print(f"# {finding.stage}: {finding.path}: {finding.message}", file=sys.stderr)
        files = sorted(
            {path for stage in report.stages for path in (*stage.read, *stage.made) if (ROOT / path).is_file()}
        )
        seconds = _beyond(ROOT, files, rounds) if found == 0 else None
    else:
        print("# expected the outputs of the active profile, got none or not all; run `make repro`", file=sys.stderr)
    goals.at_most("findings on the demo run", found, 0, "findings")
    name = "audit of the demo run, beyond 1.3 x sha256sum"
    goals.at_most(name, seconds, GRACE_S, "s")


def large_tree(goals: Goals, gigabytes: float, rounds: int) -> None:
    """The audit of a stage whose output is that large; null where the disk is too small for it."""
    seconds: float | None = None
    if shutil.disk_usage(tempfile.gettempdir()).free > 2 * gigabytes * 1e9:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "project")
            (root / "big").mkdir(parents=True)
            mebibytes = max(1, round(gigabytes * 1e9 / 2**20 / NUM_SHARDS))
            (root / "big" / "draw.py").write_text(STAGE.format(num_shards=NUM_SHARDS, mebibytes=mebibytes))
            (root / "dvc.yaml").write_text(GRAPH)
            shutil.copy(ROOT / "requirements.lock", root)
            for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "cache.type", "hardlink"]):
                _run(command, root).check_returncode()
            _run(["dvc", "repro", "-q"], root).check_returncode()
            files = [file.relative_to(root).as_posix() for file in listed(root / "data")]
            seconds = _beyond(root, files, rounds)
    goals.at_most(f"audit of {gigabytes:g} GB, beyond 1.3 x sha256sum", seconds, GRACE_S, "s")


def _beyond(root: Path, files: Sequence[str], rounds: int) -> float:
    """Seconds of the audit less 1.3 x those of sha256sum over the same files, medians."""
    sums: Callable[[], object] = lambda: _run(["sha256sum", "--", *files], root).check_returncode()  # noqa: E731
    audits: Callable[[], object] = lambda: _run(  # noqa: E731
        [sys.executable, "-m", "tve_pipeline.cli", "audit"], root
    ).check_returncode()
    times: dict[str, list[float]] = {"sums": [], "audits": []}
    for _ in range(rounds):
        for name, program in (("sums", sums), ("audits", audits)):
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"# sha256sum {medians['sums']:.2f} s, audit {medians['audits']:.2f} s", file=sys.stderr)
    return medians["audits"] - RATIO * medians["sums"]


def _run(command: Sequence[str], root: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "pipeline")))
    environment = os.environ | {"PATH": path, "PYTHONPATH": modules, "DVC_NO_ANALYTICS": "1"} | settings
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
