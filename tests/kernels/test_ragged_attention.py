"""Ragged attention: the Triton program and the fast PyTorch form against the definition in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo  # notes the functions that it knows by identity: before `poisoned` replaces some
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.layout import Ragged
from tve_kernels.limits import NARROWEST_HEAD, WIDEST_HEAD
from tve_kernels.ragged_attention import dense, ragged_attention, reference

WithinBudget = Callable[..., None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half the distance of neighbouring numbers at 1 (values are of size 1): what rounding the output alone may cost.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
WINDOWS = (21, 1, 1, 33, 5, 21, 64, 16, 2, 15)  # sequences across the edges of tiles of 32 and 64 rows


def packed(
    lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device, num_heads: int = 2
) -> tuple[tuple[Tensor, Tensor, Tensor], Ragged]:
    """q, k and v as views into one tensor [R, 3, H, W], and their layout."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    qkv_R3HW = torch.randn(sum(lengths), 3, num_heads, width, generator=generator).to(device, dtype)
    q_RHW, k_RHW, v_RHW = qkv_R3HW.unbind(1)
    return (q_RHW, k_RHW, v_RHW), Ragged.of(lengths, device)


def check(
    backend: Backend,
    qkv: tuple[Tensor, ...],
    layout: Ragged,
    within_budget: WithinBudget,
    *,
    scale: float = 0.2,
    floor: float | None = None,
) -> None:
    q, k, v = qkv
    actual = ragged_attention(q, k, v, layout, scale=scale, backend=backend)
    same_dtype = reference.ragged_attention(q, k, v, layout, scale=scale)
    exact64 = reference.ragged_attention(q.double(), k.double(), v.double(), layout, scale=scale)
    assert actual.dtype == q.dtype
    assert actual.is_contiguous()
    within_budget(actual, same_dtype, exact64, floor=FLOOR[q.dtype] if floor is None else floor)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_attends_within_each_sequence(
    dtype: torch.dtype, width: int, device: torch.device, within_budget: WithinBudget
) -> None:
    check("triton", *packed(WINDOWS, width, dtype, device), within_budget)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "lengths", [(1,), (1,) * 70, (300,), (64, 64), (63, 65), (65, 1, 127, 128), (129, 31, 32)], ids=str
)
def test_the_kernel_takes_sequences_of_any_length(
    lengths: tuple[int, ...], device: torch.device, within_budget: WithinBudget
) -> None:
    check("triton", *packed(lengths, 32, torch.float16, device, num_heads=1), within_budget)


@pytest.mark.parametrize("width", [16, 80, 96, 127, 128])
def test_the_kernel_takes_heads_of_any_width_from_16_to_128(
    width: int, device: torch.device, within_budget: WithinBudget
) -> None:
    check("triton", *packed((21, 30), width, torch.float32, device), within_budget)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scores_may_be_large(backend: Backend, device: torch.device, within_budget: WithinBudget) -> None:
    # A score of 1,000 is rounded by up to 2 ** -15, and moves what is attended by as large a part.
    check(backend, *packed((40, 90), 32, torch.float32, device), within_budget, scale=50.0, floor=2.0**-14)


def test_the_kernel_takes_rows_of_any_strides(device: torch.device, within_budget: WithinBudget) -> None:
    (q, k, v), layout = packed((40, 21), 32, torch.float32, device)
    every_other = torch.stack([k, k + 1], dim=-1)[..., 0]  # last dimension of stride 2
    heads_first = v.transpose(0, 1).contiguous().transpose(0, 1)
    assert every_other.stride(-1) == 2
    check("triton", (q, every_other, heads_first), layout, within_budget)


def test_a_sequence_does_not_see_its_neighbours_in_a_tile(device: torch.device) -> None:
    (q, k, v), layout = packed((5, 7, 9), 32, torch.float32, device)
    mine = slice(5, 12)
    others = torch.ones(21, 1, 1, device=device)
    others[mine] = 0
    before = ragged_attention(q, k, v, layout, scale=0.2, backend="triton")
    after = ragged_attention(q, k + 30 * others, v - 7 * others, layout, scale=0.2, backend="triton")
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before[:5], after[:5])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(3, 3, 1, 15, 15), (16, 21, 21, 128), (129, 200), (26,) * 40], ids=str)
def test_the_pytorch_form_equals_the_definition(
    lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device, within_budget: WithinBudget
) -> None:
    check("torch", *packed(lengths, 48, dtype, device), within_budget)


@pytest.mark.usefixtures("poisoned")
def test_the_pytorch_form_on_a_cpu_works_in_parts(monkeypatch: pytest.MonkeyPatch, within_budget: WithinBudget) -> None:
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", 2 * 3 * 21**2)  # three sequences of two heads
    check("torch", *packed((21,) * 7 + (40,) * 2, 32, torch.bfloat16, torch.device("cpu")), within_budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_rows_give_no_rows(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    (q, k, v), layout = packed((), 32, dtype, device)
    assert ragged_attention(q, k, v, layout, scale=0.2, backend=backend).shape == (0, 2, 32)


def test_the_op_keeps_the_rules_of_custom_ops(device: torch.device) -> None:
    (q, k, v), layout = packed((21, 3), 32, torch.float32, device)
    torch.library.opcheck(torch.ops.tve.ragged_attention.default, (q, k, v, layout.offsets_M1, layout.sequence_R, 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_op_compiles_without_a_break(backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    (q, k, v), layout = packed((21, 21, 3), 32, dtype, device)

    def around(q_RHW: Tensor) -> Tensor:
        return ragged_attention(q_RHW * 2, k, v, layout, scale=0.2, backend=backend) + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), around(q))


def test_every_configuration_that_is_launched_is_one_that_is_proved() -> None:
    kernel = pytest.importorskip("tve_kernels.ragged_attention.kernel")
    proved = {
        (case.num_warps, *(case.constexprs[name] for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_W")), "fp32" in case.name)
        for case in kernel.CASES
    }
    for width in range(NARROWEST_HEAD, WIDEST_HEAD + 1):
        for mean_length in (1, 21, 64, 64.5, 197, 1370):
            for itemsize in (2, 4):
                chosen = kernel.configuration(mean_length, width, itemsize)
                padded = 1 << (width - 1).bit_length()
                launched = (chosen.num_warps, chosen.BLOCK_Q, chosen.BLOCK_K, padded, itemsize == 4)
                assert launched in proved


def test_inputs_that_do_not_suit_are_refused(device: torch.device) -> None:
    (q, k, v), layout = packed((21, 3), 32, torch.float32, device)

    def refused(message: str, q: Tensor, k: Tensor, v: Tensor, layout: Ragged, backend: Backend = "torch") -> None:
        with pytest.raises(ValueError, match=message):
            ragged_attention(q, k, v, layout, scale=0.2, backend=backend)

    refused(r"q: expected \[24, H, W\]", q[1:], k, v, layout)
    refused(r"q: expected \[24, H, W\]", q[:, 0], k, v, layout)
    refused(r"k: expected torch.float32 \[24, 2, 32\]", q, k[:, :1], v, layout)
    refused(r"v: expected torch.float32", q, k, v.half(), layout)
    refused(r"k: expected .* on .*, as q, got .* on meta", q, k.to("meta"), v, layout)
    refused(r"layout: expected its tensors on", q, k, v, Ragged.of((21, 3), "meta"))
    refused(
        r"q: expected float32, bfloat16 or float16, got torch.float64",
        *(x.double() for x in (q, k, v)),
        layout,
        "triton",
    )
    refused(r"q: expected heads of width 16 to 128, got 8", *(x[..., :8] for x in (q, k, v)), layout, "triton")
