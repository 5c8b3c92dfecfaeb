"""Rows and the circumstances that they name."""

import csv
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import records
from benchmarks.records import append, circumstances, number, red_tests, results_file

CPU = torch.device("cpu")


def test_appending_keeps_the_header_and_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append(path, [{"model": "a", "per_s": 1}])
    append(path, [{"model": "b, c", "per_s": 2}, {"model": "d", "per_s": 3}])
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["model", "per_s"], ["a", "1"], ["b, c", "2"], ["d", "3"]]


def test_rows_with_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append(path, [{"model": "a"}])
    with pytest.raises(ValueError, match=r"expected the columns \['model', 'per_s'\], got \['model'\]"):
        append(path, [{"model": "a", "per_s": 1}])
    assert path.read_text() == "model\na\n"


@pytest.mark.parametrize(
    ("value", "written"),
    [(1234567.0, "1235000"), (0.000012345, "0.000012"), (3.0, "3"), (10.0, "10"), (None, ""), (7, 7), ("x", "x")],
)
def test_numbers_are_written_short_and_never_in_powers_of_ten(value: object, written: object) -> None:
    assert number(value) == written


def test_circumstances_name_the_machine_and_the_commit() -> None:
    about = circumstances(CPU)
    assert about.machine
    assert about.commit == "unknown" or 7 <= len(about.commit.removesuffix("+")) <= 40
    assert about.date.endswith("Z")
    assert circumstances(CPU, "abc1234").commit == "abc1234"


def test_a_commit_is_marked_where_files_differ_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    git = "git -c user.name=n -c user.email=e@e.e -c init.defaultBranch=main"
    assert records._commit() == "unknown"
    (tmp_path / "file").write_text("1")
    for command in ("init -q", "add .", "commit -qm first"):
        assert subprocess.run(f"{git} {command}", shell=True, cwd=tmp_path).returncode == 0
    clean = records._commit()
    assert not clean.endswith("+")
    (tmp_path / "file").write_text("2")
    assert records._commit() == f"{clean}+"


def test_the_results_of_a_device_are_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "machine", lambda device: "NVIDIA H100 80GB HBM3 (x)")
    assert results_file("engine", CPU) == records.RESULTS / "engine_nvidia-h100-80gb-hbm3-x.csv"


def test_red_tests_are_told_with_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert 1 == 2, 'broken kernel'\n")
    assert "broken kernel" in red_tests([str(tmp_path / "test_it.py")])


@pytest.mark.parametrize(("code", "said"), [(0, ""), (1, "1 failed"), (4, "1 failed"), (5, "1 failed")])
def test_anything_but_success_is_red(monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> CompletedProcess[str]:
        commands.append(command)
        return CompletedProcess(command, code, stdout="1 failed", stderr="")

    monkeypatch.setattr("subprocess.run", run)
    assert red_tests() == said
    assert commands[0][:3] == [sys.executable, "-m", "pytest"]
    assert set(records.TESTS) < set(commands[0])


def test_the_tests_that_are_run_first_exist() -> None:
    assert all((records.ROOT / test).exists() for test in records.TESTS)
