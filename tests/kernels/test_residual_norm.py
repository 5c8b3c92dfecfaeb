"""Residual and norm: as accurate as PyTorch's own in each dtype, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tve_kernels.residual_norm import op as norm_op
from tve_kernels.residual_norm import reference, residual_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("poisoned")
WithinBudget = Callable[..., None]


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def given(num_rows: int, width: int, dtype: torch.dtype, device: torch.device, kind: str = "layer") -> dict[str, Any]:
    """All arguments of the op but the backend."""
    return {
        "x_RD": normal(num_rows, width, device=device, dtype=dtype),
        "branch_RD": normal(num_rows, width, device=device, dtype=dtype, seed=1),
        "scale_D": normal(width, device=device, dtype=dtype, seed=2),
        "weight_D": normal(width, device=device, dtype=dtype, seed=3),
        "bias_D": normal(width, device=device, dtype=dtype, seed=4) if kind == "layer" else None,
        "eps": 1e-6,
        "kind": kind,
    }


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def check(within_budget: WithinBudget, arguments: dict[str, Any], floor: float | None = None) -> None:
    """The kernel's sum and norm against the definition in float64.

    The floor is a unit in the last place of float32, in which kernels compute, of the largest value: PyTorch happens
    to add without rounding the product first, which the interpreter does not. On bfloat16 it is one of bfloat16 there,
    because the interpreter cuts digits off where a GPU rounds.
    """
    dtype = arguments["x_RD"].dtype
    actual, same_dtype = residual_norm(**arguments, backend="triton"), reference.residual_norm(**arguments)
    exact64 = reference.residual_norm(**in_float64(arguments))
    unit = torch.finfo(dtype if cuts_digits_off(arguments["x_RD"]) else torch.float32).eps
    for each in zip(actual, same_dtype, exact64, strict=True):
        assert each[0].dtype == dtype
        largest = float(each[2].abs().max()) if each[2].numel() else 0.0
        within_budget(*each, floor=unit * largest if floor is None else floor)


def cuts_digits_off(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and rows.device.type == "cpu"


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 64, 192, 200, 384, 768, 1000, 4096])
def test_rows_of_any_width_are_within_the_budget(
    width: int, dtype: torch.dtype, kind: str, device: torch.device, within_budget: WithinBudget
) -> None:
    check(within_budget, given(5, width, dtype, device, kind))


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 33])
def test_any_number_of_rows_is_within_the_budget(
    num_rows: int, device: torch.device, within_budget: WithinBudget
) -> None:
    check(within_budget, given(num_rows, 192, torch.float32, device))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("absent", [("branch_RD", "scale_D"), ("scale_D",), ("weight_D",), ("bias_D",)])
def test_what_is_not_given_is_left_out(
    absent: tuple[str, ...], kind: str, device: torch.device, within_budget: WithinBudget
) -> None:
    arguments = given(5, 100, torch.float32, device, kind) | dict.fromkeys(absent)
    check(within_budget, arguments)
    if "branch_RD" in absent:
        assert residual_norm(**arguments, backend="triton")[0] is arguments["x_RD"]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_float32_serve_rows_in_half_precision(
    dtype: torch.dtype, kind: str, device: torch.device, within_budget: WithinBudget
) -> None:
    arguments = given(5, 192, dtype, device, kind)
    for name in ("scale_D", "weight_D", "bias_D"):
        arguments[name] = None if arguments[name] is None else normal(192, device=device, dtype=torch.float32, seed=7)
    check(within_budget, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_float32_are_not_rounded_to_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    x_RD = torch.tensor([1.0, -1.0], device=device, dtype=dtype).repeat(3, 32)
    weight_D = torch.full((64,), 1 + 2**-12, device=device)  # 1 in half precision
    normed_RD = residual_norm(
        x_RD, None, None, weight_D, -torch.ones_like(weight_D), eps=1e-7, kind="layer", backend="triton"
    )[1]
    torch.testing.assert_close(normed_RD[:, ::2], torch.full_like(x_RD[:, ::2], 2**-12), rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_weights_in_half_precision_serve_rows_in_float32(
    kind: str, device: torch.device, within_budget: WithinBudget
) -> None:
    arguments = given(5, 192, torch.bfloat16, device, kind)
    check(within_budget, arguments | {name: arguments[name].float() for name in ("x_RD", "branch_RD")})


def test_inputs_may_be_strided_and_what_lies_between_is_not_read(
    device: torch.device, within_budget: WithinBudget
) -> None:
    arguments = given(6, 200, torch.float32, device)
    for name, apart in (("x_RD", 256), ("branch_RD", 1000)):
        memory = torch.full((6, apart), torch.nan, device=device)
        memory[:, :200] = arguments[name]
        arguments[name] = memory[:, :200]
    for name in ("scale_D", "weight_D", "bias_D"):
        arguments[name] = torch.stack([arguments[name], torch.full_like(arguments[name], torch.nan)], 1)[:, 0]
    check(within_budget, arguments)
    for name in ("x_RD", "branch_RD"):
        arguments[name] = arguments[name].T.contiguous().T
    check(within_budget, arguments)


def test_a_large_mean_costs_no_more_than_its_own_rounding(device: torch.device, within_budget: WithinBudget) -> None:
    arguments = given(4, 768, torch.float32, device) | {"branch_RD": None, "scale_D": None}
    arguments["x_RD"] = arguments["x_RD"] + 10_000
    # The mean is rounded by up to half a unit in its last place, 4.9e-4, which weights of up to 4 multiply; the
    # difference of squares, 1e8 each, would leave no digit of a variance of 1.
    check(within_budget, arguments, floor=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_those_of_the_sum_as_it_is_stored(dtype: torch.dtype, device: torch.device) -> None:
    arguments = given(5, 64, dtype, device) | {"scale_D": None, "weight_D": None, "bias_D": None}
    arguments["x_RD"], arguments["branch_RD"] = arguments["x_RD"] * 0.001 + 100, arguments["branch_RD"] * 0.1
    total_RD, normed_RD = residual_norm(**arguments, backend="triton")
    if not cuts_digits_off(total_RD):
        assert torch.equal(total_RD, arguments["x_RD"] + arguments["branch_RD"])
    again_RD = residual_norm(total_RD, None, None, None, None, eps=1e-6, kind="layer", backend="triton")[1]
    assert torch.equal(normed_RD, again_RD)


def test_constant_rows_become_the_bias(device: torch.device) -> None:
    arguments = given(3, 192, torch.float32, device) | {"branch_RD": None, "scale_D": None}
    arguments["x_RD"] = torch.full((3, 192), 4.0, device=device)
    assert torch.equal(residual_norm(**arguments, backend="triton")[1], arguments["bias_D"].expand(3, 192))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_torch_backend_is_the_definition(kind: str, device: torch.device) -> None:
    arguments = given(3, 20, torch.float32, device, kind)
    for actual, expected in zip(
        residual_norm(**arguments, backend="torch"), reference.residual_norm(**arguments), strict=True
    ):
        assert torch.equal(actual, expected)


def test_the_definition_is_the_textbook_formula(device: torch.device) -> None:
    arguments = in_float64(given(4, 24, torch.float32, device))
    x, branch, scale, weight, bias = (
        arguments[name] for name in ("x_RD", "branch_RD", "scale_D", "weight_D", "bias_D")
    )
    total, normed = reference.residual_norm(**arguments)
    torch.testing.assert_close(total, x + scale * branch)
    centred = total - total.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias
    torch.testing.assert_close(normed, expected)
    _, normed = reference.residual_norm(x, branch, None, weight, None, eps=0.5, kind="rms")
    torch.testing.assert_close(
        normed, (x + branch) / ((x + branch).square().mean(1, keepdim=True) + 0.5).sqrt() * weight
    )


@pytest.mark.parametrize("complete", [True, False])
def test_the_custom_ops_keep_the_rules_of_torch(complete: bool, device: torch.device) -> None:
    arguments = given(3, 20, torch.float32, device)
    x, branch, scale, weight, bias = (
        arguments[name] for name in ("x_RD", "branch_RD", "scale_D", "weight_D", "bias_D")
    )
    if not complete:
        x, scale, weight, bias = x.T.contiguous().T, None, None, None
    torch.library.opcheck(norm_op._residual_norm_op, (x, branch, scale, weight, bias, 1e-6, False))
    torch.library.opcheck(norm_op._norm_op, (x, weight, None, 1e-6, True))


def test_it_compiles_without_a_graph_break(device: torch.device) -> None:
    arguments = given(3, 20, torch.float32, device)
    x, branch, scale, weight, bias = (
        arguments[name] for name in ("x_RD", "branch_RD", "scale_D", "weight_D", "bias_D")
    )

    def block(x_RD: Tensor, branch_RD: Tensor) -> tuple[Tensor, Tensor]:
        x_RD, normed_RD = residual_norm(
            x_RD, branch_RD * 2, scale, weight, bias, eps=1e-6, kind="layer", backend="triton"
        )
        return residual_norm(x_RD + normed_RD, None, None, weight, None, eps=1e-6, kind="rms", backend="triton")

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, branch), block(x, branch), strict=True):
        assert torch.equal(actual, expected)


def test_a_program_holds_whole_rows() -> None:
    from tve_kernels.residual_norm.kernel import tile

    assert [tile(width)[:2] for width in (1, 192, 384, 768, 4096)] == [
        (4096, 1),
        (16, 256),
        (8, 512),
        (4, 1024),
        (1, 4096),
    ]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_does_not_agree_is_refused(backend: str) -> None:
    arguments = given(3, 20, torch.float32, torch.device("cpu"))

    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            residual_norm(**arguments | changed, backend=backend)  # type: ignore[arg-type]

    refused("kind: expected one of .*, got 'batch'", kind="batch")
    refused(r"x: expected floats \[R, D\], got torch.float32 \[20\]", x_RD=torch.zeros(20))
    refused(r"x: expected floats \[R, D\], got torch.int64", x_RD=torch.zeros(3, 20, dtype=torch.int64))
    refused("scale: expected None without a branch", branch_RD=None)
    refused("bias: expected None", kind="rms")
    refused(r"branch: expected torch.float32 \[3, 20\].*got torch.float16", branch_RD=torch.zeros(3, 20).half())
    refused(r"branch: expected torch.float32 \[3, 20\].*\[2, 20\]", branch_RD=torch.zeros(2, 20))
    refused(r"weight: expected floats \[20\], got torch.float32 \[1, 20\]", weight_D=torch.zeros(1, 20))
    refused(r"scale: expected floats \[20\], got torch.int64", scale_D=torch.zeros(20, dtype=torch.int64))
    for name in ("branch_RD", "scale_D", "weight_D", "bias_D"):
        message = f"^{name.split('_')[0]}: expected cpu, as x, got meta; move it$"
        refused(message, **{name: arguments[name].to("meta")})
    if backend == "triton":
        wide = dict.fromkeys(("branch_RD", "scale_D", "weight_D", "bias_D"))
        refused("x: expected at most 4096 columns, got 5000; use backend 'torch'", x_RD=torch.zeros(1, 5000), **wide)
