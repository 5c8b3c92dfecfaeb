"""The definition: which token each packed row is a copy of, one sequence after the other."""

import torch
from torch import Tensor

from tve_kernels.layout import Ragged


def pack_windows(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    centre_M: Tensor,
    kept_M: Tensor,
    layout: Ragged,
    *,
    patches_per_side: int,
    radius: int,
    num_prefix: int,
) -> Tensor:
    """Packed rows [R, V] of coalitions that are a window, or everything but a window.

    Raises:
        ValueError: a length of the layout is not that of its sequence.
    """
    coalitions = []
    for centre, kept in zip(centre_M.tolist(), kept_M.tolist(), strict=True):
        p, q = divmod(centre, patches_per_side)
        patches = [divmod(n, patches_per_side) for n in range(patches_per_side**2)]
        coalitions.append([(max(abs(row - p), abs(column - q)) <= radius) == kept for row, column in patches])
    return _packed(source_BTV, absent_NV, image_M, coalitions, layout, num_prefix)


def pack_masks(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    layout: Ragged,
    *,
    num_prefix: int,
) -> Tensor:
    """Packed rows [R, V] of coalitions given as bits.

    Raises:
        ValueError: a length of the layout is not that of its sequence.
    """
    patches = range(source_BTV.shape[1] - num_prefix)
    coalitions = [[bool(words[n // 32] >> n % 32 & 1) for n in patches] for words in words_MG.tolist()]
    return _packed(source_BTV, absent_NV, image_M, coalitions, layout, num_prefix)


def _packed(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    coalitions: list[list[bool]],
    layout: Ragged,
    num_prefix: int,
) -> Tensor:
    lengths = layout.offsets_M1.diff().tolist()
    packed = [source_BTV[:0, 0]]
    for image, coalition, length in zip(image_M.tolist(), coalitions, lengths, strict=True):
        tokens_TV = source_BTV[image]
        rows = list(tokens_TV[:num_prefix])
        for n, present in enumerate(coalition):
            if present:
                rows.append(tokens_TV[num_prefix + n])
            elif absent_NV is not None:
                rows.append(absent_NV[n])
        if len(rows) != length:
            raise ValueError(f"layout: expected a sequence of {len(rows)} rows, got {length}")
        packed += [row[None] for row in rows]
    return torch.cat(packed)
