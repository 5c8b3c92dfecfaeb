"""Packing in plain PyTorch, fast on a CPU: where each packed row comes from, then one `index_select`.

Windows are arithmetic over the R packed rows, as in the kernel: no mask is built. Blank rows that lie behind the
pictures' rows in one tensor are copied with them; elsewhere they are appended first, since a second write over the
first takes up to five times as long.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tve_kernels.layout import Ragged
from tve_kernels.pack_tokens.bits import present_patches


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
    """As the reference, with lengths taken on trust."""
    sequence_R = layout.sequence_R
    row_R = torch.arange(sequence_R.shape[0], dtype=torch.int32, device=sequence_R.device)
    patch_R = row_R - layout.offsets_M1[sequence_R] - num_prefix  # below 0: a token of the prefix

    p_M, q_M = centre_M // patches_per_side, centre_M % patches_per_side
    top_M, left_M = (p_M - radius).clamp(min=0), (q_M - radius).clamp(min=0)
    height_M = (p_M + radius).clamp(max=patches_per_side - 1) - top_M + 1
    width_M = (q_M + radius).clamp(max=patches_per_side - 1) - left_M + 1
    top_R, left_R, height_R, width_R, kept_R, image_R = (
        each_M[sequence_R] for each_M in (top_M, left_M, height_M, width_M, kept_M, image_M)
    )
    if absent_NV is not None:
        line_R, column_R = patch_R // patches_per_side - top_R, patch_R % patches_per_side - left_R
        inside_R = (line_R >= 0) & (line_R < height_R) & (column_R >= 0) & (column_R < width_R)
        present_R = (patch_R < 0) | (inside_R == kept_R)
        return _copied(source_BTV, absent_NV, image_R, patch_R + num_prefix, present_R, num_prefix)

    kept_patch_R = (top_R + patch_R // width_R) * patches_per_side + left_R + patch_R % width_R
    # Between two lines of a window that is taken away lie `gap` patches; the patches of as many lines as have been
    # passed are missing. Where the window is as wide as the picture, all its lines are passed at once.
    gap_R = patches_per_side - width_R
    past_R = patch_R - (top_R * patches_per_side + left_R)
    lines_R = torch.where(gap_R > 0, torch.minimum(past_R // gap_R.clamp(min=1) + 1, height_R), height_R)
    other_patch_R = patch_R + torch.where(past_R >= 0, lines_R * width_R, 0)
    patch_R = torch.where(patch_R < 0, patch_R, torch.where(kept_R, kept_patch_R, other_patch_R))
    return _copied(source_BTV, None, image_R, patch_R + num_prefix, None, num_prefix)


def pack_masks(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    layout: Ragged,
    *,
    num_prefix: int,
) -> Tensor:
    """As the reference; of the lengths, only the sum is checked.

    Raises:
        ValueError: another number of rows than the layout's.
    """
    num_tokens = source_BTV.shape[1]
    present_MN = present_patches(words_MG, num_tokens - num_prefix)
    present_MT = functional.pad(present_MN, (num_prefix, 0), value=True)
    if absent_NV is not None:
        token_MT = torch.arange(num_tokens, device=words_MG.device).expand_as(present_MT)
        image_MT = image_M[:, None].expand_as(present_MT)
        return _copied(source_BTV, absent_NV, image_MT.flatten(), token_MT.flatten(), present_MT.flatten(), num_prefix)
    sequence_R, token_R = present_MT.nonzero(as_tuple=True)  # in the order of packed rows
    if len(sequence_R) != layout.num_rows:
        raise ValueError(f"layout: expected {len(sequence_R)} rows of these coalitions, got {layout.num_rows}")
    return _copied(source_BTV, None, image_M[sequence_R], token_R, None, num_prefix)


def _copied(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_R: Tensor,
    token_R: Tensor,
    present_R: Tensor | None,
    num_prefix: int,
) -> Tensor:
    index_R = image_R.long() * source_BTV.shape[1] + token_R
    if absent_NV is None or present_R is None:
        return source_BTV.flatten(0, 1).index_select(0, index_R)
    rows_XV, first_absent = _one_matrix(source_BTV, absent_NV)
    return rows_XV.index_select(0, torch.where(present_R, index_R, first_absent - num_prefix + token_R))


def _one_matrix(source_BTV: Tensor, absent_NV: Tensor) -> tuple[Tensor, int]:
    """Pictures' rows and blank rows as one matrix, and where the blank ones begin."""
    num_rows, width = source_BTV.shape[0] * source_BTV.shape[1], source_BTV.shape[2]
    behind = int(absent_NV.storage_offset()) - int(source_BTV.storage_offset())
    if (
        source_BTV.is_contiguous()
        and absent_NV.is_contiguous()
        and absent_NV.untyped_storage().data_ptr() == source_BTV.untyped_storage().data_ptr()
        and behind >= num_rows * width
        and behind % width == 0
    ):
        first = behind // width
        return source_BTV.as_strided((first + len(absent_NV), width), (width, 1)), first
    return torch.cat([source_BTV.flatten(0, 1), absent_NV]), num_rows
