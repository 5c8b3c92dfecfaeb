"""One case on all sides: their agreement, each side's best batch, paired timings, memory and FLOPs."""

import functools
import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import LETTERS, Candidate, Embed, Side, SideName
from benchmarks.cases import Case, some
from benchmarks.flops import flops
from benchmarks.measure import Rate, fastest, paired_seconds, peak_mib, rate, speedup
from tve.coalitions import Coalitions

# Relative error between two sides that compute the same, in the norm over all embeddings of a case.
ALLOWED: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


Known = dict[tuple[SideName, int], Candidate]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side needed for one case."""

    removal: str  # what it computed
    batch: str  # its best setting, with the unit
    evaluations: int  # of one round
    per_s: tuple[float, ...]  # evaluations per second, a number a round
    rate: Rate
    ratio_over: Mapping[str, float]  # "a", "b", "c" where these ran; c is the faster of its two forms
    peak_mib: float
    flops_per_evaluation: float


def measure_case(
    sides: Mapping[SideName, Side],
    images_B3SS: Tensor,
    case: Case,
    rounds: int,
    dtype: torch.dtype,
    known: Known | None = None,
) -> dict[SideName, Measured]:
    """Every side's measurements of one case, all in this process.

    Args:
        sides: of one backbone, as `baselines.sides` makes them for the case's removal.
        images_B3SS: the case's pictures, float32, on the device.
        case: what is evaluated.
        rounds: how often each side is timed.
        dtype: of the passes, which says how closely the sides must agree.
        known: the best settings of masked sides, by evaluations a round, which is all that their cost depends on; what
            is found is added. Of one model, dtype and device.

    Raises:
        ValueError: two sides that compute the same disagree.
    """
    device = images_B3SS.device
    given = {name: _share(case.coalitions, side.at_most) for name, side in sides.items()}
    best: dict[SideName, Candidate] = {}
    with torch.no_grad():
        for name, side in sides.items():
            key = (name, given[name].shape[0] * given[name].shape[1])
            if known is not None and key in known:
                best[name] = known[key]
                continue
            programs = [functools.partial(each.embed, images_B3SS, given[name]) for each in side.candidates]
            best[name] = side.candidates[fastest(programs, device)]
            if known is not None and side.at_most is not None:
                known[key] = best[name]
        _require_agreement(sides, {name: each.embed for name, each in best.items()}, images_B3SS, case, dtype)
        runs = {name: functools.partial(each.embed, images_B3SS, given[name]) for name, each in best.items()}
        elapsed_s = paired_seconds(runs, rounds, device)
        gc.collect()
        peaks = {name: peak_mib(run, device) for name, run in runs.items()}
        done = _flops(sides, given, images_B3SS)
    evaluations = {name: coalitions.shape[0] * coalitions.shape[1] for name, coalitions in given.items()}
    per_s = {name: tuple(evaluations[name] / each for each in elapsed_s[name]) for name in sides}
    rates = {name: rate(evaluations[name], elapsed_s[name]) for name in sides}
    references = _references(rates)
    return {
        name: Measured(
            removal=side.removal,
            batch=best[name].batch,
            evaluations=evaluations[name],
            per_s=per_s[name],
            rate=rates[name],
            ratio_over={letter: speedup(per_s[name], per_s[other]) for letter, other in references.items()},
            peak_mib=peaks[name],
            flops_per_evaluation=done[name] / evaluations[name],
        )
        for name, side in sides.items()
    }


def relative_error(actual_BKD: Tensor, expected_BKD: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64; NaN where an element is not finite."""
    actual_BKD, expected_BKD = actual_BKD.double(), expected_BKD.double()
    return float((actual_BKD - expected_BKD).norm() / expected_BKD.norm())


def _require_agreement(
    sides: Mapping[SideName, Side], embed: Mapping[SideName, Embed], images_B3SS: Tensor, case: Case, dtype: torch.dtype
) -> None:
    """Sides that compute the same removal must agree, on the coalitions that the one with the fewest evaluates."""
    for removal in {side.removal for side in sides.values()}:
        alike = [name for name, side in sides.items() if side.removal == removal]
        limits = [limit for name in alike if (limit := sides[name].at_most) is not None]
        coalitions = _share(case.coalitions, min(limits, default=None))
        results = {name: embed[name](images_B3SS, coalitions) for name in alike}
        for name in alike[1:]:
            error = relative_error(results[name], results[alike[0]])
            if not error < ALLOWED[dtype]:
                raise ValueError(
                    f"{name}: expected the embeddings of {alike[0]} within {ALLOWED[dtype]:g} on case {case.name} in "
                    f"{dtype}, got a relative error of {error:.3g}; no speed of a wrong answer"
                )


def _share(coalitions: Coalitions, at_most: int | None) -> Coalitions:
    """Of each picture as many coalitions, evenly spaced, as make at most so many in all, but one at least."""
    pictures, count = coalitions.shape[:2]
    if at_most is None or pictures * count <= at_most:
        return coalitions
    wanted = max(1, at_most // pictures)
    return some(coalitions, torch.arange(wanted, device=coalitions.device) * count // wanted)


def _references(rates: Mapping[SideName, Rate]) -> dict[str, SideName]:
    """The side behind each letter, of those that ran; of two the faster one."""
    chosen: dict[str, SideName] = {}
    for name in sorted(rates, key=lambda name: rates[name].p50):
        if LETTERS[name] != "d":
            chosen[LETTERS[name]] = name
    return dict(sorted(chosen.items()))


def _flops(
    sides: Mapping[SideName, Side], given: Mapping[SideName, Coalitions], images_B3SS: Tensor
) -> dict[SideName, int]:
    """FLOPs of each side's run, counted once where two sides differ in nothing but the compiler."""
    counted: dict[str, int] = {}
    for name, side in sides.items():
        if LETTERS[name] == "d":
            side.eager(images_B3SS, given[name])  # what it learns of its memory, it learns in its first run
        # (a) and (b) are full passes alike.
        letter = LETTERS[name].replace("b", "a")
        if letter not in counted:
            counted[letter] = flops(functools.partial(side.eager, images_B3SS, given[name]))
    return {name: counted[LETTERS[name].replace("b", "a")] for name in sides}
