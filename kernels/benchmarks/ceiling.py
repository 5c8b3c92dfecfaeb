"""The matrix ceiling: how fast this device multiplies dense matrices in one dtype, measured.

Both ways in which PyTorch lays out a product count, since their speeds differ: a @ b, and a layer's x @ weight.T.
"""

import time

import torch
from torch.nn import functional

from benchmarks.measure import seconds

# Rows, inner width, columns: squares, and the layers of a ViT-Base (the MLP's two) on many rows.
SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "cpu": ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 768, 3072), (1024, 3072, 768)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (65536, 768, 3072), (65536, 3072, 768)),
}
TIMED_S = 0.5  # at least, for each shape and way


def ceiling_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of dense products over a few shapes with this process's threads, GFLOP/s."""
    best = 0.0
    for rows, inner, columns in SHAPES[device.type]:
        a, b, weight = (
            torch.randn(size, device=device).to(dtype) for size in ((rows, inner), (inner, columns), (columns, inner))
        )
        for program in (lambda a=a, b=b: a @ b, lambda a=a, weight=weight: functional.linear(a, weight)):
            program()
            until = time.perf_counter() + TIMED_S
            while time.perf_counter() < until:
                best = max(best, 2e-9 * rows * inner * columns / seconds(program, device))
    return best
