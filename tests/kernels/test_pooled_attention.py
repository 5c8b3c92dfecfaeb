"""Pooled attention: the Triton program and the fast PyTorch form against the definition in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo  # notes the functions that it knows by identity: before `poisoned` replaces some
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.layout import Ragged
from tve_kernels.limits import NARROWEST_HEAD, WIDEST_HEAD
from tve_kernels.pooled_attention import pooled_attention, reference
from tve_kernels.ragged_attention.reference import ragged_attention

WithinBudget = Callable[..., None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half the distance of neighbouring numbers at 1 (values are of size 1): what rounding the output alone may cost.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
WINDOWS = (21, 1, 1, 33, 32, 31, 64, 2)  # around the edges of blocks of 32 keys


def packed(
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    num_queries: int = 2,
    num_heads: int = 2,
) -> tuple[tuple[Tensor, Tensor, Tensor], Ragged]:
    """q [M, Q, H, W], heads before queries in memory; k and v as views into one tensor [R, 2, H, W]; their layout."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    q_MHQW = torch.randn(len(lengths), num_heads, num_queries, width, generator=generator).to(device, dtype)
    kv_R2HW = torch.randn(sum(lengths), 2, num_heads, width, generator=generator).to(device, dtype)
    k_RHW, v_RHW = kv_R2HW.unbind(1)
    return (q_MHQW.transpose(1, 2), k_RHW, v_RHW), Ragged.of(lengths, device)


def check(
    backend: Backend, qkv: tuple[Tensor, ...], layout: Ragged, within_budget: WithinBudget, scale: float = 0.2
) -> None:
    q, k, v = qkv
    actual = pooled_attention(q, k, v, layout, scale=scale, backend=backend)
    same_dtype = reference.pooled_attention(q, k, v, layout, scale=scale)
    exact64 = reference.pooled_attention(q.double(), k.double(), v.double(), layout, scale=scale)
    assert actual.dtype == q.dtype
    assert actual.is_contiguous()
    within_budget(actual, same_dtype, exact64, floor=FLOOR[q.dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_queries", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_pooled_tokens_attend_to_their_sequence(
    backend: Backend, dtype: torch.dtype, num_queries: int, device: torch.device, within_budget: WithinBudget
) -> None:
    check(backend, *packed(WINDOWS, 48, dtype, device, num_queries), within_budget)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (300,), (64, 65, 63), (21,) * 5], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sequences_may_have_any_length(
    backend: Backend, lengths: tuple[int, ...], device: torch.device, within_budget: WithinBudget
) -> None:
    check(backend, *packed(lengths, 32, torch.bfloat16, device), within_budget)


@pytest.mark.parametrize("width", [16, 80, 127, 128])
def test_the_kernel_takes_heads_of_any_width_from_16_to_128(
    width: int, device: torch.device, within_budget: WithinBudget
) -> None:
    check("triton", *packed((21, 40), width, torch.float32, device), within_budget)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scores_may_be_large(backend: Backend, device: torch.device, within_budget: WithinBudget) -> None:
    check(backend, *packed((40, 90), 32, torch.float32, device), within_budget, scale=50.0)


def test_the_kernel_takes_rows_of_any_strides(device: torch.device, within_budget: WithinBudget) -> None:
    (q, k, v), layout = packed((40, 21), 32, torch.float32, device)
    every_other = torch.stack([k, k + 1], dim=-1)[..., 0]  # last dimension of stride 2
    heads_first = v.transpose(0, 1).contiguous().transpose(0, 1)
    assert every_other.stride(-1) == 2
    check("triton", (q, every_other, heads_first), layout, within_budget)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_it_is_ragged_attention_of_the_first_rows(backend: Backend, device: torch.device) -> None:
    (_, k, v), layout = packed((21, 3, 40), 32, torch.float32, device)
    first_M = layout.offsets_M1[:-1].long()
    everyone = ragged_attention(k + v, k, v, layout, scale=0.2)
    pooled = pooled_attention((k + v)[first_M][:, None], k, v, layout, scale=0.2, backend=backend)
    torch.testing.assert_close(pooled[:, 0], everyone[first_M])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_sequences_give_no_tokens(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    (q, k, v), layout = packed((), 32, dtype, device)
    assert pooled_attention(q, k, v, layout, scale=0.2, backend=backend).shape == (0, 2, 2, 32)


def test_the_op_keeps_the_rules_of_custom_ops(device: torch.device) -> None:
    (q, k, v), layout = packed((21, 3), 32, torch.float32, device)
    torch.library.opcheck(torch.ops.tve.pooled_attention.default, (q, k, v, layout.offsets_M1, 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_op_compiles_without_a_break(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    (q, k, v), layout = packed((21, 21, 3), 32, dtype, device)

    def around(q_MQHW: Tensor) -> Tensor:
        return pooled_attention(q_MQHW * 2, k, v, layout, scale=0.2, backend=backend) + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), around(q))


def test_every_configuration_that_is_launched_is_one_that_is_proved() -> None:
    kernel = pytest.importorskip("tve_kernels.pooled_attention.kernel")
    proved = {(case.num_warps, case.constexprs["BLOCK_K"], case.constexprs["BLOCK_W"]) for case in kernel.CASES}
    for width in range(NARROWEST_HEAD, WIDEST_HEAD + 1):
        for mean_length in (1, 21, 32, 32.5, 197, 1370):
            chosen = kernel.configuration(mean_length, width)
            assert (chosen.num_warps, chosen.BLOCK_K, 1 << (width - 1).bit_length()) in proved


def test_inputs_that_do_not_suit_are_refused(device: torch.device) -> None:
    (q, k, v), layout = packed((21, 3), 32, torch.float32, device)

    def refused(message: str, q: Tensor, k: Tensor, v: Tensor, layout: Ragged, backend: Backend = "torch") -> None:
        with pytest.raises(ValueError, match=message):
            pooled_attention(q, k, v, layout, scale=0.2, backend=backend)

    refused(r"q: expected \[2, 1 or 2, H, W\]", q[1:], k, v, layout)
    refused(r"q: expected \[2, 1 or 2, H, W\]", q[:, 0], k, v, layout)
    refused(r"q: expected \[2, 1 or 2, H, W\]", torch.cat([q, q], 1), k, v, layout)
    refused(r"k: expected torch.float32 \[24, 2, 32\]", q, k[:, :1], v, layout)
    refused(r"k: expected torch.float32 \[24, 2, 32\]", q, k[1:], v, layout)
    refused(r"v: expected torch.float32", q, k, v.half(), layout)
    refused(r"v: expected .* on .*, to suit q and the layout, got .* on meta", q, k, v.to("meta"), layout)
    refused(r"layout: expected its tensors on", q, k, v, Ragged.of((21, 3), "meta"))
    refused(r"q: expected float32, bfloat16 or float16", *(x.double() for x in (q, k, v)), layout, "triton")
    refused(r"q: expected heads of width 16 to 128, got 8", *(x[..., :8] for x in (q, k, v)), layout, "triton")
