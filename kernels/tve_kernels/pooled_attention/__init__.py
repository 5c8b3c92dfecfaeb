"""Attention of one or two pooled tokens of each sequence to all rows of it."""

from tve_kernels.pooled_attention.op import pooled_attention as pooled_attention
