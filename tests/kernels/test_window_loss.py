"""The loss over drawn windows and its gradient: the kernels against the definition in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tve.meta_attribution import MetaAttribution
from tve.objective import TargetScale, WindowTargets, draw_centres, regression_loss
from tve_kernels.backend import Backend
from tve_kernels.window_loss import reference, window_loss
from tve_kernels.window_loss.op import _window_loss

BACKENDS: tuple[Backend, ...] = get_args(Backend)
FLOOR = 2e-6  # losses are of order 1: their sums of squares are added in another order

WithinBudget = Callable[..., None]


@dataclass(frozen=True)
class Given:
    """The tensors of a call, in its order."""

    predicted_BND: Tensor
    target_BMD: Tensor
    index_BM: Tensor
    norm_DD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.predicted_BND, self.target_BMD, self.index_BM, self.norm_DD

    def double(self) -> "Given":
        return Given(*(t if t.dtype == torch.int64 else t.double() for t in self.tensors))

    def with_gradient(self, backend: Backend | None, incoming: float = 1.0) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to predicted; of the definition where no backend is named."""
        predicted_BND = self.predicted_BND.detach().requires_grad_()
        tensors = (predicted_BND, *self.tensors[1:])
        loss = reference.window_loss(*tensors) if backend is None else window_loss(*tensors, backend=backend)
        (grad_BND,) = torch.autograd.grad(loss * incoming, predicted_BND)
        return loss.detach(), grad_BND


def given(
    device: torch.device,
    *,
    pictures: int = 2,
    windows: int = 9,
    draws: int = 3,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
) -> Given:
    drawn = torch.Generator().manual_seed(0)
    return Given(
        torch.randn(pictures, windows, width, generator=drawn).to(device, dtype),
        torch.randn(pictures, draws, width, generator=drawn).to(device),
        draw_centres(pictures, windows, draws, drawn).to(device),
        (torch.randn(width, width, generator=drawn) * (2 * width) ** -0.5).to(device),
    )


