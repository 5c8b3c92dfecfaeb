"""Timing of several programs against each other in one process, and the memory that each needs.

Rounds: every program runs once a round, and the order turns from round to round, so that what disturbs the machine
for a while disturbs all. A ratio is the median over rounds of the ratio within a round.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch

Name = TypeVar("Name", bound=str)
LONG_S = 2.0  # a run of this length averages over disturbances by itself
SLOWER = 1.25  # a candidate whose first timed run is slower than this many times the best is not timed again


@dataclass(frozen=True, slots=True)
class Rate:
    """Evaluations per second over rounds: percentiles of the rate."""

    p20: float
    p50: float
    p80: float


def rate(evaluations: int, seconds: Sequence[float]) -> Rate:
    """The rate of a program that makes this many evaluations in each of these times."""
    p20, p50, p80 = np.percentile([evaluations / each for each in seconds], [20, 50, 80])
    return Rate(float(p20), float(p50), float(p80))


def speedup(per_s: Sequence[float], reference_per_s: Sequence[float]) -> float:
    """How many times the reference's rate: the median over rounds of the ratio within a round."""
    return median(mine / other for mine, other in zip(per_s, reference_per_s, strict=True))


def paired_seconds(
    programs: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Name, list[float]]:
    """Seconds of each program in each round; everything is warm when this is called."""
    names = list(programs)
    elapsed_s: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed_s[name].append(seconds(programs[name], device))
    return elapsed_s


def fastest(programs: Sequence[Callable[[], object]], device: torch.device) -> int:
    """Which program takes the least time: each warmed up once, then timed up to three times, its best time counts."""
    best, best_s = 0, float("inf")
    for number, program in enumerate(programs):
        program()
        if len(programs) == 1:
            return 0
        least_s = seconds(program, device)
        if least_s < SLOWER * best_s:
            more = 2 if least_s < LONG_S else 0
            least_s = min([least_s, *(seconds(program, device) for _ in range(more))])
        if least_s < best_s:
            best, best_s = number, least_s
    return best


def seconds(program: Callable[[], object], device: torch.device) -> float:
    """Time of one run, until the device is done."""
    _wait(device)
    start = time.perf_counter()
    result = program()
    _wait(device)
    elapsed_s = time.perf_counter() - start
    del result
    return elapsed_s


def peak_mib(program: Callable[[], object], device: torch.device) -> float:
    """How much memory a run takes at once beyond what was in use before, MiB.

    GPU: of PyTorch's allocator. CPU: resident pages of the process, so scratch of libraries is counted too; memory
    that earlier work has freed goes back to the system first, where the C library knows how (glibc).

    Raises:
        OSError: a CPU without Linux's /proc.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = program()
        _wait(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return (peak - before) / 2**20
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    result = program()
    peak = _status_kib("VmHWM")
    del result
    return (peak - before) / 2**10


def resident_mib(device: torch.device) -> float:
    """Memory in use: of PyTorch's allocator on a GPU, of the process on a CPU (Linux), MiB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _status_kib("VmRSS") / 2**10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status: expected a line {field}, got none")
