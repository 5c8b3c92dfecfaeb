"""Packing, by Triton or by PyTorch."""

import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.devices import require_one_device
from tve_kernels.layout import Ragged
from tve_kernels.pack_tokens import dense
from tve_kernels.pack_tokens.bits import num_words


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
    backend: Backend,
) -> Tensor:
    """Packed rows [R, V] of coalitions that are a window, or everything but a window. For inference.

    Args:
        source_BTV: rows of each picture's tokens, num_prefix (class, registers) and then N = patches_per_side² patches;
            fp32, bf16 or fp16; V is whatever is moved with a token, such as residual, q, k and v.
        absent_NV: rows of blank patches, of the same dtype. None: absent patches are dropped, and a sequence is its
            prefix and its present patches in ascending order. Given: every sequence has all T tokens.
        image_M: int32, the picture of each sequence.
        centre_M: int32, the patch p * patches_per_side + q in the middle of its window, which the border clips.
        kept_M: bool, whether the window is kept alone or taken away.
        layout: of the M sequences. Its lengths and all indices are taken on trust: to check them here would make the
            host wait for the device. The reference checks the lengths.
        radius: of the window, in patches: 2 * radius + 1 a side.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    _require(source_BTV, absent_NV, image_M, layout, num_prefix)
    num_patches = source_BTV.shape[1] - num_prefix
    if patches_per_side**2 != num_patches:
        raise ValueError(
            f"source: expected {num_prefix} prefix and {patches_per_side}² patch tokens, got {source_BTV.shape[1]}"
        )
    if radius < 0:
        raise ValueError(f"radius: expected 0 or more, got {radius}")
    _require_tensor("centre", centre_M, torch.int32, image_M.shape)
    _require_tensor("kept", kept_M, torch.bool, image_M.shape)
    require_one_device("source", source_BTV, {"centre": centre_M, "kept": kept_M})
    if backend == "torch":
        return dense.pack_windows(
            source_BTV,
            absent_NV,
            image_M,
            centre_M,
            kept_M,
            layout,
            patches_per_side=patches_per_side,
            radius=radius,
            num_prefix=num_prefix,
        )
    packed_RV: Tensor = _windows_op(
        source_BTV,
        absent_NV,
        image_M,
        centre_M,
        kept_M,
        layout.offsets_M1,
        layout.sequence_R,
        patches_per_side,
        radius,
        num_prefix,
    )
    return packed_RV


def pack_masks(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    layout: Ragged,
    *,
    num_prefix: int,
    backend: Backend,
) -> Tensor:
    """Packed rows [R, V] of any coalitions, given as bits: as `pack_windows`, but N is any number of patches.

    Args:
        words_MG: int32 [M, ceil(N / 32)], of `bit_words`: True where present.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    _require(source_BTV, absent_NV, image_M, layout, num_prefix)
    expected = torch.Size((image_M.shape[0], num_words(source_BTV.shape[1] - num_prefix)))
    _require_tensor("words", words_MG, torch.int32, expected)
    require_one_device("source", source_BTV, {"words": words_MG})
    if backend == "torch":
        return dense.pack_masks(source_BTV, absent_NV, image_M, words_MG, layout, num_prefix=num_prefix)
    packed_RV: Tensor = _masks_op(
        source_BTV, absent_NV, image_M, words_MG, layout.offsets_M1, layout.sequence_R, num_prefix
    )
    return packed_RV


@torch.library.custom_op("tve::pack_windows", mutates_args=())
def _windows_op(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    centre_M: Tensor,
    kept_M: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    patches_per_side: int,
    radius: int,
    num_prefix: int,
) -> Tensor:
    from tve_kernels.pack_tokens import kernel  # here alone, so that importing the package imports no Triton

    return kernel.pack_windows(
        source_BTV,
        absent_NV,
        image_M,
        centre_M,
        kept_M,
        offsets_M1,
        sequence_R,
        patches_per_side,
        radius,
        num_prefix,
    )


@_windows_op.register_fake
def _(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    centre_M: Tensor,
    kept_M: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    patches_per_side: int,
    radius: int,
    num_prefix: int,
) -> Tensor:
    return source_BTV.new_empty(sequence_R.shape[0], source_BTV.shape[2])


@torch.library.custom_op("tve::pack_masks", mutates_args=())
def _masks_op(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    num_prefix: int,
) -> Tensor:
    from tve_kernels.pack_tokens import kernel

    return kernel.pack_masks(source_BTV, absent_NV, image_M, words_MG, offsets_M1, sequence_R, num_prefix)


@_masks_op.register_fake
def _(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    num_prefix: int,
) -> Tensor:
    return source_BTV.new_empty(sequence_R.shape[0], source_BTV.shape[2])


def _require(source_BTV: Tensor, absent_NV: Tensor | None, image_M: Tensor, layout: Ragged, num_prefix: int) -> None:
    if source_BTV.ndim != 3 or not source_BTV.is_floating_point():
        raise ValueError(f"source: expected floats [B, T, V], got {source_BTV.dtype} {list(source_BTV.shape)}")
    _, num_tokens, width = source_BTV.shape
    if not 0 <= num_prefix < num_tokens:
        raise ValueError(f"num_prefix: expected 0 to {num_tokens - 1}, below the number of tokens, got {num_prefix}")
    if absent_NV is not None:
        _require_tensor("absent", absent_NV, source_BTV.dtype, torch.Size((num_tokens - num_prefix, width)))
    _require_tensor("image", image_M, torch.int32, torch.Size((layout.offsets_M1.shape[0] - 1,)))
    of_layout = {"layout.offsets": layout.offsets_M1, "layout.sequence": layout.sequence_R}
    require_one_device("source", source_BTV, {"absent": absent_NV, "image": image_M, **of_layout})


def _require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
