"""Coalitions as bits: patch n of a sequence is bit n % 32 of its word n // 32."""

import torch
from torch import Tensor

BITS = 32


def num_words(num_patches: int) -> int:
    return -(-num_patches // BITS)


def bit_words(present_MN: Tensor) -> Tensor:
    """The words int32 [M, ceil(N / 32)] of coalitions bool [M, N], True where present. Bits past N are 0.

    Raises:
        ValueError: another dtype or number of axes.
    """
    if present_MN.dtype != torch.bool or present_MN.ndim != 2:
        raise ValueError(f"present: expected bool [M, N], got {present_MN.dtype} {list(present_MN.shape)}")
    num_patches = present_MN.shape[1]
    padded_MN = torch.nn.functional.pad(present_MN, (0, num_words(num_patches) * BITS - num_patches))
    words: Tensor = (padded_MN.unflatten(1, (-1, BITS)) * _worth(present_MN)).sum(-1, dtype=torch.int32)
    return words


def present_patches(words_MG: Tensor, num_patches: int) -> Tensor:
    """The coalitions bool [M, N] of their words int32 [M, G]."""
    return ((words_MG[..., None] & _worth(words_MG)) != 0).flatten(1)[:, :num_patches]


def _worth(like: Tensor) -> Tensor:
    """What each bit adds to an int32: the highest is its sign, so that no sum leaves the range.

    Made on the device: for numbers copied there, the host would wait.
    """
    return torch.bitwise_left_shift(1, torch.arange(BITS, dtype=torch.int32, device=like.device))
