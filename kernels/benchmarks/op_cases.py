"""What each op is timed on: shapes of a ViT-Base in practice, and the least that must be moved and computed for them.

Letters: B pictures, M coalitions, R packed rows, N = P * P patches, T = N + 1 tokens, D width, H heads, W = D / H.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tve.coalitions import WindowCoalitions, Windows, random_halves
from tve.kernels import (
    Backend,
    Ragged,
    bit_words,
    pack_masks,
    pack_windows,
    pooled_attention,
    ragged_attention,
    residual_norm,
)
from tve_kernels.transfer_map import transfer_map


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the tensors; the defaults are those of a ViT-Base at 224 px."""

    pictures: int = 32
    patches_per_side: int = 14
    width: int = 768
    heads: int = 12
    radii: tuple[int, ...] = (2, 3, 4)  # windows of 25, 49 and 81 patches where no border cuts them
    windows: int = 4096
    halves: int = 1024
    whole: int = 512  # sequences of all tokens
    classes: int = 1000


@dataclass(frozen=True, slots=True)
class OpCase:
    """One op on one set of tensors."""

    op: str
    shape: str  # in words
    run: Callable[[Backend], object]
    moved_bytes: int  # every input read once, every output written once
    flops: int  # of products; 0 where the op only moves data


def op_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[OpCase]:
    """Every op on every set of coalitions that it meets, one at a time."""
    for name, coalitions in _coalitions(sizes).items():
        yield from _coalition_ops(name, coalitions, sizes, device, dtype)
    yield _transfer_map(sizes, device, dtype)


def _coalitions(sizes: Sizes) -> dict[str, Tensor | WindowCoalitions]:
    patches, num_patches = sizes.patches_per_side, sizes.patches_per_side**2
    made: dict[str, Tensor | WindowCoalitions] = {}
    centre_M = torch.arange(sizes.windows) % num_patches
    for radius in sizes.radii:
        windows = WindowCoalitions(Windows(patches, radius), centre_M, torch.ones(sizes.windows, dtype=torch.bool))
        # by length, as the evaluator packs them
        made[f"{sizes.windows} kept windows, r = {radius}"] = windows[windows.sizes().argsort(stable=True)]
    halves_MPP = random_halves(sizes.halves, patches, torch.Generator().manual_seed(0))
    whole_MPP = torch.ones(sizes.whole, patches, patches, dtype=torch.bool)
    made[f"{sizes.halves} random halves"] = halves_MPP
    made[f"{sizes.whole} whole pictures"] = whole_MPP
    return made


def _coalition_ops(
    name: str, coalitions: Tensor | WindowCoalitions, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Iterator[OpCase]:
    num_tokens, width, heads = sizes.patches_per_side**2 + 1, sizes.width, sizes.heads
    is_windows = isinstance(coalitions, WindowCoalitions)
    kept_M = coalitions.sizes() if isinstance(coalitions, WindowCoalitions) else coalitions.flatten(1).sum(1)
    lengths = (kept_M + 1).tolist()
    layout = Ragged.of(lengths, device)
    num_rows, num_sequences, squares = sum(lengths), len(lengths), sum(length**2 for length in lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    source_BTV = random(sizes.pictures, num_tokens, 4 * width)  # a token with its q, k and v
    image_M = (torch.arange(num_sequences) % sizes.pictures).int().to(device)
    element = source_BTV.element_size()
    copied = (source_BTV.numel() + 4 * num_rows * width) * element
    if isinstance(coalitions, WindowCoalitions):
        centre_M, kept = coalitions.centre.int().to(device), coalitions.kept.to(device)

        def packed(backend: Backend) -> Tensor:
            return pack_windows(
                source_BTV,
                None,
                image_M,
                centre_M,
                kept,
                layout,
                patches_per_side=sizes.patches_per_side,
                radius=coalitions.windows.radius,
                num_prefix=1,
                backend=backend,
            )
    else:
        words_MG = bit_words(coalitions.flatten(1)).to(device)

        def packed(backend: Backend) -> Tensor:
            return pack_masks(source_BTV, None, image_M, words_MG, layout, num_prefix=1, backend=backend)

    yield OpCase("pack_windows" if is_windows else "pack_masks", name, packed, copied, 0)

    scale = (width // heads) ** -0.5
    q, k, v = random(num_rows, 3, heads, width // heads).unbind(1)  # views, as a layer's product leaves them
    yield OpCase(
        "ragged_attention",
        name,
        lambda backend: ragged_attention(q, k, v, layout, scale=scale, backend=backend),
        4 * num_rows * width * element,
        4 * squares * width,
    )
    query_M1HW = random(num_sequences, 1, heads, width // heads)
    yield OpCase(
        "pooled_attention",
        name,
        lambda backend: pooled_attention(query_M1HW, k, v, layout, scale=scale, backend=backend),
        2 * (num_rows + num_sequences) * width * element,
        4 * num_rows * width,
    )
    x, branch, weight, bias = random(num_rows, width), random(num_rows, width), random(width), random(width)
    yield OpCase(
        "residual_norm",
        name,
        lambda backend: residual_norm(x, branch, None, weight, bias, eps=1e-6, kind="layer", backend=backend),
        4 * num_rows * width * element,
        0,
    )


def _transfer_map(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> OpCase:
    pictures, num_patches, width = sizes.pictures, sizes.patches_per_side**2, sizes.width
    sizes_of = ((pictures, num_patches, width), (pictures, num_patches, width), (pictures, width), (width,))
    given = [torch.randn(shape, device=device).to(dtype) for shape in (*sizes_of, (sizes.classes, width))]
    bias_C = torch.zeros(sizes.classes, device=device, dtype=dtype)
    target_B1 = torch.arange(pictures, device=device)[:, None] % sizes.classes
    kept, removed, full, empty, weight = given
    return OpCase(
        "transfer_map",
        f"{pictures} pictures, one of {sizes.classes} classes, logit",
        lambda backend: transfer_map(
            kept,
            removed,
            full,
            empty,
            weight,
            bias_C,
            target_B1,
            patches_per_side=sizes.patches_per_side,
            radius=sizes.radii[0],
            output="logit",
            weight_kept=1.0,
            weight_removed=1.0,
            window_mean=True,
            backend=backend,
        ),
        (kept.numel() + removed.numel() + 2 * pictures * width) * kept.element_size() + 4 * pictures * num_patches,
        4 * pictures * (num_patches + 1) * width,
    )
