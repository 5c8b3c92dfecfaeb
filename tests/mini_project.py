"""A small DVC project whose stages are real processes that leave signed evidence: made once, copied for each test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STAGE = """
from pathlib import Path
import yaml
from tve_pipeline.entry import run_stage

def main(argv):
    params = yaml.safe_load(Path("params.yaml").read_text())
    {work}

if __name__ == "__main__":
    run_stage("{name}", main)
"""
WORK = {
    "draw": """folder = Path("data/mini/shards"); folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(bytes([params["draw"]["seed"] + number]) * 5000)""",
    "train": """Path("models/mini").mkdir(parents=True, exist_ok=True)
    shards = b"".join(file.read_bytes()[:9] for file in sorted(Path("data/mini/shards").iterdir()))
    Path("models/mini/model.bin").write_bytes(shards * params["train"]["steps"])""",
    "export": """folder = Path("models/mini/export"); folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(Path("models/mini/model.bin").read_bytes()[::-1])
    (folder / "config.json").write_text("{}")""",
    "score": """Path("results/mini").mkdir(parents=True, exist_ok=True)
    Path("results/mini/metrics.json").write_text(str(sum(Path("models/mini/export/weights.bin").read_bytes())))""",
}
DEPS = {"draw": [], "train": ["data/mini/shards"], "export": ["models/mini/model.bin"], "score": ["models/mini/export"]}
OUTS = {
    "draw": "data/mini/shards",
    "train": "models/mini/model.bin",
    "export": "models/mini/export",
    "score": "results/mini/metrics.json",
}


def run(*command: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """In an environment in which `python` is this one, and DVC and git ask nobody."""
    settings = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "pipeline"))),
        "DVC_NO_ANALYTICS": "1",
    }
    ended = subprocess.run(command, cwd=cwd, env=settings | env, capture_output=True, text=True)
    assert not check or ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def commit(root: Path, message: str) -> None:
    run("git", "add", "-A", cwd=root)
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message, cwd=root)


def write_project(root: Path) -> None:
    (root / "mini").mkdir(parents=True)
    lines = ["stages:"]
    for name, work in WORK.items():
        (root / "mini" / f"{name}.py").write_text(STAGE.replace("{name}", name).replace("{work}", work))
        lines += [
            f"  {name}:",
            f"    cmd: python -m mini.{name}",
            f"    params: [{'draw' if name == 'draw' else 'train'}]",
        ]
        lines += [f"    deps: [{', '.join([f'mini/{name}.py', *DEPS[name]])}]", "    outs:", f"      - {OUTS[name]}"]
    (root / "dvc.yaml").write_text("\n".join(lines) + "\n")
    (root / "params.yaml").write_text("profile: mini\ndraw: {seed: 7}\ntrain: {steps: 3, seed: 1}\n")
    shutil.copy(ROOT / "requirements.lock", root / "requirements.lock")
    (root / ".gitignore").write_text("__pycache__\n")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The project after `dvc repro`, all committed, its key trusted; and the folder of user settings with the key."""
    home, root = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("made") / "project"
    write_project(root)
    run("git", "init", "-q", "-b", "main", cwd=root)
    run("dvc", "init", "-q", cwd=root)
    run("python", "-m", "tve_pipeline.cli", "keys", cwd=root, XDG_CONFIG_HOME=str(home))
    commit(root, "project")
    run("dvc", "repro", "-q", cwd=root, XDG_CONFIG_HOME=str(home))
    run("python", "-m", "tve_pipeline.cli", "keys", "trust", cwd=root, XDG_CONFIG_HOME=str(home))
    commit(root, "results")
    return root, home


@pytest.fixture
def project(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoiled."""
    root, home = finished
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.delenv("TVE_SIGNING_KEY", raising=False)
    shutil.copytree(root, tmp_path / "project", symlinks=True)
    return tmp_path / "project"
