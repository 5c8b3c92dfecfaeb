"""The three commands, on a tiny model and on tiny tensors."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baselines, engine, ops, table
from benchmarks.cases import Amounts
from benchmarks.engine import Row
from benchmarks.flops import flops
from benchmarks.op_cases import OpCase, Sizes, op_cases
from benchmarks.records import append
from tve.backbones import Backbone

CPU = torch.device("cpu")
SMALL = Sizes(2, patches_per_side=3, width=64, heads=2, radii=(1,), windows=9, halves=4, whole=2, classes=5)


@pytest.fixture
def small_run(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the tiny model, without a compiler, without tests, on a ceiling of 100 GFLOP/s."""
    sizes = {"eager copies": (4,), "compiled copies": (3,), "eager rows": (50,), "compiled rows": (50,)}
    monkeypatch.setitem(baselines.CANDIDATES, "cpu", sizes | {"static rows": (50,), "MiB": (64,)})
    monkeypatch.setattr(baselines, "compiled", lambda function, *, dynamic: function)
    monkeypatch.setattr(engine, "load_backbone", lambda *_: copy.deepcopy(tiny))
    monkeypatch.setattr(engine, "ceiling_gflops", lambda *_: 100.0)
    monkeypatch.setattr(engine, "ON_A_CPU", Amounts(pictures=1, halves=2, orders=1, zeros=2))
    monkeypatch.setattr(engine, "red_tests", lambda: "")
    monkeypatch.setattr(engine, "forget_compiled", lambda: None)


ASKED = ["--device", "cpu", "--models", "vit_tiny", "--dtypes", "float32", "--rounds", "2", "--commit", "abc1234"]


@pytest.mark.usefixtures("small_run")
def test_a_run_appends_a_row_for_each_case_and_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    cases = ["--cases", "kept", "half", "zero", "--radii", "0", "1"]
    assert engine.main([*ASKED, *cases, "--output", str(output)]) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [("kept", "0")] * 5 + [("kept", "1")] * 5 + [("half", "")] * 5 + [("zero", "")] * 3
    assert [(row["case"], row["radius"]) for row in rows] == expected
    ours = next(row for row in rows if row["side"] == "evaluator")
    assert (ours["backend"], ours["commit"], ours["threads"], ours["rounds"]) == ("torch", "abc1234", "1", "2")
    assert ours["reason"]
    for row in rows:
        done, nominal = float(row["gflop_done_per_evaluation"]), float(row["gflop_nominal"])
        assert float(row["per_s_p20"]) <= float(row["per_s_p50"]) <= float(row["per_s_p80"])
        assert float(row["share_done"]) == pytest.approx(done * float(row["per_s_p50"]) / 100, rel=1e-2)
        assert float(row["share_nominal"]) == pytest.approx(nominal * float(row["per_s_p50"]) / 100, rel=1e-2)
        assert (row["ratio_over_c"] == "") == (row["case"] == "zero")
    printed = capsys.readouterr().out
    assert printed.count("evaluator") == 4
    assert "matrix ceiling, GFLOP/s: float32 100" in printed


@pytest.mark.usefixtures("small_run")
def test_no_number_is_printed_where_tests_are_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "red_tests", lambda: "1 failed")
    monkeypatch.setattr(engine, "measured_rows", lambda _: pytest.fail("measured"))
    output = tmp_path / "rows.csv"
    assert engine.main([*ASKED, "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "1 failed\n")
    assert not output.exists()


def test_without_a_gpu_no_op_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "rows.csv"
    assert ops.main(["--output", str(output)]) == 0
    assert capsys.readouterr().out == "not measured: needs a GPU\n"
    assert not output.exists()


def made_op_cases() -> list[OpCase]:
    return list(op_cases(SMALL, CPU, torch.float32))


@pytest.mark.parametrize("number", range(len(made_op_cases())))
def test_every_op_case_runs_and_says_what_it_computes(number: int) -> None:
    made = made_op_cases()[number]
    assert made.op in ops.OPS
    assert made.moved_bytes > 0
    assert flops(lambda: made.run("torch")) == made.flops


def test_every_op_has_a_case() -> None:
    assert {made.op for made in made_op_cases()} == set(ops.OPS)


def test_the_windows_of_op_cases_have_the_lengths_of_windows() -> None:
    packed: Any = made_op_cases()[0].run("torch")
    assert packed.shape == (9 + 4 * 4 + 4 * 6 + 9, 4 * 64)  # class tokens, corners, edges, the middle


def test_forms_of_an_op_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(1.0, 2.0, 3.0), (5.0, 6.0, 7.0), (10.0, 20.0, 30.0)])
    monkeypatch.setattr(ops, "_milliseconds", lambda run: next(times))
    monkeypatch.setattr(ops, "compiled", lambda function, *, dynamic: function)
    case = OpCase("residual_norm", "any", lambda backend: None, moved_bytes=4 * 10**6, flops=8 * 10**9)
    kernel, compiled, eager = ops.measured_rows(case, "float32")
    assert (kernel.ms_p50, kernel.gb_per_s, kernel.tflop_per_s) == (2.0, 2.0, 4.0)
    assert (kernel.ratio_over_compiled, kernel.ratio_over_eager) == (3.0, 10.0)
    assert (compiled.form, compiled.ratio_over_compiled, eager.ratio_over_eager) == ("compiled", 1.0, 1.0)


def row(date: str, side: str, per_s: float, **changes: Any) -> dict[str, str]:
    columns = dict.fromkeys(Row.__slots__, "1") | {"backend": "", "reason": ""}
    about = {"date": date, "commit": "abc1234", "machine": "A CPU", "threads": "2"}
    versions = {"torch": "2.15", "timm": "1.0", "triton": ""}
    given = {"model": "vit", "radius": "2", "dtype": "float32", "case": "kept", "side": side, "per_s_p50": str(per_s)}
    return about | versions | columns | given | changes


def test_the_table_shows_the_newest_rows_and_the_faster_form() -> None:
    sides = {"masked_eager": 10.0, "grouped_eager": 40.0, "grouped_compiled": 80.25, "evaluator": 1234.0}
    old = [row("2026-01-01T00:00:00Z", side, per_s / 2) for side, per_s in sides.items()]
    new = [row("2026-02-01T00:00:00Z", side, per_s, ratio_over_b="") for side, per_s in sides.items()]
    lines = table.markdown([*old, *new]).splitlines()
    assert lines[2] == "| vit | float32 | kept, r = 2 | 10 |  | 80.2 | 1,234 | 1.00 |  | 1.00 | 1 | 100% / 100% |"
    assert lines[3] == ""
    assert lines[4:] == [
        "*Evaluations per second on A CPU, threads: 2; torch 2.15, timm 1.0; commit abc1234, 2026-02-01.*"
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    readme, rows = tmp_path / "README.md", tmp_path / "rows.csv"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    append(rows, [row("2026-01-01T00:00:00Z", "evaluator", 5.0)])
    for _ in range(2):
        assert table.main([str(rows), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| model |")
    assert text.endswith(f"*\n{table.END}\nafter\n")
    assert "old" not in text
    assert text.count("| vit |") == 1


@pytest.mark.parametrize("text", ["none", f"{table.END}{table.BEGIN}", f"{table.BEGIN}{table.BEGIN}{table.END}"])
def test_a_readme_without_markers_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="put them where the table goes"):
        table.replaced(text, "| a |")
