"""The goals of the lineage, measured here and now: one JSON line each, and a non-zero exit where one falls short.

    python -m tve_pipeline.goals_lineage [--gigabytes 5] [--rounds 3]

Tampering is tried by the tests of the audit, each on a real DVC project with real signatures. Times are those of the
command `tve audit` beside `sha256sum` over the same files, in turn, medians of the rounds.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tve_pipeline.goal_lines import Goals
from tve_pipeline.lineage.audit import audit
from tve_pipeline.lineage.files import listed

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/lineage/test_audit.py"
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of the large tree")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    arguments = parser.parse_args(argv)
    goals = Goals()
    tampering(goals)
    demo_run(goals, arguments.rounds)
    large_tree(goals, arguments.gigabytes, arguments.rounds)
    return 1 if goals.fell_short else 0


def tampering(goals: Goals) -> None:
    """Every promise of docs/lineage.md broken: the share of the tests that pass; a skipped one did not."""
    output = _run([sys.executable, "-m", "pytest", TESTS], ROOT).stdout
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    goals.at_least("tampering found and named", found.get("passed", 0) / max(1, sum(found.values())), 1.0, "share")


def demo_run(goals: Goals, rounds: int) -> None:
    """The audit of the active profile's run; null where it was not made here or left no evidence."""
    seconds: float | None = None
    name = "audit of the demo run, beyond 1.3 x sha256sum"
    try:
        report = audit(ROOT)
    except ValueError:
        report = None
    if report is not None and report.stages and all(stage.standing != "missing" for stage in report.stages):
        goals.at_most(
            "findings on the demo run", float(len([f for f in report.findings if f.severity != "note"])), 0, "findings"
        )
        files = sorted(
            {path for stage in report.stages for path in (*stage.read, *stage.made) if (ROOT / path).is_file()}
        )
        seconds = _beyond(ROOT, files, rounds)
    else:
        goals.at_most("findings on the demo run", None, 0, "findings")
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


def _run(command: Sequence[str], root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "pipeline")))
    environment = os.environ | {"PATH": path, "PYTHONPATH": modules, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
