"""A kernel reads addresses: one of another device's memory is a crash, or numbers that mean nothing."""

from collections.abc import Mapping

from torch import Tensor


def require_one_device(first_name: str, first: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Every tensor is on the device of the first.

    Raises:
        ValueError: one is not.
    """
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: expected {first.device}, as {first_name}, got {other.device}; move it")
