"""Programs start on the device of their tensors."""

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tve_kernels.launch import on_device_of_first

OPS = ("pack_tokens", "pooled_attention", "ragged_attention", "residual_norm", "transfer_map")


@on_device_of_first
def doubled(first: Tensor, second: Tensor, *, times: float = 2) -> Tensor:
    """Twice the first."""
    return first * times + second


def test_a_launcher_runs_with_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    current: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        current.append(tensor)
        yield
        current.pop()

    @on_device_of_first
    def launcher(first: Tensor, second: Tensor) -> Tensor:
        assert current[0] is first
        return second

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    one, other = torch.zeros(1), torch.ones(1)
    assert launcher(one, other) is other
    assert len(entered) == 1
    assert entered[0] is one
    assert not current


def test_on_a_cpu_a_launcher_is_what_it_was() -> None:
    assert doubled(torch.ones(1), torch.zeros(1), times=3).tolist() == [3]
    assert (doubled.__name__, doubled.__doc__) == ("doubled", "Twice the first.")


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_current_while_its_program_starts() -> None:
    current = on_device_of_first(lambda _: torch.cuda.current_device())
    assert current(torch.zeros(1, device="cuda:1")) == 1
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", OPS)
def test_every_function_that_starts_a_program_chooses_its_device(op: str) -> None:
    """A start is written `program[grid](...)`."""
    module = ast.parse(inspect.getsource(import_module(f"tve_kernels.{op}.kernel")))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    starting = [
        function
        for function in functions
        if any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) for node in ast.walk(function))
    ]
    assert starting
    for function in starting:
        assert [ast.unparse(each) for each in function.decorator_list] == ["on_device_of_first"], function.name
