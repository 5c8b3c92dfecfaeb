"""FLOPs of a computation: multiplications and additions of its matrix products, convolutions and attention.

Counted as PyTorch runs them, so a computation that leaves work out shows it. Norms, softmax and sums are not counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.baselines import zero_and_embed
from tve.backbones import Backbone

aten = torch.ops.aten
# What an op that multiplies matrices has in its name; one that is not counted is an error, not a zero.
PRODUCTS = ("mm", "matmul", "linear", "conv", "attention", "einsum", "bmm", "mv", "dot")
NO_PRODUCTS = ("convert", "upsample")


def flops(compute: Callable[[], object]) -> int:
    """FLOPs of what `compute` runs, in eager PyTorch.

    Raises:
        ValueError: an op that multiplies matrices and whose FLOPs nobody knows, such as a Triton kernel of ours.
    """
    seen = _Seen()
    counter = FlopCounterMode(display=False, custom_mapping=_missing())
    with seen, counter:
        compute()
    counted = {str(op) for op in counter.flop_registry}
    unknown = sorted(name for name in seen.names if _multiplies(name) and name not in counted)
    if unknown:
        raise ValueError(f"flops: expected ops with a formula, got {unknown}; use backend 'torch', or add a formula")
    return int(counter.get_total_flops())


def full_pass_flops(backbone: Backbone) -> int:
    """FLOPs of one full pass, from a picture to its embedding: what an evaluation costs nominally."""
    size, patches = backbone.image_size, backbone.patches_per_side
    parameter = next(backbone.model.parameters())
    images = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    present = torch.ones(1, patches, patches, dtype=torch.bool, device=parameter.device)
    return flops(lambda: zero_and_embed(backbone, images, present))


class _Seen(TorchDispatchMode):
    """The names of all ops that run inside the context, after those that are made of others are taken apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func._overloadpacket))
        return func(*args, **(kwargs or {}))


def _multiplies(name: str) -> bool:
    op = name.removeprefix("aten.")
    return name.startswith("tve.") or (
        any(part in op for part in PRODUCTS) and not any(part in op for part in NO_PRODUCTS)
    )


def _missing() -> dict[Any, Any]:
    """Formulas of ops that PyTorch's own counter, or that of older versions, does not know."""
    known = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops, aten.mv: _matrix_vector_flops}
    return {op: formula for op, formula in known.items() if op not in flop_registry}


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_val: Tensor | None = None, **kwargs: Any) -> int:
    """Queries by keys, then weights by values; the counter gives shapes [B, H, L, W] for tensors."""
    batch, heads, length, width = q
    flops: int = 2 * batch * heads * length * k[2] * (width + v[3])
    return flops


def _matrix_vector_flops(matrix: Any, vector: Any, *args: Any, out_val: Tensor | None = None, **kwargs: Any) -> int:
    rows, columns = matrix
    flops: int = 2 * rows * columns
    return flops