# Around the tiles: 32 draws, 32 and 64 numbers; of the scatter, 16 windows and 128 numbers.
SHAPES = {
    "one of each": {"pictures": 1, "windows": 1, "draws": 1, "width": 1},
    "below every tile": {},
    "at the tiles": {"pictures": 2, "windows": 16, "draws": 16, "width": 64},
    "past the tiles": {"pictures": 3, "windows": 17, "draws": 11, "width": 65},
    "past the columns": {"pictures": 1, "windows": 33, "draws": 33, "width": 130},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.usefixtures("poisoned")
def test_loss_and_gradient_equal_the_definition_around_every_tile_edge(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = given(device, **shape, dtype=dtype)
    loss, grad_BND = inputs.with_gradient("triton", incoming=3.0)
    same_loss, same_grad_BND = inputs.with_gradient(None, incoming=3.0)
    exact_loss, exact_grad_BND = inputs.double().with_gradient(None, incoming=3.0)
    assert (loss.dtype, grad_BND.dtype) == (torch.float32, dtype)
    within_budget(loss, same_loss, exact_loss, floor=FLOOR)
    # Relative to the gradient itself, which is small: 2 / (B M D) of an error.
    within_budget(grad_BND, same_grad_BND, exact_grad_BND, floor=FLOOR * float(exact_grad_BND.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_gradients_of_a_window_that_was_drawn_twice_add(
    backend: Backend, device: torch.device, within_budget: WithinBudget
) -> None:
    inputs = given(device, draws=4)
    twice = replace(inputs, index_BM=torch.tensor([[2, 2, 8, 2], [0, 5, 5, 1]], device=device))
    _, grad_BND = twice.with_gradient(backend)
    _, same_grad_BND = twice.with_gradient(None)
    _, exact_grad_BND = twice.double().with_gradient(None)
    within_budget(grad_BND, same_grad_BND, exact_grad_BND, floor=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_the_mean_square_of_each_drawn_window_under_the_norm(
    backend: Backend, device: torch.device
) -> None:
    inputs = given(device)
    squares = [
        (inputs.norm_DD.T @ (inputs.predicted_BND[picture, window] - inputs.target_BMD[picture, draw])).square()
        for picture in range(2)
        for draw, window in enumerate(inputs.index_BM[picture].tolist())
    ]
    torch.testing.assert_close(window_loss(*inputs.tensors, backend=backend), torch.stack(squares).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_terms_are_the_regression_loss(backend: Backend, device: torch.device) -> None:
    kept, removed = given(device), given(device)
    removed = replace(removed, predicted_BND=removed.predicted_BND * 2, norm_DD=removed.norm_DD.T)
    full_BD = kept.predicted_BND[:, 0]
    terms = regression_loss(
        MetaAttribution(kept.predicted_BND, removed.predicted_BND, full_BD, full_BD[0], radius=1),
        WindowTargets(kept.index_BM, kept.target_BMD, removed.target_BMD),
        TargetScale(kept.norm_DD, removed.norm_DD),
    )
    for term, inputs in zip(terms, (kept, removed), strict=True):
        torch.testing.assert_close(window_loss(*inputs.tensors, backend=backend), term)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_predicted_equals_target_loss_and_gradient_are_zero(backend: Backend, device: torch.device) -> None:
    inputs = given(device, dtype=torch.bfloat16)
    rows_B1 = torch.arange(2, device=device)[:, None]
    right = replace(inputs, target_BMD=inputs.predicted_BND[rows_B1, inputs.index_BM].float())
    loss, grad_BND = right.with_gradient(backend)
    assert float(loss) == 0
    assert not bool(grad_BND.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_only_drawn_windows_have_a_gradient(backend: Backend, device: torch.device) -> None:
    inputs = given(device, windows=40, draws=5)
    _, grad_BND = inputs.with_gradient(backend)
    drawn_BN = torch.zeros(2, 40, dtype=torch.bool, device=device).scatter(1, inputs.index_BM, True)
    assert torch.equal(grad_BND.ne(0).any(2), drawn_BN)


def test_a_second_run_gives_the_same_bits(device: torch.device) -> None:
    inputs = given(device, pictures=3, draws=7, width=70)
    first, second = inputs.with_gradient("triton"), inputs.with_gradient("triton")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_tensors_that_are_views_of_others_are_read_where_they_lie(device: torch.device) -> None:
    inputs = given(device)
    both_BND = torch.cat([inputs.predicted_BND, inputs.predicted_BND + 1], 1)
    targets_BMD = torch.cat([inputs.target_BMD, inputs.target_BMD + 1], 2)
    views = Given(
        both_BND[:, :9],  # batch stride
        targets_BMD[:, :, :24],  # row stride
        torch.cat([inputs.index_BM, inputs.index_BM], 1)[:, :3],
        inputs.norm_DD.T.contiguous().T,  # by columns, as eigenvectors come
    )
    turned = replace(inputs, predicted_BND=inputs.predicted_BND.mT.contiguous().mT)  # last axis not contiguous
    loss, grad_BND = inputs.with_gradient("triton")
    for other in (views, turned):
        other_loss, other_grad_BND = other.with_gradient("triton")
        assert torch.equal(other_loss, loss)
        assert torch.equal(other_grad_BND, grad_BND)


@pytest.mark.parametrize("unknown", [-1, 9])
def test_a_window_that_does_not_exist_makes_the_loss_not_a_number_with_triton(
    unknown: int, device: torch.device
) -> None:
    inputs = given(device)
    inputs.index_BM[1, 2] = unknown
    assert bool(window_loss(*inputs.tensors, backend="triton").isnan())


@pytest.mark.parametrize("unknown", [-1, 9])
def test_a_window_that_does_not_exist_is_an_error_with_torch(unknown: int) -> None:
    inputs = given(torch.device("cpu"))
    inputs.index_BM[1, 2] = unknown
    with pytest.raises((IndexError, RuntimeError), match="index"):
        window_loss(*inputs.tensors, backend="torch")


def test_the_op_says_the_truth_about_itself(device: torch.device) -> None:
    inputs = given(device, width=8)
    tensors = (inputs.predicted_BND.requires_grad_(), *inputs.tensors[1:])
    torch.library.opcheck(_window_loss, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break_loss_and_gradient_are_the_same(
    backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = given(device, dtype=dtype)

    def stretched(predicted_BND: Tensor) -> Tensor:
        return 3 * window_loss(2 * predicted_BND, *inputs.tensors[1:], backend=backend)

    def with_gradient(loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        predicted_BND = inputs.predicted_BND.detach().requires_grad_()
        loss = loss_of(predicted_BND)
        return loss.detach(), torch.autograd.grad(loss, predicted_BND)[0]

    compiled = with_gradient(torch.compile(stretched, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, with_gradient(stretched), strict=True):
        torch.testing.assert_close(one, other)


def test_predictions_without_a_gradient_need_none(device: torch.device) -> None:
    assert not window_loss(*given(device).tensors, backend="triton").requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"predicted_BND": torch.zeros(2, 9)}, r"predicted: expected \[B, N, D\], one of .*got torch.float32 \[2, 9\]"),
        ({"predicted_BND": torch.zeros(2, 9, 24).double()}, "predicted: .*got torch.float64 .*cast it"),
        ({"index_BM": torch.zeros(2, 3).int()}, r"index: expected int64 \[2, M\], got torch.int32 \[2, 3\]"),
        ({"index_BM": torch.zeros(1, 3).long()}, r"index: expected int64 \[2, M\], got torch.int64 \[1, 3\]"),
        ({"index_BM": torch.zeros(2, 0).long()}, "index: expected at least one drawn window"),
        (
            {"target_BMD": torch.zeros(2, 4, 24)},
            r"target: expected float32 \[2, 3, 24\], got torch.float32 \[2, 4, 24\]",
        ),
        ({"target_BMD": torch.zeros(2, 3, 24).half()}, r"target: expected float32 .*got torch.float16"),
        ({"norm_DD": torch.zeros(24, 23)}, r"norm: expected float32 \[24, 24\], got torch.float32 \[24, 23\]"),
        ({"norm_DD": torch.zeros(24, 24, requires_grad=True)}, "norm: expected a constant.*detach it"),
        ({"target_BMD": torch.zeros(2, 3, 24, requires_grad=True)}, "target: expected a constant.*detach it"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_together_is_refused(backend: Backend, changed: dict[str, Any], message: str) -> None:
    inputs = replace(given(torch.device("cpu")), **changed)
    with pytest.raises(ValueError, match=message):
        window_loss(*inputs.tensors, backend=backend)


@pytest.mark.parametrize("name", ["target_BMD", "index_BM", "norm_DD"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_on_another_device_is_refused(backend: Backend, name: str) -> None:
    inputs = given(torch.device("cpu"))
    inputs = replace(inputs, **{name: getattr(inputs, name).to("meta")})
    with pytest.raises(ValueError, match=f"^{name.split('_')[0]}: expected cpu, as predicted, got meta; move it$"):
        window_loss(*inputs.tensors, backend=backend)
