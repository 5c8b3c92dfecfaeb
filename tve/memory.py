"""How much memory a computation needs at once, found by running it on tensors that have sizes but no memory.

Live tensors are counted as PyTorch makes and frees them, in bytes of storage. What kernels use inside themselves
(scratch of matrix products) is not seen.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
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


def keep_freed_pages() -> None:
    """Lets the C library keep the pages of freed tensors below 32 MiB for the next ones, where it is glibc.

    Its thresholds for handing memory back follow the largest block that was mapped and freed so far, up to 32 MiB
    (mallopt(3), M_MMAP_THRESHOLD). Until such a block was freed, every pass may fault its pages in anew, which took up
    to half of the time (docs/experiments.md). Nothing is written, so the block itself costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The peak of a computation that grows with its number of units: fixed + per_unit * units, bytes."""

    fixed_bytes: int
    per_unit_bytes: int

    def units_within(self, num_bytes: int) -> int:
        """How many units fit; 0 where not even one does."""
        return max(0, (num_bytes - self.fixed_bytes) // self.per_unit_bytes)


def peak_bytes(compute: Callable[[], object], *, fake: bool = False) -> int:
    """Peak bytes of the tensors that a computation makes, its result included.

    Args:
        compute: takes nothing.
        fake: with tensors that have sizes but no memory, which costs no arithmetic either; the computation must
            then not look at values.
    """
    live = LiveTensors()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), live:
        result = compute()
        del result
    return live.peak_bytes


def need_of(compute: Callable[[int], object], few: int = 1) -> MemoryNeed:
    """The need of `compute(units)`, from fake runs with `few` and 2 * `few` units."""
    low, high = (peak_bytes(partial(compute, units), fake=True) for units in (few, 2 * few))
    per_unit = max(1, -(-(high - low) // few))
    return MemoryNeed(max(0, low - per_unit * few), per_unit)


def even_bounds(sizes: Sequence[int], limit: int) -> list[int]:
    """Where groups of consecutive items begin and end: as few as the limit on their sum allows, of about one size.

    Args:
        sizes: of the items, ascending, none above the limit.
        limit: on the sum of a group.

    >>> even_bounds([4, 4, 4, 4, 4], 16)
    [0, 3, 5]
    """
    even = -(-sum(sizes) // -(-sum(sizes) // limit))
    limit = min(limit, even + sizes[-1] - 1)
    bounds, taken = [0], 0
    for number, size in enumerate(sizes):
        if taken + size > limit and taken:
            bounds.append(number)
            taken = 0
        taken += size
    return [*bounds, len(sizes)]
