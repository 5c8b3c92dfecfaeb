"""Where the sequences of a ragged batch lie: M sequences of different lengths in R rows, one after the other.

The letters of this package: B pictures, M sequences, R packed rows, N patches of a picture, T = tokens of a picture
(prefix and patches), D width, H heads, W head width, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from tve_kernels.backend import Backend

LONG = 64  # rows of a sequence on average
ROWS_OF_A_CALL = 4096  # that pay for a call of its own for each length


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive sequences of one length."""

    num_sequences: int
    length: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """The layout of a ragged batch, for kernels (tensors on the device) and for dense loops (runs on the host)."""

    offsets_M1: Tensor  # int32 [M + 1]: sequence m has rows offsets[m] to offsets[m + 1]
    sequence_R: Tensor  # int32 [R]: the sequence of each row
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Ragged":
        """The layout of sequences of these lengths, in this order.

        Raises:
            ValueError: a sequence without rows.
        """
        if lengths and min(lengths) < 1:
            raise ValueError(f"lengths: expected at least 1 row a sequence, got {min(lengths)}; leave it out")
        lengths_M = torch.tensor(lengths, dtype=torch.int64)
        if torch.device(device).type == "cuda":  # the host need not wait for the copy
            lengths_M = lengths_M.pin_memory().to(device, non_blocking=True)
        offsets_M1 = functional.pad(lengths_M.cumsum(0), (1, 0)).int()
        sequence_M = torch.arange(len(lengths), dtype=torch.int32, device=lengths_M.device)
        sequence_R = sequence_M.repeat_interleave(lengths_M, output_size=sum(lengths))
        runs = tuple(Run(len(list(same)), length) for length, same in groupby(lengths))
        return cls(offsets_M1.to(device), sequence_R.to(device), runs)

    # Of the tensors, not of the runs: a compiled program then serves other lengths too.

    @property
    def num_sequences(self) -> int:
        return self.offsets_M1.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return self.sequence_R.shape[0]

    def attention_backend(self, backend: Backend) -> Backend:
        """Who attends within these sequences: PyTorch on a GPU where they are long and of few lengths, else `backend`.

        Measured on an H100 in bfloat16 (kernels/results): at 10 to 25 rows the kernel takes 0.27 of the time of
        PyTorch's own attention, at 99 and 197 rows 2.5 to 3 times its time. Where the two meet is not measured.
        """
        if backend == "torch" or self.offsets_M1.device.type != "cuda" or torch.compiler.is_compiling():
            return backend  # while compiling, the lengths are not known
        return "torch" if suits_pytorch(self.num_rows, self.num_sequences, len(self.runs)) else backend

    def dense(self, *rows: Tensor) -> Iterator[tuple[Run, slice, tuple[Tensor, ...]]]:
        """Each run, its sequences, and of each tensor [R, ...] its rows of the run as [sequences, length, ...]."""
        first_row = first_sequence = 0
        for run in self.runs:
            here = slice(first_row, first_row + run.num_sequences * run.length)
            parts = tuple(tensor[here].unflatten(0, (run.num_sequences, run.length)) for tensor in rows)
            yield run, slice(first_sequence, first_sequence + run.num_sequences), parts
            first_row, first_sequence = here.stop, first_sequence + run.num_sequences


def suits_pytorch(num_rows: int, num_sequences: int, num_runs: int) -> bool:
    """Whether sequences are long enough for PyTorch's own attention, and runs of one length for a call each."""
    return num_rows >= LONG * num_sequences and num_rows >= ROWS_OF_A_CALL * num_runs > 0
