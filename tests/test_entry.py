"""Entry points: a user's mistake is one line on stderr and exit code 1, and nothing was done before it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tve_pipeline.entry import run_stage

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a stage that takes BACKBONE DATASET and reads `file`; says what it ended with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").symlink_to(ROOT / "profiles" / "scenes.yaml")

    def call(*arguments: str, file: str = "params.yaml", error: Exception | None = None) -> str:
        def main(argv: list[str]) -> None:
            if error is not None:
                raise error
            print(Path(file).read_text()[:0] + f"ran {argv}")

        monkeypatch.setattr(sys, "argv", ["tve_pipeline.heads", *arguments])
        try:
            run_stage("heads", main, "BACKBONE", "DATASET")
        except SystemExit as exit:
            return str(exit.code)
        return "passed"

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "heads: expected BACKBONE DATASET, got []"),
        (("vit_scenes",), "heads: expected BACKBONE DATASET, got ['vit_scenes']"),
        (("resnet", "scenes"), "heads: params.yaml: backbones: no 'resnet'; known backbones: vit_scenes"),
        (
            ("vit_scenes", "cats"),
            "heads: params.yaml: datasets: no 'cats'; known datasets: scenes_unlabelled, scenes",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_work(
    call: Callable[..., str], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert call(*arguments) == message
    assert capsys.readouterr().out == ""


def test_a_stage_whose_arguments_fit_runs(call: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("vit_scenes", "scenes") == "passed"
    assert capsys.readouterr().out == "ran ['vit_scenes', 'scenes']\n"


def test_a_mistake_that_a_stage_finds_becomes_one_line_and_any_other_error_keeps_its_traceback(
    call: Callable[..., str],
) -> None:
    names = ("vit_scenes", "scenes")
    assert call(*names, error=ValueError("radius: expected 1")) == "heads: radius: expected 1"
    assert call(*names, error=FileNotFoundError("expected a file")) == "heads: expected a file"
    expected = "heads: expected none.json, which does not exist; `dvc repro` makes what a stage reads"
    assert call(*names, file="none.json") == expected
    with pytest.raises(RuntimeError, match="step 3"):
        call(*names, error=RuntimeError("step 3"))


def test_a_mistake_on_the_command_line_prints_one_line_and_ends_with_1() -> None:
    command = [sys.executable, "-m", "tve_pipeline.shards"]
    paths = [str(ROOT), str(ROOT / "pipeline"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "shards: expected DATASET, got []\n")
