"""What the embedding would be if the last blocks alone lacked a window: the class token's way through them, anew.

The class token is taken as the full pass has it before the last K blocks and carried through them once for every
window, that window's patches out of its sight. All other patches' keys and values are those of the full pass, so that
N windows together cost what N more tokens would in K blocks, beside 2 N passes for the exact answers.

It is h, but for what patches have told each other of the window, and the class token before: an approximation that
needs no training, and that an explainer corrects. Of what differs from window to window in h (centred R², ViT-Ti and
DeiT-Ti at 112 px, r = 1) it has .08 to .13 with one block and .18 to .23 with three.
"""

from collections.abc import Sequence

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tve.backbones import Backbone
from tve.coalitions import CoalitionFamily
from tve.plain_vits import obstacle, pooled_tokens
from tve.vit_blocks import PreNormBlock, added


def most_blocks(backbone: Backbone) -> int:
    """How many of its last blocks a backbone's class token can be carried through anew.

    All but the first of a plain vision transformer that pools its class tokens; none of any other model.
    """
    model = backbone.model
    if type(model) not in (VisionTransformer, VisionTransformerDistilled) or not pooled_tokens(model):
        return 0
    if obstacle(model, backbone.image_size, backbone.patches_per_side):
        return 0
    fitting = [PreNormBlock.fits(block) for block in model.blocks]  # type: ignore[union-attr]
    after = len(fitting) - fitting[::-1].index(False) if False in fitting else 0
    return len(fitting) - max(after, 1)


def seen_without(family: CoalitionFamily, tokens_per_side: int) -> Tensor:
    """Bool [N, T]: the tokens of T = tokens_per_side² patches that are left when each coalition is taken away.

    Raises:
        ValueError: a grid that the family's does not divide.
    """
    if tokens_per_side % family.patches_per_side:
        raise ValueError(
            f"tokens_per_side: expected a multiple of {family.patches_per_side}, the grid, got {tokens_per_side}"
        )
    across = tokens_per_side // family.patches_per_side
    removed = family.kept_NPP().repeat_interleave(across, 1).repeat_interleave(across, 2)
    return ~removed.flatten(1)


def reread(backbone: Backbone, entering: Sequence[Tensor], seen_NT: Tensor) -> Tensor:
    """The embedding [B, N, D] that the class token comes to through the last K blocks, seeing only some patches.

    Differentiable, also in the backbone's weights where they take gradients.

    Args:
        backbone: one of which `most_blocks` is at least K.
        entering: the tokens [B, prefix + T, W] that enter each of these blocks; `Features.entering`.
        seen_NT: bool; the patches whose tokens are seen. The prefix always is.
    """
    model = backbone.model
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    blocks = [PreNormBlock(block) for block in model.blocks[-len(entering) :]]  # type: ignore[index]
    num_pictures, num_readings = len(entering[0]), len(seen_NT)
    x_RD = entering[0][:, None, :prefix].expand(-1, num_readings, -1, -1).flatten(0, 2)
    for block, tokens_BTD in zip(blocks, entering, strict=True):
        patches_RD = block.norm1(tokens_BTD[:, prefix:]).flatten(0, 1)
        patch_kv = block.expand(*block.key_value(patches_RD, None))
        normed_RD = block.norm1(x_RD)
        q, *own_kv = block.query_key_value(normed_RD, None)
        gathered = _gather(
            q.unflatten(0, (num_pictures, num_readings, prefix)),
            [part.unflatten(0, (num_pictures, num_readings, prefix)) for part in block.expand(*own_kv)],
            [part.unflatten(0, (num_pictures, -1)) for part in patch_kv],
            seen_NT,
            block.scale,
        )
        x_RD = added(x_RD, block.attended(gathered, normed_RD), block.scale1_D)
        x_RD = added(x_RD, block.mlp(block.norm2(x_RD)), block.scale2_D)
    tokens_RPD = model.norm(x_RD).unflatten(0, (-1, prefix))  # type: ignore[operator]
    embedding_BND: Tensor = backbone.pool(tokens_RPD).unflatten(0, (num_pictures, num_readings))
    return embedding_BND


def _gather(
    q_BNPHW: Tensor, own_kv_BNPHW: Sequence[Tensor], kv_BTHW: Sequence[Tensor], seen_NT: Tensor, scale: float
) -> Tensor:
    """What each prefix token gathers from its own reading's prefix and from the patches seen, [B * N * P, H, W]."""
    (own_k, own_v), (k, v) = own_kv_BNPHW, kv_BTHW
    own = torch.einsum("bnphw,bnohw->bhnpo", q_BNPHW, own_k)
    patches = torch.einsum("bnphw,bthw->bhnpt", q_BNPHW, k).masked_fill(~seen_NT[:, None], float("-inf"))
    weights = (torch.cat([own, patches], -1) * scale).softmax(-1)
    own, patches = weights.split([own.shape[-1], patches.shape[-1]], -1)
    gathered = torch.einsum("bhnpo,bnohw->bnphw", own, own_v) + torch.einsum("bhnpt,bthw->bnphw", patches, v)
    return gathered.flatten(0, 2)
