"""Muon in float32 beside torch's, which rounds to bfloat16."""

import pytest
import torch
from torch import Tensor

from tve_pipeline.muon import Muon

SHAPES = [(24, 8), (8, 8), (8, 24), (8, 8)]


def matrices() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in SHAPES]


def changes(optimizer: torch.optim.Optimizer, parameters: list[Tensor], num_steps: int) -> list[Tensor]:
    before = [each.detach().clone() for each in parameters]
    torch.manual_seed(1)
    for _ in range(num_steps):
        for each in parameters:
            each.grad = torch.randn_like(each)
        optimizer.step()
    return [(each - was).detach() for each, was in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("num_steps", [1, 4])
def test_it_is_torchs_but_for_rounding(num_steps: int) -> None:
    ours, torchs = matrices(), matrices()
    mine = changes(Muon(ours, lr=0.02, weight_decay=0.1), ours, num_steps)
    reference = torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for found, expected in zip(mine, changes(reference, torchs, num_steps), strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


def orthogonal_in_float64(gradient: Tensor) -> Tensor:
    wide = gradient.double() if gradient.shape[0] <= gradient.shape[1] else gradient.double().mT
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if gradient.shape[0] <= gradient.shape[1] else wide.mT


def test_it_rounds_to_float32() -> None:
    parameters = matrices()
    for parameter, found in zip(
        parameters, changes(Muon(parameters, lr=1.0, weight_decay=0.0), parameters, 1), strict=True
    ):
        assert parameter.grad is not None
        # Orthogonalising, of the gradient alone at first, knows no scale.
        expected = -0.2 * max(found.shape) ** 0.5 * orthogonal_in_float64(parameter.grad)
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_updates_are_nearly_orthogonal_and_as_large_as_adamws() -> None:
    parameters = matrices()
    for found in changes(Muon(parameters, lr=1.0, weight_decay=0.0), parameters, 1):
        singular_values = torch.linalg.svdvals(found / (0.2 * max(found.shape) ** 0.5))
        assert 0.5 < singular_values.min() <= singular_values.max() < 1.3
        assert 0.1 < found.square().mean().sqrt() < 0.25


def test_matrices_without_a_gradient_stay_and_others_are_refused() -> None:
    parameters = matrices()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    before = [each.detach().clone() for each in parameters]
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert [torch.equal(each, was) for each, was in zip(parameters, before, strict=True)] == [True, False, True, True]
    with pytest.raises(ValueError, match="closure: expected None, got one"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"matrices: expected parameters of two dimensions, got \[3\]"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1, weight_decay=0.0)
