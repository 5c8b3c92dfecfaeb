"""Who attends: PyTorch where sequences are long and a call for each length pays, kernels elsewhere."""

import pytest
import torch

from tve_kernels.layout import Ragged, suits_pytorch


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([99] * 1024, True),  # random halves
        ([197] * 512, True),  # whole pictures
        ([10] * 512 + [26] * 4096, False),  # windows: short
        ([100] * 10, False),  # few rows
        ([*range(20, 190)] * 4, False),  # a length of its own for each few
        ([], False),
    ],
)
def test_pytorch_attends_where_sequences_are_long_and_of_few_lengths(lengths: list[int], expected: bool) -> None:
    layout = Ragged.of(sorted(lengths))
    assert suits_pytorch(layout.num_rows, layout.num_sequences, len(layout.runs)) is expected


def test_without_a_gpu_who_was_chosen_attends() -> None:
    layout = Ragged.of([99] * 1024)
    assert layout.attention_backend("triton") == "triton"
    assert layout.attention_backend("torch") == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pytorch_attends_within_long_sequences() -> None:
    assert Ragged.of([99] * 1024, "cuda").attention_backend("triton") == "torch"
    assert Ragged.of([21] * 4096, "cuda").attention_backend("triton") == "triton"
