"""What the embedding would be if the last blocks alone lacked a window: the class token's way through them, anew.

The class token, with the rest of the prefix, is taken as the full pass has it before the last K blocks and carried
through them once for every window, that window's patches out of its sight. All other patches' keys and values are
those of the full pass: N windows together cost what N prefixes more would in K blocks, and exact answers 2 N passes.

Under `drop` it is h, but for what patches have told each other of the window, and the class token before: an
approximation that needs no training, and that an explainer corrects. Under `zero` it is a hint. Of what differs from
window to window in h (centred R² at the best scale, ViT-Ti and DeiT-Ti at 112 px, r = 1, `drop`) it has .08 to .13
with one block and .18 to .23 with three.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor

from tve.backbones import Backbone
from tve.coalitions import CoalitionFamily, on_finer_grid
from tve.plain_vits import obstacle, pooled_tokens
from tve.vit_blocks import PreNormBlock, added


def most_blocks(backbone: Backbone) -> int:
    """How many of its last blocks a backbone's class token can be carried through anew.

    All but the first of a plain vision transformer that pools its class tokens; none of any other model.
    """
    model: Any = backbone.model
    if obstacle(model, backbone.image_size, backbone.patches_per_side) or isinstance(model, Eva):  # Eva: rotary
        return 0
    if not pooled_tokens(model):
        return 0
    known = takewhile(PreNormBlock.of_known_parts, reversed(model.blocks))
    return min(sum(1 for _ in known), len(model.blocks) - 1)


def seen_without(family: CoalitionFamily, tokens_per_side: int) -> Tensor:
    """Bool [N, T]: the tokens of T = tokens_per_side² patches that are left when each coalition is taken away.

    Raises:
        ValueError: a grid that the family's does not divide.
    """
    if tokens_per_side % family.patches_per_side:
        raise ValueError(
            f"tokens_per_side: expected a multiple of {family.patches_per_side}, the grid, got {tokens_per_side}"
        )
    return ~on_finer_grid(family.kept_NPP(), tokens_per_side // family.patches_per_side).flatten(1)


def changed_without(backbone: Backbone, entering: Sequence[Tensor], seen_NT: Tensor) -> Tensor:
    """By how much the embedding changes where only some patches are seen, [B, N, D]: `reread`, less the same of all.

    Both in the weights' own precision whatever is autocast, and by the same arithmetic: the changes are small, and
    rounding errors of either cancel. Arguments and errors are those of `reread`.
    """
    weight = next(backbone.parameters())
    whole_1T = torch.ones_like(seen_NT[:1])
    with torch.autocast(weight.device.type, enabled=False):
        read = reread(backbone, [tokens.to(weight.dtype) for tokens in entering], torch.cat([whole_1T, seen_NT]))
    return read[:, 1:] - read[:, :1]


def reread(backbone: Backbone, entering: Sequence[Tensor], seen_NT: Tensor) -> Tensor:
    """The embedding [B, N, D] that the class token comes to through the last K blocks, seeing only some patches.

    Differentiable, also in the backbone's weights where they take gradients.

    Args:
        backbone: one of which `most_blocks` is at least K.
        entering: the tokens [B, prefix + T, W] that enter each of these blocks; `Features.entering`.
        seen_NT: bool; the patches whose tokens are seen. The prefix always is.

    Raises:
        ValueError: a block with hooks, which would be passed by.
    """
    model: Any = backbone.model
    prefix, pooled = int(model.num_prefix_tokens), pooled_tokens(model)
    num_pictures, num_readings = len(entering[0]), len(seen_NT)
    every = (num_pictures, num_readings)
    x_RD = entering[0][:, None, :prefix].expand(-1, num_readings, -1, -1).flatten(0, 2)
    first = len(model.blocks) - len(entering)
    for number, tokens_BTD in enumerate(entering, first):
        if PreNormBlock.hooked(model.blocks[number]):
            raise ValueError(f"block {number} of {backbone.config.name}: expected no hooks, got some; remove them")
        block = PreNormBlock(model.blocks[number])
        patches_RD = block.norm1(tokens_BTD[:, prefix:]).flatten(0, 1)
        patches = [part.unflatten(0, (num_pictures, -1)) for part in block.expand(*block.key_value(patches_RD, None))]
        normed_RD = block.norm1(x_RD)
        queries, *own = block.query_key_value(normed_RD, None)
        queries, *own = (part.unflatten(0, (*every, prefix)) for part in (queries, *block.expand(*own)))
        if tokens_BTD is entering[-1] and pooled < prefix:  # no one reads the other tokens again
            queries = queries[:, :, :pooled]
            x_RD, normed_RD = (rows.unflatten(0, (-1, prefix))[:, :pooled].flatten(0, 1) for rows in (x_RD, normed_RD))
        gathered = _gather(queries * block.scale, own, patches, seen_NT)
        x_RD = added(x_RD, block.attended(gathered, normed_RD), block.scale1_D)
        x_RD = added(x_RD, block.mlp(block.norm2(x_RD)), block.scale2_D)
    pooled_RQD = model.norm(x_RD).unflatten(0, (-1, pooled))
    embedding_BND: Tensor = backbone.pool(pooled_RQD).unflatten(0, every)
    return embedding_BND


def _gather(
    queries_BNQHW: Tensor, own_kv_BNPHW: Sequence[Tensor], kv_BTHW: Sequence[Tensor], seen_NT: Tensor
) -> Tensor:
    """What Q scaled queries of each reading gather from its P prefix tokens and the patches seen, [B * N * Q, H, W]."""
    (own_k, own_v), (k, v) = own_kv_BNPHW, kv_BTHW
    to_own = torch.einsum("bnqhw,bnphw->bhnqp", queries_BNQHW, own_k)
    to_patches = torch.einsum("bnqhw,bthw->bhnqt", queries_BNQHW, k).masked_fill(~seen_NT[:, None], float("-inf"))
    weights = torch.cat([to_own, to_patches], -1).softmax(-1)
    to_own, to_patches = weights.split([to_own.shape[-1], to_patches.shape[-1]], -1)
    gathered = torch.einsum("bhnqp,bnphw->bnqhw", to_own, own_v) + torch.einsum("bhnqt,bthw->bnqhw", to_patches, v)
    return gathered.flatten(0, 2)
