"""Maps of chosen classes from a meta-attribution and a linear head, by Triton or by PyTorch."""

from typing import cast, get_args

import torch
from torch import Tensor, nn

from tve_kernels.backend import Backend
from tve_kernels.devices import require_one_device
from tve_kernels.transfer_map import reference
from tve_kernels.transfer_map.reference import Output

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def transfer_map(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    *,
    patches_per_side: int,
    radius: int,
    output: Output,
    weight_kept: float,
    weight_removed: float,
    window_mean: bool,
    backend: Backend,
) -> Tensor:
    """Attribution maps phi [B, K, P, P] float32 of K classes a picture under a linear head; no gradient.

    Embeddings and head share one dtype: float32, bfloat16 or float16. Sums and maps are float32.

    Args:
        kept_BND: g, only the window is kept; N = P * P, row-major.
        removed_BND: h, the window is taken away.
        full_BD: G(x).
        empty_D: G(∅).
        weight_CD: of the head.
        bias_C: of the head, or None.
        target_BK: int64, classes of each picture, 0 to C - 1. Another class is NaN with "triton" (to look before
            would wait for the device) and an error of PyTorch with "torch".
        patches_per_side: P.
        radius: of the windows, patches.
        output: what is read: "logit", "probability" or "log_probability".
        weight_kept: w+, of what the window says alone.
        weight_removed: w-, of what is lost with it.
        window_mean: phi; u where False.
        backend: "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a radius below 0, or an unknown output.
    """
    _check(kept_BND, removed_BND, full_BD, empty_D, weight_CD, bias_C, target_BK, patches_per_side, radius, output)
    if backend == "triton":
        phi_BKPP: Tensor = _transfer_map(
            kept_BND,
            removed_BND,
            full_BD,
            empty_D,
            weight_CD,
            bias_C,
            target_BK,
            patches_per_side,
            radius,
            output,
            weight_kept,
            weight_removed,
            window_mean,
        )
        return phi_BKPP
    if output == "logit":
        u_BKN = _u_of_logits(kept_BND, removed_BND, full_BD, empty_D, weight_CD, target_BK, weight_kept, weight_removed)
        return reference.maps(u_BKN, patches_per_side, radius, window_mean)
    return reference.transfer_map(
        kept_BND,
        removed_BND,
        full_BD,
        empty_D,
        weight_CD,
        bias_C,
        target_BK,
        patches_per_side=patches_per_side,
        radius=radius,
        output=output,
        weight_kept=weight_kept,
        weight_removed=weight_removed,
        window_mean=window_mean,
    )


def _u_of_logits(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    target_BK: Tensor,
    weight_kept: float,
    weight_removed: float,
) -> Tensor:
    """u [B, K, N] of logits, from the target rows of the head alone; its bias cancels in both brackets."""
    rows_BKD = nn.functional.embedding(target_BK, weight_CD).float()  # unlike an index, it takes no class -1
    alone_BKN = rows_BKD @ kept_BND.float().mT - (rows_BKD @ empty_D.float())[..., None]
    lost_BKN = rows_BKD @ full_BD.float()[..., None] - rows_BKD @ removed_BND.float().mT
    return weight_kept * alone_BKN + weight_removed * lost_BKN


@torch.library.custom_op("tve::transfer_map", mutates_args=())
def _transfer_map(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    patches_per_side: int,
    radius: int,
    output: str,
    weight_kept: float,
    weight_removed: float,
    window_mean: bool,
) -> Tensor:
    from tve_kernels.transfer_map import kernel

    u_BKN = kernel.readings(
        kept_BND,
        removed_BND,
        full_BD,
        empty_D,
        weight_CD,
        bias_C,
        target_BK,
        cast(Output, output),
        weight_kept,
        weight_removed,
    )
    maps_BKN = kernel.window_mean(u_BKN, patches_per_side, radius) if window_mean else u_BKN
    return maps_BKN.view(*target_BK.shape, patches_per_side, patches_per_side)


@_transfer_map.register_fake
def _(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    patches_per_side: int,
    radius: int,
    output: str,
    weight_kept: float,
    weight_removed: float,
    window_mean: bool,
) -> Tensor:
    return kept_BND.new_empty((*target_BK.shape, patches_per_side, patches_per_side), dtype=torch.float32)


def _check(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    patches_per_side: int,
    radius: int,
    output: str,
) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output: expected one of {list(get_args(Output))}, got {output!r}")
    if radius < 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    num_patches = patches_per_side**2
    if patches_per_side < 1 or kept_BND.ndim != 3 or kept_BND.shape[1] != num_patches:
        raise ValueError(
            f"kept: expected [B, {num_patches}, D] of {patches_per_side} patches per side, got {list(kept_BND.shape)}"
        )
    if weight_CD.ndim != 2 or weight_CD.shape[0] < 1:
        raise ValueError(f"weight: expected [C, {kept_BND.shape[2]}], C > 0, got {list(weight_CD.shape)}")
    if kept_BND.dtype not in DTYPES:
        raise ValueError(f"kept: expected one of {list(DTYPES)}, got {kept_BND.dtype}; cast it")
    batch_size, _, width = kept_BND.shape
    given: dict[str, tuple[Tensor, list[int]]] = {
        "removed": (removed_BND, [batch_size, num_patches, width]),
        "full": (full_BD, [batch_size, width]),
        "empty": (empty_D, [width]),
        "weight": (weight_CD, [weight_CD.shape[0], width]),
    }
    if bias_C is not None:
        given["bias"] = (bias_C, [weight_CD.shape[0]])
    for name, (tensor, shape) in given.items():
        if list(tensor.shape) != shape or tensor.dtype != kept_BND.dtype:
            raise ValueError(
                f"{name}: expected {kept_BND.dtype} {shape}, as kept has them, got {tensor.dtype} {list(tensor.shape)}"
            )
    if target_BK.ndim != 2 or target_BK.shape[0] != batch_size or target_BK.dtype != torch.int64:
        raise ValueError(
            f"target: expected int64 [{batch_size}, K], got {target_BK.dtype} {list(target_BK.shape)}; "
            "give each picture its classes"
        )
    require_one_device("kept", kept_BND, {name: tensor for name, (tensor, _) in given.items()} | {"target": target_BK})
