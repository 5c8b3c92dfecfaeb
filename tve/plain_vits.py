"""Which of timm's models are plain vision transformers, whose tokens can be left out or replaced one by one."""

from typing import Any

from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tve.kernels import NARROWEST_HEAD, WIDEST_HEAD, WIDEST_ROW
from tve.vit_blocks import PreNormBlock, read_blocks


def obstacle(model: nn.Module, image_size: int, patches_per_side: int) -> str:
    """Why a model's tokens cannot be left out or replaced one by one, or "" where they can."""
    name = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return f"{name} is no plain vision transformer of timm (VisionTransformer, its distilled form, or Eva)"
    stem = model.patch_embed
    if not isinstance(stem, PatchEmbed):
        return f"its stem {type(stem).__name__} lets patches see their neighbours' pixels"
    if len(set(stem.patch_size)) != 1:
        return f"its patches of {stem.patch_size[0]} x {stem.patch_size[1]} px are not square"
    if not model.global_pool:
        return "it does not pool"
    if isinstance(pool := getattr(model, "attn_pool", None), AttentionPoolLatent) and pool.pos_embed is not None:
        return "its attention pooling has positions of its own"
    size = int(stem.patch_size[0])
    if image_size % size or (image_size // size) % patches_per_side:
        return (
            f"its patches of {size} px make a grid of {image_size / size:g} per side, which a grid of "
            f"{patches_per_side} does not divide"
        )
    return ""


def kernel_obstacle(model: nn.Module) -> str:
    """Why Triton's kernels cannot serve a model that `obstacle` lets through, or "" where they can."""
    blocks: Any = model.blocks
    widths = {block.head_width for block in read_blocks(blocks, 0) if isinstance(block, PreNormBlock)}
    if outside := sorted(width for width in widths if not NARROWEST_HEAD <= width <= WIDEST_HEAD):
        return f"its heads have a width of {outside[0]}, and kernels serve {NARROWEST_HEAD} to {WIDEST_HEAD}"
    if int(model.embed_dim) > WIDEST_ROW:  # type: ignore[arg-type]
        return f"its tokens have a width of {model.embed_dim}, and kernels serve up to {WIDEST_ROW}"
    return ""


def pools_prefix(model: nn.Module) -> bool:
    """Whether a coalition without patches still leaves tokens to pool."""
    if int(getattr(model, "num_prefix_tokens", 0)) == 0:
        return False
    if getattr(model, "attn_pool", None) is not None:
        return isinstance(model, Eva) or bool(getattr(model, "pool_include_prefix", False))
    return getattr(model, "global_pool", None) == "token" or bool(getattr(model, "pool_include_prefix", False))


def pooled_tokens(model: nn.Module) -> int:
    """How many tokens, the first of a sequence, are all that the pooling reads; 0 where it reads the patches."""
    if getattr(model, "attn_pool", None) is not None or model.global_pool != "token":
        return 0
    return 2 if isinstance(model, VisionTransformerDistilled) else 1
