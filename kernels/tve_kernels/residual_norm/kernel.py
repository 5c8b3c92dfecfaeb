"""Residual and norm in one pass over memory: whole rows lie in registers, each is read once and written twice."""

import triton
import triton.language as tl
from torch import Tensor

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first

ELEMENTS = 4096  # of a program of 8 warps: 16 a thread; with 32, one case spills on one target


@triton.jit
def residual_norm_kernel(
    sum_RD,
    normed_RD,
    x_RD,
    branch_RD,
    scale_D,
    weight_D,
    bias_D,
    num_rows,
    x_stride_r,
    branch_stride_r,
    eps,
    WIDTH: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < WIDTH
    inside_RD = (rows < num_rows)[:, None] & is_column[None, :]
    out = rows[:, None] * WIDTH + columns[None, :]

    stored_RD = tl.load(x_RD + rows[:, None] * x_stride_r + columns[None, :], mask=inside_RD, other=0.0)
    if HAS_BRANCH:
        added_RD = tl.load(
            branch_RD + rows[:, None] * branch_stride_r + columns[None, :], mask=inside_RD, other=0.0
        ).to(tl.float32)
        if HAS_SCALE:
            added_RD *= tl.load(scale_D + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        stored_RD = (stored_RD.to(tl.float32) + added_RD).to(stored_RD.dtype)
        tl.store(sum_RD + out, stored_RD, mask=inside_RD)

    values_RD = stored_RD.to(tl.float32)  # of the sum as stored: what the next block adds to is what was normalised
    if not RMS:
        mean_R = tl.sum(values_RD, axis=1) / WIDTH
        values_RD = tl.where(is_column[None, :], values_RD - mean_R[:, None], 0.0)
        # The mean is off by a rounding, which the norm of a nearly constant row multiplies by up to eps ** -0.5.
        off_R = tl.sum(values_RD, axis=1) / WIDTH
        values_RD = tl.where(is_column[None, :], values_RD - off_R[:, None], 0.0)
    variance_R = tl.sum(values_RD * values_RD, axis=1) / WIDTH
    values_RD *= (1.0 / tl.sqrt(variance_R + eps))[:, None]
    if HAS_WEIGHT:
        values_RD *= tl.load(weight_D + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        values_RD += tl.load(bias_D + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_RD + out, values_RD.to(stored_RD.dtype), mask=inside_RD)


def tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    columns = triton.next_power_of_2(width)
    return max(1, ELEMENTS // columns), columns, 8


@on_device_of_first
def residual_norm(
    x_RD: Tensor,
    branch_RD: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The sum (x itself where there is no branch) and the normed rows."""
    num_rows, width = x_RD.shape
    x_RD = _columns_side_by_side(x_RD)
    normed_RD = x_RD.new_empty(num_rows, width)
    sum_RD = x_RD
    if branch_RD is not None:
        branch_RD = _columns_side_by_side(branch_RD)
        sum_RD = x_RD.new_empty(num_rows, width)
    if num_rows:
        block_r, block_d, num_warps = tile(width)
        residual_norm_kernel[(triton.cdiv(num_rows, block_r),)](
            sum_RD,
            normed_RD,
            x_RD,
            branch_RD,
            None if scale_D is None else scale_D.contiguous(),
            None if weight_D is None else weight_D.contiguous(),
            None if bias_D is None else bias_D.contiguous(),
            num_rows,
            x_RD.stride(0),
            0 if branch_RD is None else branch_RD.stride(0),
            eps,
            WIDTH=width,
            HAS_BRANCH=branch_RD is not None,
            HAS_SCALE=scale_D is not None,
            HAS_WEIGHT=weight_D is not None,
            HAS_BIAS=bias_D is not None,
            RMS=rms,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return sum_RD, normed_RD


def _columns_side_by_side(rows_RD: Tensor) -> Tensor:
    return rows_RD if rows_RD.stride(1) == 1 else rows_RD.contiguous()


def _case(
    dtype: str, width: int, rms: bool = False, branch: bool = True, scale: bool = False, weights: str = ""
) -> CompileCase:
    block_r, block_d, num_warps = tile(width)
    signature = dict.fromkeys(("sum_RD", "normed_RD", "x_RD"), f"*{dtype}")
    constexprs: dict[str, int | None] = {
        "WIDTH": width,
        "HAS_BRANCH": branch,
        "HAS_SCALE": scale,
        "HAS_WEIGHT": True,
        "HAS_BIAS": not rms,
        "RMS": rms,
        "BLOCK_R": block_r,
        "BLOCK_D": block_d,
    }
    given = {"branch_RD": branch, "scale_D": scale, "weight_D": True, "bias_D": not rms}
    for name, is_given in given.items():
        if is_given:
            signature[name] = f"*{dtype if name == 'branch_RD' or not weights else weights}"
        else:
            constexprs[name] = None
    signature |= {"num_rows": "i32", "x_stride_r": "i32"}
    if branch:
        signature["branch_stride_r"] = "i32"
    else:
        constexprs["branch_stride_r"] = 0
    aligned = frozenset(signature) - {"num_rows"}
    words = [dtype, "rms" if rms else "layer", f"D={width}"]
    words += ["scale"] * scale + ["no branch"] * (not branch) + [f"{weights} weights"] * bool(weights)
    return CompileCase(
        " ".join(words), residual_norm_kernel, signature | {"eps": "fp32"}, constexprs, aligned, num_warps
    )


CASES = (
    _case("fp32", 192),
    _case("bf16", 192),
    _case("fp32", 384),
    _case("bf16", 384, scale=True),
    _case("fp32", 768),
    _case("bf16", 768),
    _case("fp16", 768),
    _case("bf16", 768, branch=False),
    _case("bf16", 768, scale=True, weights="fp32"),
    _case("bf16", 1024, rms=True, scale=True),
    _case("fp32", 1536, scale=True),
    _case("fp32", 4096, scale=True),
    _case("bf16", 4096, rms=True, scale=True),
)
