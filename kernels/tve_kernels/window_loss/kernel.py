"""Three Triton programs: the loss of the drawn windows, and, for its gradient, a product and a scatter."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first

# One tile for both products. Their float32 operands must not be rounded, so they run outside the matrix units.
BLOCK_R = 32
BLOCK_E = 64
BLOCK_D = 32
# Of the scatter, which only writes.
WINDOWS = 16
COLUMNS = 128


@on_device_of_first
def forward(predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and (predicted - target) @ norm of every draw [B * M, D], both float32."""
    predicted_BND, target_BMD, index_BM = _rows(predicted_BND), _rows(target_BMD), index_BM.contiguous()
    num_windows, width = predicted_BND.shape[1:]
    num_rows = index_BM.numel()
    error_RE = torch.empty((num_rows, width), dtype=torch.float32, device=predicted_BND.device)
    grid = (triton.cdiv(num_rows, BLOCK_R), triton.cdiv(width, BLOCK_E))
    part = torch.empty(grid, dtype=torch.float32, device=predicted_BND.device)
    _forward_kernel[grid](
        predicted_BND,
        target_BMD,
        index_BM,
        norm_DD,
        error_RE,
        part,
        num_rows,
        num_windows,
        index_BM.shape[1],
        width,
        predicted_BND.stride(0),
        predicted_BND.stride(1),
        target_BMD.stride(0),
        target_BMD.stride(1),
        norm_DD.stride(0),
        norm_DD.stride(1),
        BLOCK_R=BLOCK_R,
        BLOCK_E=BLOCK_E,
        BLOCK_D=BLOCK_D,
        num_warps=4,
        num_stages=2,
    )
    return part.sum() / (num_rows * width), error_RE


@on_device_of_first
def backward(
    grad: Tensor, error_RE: Tensor, index_BM: Tensor, norm_DD: Tensor, num_windows: int, dtype: torch.dtype
) -> Tensor:
    """The gradient [B, N, D] with respect to predicted, from the loss's own, a scalar."""
    index_BM = index_BM.contiguous()
    batch_size, num_draws = index_BM.shape
    num_rows, width = error_RE.shape
    product_RD = torch.empty_like(error_RE)
    _product_kernel[(triton.cdiv(num_rows, BLOCK_R), triton.cdiv(width, BLOCK_E))](
        error_RE,
        norm_DD,
        grad,
        product_RD,
        num_rows,
        width,
        norm_DD.stride(0),
        norm_DD.stride(1),
        2 / (num_rows * width),
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_E,
        BLOCK_E=BLOCK_D,
        num_warps=4,
        num_stages=2,
    )
    # Triton's interpreter cuts a float32 off where it should round it to bfloat16: there PyTorch rounds it.
    stored = torch.float32 if triton.knobs.runtime.interpret and dtype == torch.bfloat16 else dtype
    grad_BND = torch.empty((batch_size, num_windows, width), dtype=stored, device=error_RE.device)
    grid = (batch_size * triton.cdiv(num_windows, WINDOWS), triton.cdiv(width, COLUMNS))
    _scatter_kernel[grid](
        product_RD,
        index_BM,
        grad_BND,
        num_windows,
        num_draws,
        width,
        BLOCK_N=WINDOWS,
        BLOCK_D=COLUMNS,
        num_warps=4,
        num_stages=2,
    )
    return grad_BND.to(dtype)


