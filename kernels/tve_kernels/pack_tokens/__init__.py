"""The kept tokens of many coalitions, packed into one ragged batch."""

from tve_kernels.pack_tokens.bits import bit_words as bit_words
from tve_kernels.pack_tokens.op import pack_masks as pack_masks
from tve_kernels.pack_tokens.op import pack_windows as pack_windows
