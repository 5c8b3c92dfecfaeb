"""The Triton program of pooled attention: a sequence and a head, its one or two queries together.

Two queries cannot fill a tile of a matrix unit, and each key is used by no more than two: products are multiplied and
summed in float32, and the program's time is that of reading the keys and values once.
"""

from dataclasses import dataclass
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first

STAGES = 2  # blocks of keys in flight


@dataclass(frozen=True, slots=True)
class Configuration:
    """Keys of a block, and the warps that share it."""

    BLOCK_K: int
    num_warps: int


def configuration(mean_length: float, width: int) -> Configuration:
    """Block sizes for sequences of this mean length and heads of this width."""
    if mean_length <= 32:
        return Configuration(32, 1 if width <= 32 else 2)
    return Configuration(64 if width <= 64 else 32, 4)


@on_device_of_first
def pooled_attention(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, scale: float) -> Tensor:
    """Attended values [M, Q, H, W], contiguous, in the dtype of q; the first axes of q, k, v may have any strides."""
    num_sequences, num_queries, num_heads, width = q_MQHW.shape
    out_MQHW = torch.empty(q_MQHW.shape, dtype=q_MQHW.dtype, device=q_MQHW.device)
    if not num_sequences:
        return out_MQHW
    q_MQHW, k_RHW, v_RHW = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_MQHW, k_RHW, v_RHW))
    chosen = configuration(len(k_RHW) / num_sequences, width)
    pooled_attention_kernel[(num_sequences, num_heads)](
        q_MQHW,
        k_RHW,
        v_RHW,
        out_MQHW,
        offsets_M1,
        *(stride for x in (q_MQHW, k_RHW, v_RHW, out_MQHW) for stride in x.stride()[:-1]),
        scale * log2(torch.e),
        W=width,
        BLOCK_W=triton.next_power_of_2(width),
        Q=num_queries,
        BLOCK_K=chosen.BLOCK_K,
        num_warps=chosen.num_warps,
        num_stages=STAGES,
    )
    return out_MQHW


@triton.jit
def pooled_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    offsets_ptr,
    q_sequence,
    q_query,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_sequence,
    out_query,
    out_head,
    scale_log2,  # times log2(e): exponentials are powers of two
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first_key = tl.load(offsets_ptr + sequence)
    end_key = tl.load(offsets_ptr + sequence + 1)
    queries_Q = tl.arange(0, Q)
    columns_W = tl.arange(0, BLOCK_W)
    inside_W = columns_W < W
    q_at_QW = q_ptr + sequence * q_sequence + head * q_head + queries_Q[:, None] * q_query + columns_W[None, :]
    q_QW = tl.load(q_at_QW, mask=inside_W[None, :], other=0.0).to(tl.float32) * scale_log2

    largest_Q = tl.full((Q,), float("-inf"), tl.float32)
    total_Q = tl.zeros((Q,), tl.float32)
    sum_QW = tl.zeros((Q, BLOCK_W), tl.float32)
    for start in range(first_key, end_key, BLOCK_K):
        keys_K = start + tl.arange(0, BLOCK_K)
        present_K = keys_K < end_key
        inside_KW = present_K[:, None] & inside_W[None, :]
        wide_K1 = keys_K.to(tl.int64)[:, None]
        k_KW = tl.load(k_ptr + head * k_head + wide_K1 * k_row + columns_W[None, :], mask=inside_KW, other=0.0)
        v_KW = tl.load(v_ptr + head * v_head + wide_K1 * v_row + columns_W[None, :], mask=inside_KW, other=0.0)
        scores_QK = tl.sum(q_QW[:, None, :] * k_KW.to(tl.float32)[None, :, :], 2)
        scores_QK = tl.where(present_K[None, :], scores_QK, float("-inf"))

        new_Q = tl.maximum(largest_Q, tl.max(scores_QK, 1))  # finite: each block holds a key
        weights_QK = tl.exp2(scores_QK - new_Q[:, None])
        keep_Q = tl.exp2(largest_Q - new_Q)
        total_Q = total_Q * keep_Q + tl.sum(weights_QK, 1)
        sum_QW = sum_QW * keep_Q[:, None] + tl.sum(weights_QK[:, :, None] * v_KW.to(tl.float32)[None, :, :], 1)
        largest_Q = new_Q

    out_at_QW = out_ptr + sequence * out_sequence + head * out_head + queries_Q[:, None] * out_query
    attended_QW = (sum_QW / total_Q[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at_QW + columns_W[None, :], attended_QW, mask=inside_W[None, :])


def _case(dtype: str, width: int, mean_length: int, num_queries: int) -> CompileCase:
    chosen = configuration(mean_length, width)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | {"offsets_ptr": "*i32"}
    strides = [f"{name}_{axis}" for name in ("q", "out") for axis in ("sequence", "query", "head")]
    strides += [f"{name}_{axis}" for name in ("k", "v") for axis in ("row", "head")]
    return CompileCase(
        f"{dtype} W={width} L={mean_length} Q={num_queries}",
        pooled_attention_kernel,
        pointers | dict.fromkeys(strides, "i32") | {"scale_log2": "fp32"},
        {"W": width, "BLOCK_W": triton.next_power_of_2(width), "Q": num_queries, "BLOCK_K": chosen.BLOCK_K},
        frozenset(pointers) | frozenset(strides),
        chosen.num_warps,
        STAGES,
    )


# Sequences of windows (21 tokens) and of whole pictures (197) in every padded width; distilled DeiTs pool two tokens.
CASES = tuple(
    _case(dtype, width, mean_length, num_queries)
    for dtype in ("bf16", "fp16", "fp32")
    for width in (16, 32, 64, 128)
    for mean_length in (21, 197)
    for num_queries in (1, 2)
    if num_queries == 2 or width == 64
)
