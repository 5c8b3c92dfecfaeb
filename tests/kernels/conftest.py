"""Kernels run where this machine can run them: on its GPU, else in Triton's interpreter on CPU tensors.

The error that a kernel may make: twice that of PyTorch in the same dtype, against float64, and a stated floor.
"""

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
import torch._dynamo  # before `poisoned`: what it finds in torch.empty's place at its import, it never traces
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or huge integers), so that an element which a kernel never writes shows."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


class WithinBudget(Protocol):
    def __call__(self, actual: Tensor, same_dtype: Tensor, exact64: Tensor, *, floor: float) -> None: ...


@pytest.fixture(scope="session")
def within_budget() -> WithinBudget:
    """Asserts max |actual - exact64| <= 2 max |same_dtype - exact64| + floor, and that all elements are finite."""

    def check(actual: Tensor, same_dtype: Tensor, exact64: Tensor, *, floor: float) -> None:
        assert actual.shape == exact64.shape, f"expected shape {list(exact64.shape)}, got {list(actual.shape)}"
        if not exact64.numel():
            return
        assert bool(actual.isfinite().all()), "elements that are not finite"
        error = float((actual.double() - exact64).abs().max())
        allowed = 2 * float((same_dtype.double() - exact64).abs().max()) + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
