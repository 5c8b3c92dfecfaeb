"""Evaluations of coalitions per second: the evaluator against masked copies and against gathered tokens.

    python -m benchmarks.engine [--device cuda] [--models ...] [--radii 1 2] [--dtypes bfloat16 float32] [--rounds 7]

Tests come first: of code whose tests fail, no speed is measured. Rows are appended to kernels/results/.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from benchmarks.baselines import SIDES, Side, SideName, forget_compiled, sides
from benchmarks.cases import NAMES, OF_WINDOWS, ON_A_CPU, ON_A_GPU, Amounts, Case, CaseName, case
from benchmarks.ceiling import ceiling_gflops
from benchmarks.compare import Known, Measured, measure_case
from benchmarks.flops import full_pass_flops
from benchmarks.records import Circumstances, append, circumstances, columns_of, number, red_tests, results_file
from tve.backbones import Backbone, load_backbone
from tve.plain_vits import obstacle
from tve.precision import DTYPES, Precision, has_bfloat16

MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_base_patch16_224",
    "swin_base_patch4_window7_224",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What follows the circumstances in a row."""

    model: str
    radius: int | None  # None where the case has no window
    dtype: str
    case: str
    removal: str  # what the side computes: masked copies know `zero` alone
    side: str
    batch: str
    evaluations: int
    rounds: int
    per_s_p20: float
    per_s_p50: float
    per_s_p80: float
    ratio_over_a: float | None
    ratio_over_b: float | None
    ratio_over_c: float | None
    peak_mib: float
    gflop_done_per_evaluation: float
    gflop_nominal: float
    ceiling_gflops: float
    share_done: float  # of the ceiling, by the FLOPs that were done
    share_nominal: float  # of the ceiling, had every evaluation been a full pass
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run measures."""

    device: torch.device
    models: tuple[str, ...]
    radii: tuple[int, ...]
    dtypes: tuple[Precision, ...]
    cases: tuple[CaseName, ...]
    sides: tuple[SideName, ...]
    rounds: int
    amounts: Amounts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, appends rows and prints them; 1 without a number where tests fail."""
    asked = _parser().parse_args(arguments)
    if failed := red_tests():
        print(failed, file=sys.stderr)
        return 1
    torch.set_num_threads(asked.threads)
    settings = _settings(asked)
    about = circumstances(settings.device, asked.commit)
    output = asked.output or results_file("engine", settings.device)
    rows: list[Row] = []
    for measured in measured_rows(settings):
        append(output, [columns_of(about) | columns_of(row) for row in measured])
        rows += measured
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(readable(rows, about))
    print(f"\n{len(rows)} rows appended to {output}")
    return 0


def measured_rows(settings: Settings) -> Iterator[list[Row]]:
    """The rows of each case, as they are measured."""
    device = settings.device
    for model in settings.models:
        for precision in settings.dtypes:
            forget_compiled()
            backbone = load_backbone(model, "random")
            backbone.model.to(device=device, dtype=DTYPES[precision])
            ceiling = ceiling_gflops(device, DTYPES[precision])
            nominal = full_pass_flops(backbone)
            made: dict[str, dict[SideName, Side]] = {}
            known: Known = {}
            for each in _cases(settings, backbone):
                if each.removal not in made:
                    made[each.removal] = sides(backbone, each.removal, precision, settings.sides)
                images = _pictures(each, backbone, device)
                found = measure_case(made[each.removal], images, each, settings.rounds, DTYPES[precision], known)
                yield [
                    _row(model, precision, each, side, found[side.name], ceiling, nominal * 1e-9)
                    for side in made[each.removal].values()
                ]