@triton.jit
def _forward_kernel(
    predicted,
    target,
    index,
    norm,
    error,
    part,  # of the sum of squares, one a program: adding them in one order is what makes the loss repeatable
    num_rows,
    num_windows,
    num_draws,
    width,
    predicted_stride_b,
    predicted_stride_n,
    target_stride_b,
    target_stride_m,
    norm_stride_d,
    norm_stride_e,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    exists_R, exists_E = row_R < num_rows, e_E < width
    picture_R, draw_R = (row_R // num_draws).to(tl.int64), (row_R % num_draws).to(tl.int64)
    window_R = tl.load(index + row_R, mask=exists_R, other=0)
    known_R = (window_R >= 0) & (window_R < num_windows)
    predicted_ptr_R = predicted + picture_R * predicted_stride_b + window_R * predicted_stride_n
    target_ptr_R = target + picture_R * target_stride_b + draw_R * target_stride_m
    error_RE = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for at in range(0, width, BLOCK_D):
        d_D = at + tl.arange(0, BLOCK_D)
        exists_D = d_D < width
        exists_RD = exists_R[:, None] & exists_D[None, :]
        p_RD = tl.load(predicted_ptr_R[:, None] + d_D[None, :], mask=exists_RD & known_R[:, None], other=0.0)
        t_RD = tl.load(target_ptr_R[:, None] + d_D[None, :], mask=exists_RD, other=0.0)
        norm_DE = tl.load(
            norm + d_D.to(tl.int64)[:, None] * norm_stride_d + e_E.to(tl.int64)[None, :] * norm_stride_e,
            mask=exists_D[:, None] & exists_E[None, :],
            other=0.0,
        )
        error_RE = tl.dot(p_RD.to(tl.float32) - t_RD, norm_DE, error_RE, input_precision="ieee")
    error_RE = tl.where(known_R[:, None], error_RE, float("nan"))
    exists_RE = exists_R[:, None] & exists_E[None, :]
    tl.store(error + row_R.to(tl.int64)[:, None] * width + e_E[None, :], error_RE, mask=exists_RE)
    # Outside the width errors are zero, but those of an unknown window are NaN: they count where they exist.
    square = tl.sum(tl.sum(tl.where(exists_RE, error_RE * error_RE, 0.0), 1), 0)
    tl.store(part + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
def _product_kernel(
    error,
    norm,
    grad,
    product,
    num_rows,
    width,
    norm_stride_d,
    norm_stride_e,
    mean_scale,  # of the mean of squares: 2 / (number of squares)
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists_R, exists_D = row_R < num_rows, d_D < width
    error_ptr_R = error + row_R.to(tl.int64) * width
    product_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for at in range(0, width, BLOCK_E):
        e_E = at + tl.arange(0, BLOCK_E)
        exists_E = e_E < width
        error_RE = tl.load(error_ptr_R[:, None] + e_E[None, :], mask=exists_R[:, None] & exists_E[None, :], other=0.0)
        norm_ED = tl.load(
            norm + d_D.to(tl.int64)[None, :] * norm_stride_d + e_E.to(tl.int64)[:, None] * norm_stride_e,
            mask=exists_E[:, None] & exists_D[None, :],
            other=0.0,
        )
        product_RD = tl.dot(error_RE, norm_ED, product_RD, input_precision="ieee")
    scale = tl.load(grad) * mean_scale
    tl.store(
        product + row_R.to(tl.int64)[:, None] * width + d_D[None, :],
        product_RD * scale,
        mask=exists_R[:, None] & exists_D[None, :],
    )


@triton.jit
def _scatter_kernel(product, index, grad, num_windows, num_draws, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    num_tiles = tl.cdiv(num_windows, BLOCK_N)
    picture = (tl.program_id(0) // num_tiles).to(tl.int64)
    first = tl.program_id(0) % num_tiles * BLOCK_N
    n_N = first + tl.arange(0, BLOCK_N)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists_D = d_D < width
    grad_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # A window reads its draws, in their order: no two programs write one element, and a window drawn twice adds.
    for draw in range(num_draws):
        window = tl.load(index + picture * num_draws + draw)
        if (window >= first) & (window < first + BLOCK_N):
            row_D = tl.load(product + (picture * num_draws + draw) * width + d_D, mask=exists_D, other=0.0)
            grad_ND += tl.where((n_N == window)[:, None], row_D[None, :], 0.0)
    grad_ptr_ND = grad + (picture * num_windows + n_N[:, None]) * width + d_D[None, :]
    tl.store(grad_ptr_ND, grad_ND.to(grad.dtype.element_ty), mask=(n_N < num_windows)[:, None] & exists_D[None, :])


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_PRODUCT_TILE = {"BLOCK_R": BLOCK_R, "BLOCK_D": BLOCK_E, "BLOCK_E": BLOCK_D}
_SIZES = ("num_rows", "num_windows", "num_draws", "width")
_STRIDES = ("predicted_stride_b", "predicted_stride_n", "target_stride_b", "target_stride_m")


def _forward_case(name: str, norm_strides: dict[str, str], norm_ones: dict[str, int], order: str) -> CompileCase:
    pointers = {"predicted": f"*{name}", "target": "*fp32", "index": "*i64"}
    pointers |= dict.fromkeys(("norm", "error", "part"), "*fp32")
    return CompileCase(
        f"forward {name}, norm by {order}",
        _forward_kernel,
        {**pointers, **dict.fromkeys((*_SIZES, *_STRIDES), "i32"), **norm_strides},
        {"BLOCK_R": BLOCK_R, "BLOCK_E": BLOCK_E, "BLOCK_D": BLOCK_D, **norm_ones},
        frozenset({*pointers, "width", *_STRIDES, *norm_strides}),
    )


def _product_case(norm_strides: dict[str, str], norm_ones: dict[str, int], order: str) -> CompileCase:
    pointers = dict.fromkeys(("error", "norm", "grad", "product"), "*fp32")
    return CompileCase(
        f"product, norm by {order}",
        _product_kernel,
        {**pointers, "num_rows": "i32", "width": "i32", "mean_scale": "fp32", **norm_strides},
        {**_PRODUCT_TILE, **norm_ones},
        frozenset({*pointers, "width", *norm_strides}),
    )


def _scatter_case(name: str) -> CompileCase:
    pointers = {"product": "*fp32", "index": "*i64", "grad": f"*{name}"}
    return CompileCase(
        f"scatter {name}",
        _scatter_kernel,
        {**pointers, **dict.fromkeys(("num_windows", "num_draws", "width"), "i32")},
        {"BLOCK_N": WINDOWS, "BLOCK_D": COLUMNS},
        frozenset({*pointers, "width"}),
    )


# Triton compiles a stride of 1 as the constant; eigenvectors, which norms are made of, come by columns.
_ORDERS = (
    ({"norm_stride_d": "i32"}, {"norm_stride_e": 1}, "rows"),
    ({"norm_stride_e": "i32"}, {"norm_stride_d": 1}, "columns"),
)
# Widths 192, 384, 768 are runtime values: one program serves them all.
CASES: tuple[CompileCase, ...] = (
    *(_forward_case(name, *order) for name in ("fp32", "bf16", "fp16") for order in _ORDERS),
    *(_product_case(*order) for order in _ORDERS),
    *(_scatter_case(name) for name in ("fp32", "bf16", "fp16")),
)
