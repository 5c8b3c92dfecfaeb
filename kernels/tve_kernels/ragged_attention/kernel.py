"""The Triton program of ragged attention: a tile of query rows, which may span several sequences, and one head.

Keys run from the first row of the tile's first sequence to the last row of its last one; a row sees those of its own
sequence. So windows of 21 tokens fill the tiles as well as sequences of 1,370.
"""

from dataclasses import dataclass
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first

STAGES = 2  # blocks of keys in flight


@dataclass(frozen=True, slots=True)
class Configuration:
    """Rows and keys of a tile, and the warps that share it."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int


def configuration(mean_length: float, width: int, itemsize: int) -> Configuration:
    """Tile sizes for sequences of this mean length, heads of this width and elements of this many bytes."""
    if itemsize == 4:  # float32 products in full precision hold both operands in registers
        return Configuration(32, 32, 4)
    if mean_length <= 64:  # 64 rows are the fewest that fill Hopper's matrix units
        return Configuration(64, 32, 4)
    return Configuration(128, 64 if width <= 64 else 32, 8)  # wider ones with 64 keys spill on gfx942


@on_device_of_first
def ragged_attention(
    q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, sequence_R: Tensor, scale: float
) -> Tensor:
    """Attended values [R, H, W], contiguous, in the dtype of q; rows and heads of q, k and v may have any strides."""
    num_rows, num_heads, width = q_RHW.shape
    out_RHW = torch.empty((num_rows, num_heads, width), dtype=q_RHW.dtype, device=q_RHW.device)
    if not num_rows:
        return out_RHW
    q_RHW, k_RHW, v_RHW = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_RHW, k_RHW, v_RHW))
    chosen = configuration(num_rows / (len(offsets_M1) - 1), width, q_RHW.element_size())
    ragged_attention_kernel[(triton.cdiv(num_rows, chosen.BLOCK_Q), num_heads)](
        q_RHW,
        k_RHW,
        v_RHW,
        out_RHW,
        offsets_M1,
        sequence_R,
        *(stride for x in (q_RHW, k_RHW, v_RHW, out_RHW) for stride in x.stride()[:2]),
        num_rows,
        scale * log2(torch.e),
        W=width,
        BLOCK_W=triton.next_power_of_2(width),
        BLOCK_Q=chosen.BLOCK_Q,
        BLOCK_K=chosen.BLOCK_K,
        # The interpreter multiplies the bit patterns of bfloat16.
        UPCAST=bool(knobs.runtime.interpret) and q_RHW.dtype == torch.bfloat16,
        num_warps=chosen.num_warps,
        num_stages=STAGES,
    )
    return out_RHW


@triton.jit
def ragged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    offsets_ptr,
    sequence_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    num_rows,
    scale_log2,  # times log2(e): exponentials are powers of two
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_Q
    last_row = tl.minimum(first_row + BLOCK_Q, num_rows) - 1
    rows_Q = first_row + tl.arange(0, BLOCK_Q)
    columns_W = tl.arange(0, BLOCK_W)
    inside_W = columns_W < W
    inside_QW = (rows_Q < num_rows)[:, None] & inside_W[None, :]
    q_at_QW = q_ptr + head * q_head + rows_Q.to(tl.int64)[:, None] * q_row + columns_W[None, :]
    q_QW = tl.load(q_at_QW, mask=inside_QW, other=0.0)
    if UPCAST:
        q_QW = q_QW.to(tl.float32)
    sequence_Q = tl.load(sequence_ptr + rows_Q, mask=rows_Q < num_rows, other=-1)
    first_key = tl.load(offsets_ptr + tl.load(sequence_ptr + first_row))
    end_key = tl.load(offsets_ptr + tl.load(sequence_ptr + last_row) + 1)

    largest_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    sum_QW = tl.zeros((BLOCK_Q, BLOCK_W), tl.float32)
    for start in range(first_key, end_key, BLOCK_K):
        keys_K = start + tl.arange(0, BLOCK_K)
        present_K = keys_K < end_key
        inside_KW = present_K[:, None] & inside_W[None, :]
        wide_K1 = keys_K.to(tl.int64)[:, None]
        k_KW = tl.load(k_ptr + head * k_head + wide_K1 * k_row + columns_W[None, :], mask=inside_KW, other=0.0)
        v_KW = tl.load(v_ptr + head * v_head + wide_K1 * v_row + columns_W[None, :], mask=inside_KW, other=0.0)
        if UPCAST:
            k_KW, v_KW = k_KW.to(tl.float32), v_KW.to(tl.float32)
        sequence_K = tl.load(sequence_ptr + keys_K, mask=present_K, other=-2)
        scores_QK = tl.dot(q_QW, tl.trans(k_KW), input_precision="ieee") * scale_log2
        scores_QK = tl.where(sequence_Q[:, None] == sequence_K[None, :], scores_QK, float("-inf"))

        new_Q = tl.maximum(largest_Q, tl.max(scores_QK, 1))
        # A row whose sequence has not begun yet has no largest score; any finite number gives it weights of zero.
        shift_Q = tl.where(new_Q == float("-inf"), 0.0, new_Q)
        weights_QK = tl.exp2(scores_QK - shift_Q[:, None])
        keep_Q = tl.exp2(largest_Q - shift_Q)
        total_Q = total_Q * keep_Q + tl.sum(weights_QK, 1)
        sum_QW = tl.dot(weights_QK.to(v_KW.dtype), v_KW, sum_QW * keep_Q[:, None], input_precision="ieee")
        largest_Q = new_Q

    total_Q = tl.where(rows_Q < num_rows, total_Q, 1.0)  # rows beyond the last have no key
    out_at_QW = out_ptr + head * out_head + rows_Q.to(tl.int64)[:, None] * out_row + columns_W[None, :]
    tl.store(out_at_QW, (sum_QW / total_Q[:, None]).to(out_ptr.dtype.element_ty), mask=inside_QW)


def _case(dtype: str, width: int, mean_length: int) -> CompileCase:
    chosen = configuration(mean_length, width, 4 if dtype == "fp32" else 2)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("offsets_ptr", "sequence_ptr"), "*i32")
    strides = dict.fromkeys(f"{name}_{axis}" for name in ("q", "k", "v", "out") for axis in ("row", "head"))
    return CompileCase(
        f"{dtype} W={width} L={mean_length}",
        ragged_attention_kernel,
        pointers | dict.fromkeys(strides, "i32") | {"num_rows": "i32", "scale_log2": "fp32"},
        {
            "W": width,
            "BLOCK_W": triton.next_power_of_2(width),
            "BLOCK_Q": chosen.BLOCK_Q,
            "BLOCK_K": chosen.BLOCK_K,
            "UPCAST": False,
        },
        frozenset(pointers) | frozenset(strides),
        chosen.num_warps,
        STAGES,
    )


# Sequences of windows (21 tokens) and of whole pictures (197) in every padded width, and ViT-H's 80.
CASES = tuple(
    _case(dtype, width, mean_length)
    for dtype in ("bf16", "fp16", "fp32")
    for width in (16, 32, 64, 80, 128)
    for mean_length in (21, 197)
    if dtype != "fp32" or mean_length == 21  # whose tiles do not depend on it
)
