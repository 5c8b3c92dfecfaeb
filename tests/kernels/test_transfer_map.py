"""Maps of chosen classes: the kernels against the definition in float64, and against the transfer rule itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tve.meta_attribution import MetaAttribution
from tve.transfer_rule import TransferRule, transfer
from tve_kernels.backend import Backend
from tve_kernels.transfer_map import reference, transfer_map
from tve_kernels.transfer_map.op import _transfer_map
from tve_kernels.transfer_map.reference import Output

# Lanes past the end of a map divide 0 by 0 in the interpreter; they are never stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

OUTPUTS: tuple[Output, ...] = get_args(Output)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FLOOR = 1e-5  # maps are of order 1; both sum the same float32 products, in another order
RULE: dict[str, Any] = {"radius": 1, "output": "logit", "weight_kept": 1.0, "weight_removed": 0.5, "window_mean": True}

WithinBudget = Callable[..., None]


@dataclass(frozen=True)
class Given:
    """The tensors of a call, in its order."""

    kept_BND: Tensor
    removed_BND: Tensor
    full_BD: Tensor
    empty_D: Tensor
    weight_CD: Tensor
    bias_C: Tensor | None
    target_BK: Tensor

    @property
    def tensors(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def side(self) -> int:
        return math.isqrt(self.kept_BND.shape[1])

    def to(self, dtype: torch.dtype) -> "Given":
        return Given(*(t if t is None or t.dtype == torch.int64 else t.to(dtype) for t in self.tensors))

    def maps(self, backend: Backend, **rule: Any) -> Tensor:
        return transfer_map(*self.tensors, patches_per_side=self.side, backend=backend, **{**RULE, **rule})

    def defined(self, **rule: Any) -> Tensor:
        return reference.transfer_map(*self.tensors, patches_per_side=self.side, **{**RULE, **rule})


def given(
    device: torch.device,
    *,
    pictures: int = 2,
    side: int = 3,
    width: int = 40,
    classes: int = 20,
    targets: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Given:
    """Embeddings that differ between windows, and a head whose probabilities are neither flat nor certain."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=drawn) * scale).to(device, dtype)

    return Given(
        normal(pictures, side**2, width),
        normal(pictures, side**2, width),
        normal(pictures, width),
        normal(width),
        normal(classes, width, scale=2 * width**-0.5),
        normal(classes),
        torch.randint(classes, (pictures, targets), generator=drawn).to(device),
    )


