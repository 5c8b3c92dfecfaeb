"""In which arithmetic passes run: the one that is asked for, or the fastest that the device has products for.

Without instructions of its own for bfloat16, a CPU multiplies such matrices at a fortieth of its float32 rate
(measured on AVX2, docs/experiments.md). "auto" is bfloat16 on GPUs and CPUs that have them, and float32 elsewhere.
"""

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16", "float16"]
RequestedPrecision = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OLDEST_GPU_WITH_BFLOAT16 = (8, 0)  # compute capability

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """An arithmetic, and why it was taken."""

    precision: Precision
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def choose_precision(requested: RequestedPrecision, device: torch.device) -> PrecisionChoice:
    """The arithmetic of passes on a device.

    Raises:
        ValueError: one that does not exist.
    """
    if requested not in get_args(RequestedPrecision):
        raise ValueError(f"precision: expected one of {list(get_args(RequestedPrecision))}, got {requested!r}")
    native = has_bfloat16(device)
    if requested != "auto":
        if requested == "bfloat16" and not native:
            logger.warning("precision: bfloat16 is emulated on this %s, many times slower; use 'auto'", device.type)
        return PrecisionChoice(requested, "asked for")
    if native:
        return PrecisionChoice("bfloat16", f"the {device.type} has products of bfloat16")
    return PrecisionChoice("float32", f"the {device.type} has no products of bfloat16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_GPU_WITH_BFLOAT16
    if device.type == "cpu":
        return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return False
