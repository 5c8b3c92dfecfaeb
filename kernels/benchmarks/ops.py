"""Each kernel alone on a GPU: against torch.compile of its plain PyTorch, and against that PyTorch as it is.

python -m benchmarks.ops [--dtypes bfloat16 float32] [--ops ...]

Rows are appended to kernels/results/. Without a GPU nothing is measured.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.baselines import compiled
from benchmarks.op_cases import OpCase, Sizes, op_cases
from benchmarks.records import append, circumstances, columns_of, number, red_tests, results_file
from tve.precision import DTYPES, Precision

Form = Literal["kernel", "compiled", "eager"]
OPS = (
    "pack_windows",
    "pack_masks",
    "ragged_attention",
    "pooled_attention",
    "residual_norm",
    "transfer_map",
)
NOT_MEASURED = "not measured: needs a GPU"


@dataclass(frozen=True, slots=True)
class OpRow:
    """What follows the circumstances in a row."""

    op: str
    shape: str
    dtype: str
    form: str  # kernel; its plain PyTorch compiled; the same eager
    ms_p20: float
    ms_p50: float
    ms_p80: float
    moved_mb: float  # the least that must be moved
    gb_per_s: float
    tflop_per_s: float
    ratio_over_compiled: float
    ratio_over_eager: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, appends rows and prints them; 1 without a number where tests fail, 0 where there is no GPU."""
    asked = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(NOT_MEASURED)
        return 0
    if failed := red_tests():
        print(failed, file=sys.stderr)
        return 1
    device = torch.device("cuda")
    about = circumstances(device, asked.commit)
    output = asked.output or results_file("ops", device)
    for precision in asked.dtypes:
        for case in op_cases(Sizes(), device, DTYPES[precision]):
            if case.op in asked.ops:
                rows = list(measured_rows(case, precision))
                append(output, [columns_of(about) | columns_of(row) for row in rows])
                print(*map(_line, rows), sep="\n", flush=True)
    return 0


def measured_rows(case: OpCase, precision: Precision) -> Iterator[OpRow]:
    """One row for each form."""
    program = compiled(case.run, dynamic=False)  # type: ignore[arg-type]
    forms: dict[Form, Callable[[], object]] = {
        "kernel": functools.partial(case.run, "triton"),
        "compiled": functools.partial(program, "torch"),
        "eager": functools.partial(case.run, "torch"),
    }
    times_ms = {form: _milliseconds(run) for form, run in forms.items()}
    for form in get_args(Form):
        p20, p50, p80 = times_ms[form]
        yield OpRow(
            op=case.op,
            shape=case.shape,
            dtype=precision,
            form=form,
            ms_p20=p20,
            ms_p50=p50,
            ms_p80=p80,
            moved_mb=case.moved_bytes * 1e-6,
            gb_per_s=case.moved_bytes * 1e-6 / p50,
            tflop_per_s=case.flops * 1e-9 / p50,
            ratio_over_compiled=times_ms["compiled"][1] / p50,
            ratio_over_eager=times_ms["eager"][1] / p50,
        )


def _milliseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Percentiles 20, 50 and 80 of the time on the GPU, with a cold cache before each run."""
    from triton.testing import do_bench  # here alone, so that the module imports where there is no Triton

    p20, p50, p80 = do_bench(run, quantiles=[0.2, 0.5, 0.8])
    return float(p20), float(p50), float(p80)


def _line(row: OpRow) -> str:
    return (
        f"{row.op:<17} {row.shape:<44} {row.dtype:<9} {row.form:<9} {number(row.ms_p50)!s:>8} ms "
        f"{row.gb_per_s:8.0f} GB/s {row.tflop_per_s:7.1f} TFLOP/s  "
        f"{row.ratio_over_compiled:6.2f} x compiled {row.ratio_over_eager:6.2f} x eager"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=get_args(Precision), default=("bfloat16",))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--output", type=Path, help="CSV file; by default one per device in kernels/results")
    parser.add_argument("--commit", help="where the repository's history is not at hand")
    return parser


if __name__ == "__main__":
    sys.exit(main())
