"""Which of two programs runs an op: its Triton kernel or plain PyTorch. Always for a stated reason.

"auto" takes Triton where it runs at the speed that it is written for, and PyTorch elsewhere. "triton" and "torch" are
orders: the first raises where no kernel can run.
"""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch

Requested = Literal["auto", "triton", "torch"]
Backend = Literal["triton", "torch"]

# On PyPI, and with PyTorch's wheels: for ROCm, of each night, and for ROCm under its newer name.
TRITON_NAMES = ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm")
OLDEST_TRITON = (3, 6)
OLDEST_NVIDIA = (8, 0)  # the first with bfloat16 matrix units


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice depends on."""

    device_type: str
    triton: tuple[int, int] | None = None  # its version; None where it is not installed
    interpreted: bool = False  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests
    capability: tuple[int, int] | None = None  # of an NVIDIA device


@dataclass(frozen=True, slots=True)
class Choice:
    backend: Backend
    reason: str


def choose(requested: Requested, device: torch.device | str) -> Choice:
    """The backend for tensors on a device.

    Raises:
        ValueError: a name that is no backend, or "triton" where no kernel can run.
    """
    return decide(requested, facts(torch.device(device)))


def decide(requested: Requested, given: Facts) -> Choice:
    """`choose` as a pure function of its facts."""
    if requested not in get_args(Requested):
        raise ValueError(f"backend: expected one of {list(get_args(Requested))}, got {requested!r}")
    if requested == "torch":
        return Choice("torch", "asked for")
    obstacle = _obstacle(given)
    if requested == "triton":
        if obstacle:
            raise ValueError(
                f"backend: expected a device that runs Triton kernels, got one where {obstacle}; use 'auto'"
            )
        return Choice("triton", "asked for")
    if obstacle:
        return Choice("torch", obstacle)
    if given.device_type == "cpu":
        return Choice("torch", "Triton's interpreter is for tests, not for speed")
    return Choice("triton", f"Triton {given.triton[0]}.{given.triton[1]} on {given.device_type}")  # type: ignore[index]


def facts(device: torch.device) -> Facts:
    """What this machine says of itself."""
    capability = None
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    return Facts(device.type, _triton_version(), os.environ.get("TRITON_INTERPRET") == "1", capability)


def _obstacle(given: Facts) -> str:
    """Why no kernel can run, or "" where one can."""
    if given.triton is None:
        return "Triton is not installed"
    if given.triton < OLDEST_TRITON:
        return f"Triton is {given.triton[0]}.{given.triton[1]}, older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if given.device_type == "cpu":
        return "" if given.interpreted else "tensors are on a CPU and TRITON_INTERPRET is not 1"
    if given.device_type != "cuda":
        return f"tensors are on {given.device_type}, not on an NVIDIA or AMD GPU"
    if given.interpreted:
        return "TRITON_INTERPRET is 1, which runs kernels on the CPU"
    if given.capability is not None and given.capability < OLDEST_NVIDIA:
        return f"the GPU has compute capability {given.capability[0]}.{given.capability[1]}, below 8.0"
    return ""


def _triton_version() -> tuple[int, int] | None:
    for name in TRITON_NAMES:
        try:
            major, minor = version(name).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None