# Around the tiles: 16 or 32 patches, 16 and 32 targets, 32 or 64 numbers, 64 or 128 classes, 512 a program.
SHAPES: dict[str, dict[str, Any]] = {
    "one patch, one class of one": {"pictures": 1, "side": 1, "width": 1, "classes": 1, "targets": 1},
    "below every tile": {},
    "at the tiles": {"pictures": 1, "side": 4, "width": 64, "classes": 128, "targets": 16},
    "past the tiles": {"pictures": 3, "side": 6, "width": 65, "classes": 129, "targets": 17},
    "past two tiles of targets": {"pictures": 1, "side": 2, "width": 16, "classes": 40, "targets": 33},
    "past a program's classes": {"pictures": 1, "side": 3, "width": 16, "classes": 513, "targets": 3},
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_equals_the_definition_around_every_tile_edge(
    shape: dict[str, Any], output: Output, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = given(device, **shape)
    rule = {"output": output, "window_mean": False}  # whose own edges are another test's
    maps = inputs.maps("triton", **rule)
    assert maps.dtype == torch.float32
    within_budget(maps, inputs.defined(**rule), inputs.to(torch.float64).defined(**rule), floor=FLOOR)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_half_precision_is_summed_in_float32(
    backend: Backend, dtype: torch.dtype, output: Output, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = given(device, side=4, width=100, classes=150, targets=3, dtype=dtype)
    exact = inputs.to(torch.float64).defined(output=output)
    # The definition reads half precision in float32, so this budget is float32's.
    within_budget(inputs.maps(backend, output=output), inputs.defined(output=output), exact, floor=FLOOR)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_classes_at_once_are_the_transfer_rule(backend: Backend, output: Output, device: torch.device) -> None:
    inputs = given(device, side=3, width=24, classes=18)
    everything = torch.arange(18, device=device).expand(2, -1)
    head = nn.Linear(24, 18, device=device)
    with torch.no_grad():
        head.weight.copy_(inputs.weight_CD)
        head.bias.copy_(inputs.bias_C if inputs.bias_C is not None else torch.zeros(18))
    meta = MetaAttribution(inputs.kept_BND, inputs.removed_BND, inputs.full_BD, inputs.empty_D, radius=1)
    for window_mean in (True, False):
        rule = TransferRule(output, "mean" if window_mean else "window", weight_kept=0.7, weight_removed=1.3)
        expected = transfer(meta, head, rule)
        maps = replace(inputs, target_BK=everything).maps(
            backend, output=output, weight_kept=0.7, weight_removed=1.3, window_mean=window_mean
        )
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


# A tile of a map has 256 patches: 17 x 17 goes past it.
@pytest.mark.parametrize(("side", "radius"), [(5, 0), (5, 1), (5, 2), (5, 4), (5, 9), (16, 1), (17, 2), (1, 1)])
@pytest.mark.usefixtures("poisoned")
def test_any_radius_clips_its_window_at_the_border(
    side: int, radius: int, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = given(device, side=side, width=8, classes=4, targets=1)
    exact = inputs.to(torch.float64).defined(radius=radius)
    within_budget(inputs.maps("triton", radius=radius), inputs.defined(radius=radius), exact, floor=FLOOR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_radius_0_leaves_u_as_it_is(backend: Backend, device: torch.device) -> None:
    inputs = given(device)
    assert torch.equal(inputs.maps(backend, radius=0), inputs.maps(backend, radius=0, window_mean=False))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_all_windows_say_the_same_the_map_is_flat_up_to_the_border(
    backend: Backend, output: Output, device: torch.device
) -> None:
    inputs = given(device, side=5)
    flat = replace(
        inputs,
        kept_BND=inputs.kept_BND[:, :1].expand_as(inputs.kept_BND),
        removed_BND=inputs.removed_BND[:, :1].expand_as(inputs.removed_BND),
    )
    phi = flat.maps(backend, output=output, radius=2)
    torch.testing.assert_close(phi, phi[..., :1, :1].expand_as(phi), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_that_say_nothing_and_lose_nothing_score_zero(backend: Backend, device: torch.device) -> None:
    inputs = given(device)
    silent = replace(
        inputs,
        kept_BND=inputs.empty_D.expand_as(inputs.kept_BND),
        removed_BND=inputs.full_BD[:, None].expand_as(inputs.removed_BND),
    )
    for output in OUTPUTS:
        assert float(silent.maps(backend, output=output).abs().max()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_without_bias_and_weights_of_zero(
    backend: Backend, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = replace(given(device), bias_C=None)
    for output in OUTPUTS:
        for rule in ({"weight_kept": 0.0}, {"weight_removed": 0.0}):
            exact = inputs.to(torch.float64).defined(output=output, **rule)
            maps = inputs.maps(backend, output=output, **rule)
            within_budget(maps, inputs.defined(output=output, **rule), exact, floor=FLOOR)


@pytest.mark.parametrize("output", OUTPUTS)
def test_tensors_that_are_views_of_others_are_read_where_they_lie(output: Output, device: torch.device) -> None:
    inputs = given(device, side=3, width=12)
    both_BND = torch.cat([inputs.kept_BND, inputs.removed_BND], 1)
    wide_CD = torch.cat([inputs.weight_CD, inputs.weight_CD], 1)
    views = Given(
        both_BND[:, :9],  # batch stride
        inputs.removed_BND.mT.contiguous().mT,  # last axis not contiguous
        torch.stack([inputs.full_BD, inputs.full_BD], 1)[:, 1],  # row stride
        torch.stack([inputs.empty_D, inputs.empty_D], 1)[:, 0],
        wide_CD[:, 12:],
        None if inputs.bias_C is None else torch.stack([inputs.bias_C, inputs.bias_C], 1)[:, 0],
        inputs.target_BK.mT.contiguous().mT,
    )
    assert torch.equal(views.maps("triton", output=output), inputs.maps("triton", output=output))


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_that_the_bias_masks_are_left_out_of_the_probabilities(backend: Backend, device: torch.device) -> None:
    inputs = given(device, classes=140, width=8)
    bias_C = torch.full((140,), -torch.inf, device=device)
    bias_C[130:] = 0.0  # the first tile of classes holds none that counts
    masked = replace(inputs, bias_C=bias_C, target_BK=torch.tensor([[130], [139]], device=device))
    alone = replace(
        inputs, weight_CD=inputs.weight_CD[130:], bias_C=None, target_BK=torch.tensor([[0], [9]], device=device)
    )
    for output in ("probability", "log_probability"):
        torch.testing.assert_close(
            masked.maps(backend, output=output), alone.defined(output=output), rtol=1e-5, atol=1e-5
        )


def test_logits_of_thousands_do_not_overflow(device: torch.device) -> None:
    inputs = given(device, classes=150, width=8)
    large = replace(inputs, weight_CD=inputs.weight_CD * 1000)
    for output in ("probability", "log_probability"):
        exact = large.to(torch.float64).defined(output=output)
        torch.testing.assert_close(large.maps("triton", output=output).double(), exact, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("shape", [{"pictures": 0}, {"targets": 0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pictures_or_no_classes_make_no_maps(backend: Backend, shape: dict[str, Any], device: torch.device) -> None:
    inputs = given(device, **shape)
    for output in OUTPUTS:
        maps = inputs.maps(backend, output=output)
        assert maps.dtype == torch.float32
        assert maps.shape == (*inputs.target_BK.shape, 3, 3)


@pytest.mark.parametrize("unknown", [-1, 20])
def test_a_class_that_the_head_does_not_have_is_not_a_number_with_triton(unknown: int, device: torch.device) -> None:
    inputs = given(device)
    target_BK = inputs.target_BK.clone()
    target_BK[1, 0] = unknown
    for output in OUTPUTS:
        maps = replace(inputs, target_BK=target_BK).maps("triton", output=output)
        right = inputs.maps("triton", output=output)
        assert bool(maps[1, 0].isnan().all())
        right[1, 0] = torch.nan
        assert torch.equal(maps.nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("unknown", [-1, 20])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_class_that_the_head_does_not_have_is_an_error_with_torch(output: Output, unknown: int) -> None:
    inputs = given(torch.device("cpu"))
    inputs.target_BK[1, 0] = unknown
    with pytest.raises((IndexError, RuntimeError), match="index"):
        inputs.maps("torch", output=output)


@pytest.mark.parametrize("window_mean", [True, False])
def test_the_op_says_the_truth_about_itself(window_mean: bool, device: torch.device) -> None:
    arguments = (*given(device, width=8).tensors, 3, 1, "probability", 1.0, 0.5, window_mean)
    torch.library.opcheck(_transfer_map, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break_it_is_the_same(backend: Backend, device: torch.device) -> None:
    inputs = given(device, width=8)

    def twice(kept_BND: Tensor) -> Tensor:
        return replace(inputs, kept_BND=2 * kept_BND).maps(backend, output="probability") + 1

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs.kept_BND), twice(inputs.kept_BND), rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_carry_no_gradient(backend: Backend, device: torch.device) -> None:
    inputs = given(device, width=8)
    assert not replace(inputs, weight_CD=inputs.weight_CD.requires_grad_()).maps(backend).requires_grad


@pytest.mark.parametrize(
    ("changed", "rule", "message"),
    [
        ({}, {"output": "softmax"}, r"output: expected one of \['logit'"),
        ({}, {"radius": -1}, "radius: expected at least 0, got -1"),
        (
            {"kept_BND": torch.zeros(2, 8, 40)},
            {},
            r"kept: expected \[B, 9, D\] of 3 patches per side, got \[2, 8, 40\]",
        ),
        ({"kept_BND": torch.zeros(2, 9, 40).double()}, {}, "kept: expected one of .*float64; cast it"),
        ({"removed_BND": torch.zeros(2, 9, 41)}, {}, r"removed: expected torch.float32 \[2, 9, 40\]"),
        ({"full_BD": torch.zeros(1, 40)}, {}, r"full: expected torch.float32 \[2, 40\].*\[1, 40\]"),
        ({"empty_D": torch.zeros(40).half()}, {}, r"empty: expected torch.float32 \[40\].*got torch.float16"),
        ({"weight_CD": torch.zeros(20, 39)}, {}, r"weight: expected torch.float32 \[20, 40\].*\[20, 39\]"),
        ({"weight_CD": torch.zeros(0, 40)}, {}, r"weight: expected \[C, 40\], C > 0, got \[0, 40\]"),
        ({"bias_C": torch.zeros(19)}, {}, r"bias: expected torch.float32 \[20\]"),
        (
            {"target_BK": torch.zeros(2, dtype=torch.int64)},
            {},
            r"target: expected int64 \[2, K\], got torch.int64 \[2\]",
        ),
        ({"target_BK": torch.zeros(2, 1)}, {}, r"target: expected int64 \[2, K\], got torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_together_is_refused(
    backend: Backend, changed: dict[str, Any], rule: dict[str, Any], message: str
) -> None:
    inputs = replace(given(torch.device("cpu")), **changed)
    with pytest.raises(ValueError, match=message):
        transfer_map(*inputs.tensors, patches_per_side=3, backend=backend, **{**RULE, **rule})


@pytest.mark.parametrize("name", ["removed_BND", "full_BD", "empty_D", "weight_CD", "bias_C", "target_BK"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_on_another_device_is_refused(backend: Backend, name: str) -> None:
    inputs = given(torch.device("cpu"))
    inputs = replace(inputs, **{name: getattr(inputs, name).to("meta")})
    with pytest.raises(ValueError, match=f"^{name.split('_')[0]}: expected cpu, as kept, got meta; move it$"):
        inputs.maps(backend)
