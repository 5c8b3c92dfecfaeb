"""How much memory a computation needs at once, found by running it small: exact for any architecture.

Live tensors are counted as PyTorch makes and frees them, in bytes of storage. What kernels use inside themselves
(scratch of matrix products) is not seen.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the context, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Storage that comes in from outside (weights, inputs) is not counted when a view of it comes out.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._know(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._know(tensor):
                storage = tensor.untyped_storage()
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _know(self, tensor: Tensor) -> bool:
        """Remembers a tensor's storage; whether it is new."""
        storage = tensor.untyped_storage()
        if self._known.get(storage._cdata) is storage:
            return False
        self._known[storage._cdata] = storage
        return True

    def _freed(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The peak of a computation that grows with its number of units: fixed + per_unit * units, bytes."""

    fixed_bytes: int
    per_unit_bytes: int

    def units_within(self, num_bytes: int) -> int:
        """How many units fit; 0 where not even one does."""
        return max(0, (num_bytes - self.fixed_bytes) // self.per_unit_bytes)


def peak_bytes(compute: Callable[[], object]) -> int:
    """Peak bytes of the tensors that a computation makes, its result included."""
    live = LiveTensors()
    with torch.no_grad(), live:
        result = compute()
        del result
    return live.peak_bytes


def need_of(compute: Callable[[int], object], few: int, units_each: int = 1) -> MemoryNeed:
    """The need of `compute(count)`, from runs at `few` and 2 * `few`.

    Args:
        compute: runs on `count` items of `units_each` units.
        few: large enough that what grows only up to a bound has reached it.
        units_each: units of one item.
    """
    low, high = peak_bytes(lambda: compute(few)), peak_bytes(lambda: compute(2 * few))
    per_unit = max(1, -(-(high - low) // (few * units_each)))
    return MemoryNeed(max(0, low - per_unit * few * units_each), per_unit)