def readable(rows: Sequence[Row], about: Circumstances) -> str:
    """Rows as a table for the terminal."""
    names = ("model", "r", "dtype", "case", "side", "batch", "per s", "p20", "p80", "/a", "/b", "/c", "MiB", "GFLOP")
    table: list[tuple[str, ...]] = [(*names, "share", "nominal")]
    for row in rows:
        ratios = (row.ratio_over_a, row.ratio_over_b, row.ratio_over_c)
        numbers = (row.per_s_p50, row.per_s_p20, row.per_s_p80, *ratios, row.peak_mib, row.gflop_done_per_evaluation)
        cells = (row.model, row.radius, row.dtype, row.case, row.side, row.batch, *map(_short, numbers))
        table.append(tuple(str(number(cell)) for cell in (*cells, _short(row.share_done), _short(row.share_nominal))))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    heading = ", ".join(f"{name} {value}" for name, value in asdict(about).items())
    ceilings = sorted({f"{row.dtype} {_short(row.ceiling_gflops)}" for row in rows})
    return "\n".join([heading, f"matrix ceiling, GFLOP/s: {'; '.join(ceilings)}", "", *lines])


def _row(
    model: str, precision: Precision, case: Case, side: Side, found: Measured, ceiling: float, nominal_gflop: float
) -> Row:
    done_gflop = found.flops_per_evaluation * 1e-9
    return Row(
        model=model,
        radius=case.radius,
        dtype=precision,
        case=case.name,
        removal=found.removal,
        side=side.name,
        batch=found.batch,
        evaluations=found.evaluations,
        rounds=len(found.per_s),
        per_s_p20=found.rate.p20,
        per_s_p50=found.rate.p50,
        per_s_p80=found.rate.p80,
        ratio_over_a=found.ratio_over.get("a"),
        ratio_over_b=found.ratio_over.get("b"),
        ratio_over_c=found.ratio_over.get("c"),
        peak_mib=found.peak_mib,
        gflop_done_per_evaluation=done_gflop,
        gflop_nominal=nominal_gflop,
        ceiling_gflops=ceiling,
        share_done=done_gflop * found.rate.p50 / ceiling,
        share_nominal=nominal_gflop * found.rate.p50 / ceiling,
        backend=side.choice.backend if side.choice else "",
        reason=side.choice.reason if side.choice else "",
    )


def _cases(settings: Settings, backbone: Backbone) -> Iterator[Case]:
    patches = backbone.patches_per_side
    droppable = not obstacle(backbone.model, backbone.image_size, patches)
    for name in settings.cases:
        if name != "zero" and not droppable:
            continue
        for radius in settings.radii if name in OF_WINDOWS else settings.radii[:1]:
            yield case(name, patches, radius, settings.amounts, settings.device)


def _pictures(case: Case, backbone: Backbone, device: torch.device) -> torch.Tensor:
    shape = (case.coalitions.shape[0], 3, backbone.image_size, backbone.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _short(value: float | None) -> str:
    return "" if value is None else str(number(float(f"{value:.3g}")))


def _settings(asked: argparse.Namespace) -> Settings:
    device = torch.device(asked.device)
    amounts = ON_A_GPU if device.type == "cuda" else ON_A_CPU
    if asked.pictures:
        amounts = replace(amounts, pictures=asked.pictures)
    return Settings(
        device=device,
        models=tuple(asked.models),
        radii=tuple(asked.radii),
        dtypes=tuple(asked.dtypes or (("bfloat16", "float32") if has_bfloat16(device) else ("float32",))),
        cases=tuple(asked.cases),
        sides=tuple(asked.sides),
        rounds=asked.rounds,
        amounts=amounts,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names; random weights")
    parser.add_argument("--radii", nargs="+", type=int, default=(1, 2), help="of the windows, patches")
    parser.add_argument("--dtypes", nargs="+", choices=get_args(Precision), help="by default those with own products")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--pictures", type=int, help="evaluated together; 1 on a CPU, 64 on a GPU")
    parser.add_argument("--output", type=Path, help="CSV file; by default one per device in kernels/results")
    parser.add_argument("--commit", help="where the repository's history is not at hand")
    return parser


if __name__ == "__main__":
    sys.exit(main())
