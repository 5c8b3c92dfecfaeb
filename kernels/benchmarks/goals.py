"""The coalition engine's goals, measured here and now: one JSON line each, and a non-zero exit where one falls short.

    python -m benchmarks.goals [--threads 1] [--rounds 7] [--skip-stream]

A goal that this machine cannot measure (a GPU's on a CPU, and the other way round) has the value null. Nothing is read
from a file: speeds are timed side by side in this process, errors computed against float64, proofs run.
"""

import argparse
import copy
import functools
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import SideName, forget_compiled, sides
from benchmarks.cases import ON_A_CPU, ON_A_GPU, CaseName, case
from benchmarks.ceiling import ceiling_gflops
from benchmarks.compare import Measured, measure_case
from benchmarks.flops import full_pass_flops
from benchmarks.measure import paired_seconds, peak_mib, resident_mib, speedup
from tve.backbones import Backbone, load_backbone
from tve.coalitions import WindowCoalitions, Windows, random_halves
from tve.evaluator import CoalitionEvaluator
from tve.memory import peak_bytes
from tve.precision import DTYPES, Precision, choose_precision
from tve.removal import Removal, zero_pixels
from tve_kernels.compile_proof import OPS, TARGETS, prove
from tve_pipeline.goal_lines import Goals

ROOT = Path(__file__).resolve().parents[2]
RADIUS = 2
ON_GPU_PRECISION: Precision = "bfloat16"
KEPT_OVER_A = {"vit_tiny_patch16_224": 9.5, "vit_small_patch16_224": 9.0}
OVER_A: dict[CaseName, float] = {"pairs": 2.1, "half": 2.2}
DROP_CASES: tuple[CaseName, ...] = ("kept", "removed", "pairs", "half", "fidelity")
ON_GPU_MODEL = "vit_base_patch16_224"
DEFINITION_TEST = "test_drop_equals_forbidding_attention"  # a case an architecture of timm
CPU_BUDGET_MIB, GPU_BUDGET_MIB = 64, 512
STREAMED_PICTURES, STREAM_BATCH, GROWTH_MIB = 50_000, 50, 16.0
FLOORS: dict[Precision, float] = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}  # of the largest element


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.goals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed")
    parser.add_argument("--skip-stream", action="store_true", help="leave out the 50,000 pictures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    goals = Goals()
    proofs(goals)
    errors(goals, device)
    memory(goals, device, arguments.rounds)
    stream(goals, device, skip=arguments.skip_stream)
    speed_on_a_cpu(goals, device, arguments.rounds)
    speed_on_a_gpu(goals, device, arguments.rounds)
    return 1 if goals.fell_short else 0


def proofs(goals: Goals) -> None:
    """The tests of ops and evaluator, and every kernel compiled for every target."""
    ops = pytest_counts("tests/kernels")
    goals.at_least("kernels against float64, tests passed", ops["passed"] / ops["all"], 1.0, "share")
    counts = pytest_counts("tests/test_evaluator.py", "tests/test_evaluator_architectures.py")
    goals.at_least("evaluator, tests passed", counts["passed"] / counts["all"], 1.0, "share")
    goals.at_least("architectures equal to their definition", counts[DEFINITION_TEST], 15, "architectures")
    rows = prove(OPS, tuple(TARGETS))
    clean = set(TARGETS) - {row.target for row in rows if row.problem}
    goals.at_least("targets for which every kernel compiles without a spill", float(len(clean)), 4, "targets")
    goals.at_most("spills", float(sum(row.usage.spilled_bytes for row in rows if row.usage)), 0, "bytes")


def errors(goals: Goals, device: torch.device) -> None:
    """Largest error against float64 as a multiple of what is allowed: 2 x that of PyTorch in the dtype, + a floor."""
    backbone = redrawn("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    present = random_halves(6, 14, torch.Generator().manual_seed(1)).unflatten(0, (2, 3))
    present[:, 1] = Windows(14, RADIUS).kept_NPP()[40]
    for removal in ("drop", "zero"):
        exact = defined(backbone.model.double(), images, present, removal)
        for precision, floor in FLOORS.items():
            model = copy.deepcopy(backbone.model).to(device, DTYPES[precision])
            plain = defined(model, images.to(device), present.to(device), removal).cpu()
            on_device = Backbone(backbone.config, backbone.model.float()).to(device)
            evaluator = CoalitionEvaluator(on_device, removal, precision=precision)
            found = evaluator(images.to(device), present.to(device)).cpu()
            allowed = 2 * float((plain - exact).abs().max()) + floor * float(exact.abs().max())
            error = float((found - exact).abs().max())
            goals.at_most(f"error of {removal} in {precision}, of what is allowed", error / allowed, 1.0, "share")
            backbone.model.cpu()


def memory(goals: Goals, device: torch.device, rounds: int) -> None:
    """Live tensors, and on a CPU the process, against the budget; and what keeping to it costs."""
    backbone = load_backbone("vit_tiny_patch16_224", "random").to(device)
    num_pictures, mib = (4, CPU_BUDGET_MIB) if device.type == "cpu" else (64, GPU_BUDGET_MIB)
    images = torch.randn(num_pictures, 3, 224, 224, device=device)
    centre = torch.arange(0, 196, 7, device=device).repeat(2).expand(num_pictures, -1)
    given = (
        images,
        WindowCoalitions(Windows(14, RADIUS), centre, torch.arange(56, device=device).expand_as(centre) < 28),
    )
    embeddings_mib = num_pictures * 56 * backbone.embed_dim * 4 / 2**20
    make = functools.partial(CoalitionEvaluator, backbone, "drop", precision="auto")
    budgeted, unlimited = make(memory_mib=mib), make(memory_mib=2**20)
    if device.type == "cpu":
        make(memory_mib=mib)(*given)  # what libraries load once is not the evaluator's
        grown = peak_mib(functools.partial(budgeted, *given), device)  # its first call, in which it measures its needs
        goals.at_most(f"growth of the process, of a budget of {mib} MiB", (grown - embeddings_mib) / mib, 1.1, "share")
        live_mib = peak_bytes(functools.partial(budgeted, *given)) / 2**20
    else:
        budgeted(*given)
        live_mib = peak_mib(functools.partial(budgeted, *given), device)
    goals.at_most(f"peak of live tensors, of a budget of {mib} MiB", (live_mib - embeddings_mib) / mib, 1.1, "share")
    unlimited(*given)
    programs = {"budgeted": functools.partial(budgeted, *given), "unlimited": functools.partial(unlimited, *given)}
    elapsed_s = paired_seconds(programs, rounds, device)
    share = speedup(*([1 / each for each in elapsed_s[name]] for name in ("budgeted", "unlimited")))
    goals.at_least(f"throughput with {mib} MiB, of that without a budget", share, 0.95, "share")


def stream(goals: Goals, device: torch.device, *, skip: bool) -> None:
    """Memory over 50,000 pictures of two coalitions each, after the first tenth, in which the heap finds its size."""
    growth: float | None = None
    if not skip:
        backbone = load_backbone("vit_tiny_patch16_224", "random").to(device)
        evaluator = CoalitionEvaluator(backbone, "drop", precision="auto")
        windows, generator = Windows(14, RADIUS), torch.Generator().manual_seed(0)
        images = torch.randn(STREAM_BATCH, 3, 224, 224, generator=generator).to(device)
        kept = torch.ones(STREAM_BATCH, 2, dtype=torch.bool, device=device)
        settled = 0.0
        for number in range(0, STREAMED_PICTURES, STREAM_BATCH):
            centre = torch.randint(196, (STREAM_BATCH, 2), generator=generator).to(device)
            evaluator(images.roll(number, -1), WindowCoalitions(windows, centre, kept))
            if number == STREAMED_PICTURES // 10:
                settled = resident_mib(device)
        growth = resident_mib(device) - settled
    goals.at_most("growth over 45,000 pictures x 2 coalitions, after 5,000", growth, GROWTH_MIB, "MiB")


def speed_on_a_cpu(goals: Goals, device: torch.device, rounds: int) -> None:
    for model, precision in cpu_cases(device):
        found: Mapping[CaseName, Mapping[SideName, Measured]] = {}
        if device.type == "cpu":
            names: tuple[SideName, ...] = ("masked_eager", "grouped_eager", "grouped_compiled", "evaluator")
            found = timed_cases(model, precision, DROP_CASES, names, device, rounds)
        for name in DROP_CASES:
            ratio = found[name]["evaluator"].ratio_over if found else {}
            bar = KEPT_OVER_A[model] if name == "kept" else OVER_A.get(name)
            if bar is not None:
                goals.at_least(f"CPU, {model}, {precision}, {name} over (a)", ratio.get("a"), bar, "x")
            goals.at_least(f"CPU, {model}, {precision}, {name} over (c)", ratio.get("c"), 1.06, "x")


def cpu_cases(device: torch.device) -> list[tuple[str, Precision]]:
    """Models and the arithmetic in which all sides run: the CPU's fastest, and float32 besides for the smallest."""
    fastest = choose_precision("auto", device if device.type == "cpu" else torch.device("cpu")).precision
    smallest, *_ = KEPT_OVER_A
    found: list[tuple[str, Precision]] = [(model, fastest) for model in KEPT_OVER_A]
    return found if fastest == "float32" else [*found, (smallest, "float32")]


def speed_on_a_gpu(goals: Goals, device: torch.device, rounds: int) -> None:
    found: Mapping[CaseName, Mapping[SideName, Measured]] = {}
    share: float | None = None
    if device.type == "cuda":
        names: tuple[SideName, ...] = ("masked_compiled", "grouped_eager", "grouped_compiled", "evaluator")
        found = timed_cases(ON_GPU_MODEL, ON_GPU_PRECISION, ("zero", "kept", "pairs"), names, device, rounds)
        backbone = load_backbone(ON_GPU_MODEL, "random").to(device=device, dtype=DTYPES[ON_GPU_PRECISION])
        nominal = full_pass_flops(backbone) * 1e-9
        share = nominal * found["zero"]["evaluator"].rate.p50 / ceiling_gflops(device, DTYPES[ON_GPU_PRECISION])
    for name, letter, bar in (
        ("zero", "b", 1.08),
        ("kept", "b", 8.0),
        ("kept", "c", 1.15),
        ("pairs", "b", 2.0),
        ("pairs", "c", 1.08),
    ):
        ratio = found[name]["evaluator"].ratio_over if found else {}  # type: ignore[index]
        goals.at_least(f"GPU, {ON_GPU_MODEL}, {name} over ({letter})", ratio.get(letter), bar, "x")
    goals.at_least(f"GPU, {ON_GPU_MODEL}, zero, of the measured matrix ceiling", share, 0.55, "share")


def timed_cases(
    model: str,
    precision: Precision,
    cases: Sequence[CaseName],
    names: tuple[SideName, ...],
    device: torch.device,
    rounds: int,
) -> dict[CaseName, dict[SideName, Measured]]:
    """Every case of a model, all sides in turn, each at its own best batch."""
    forget_compiled()
    backbone = load_backbone(model, "random").to(device=device, dtype=DTYPES[precision])
    found = {}
    for name in cases:
        each = case(name, backbone.patches_per_side, RADIUS, ON_A_CPU if device.type == "cpu" else ON_A_GPU, device)
        made = sides(backbone, each.removal, precision, names)
        shape = (each.coalitions.shape[0], 3, backbone.image_size, backbone.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        found[name] = measure_case(made, images, each, rounds, DTYPES[precision])
    return found


@torch.no_grad()
def defined(model: Any, images_B3SS: Tensor, present_BKPP: Tensor, removal: Removal) -> Tensor:
    """Embeddings [B, K, D], float64, by PyTorch alone in the model's dtype: attention forbidden, or pixels masked."""
    dtype = next(model.parameters()).dtype
    rows = []
    for image, present_KPP in zip(images_B3SS.to(dtype), present_BKPP, strict=True):
        for present_PP in present_KPP:
            if removal == "zero":
                features = model.forward_features(zero_pixels(image[None], present_PP[None]))
            else:
                token = torch.ones(model.num_prefix_tokens, dtype=torch.bool, device=image.device)
                visible = torch.cat([token, present_PP.flatten()])[None, None, None]
                features = model.forward_features(image[None], attn_mask=visible)
            rows.append(model.forward_head(features, pre_logits=True)[0])
    return torch.stack(rows).reshape(*present_BKPP.shape[:2], -1).double()


def redrawn(architecture: str) -> Backbone:
    """Random weights, every parameter moved from where initialisation left it."""
    torch.manual_seed(0)
    backbone = load_backbone(architecture, "random")
    for parameter in backbone.model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return backbone


def pytest_counts(*paths: str) -> dict[str, int]:
    """Tests by outcome, their number, and how many cases of the comparison with the definition passed.

    A skipped test counts as one that did not pass; those that need two GPUs are left out where there are fewer.
    """
    apart = ["-m", "not two_gpus"] if torch.cuda.device_count() < 2 else []
    command = [sys.executable, "-m", "pytest", "-v", "-v", *apart, *paths]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    of_definition = len(re.findall(rf"::{DEFINITION_TEST}\[.*PASSED", output))
    return {"passed": 0} | found | {"all": max(1, sum(found.values())), DEFINITION_TEST: of_definition}


if __name__ == "__main__":
    sys.exit(main())
