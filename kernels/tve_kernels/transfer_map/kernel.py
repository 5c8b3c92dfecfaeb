"""Three Triton programs: log-sum-exp of logits that are never stored, readings of some classes, and the window mean."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first
from tve_kernels.transfer_map.reference import Output

CLASSES_PER_PROGRAM = 512  # so that one picture with many classes still fills a GPU; a multiple of every tile
MAP_TILE = 256


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of logits, rows x classes, summed over pieces of the width."""

    rows: int
    classes: int
    width: int
    num_warps: int
    num_stages: int


def log_sum_exp_tiling(dtype: torch.dtype) -> Tiling:
    """float32 products run outside the matrix units, with their operands in registers: smaller tiles."""
    return Tiling(64, 64, 32, 8, 2) if dtype == torch.float32 else Tiling(64, 128, 64, 8, 3)


def target_tiling(dtype: torch.dtype, num_targets: int) -> Tiling:
    """Few rows a tile: what this kernel waits for is memory, so many programs are better than large ones."""
    classes = 16 if num_targets <= 16 else 32
    return Tiling(16 if dtype == torch.float32 else 32, classes, 64, 4, 3)


@on_device_of_first
def readings(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    output: Output,
    weight_kept: float,
    weight_removed: float,
) -> Tensor:
    """u [B, K, N] float32 of the chosen classes."""
    batch_size, num_patches, width = kept_BND.shape
    num_targets = target_BK.shape[1]
    u_BKN = kept_BND.new_empty((batch_size, num_targets, num_patches), dtype=torch.float32)
    if not u_BKN.numel():
        return u_BKN
    kept_BND, removed_BND, full_BD, weight_CD = (_rows(each) for each in (kept_BND, removed_BND, full_BD, weight_CD))
    empty_D, target_BK = empty_D.contiguous(), target_BK.contiguous()
    if output == "logit":
        bias_C = None  # it cancels in both brackets
        kept_lse = removed_lse = ends_lse = u_BKN  # not read
    else:
        bias_C = None if bias_C is None else bias_C.contiguous()
        kept_lse = log_sum_exp(kept_BND, weight_CD, bias_C)
        removed_lse = log_sum_exp(removed_BND, weight_CD, bias_C)
        ends_lse = log_sum_exp(torch.cat([empty_D[None], full_BD])[None], weight_CD, bias_C)
    tiling = target_tiling(kept_BND.dtype, num_targets)
    grid = (batch_size * triton.cdiv(num_patches, tiling.rows), triton.cdiv(num_targets, tiling.classes))
    _target_kernel[grid](
        kept_BND,
        removed_BND,
        full_BD,
        empty_D,
        weight_CD,
        weight_CD if bias_C is None else bias_C,
        target_BK,
        kept_lse,
        removed_lse,
        ends_lse,
        u_BKN,
        num_patches,
        num_targets,
        weight_CD.shape[0],
        width,
        kept_BND.stride(0),
        kept_BND.stride(1),
        removed_BND.stride(0),
        removed_BND.stride(1),
        full_BD.stride(0),
        weight_CD.stride(0),
        weight_kept,
        weight_removed,
        OUTPUT=output,
        HAS_BIAS=bias_C is not None,
        UPCAST=_upcast(kept_BND.dtype),
        BLOCK_N=tiling.rows,
        BLOCK_K=tiling.classes,
        BLOCK_D=tiling.width,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return u_BKN


@on_device_of_first
def log_sum_exp(rows_BND: Tensor, weight_CD: Tensor, bias_C: Tensor | None) -> Tensor:
    """Log of the summed exponentials of all C logits of each row, [B * N] float32."""
    batch_size, num_patches, width = rows_BND.shape
    num_rows, num_classes = batch_size * num_patches, weight_CD.shape[0]
    num_parts = triton.cdiv(num_classes, CLASSES_PER_PROGRAM)
    part_SR = rows_BND.new_empty((num_parts, num_rows), dtype=torch.float32)
    tiling = log_sum_exp_tiling(rows_BND.dtype)
    _log_sum_exp_kernel[(triton.cdiv(num_rows, tiling.rows), num_parts)](
        rows_BND,
        weight_CD,
        weight_CD if bias_C is None else bias_C,
        part_SR,
        num_rows,
        num_patches,
        num_classes,
        width,
        rows_BND.stride(0),
        rows_BND.stride(1),
        weight_CD.stride(0),
        HAS_BIAS=bias_C is not None,
        UPCAST=_upcast(rows_BND.dtype),
        SPAN=CLASSES_PER_PROGRAM,
        BLOCK_R=tiling.rows,
        BLOCK_C=tiling.classes,
        BLOCK_D=tiling.width,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return part_SR.logsumexp(0)


@on_device_of_first
def window_mean(u_BKN: Tensor, patches_per_side: int, radius: int) -> Tensor:
    """phi [B, K, N]: the mean of u over N_r(p, q), clipped at the border."""
    phi_BKN = torch.empty_like(u_BKN)
    batch_size, num_targets, num_patches = u_BKN.shape
    if phi_BKN.numel():
        _window_mean_kernel[(batch_size * num_targets, triton.cdiv(num_patches, MAP_TILE))](
            u_BKN,
            phi_BKN,
            patches_per_side,
            min(radius, patches_per_side - 1),  # a larger window holds every patch already
            BLOCK_N=MAP_TILE,
            num_warps=4,
            num_stages=2,
        )
    return phi_BKN


@triton.jit
def _log_sum_exp_kernel(
    rows,
    weight,
    bias,
    part,
    num_rows,
    num_patches,
    num_classes,
    width,
    row_stride_b,
    row_stride_n,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists_R = row_R < num_rows
    picture_R, patch_R = row_R // num_patches, row_R % num_patches
    row_ptr_R = rows + picture_R.to(tl.int64) * row_stride_b + patch_R.to(tl.int64) * row_stride_n
    first = tl.program_id(1) * SPAN
    highest_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)  # of exp(logit - highest)
    for start in range(first, tl.minimum(first + SPAN, num_classes), BLOCK_C):
        class_C = start + tl.arange(0, BLOCK_C)
        exists_C = class_C < num_classes
        weight_ptr_C = weight + class_C.to(tl.int64) * weight_stride
        logit_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for at in range(0, width, BLOCK_D):
            d_D = at + tl.arange(0, BLOCK_D)
            x_RD = tl.load(
                row_ptr_R[:, None] + d_D[None, :], mask=exists_R[:, None] & (d_D < width)[None, :], other=0.0
            )
            w_CD = tl.load(
                weight_ptr_C[:, None] + d_D[None, :], mask=exists_C[:, None] & (d_D < width)[None, :], other=0.0
            )
            if UPCAST:
                x_RD, w_CD = x_RD.to(tl.float32), w_CD.to(tl.float32)
            logit_RC = tl.dot(x_RD, tl.trans(w_CD), logit_RC, input_precision="ieee")
        if HAS_BIAS:
            logit_RC += tl.load(bias + class_C, mask=exists_C, other=0.0).to(tl.float32)[None, :]
        logit_RC = tl.where(exists_C[None, :], logit_RC, float("-inf"))
        new_R = tl.maximum(highest_R, tl.max(logit_RC, 1))
        # Where all logits so far are -inf (classes that a bias masks), -inf - -inf would be NaN.
        from_R = tl.where(new_R == float("-inf"), 0.0, new_R)
        sum_R = sum_R * tl.exp(highest_R - from_R) + tl.sum(tl.exp(logit_RC - from_R[:, None]), 1)
        highest_R = new_R
    part_ptr_R = part + tl.program_id(1).to(tl.int64) * num_rows + row_R
    tl.store(part_ptr_R, highest_R + tl.log(sum_R), mask=exists_R)


@triton.jit
def _target_kernel(
    kept,
    removed,
    full,
    empty,
    weight,
    bias,
    target,
    kept_lse,
    removed_lse,
    ends_lse,  # of G(∅), then of G(x) of each picture
    u,
    num_patches,
    num_targets,
    num_classes,
    width,
    kept_stride_b,
    kept_stride_n,
    removed_stride_b,
    removed_stride_n,
    full_stride,
    weight_stride,
    weight_kept,
    weight_removed,
    OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_tiles = tl.cdiv(num_patches, BLOCK_N)
    picture = (tl.program_id(0) // num_tiles).to(tl.int64)
    n_N = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists_N, exists_K = n_N < num_patches, k_K < num_targets
    class_K = tl.load(target + picture * num_targets + k_K, mask=exists_K, other=0)
    known_K = (class_K >= 0) & (class_K < num_classes)

    kept_ptr_N = kept + picture * kept_stride_b + n_N.to(tl.int64) * kept_stride_n
    removed_ptr_N = removed + picture * removed_stride_b + n_N.to(tl.int64) * removed_stride_n
    weight_ptr_K = weight + class_K * weight_stride
    kept_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    removed_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    full_K = tl.zeros([BLOCK_K], tl.float32)
    empty_K = tl.zeros([BLOCK_K], tl.float32)
    for at in range(0, width, BLOCK_D):
        d_D = at + tl.arange(0, BLOCK_D)
        exists_D = d_D < width
        exists_ND = exists_N[:, None] & exists_D[None, :]
        g_ND = tl.load(kept_ptr_N[:, None] + d_D[None, :], mask=exists_ND, other=0.0)
        h_ND = tl.load(removed_ptr_N[:, None] + d_D[None, :], mask=exists_ND, other=0.0)
        w_KD = tl.load(weight_ptr_K[:, None] + d_D[None, :], mask=known_K[:, None] & exists_D[None, :], other=0.0)
        full_D = tl.load(full + picture * full_stride + d_D, mask=exists_D, other=0.0)
        empty_D = tl.load(empty + d_D, mask=exists_D, other=0.0)
        full_K += tl.sum(w_KD.to(tl.float32) * full_D.to(tl.float32)[None, :], 1)
        empty_K += tl.sum(w_KD.to(tl.float32) * empty_D.to(tl.float32)[None, :], 1)
        if UPCAST:
            g_ND, h_ND, w_KD = g_ND.to(tl.float32), h_ND.to(tl.float32), w_KD.to(tl.float32)
        w_DK = tl.trans(w_KD)
        # Two sums, not one of w+ g - w- h: that difference would be rounded to the inputs' dtype.
        kept_NK = tl.dot(g_ND, w_DK, kept_NK, input_precision="ieee")
        removed_NK = tl.dot(h_ND, w_DK, removed_NK, input_precision="ieee")

    if HAS_BIAS:
        bias_K = tl.load(bias + class_K, mask=known_K, other=0.0).to(tl.float32)
        kept_NK, removed_NK = kept_NK + bias_K[None, :], removed_NK + bias_K[None, :]
        full_K, empty_K = full_K + bias_K, empty_K + bias_K
    if OUTPUT != "logit":
        lse_N = picture * num_patches + n_N
        kept_NK -= tl.load(kept_lse + lse_N, mask=exists_N, other=0.0)[:, None]
        removed_NK -= tl.load(removed_lse + lse_N, mask=exists_N, other=0.0)[:, None]
        empty_K -= tl.load(ends_lse)
        full_K -= tl.load(ends_lse + 1 + picture)
    if OUTPUT == "probability":
        kept_NK, removed_NK = tl.exp(kept_NK), tl.exp(removed_NK)
        full_K, empty_K = tl.exp(full_K), tl.exp(empty_K)
    u_NK = weight_kept * (kept_NK - empty_K[None, :]) + weight_removed * (full_K[None, :] - removed_NK)
    u_NK = tl.where(known_K[None, :], u_NK, float("nan"))
    u_ptr_NK = u + (picture * num_targets + k_K[None, :]) * num_patches + n_N[:, None]
    tl.store(u_ptr_NK, u_NK, mask=exists_N[:, None] & exists_K[None, :])


@triton.jit
def _window_mean_kernel(u, phi, side, radius, BLOCK_N: tl.constexpr):
    num_patches = side * side
    first = tl.program_id(0).to(tl.int64) * num_patches
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N, column_N = n_N // side, n_N % side
    total_N = tl.zeros([BLOCK_N], tl.float32)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            r_N, c_N = row_N + down, column_N + right
            inside_N = (n_N < num_patches) & (r_N >= 0) & (r_N < side) & (c_N >= 0) & (c_N < side)
            total_N += tl.load(u + first + r_N * side + c_N, mask=inside_N, other=0.0)
    rows_N = tl.minimum(row_N + radius, side - 1) - tl.maximum(row_N - radius, 0) + 1
    columns_N = tl.minimum(column_N + radius, side - 1) - tl.maximum(column_N - radius, 0) + 1
    tl.store(phi + first + n_N, total_N / (rows_N * columns_N).to(tl.float32), mask=n_N < num_patches)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies bfloat16 bit patterns."""
    return bool(triton.knobs.runtime.interpret) and dtype == torch.bfloat16


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _log_sum_exp_case(name: str) -> CompileCase:
    tiling = log_sum_exp_tiling(_TYPES[name])
    pointers = {**dict.fromkeys(("rows", "weight", "bias"), f"*{name}"), "part": "*fp32"}
    sizes = ("num_rows", "num_patches", "num_classes", "width", "row_stride_b", "row_stride_n", "weight_stride")
    constexprs: dict[str, Any] = {"HAS_BIAS": True, "UPCAST": False, "SPAN": CLASSES_PER_PROGRAM}
    constexprs |= {"BLOCK_R": tiling.rows, "BLOCK_C": tiling.classes, "BLOCK_D": tiling.width}
    return CompileCase(
        f"log-sum-exp {name}",
        _log_sum_exp_kernel,
        {**pointers, **dict.fromkeys(sizes, "i32")},
        constexprs,
        frozenset({*pointers, "width", "row_stride_b", "row_stride_n", "weight_stride"}),
        tiling.num_warps,
        tiling.num_stages,
    )


def _target_case(name: str, output: Output, num_targets: int) -> CompileCase:
    tiling = target_tiling(_TYPES[name], num_targets)
    pointers = dict.fromkeys(("kept", "removed", "full", "empty", "weight", "bias"), f"*{name}")
    pointers |= {"target": "*i64", **dict.fromkeys(("kept_lse", "removed_lse", "ends_lse", "u"), "*fp32")}
    strides = [f"{each}_stride_{axis}" for each in ("kept", "removed") for axis in "bn"]
    strides += ["full_stride", "weight_stride"]
    sizes = ["num_patches", "num_classes", "width", *strides]
    weights = dict.fromkeys(("weight_kept", "weight_removed"), "fp32")
    constexprs: dict[str, Any] = {"OUTPUT": output, "HAS_BIAS": output != "logit", "UPCAST": False}
    constexprs |= {"BLOCK_N": tiling.rows, "BLOCK_K": tiling.classes, "BLOCK_D": tiling.width}
    if num_targets == 1:
        constexprs["num_targets"] = 1  # Triton compiles an argument of 1 as the constant
    else:
        sizes.append("num_targets")
    return CompileCase(
        f"{output} {name} K={num_targets}",
        _target_kernel,
        {**pointers, **dict.fromkeys(sizes, "i32"), **weights},
        constexprs,
        frozenset({*pointers, "width", *strides}),
        tiling.num_warps,
        tiling.num_stages,
    )


# Widths 192, 384, 768 and grids up to 37 x 37 are runtime values: one program serves them all.
CASES: tuple[CompileCase, ...] = (
    *(_log_sum_exp_case(name) for name in _TYPES),
    *(_target_case(name, "logit", num_targets) for name in _TYPES for num_targets in (1, 32)),
    *(_target_case(name, "probability", 1) for name in _TYPES),
    *(_target_case(name, "log_probability", 1) for name in _TYPES),
    CompileCase(
        "window mean",
        _window_mean_kernel,
        {"u": "*fp32", "phi": "*fp32", "side": "i32", "radius": "i32"},
        {"BLOCK_N": MAP_TILE},
        frozenset({"u", "phi"}),
    ),
    CompileCase(
        "window mean r=1",
        _window_mean_kernel,
        {"u": "*fp32", "phi": "*fp32", "side": "i32"},
        {"radius": 1, "BLOCK_N": MAP_TILE},
        frozenset({"u", "phi"}),
    ),
)
