"""Softmax attention within each sequence of a ragged batch."""

from tve_kernels.ragged_attention.op import ragged_attention as ragged_attention
