"""AttnLRP: relevance of each patch for a class, in one forward and one backward pass of a plain vision transformer.

    R = pixel * (gradient of the class's output by the pixel), summed over a patch, with these rules for the gradient:

    norm           the deviation (or root mean square) counts as a constant
    activation     f(x) counts as c x with the constant c = f(x) / x                 identity rule
    q k^T and A V  the gradient of each factor is halved                             uniform rule
    softmax        its own gradient                                                  Taylor decomposition
    linear         its own gradient                                                  epsilon rule, epsilon -> 0

Achtibat et al., ICML 2024, arXiv 2402.05602, in the form of input times gradient. Relevance is conserved but for what
biases and positions, which are no input, and the softmax take: without them it sums to the class's logit. The gamma
rule that the paper adds for linear layers of vision transformers is left out: its settings are tuned model by model.

Relevance is taken at the pixels, not at the tokens behind the stem. The stem is linear, so this is the part of a
token's relevance that comes from its pixels: the stem's bias and the position are left out, which a token would count
as the patch's own although they say nothing of the picture; a patch of zeros has the relevance zero.

The authors' library, lxt, is not used: it needs transformers, accelerate, bitsandbytes, open_clip and zennit, patches
classes for the whole process, and serves the models of torchvision and Hugging Face, not timm's. The forward pass here
reads timm's own modules and leaves them as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm, RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tve.backbones import Backbone
from tve.baselines.method import Answer, Answers, Cost, Question
from tve.plain_vits import obstacle
from tve.transfer_rule import Output, of_class, read, require_head
from tve.vit_blocks import PreNormBlock

NORMS = (nn.LayerNorm, LayerNorm, RmsNorm, nn.Identity)
ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU, GELU, GELUTanh, QuickGELU)


def attn_lrp_obstacle(backbone: Backbone) -> str:
    """Why the rules are not defined here for a backbone, or "" where they are."""
    model: Any = backbone.model
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return f"{type(model).__name__} is neither timm's VisionTransformer nor its distilled form"
    if reason := obstacle(model, backbone.image_size, backbone.patches_per_side):
        return reason
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by an attention of its own"
    if not isinstance(model.patch_embed.norm, nn.Identity):
        return "its stem has a norm"
    for block in model.blocks:
        if type(block) is not Block or not PreNormBlock.fits(block) or type(block.attn) is not Attention:
            return f"a block of it, {type(block).__name__}, is not timm's plain one"
        if block.attn.gate is not None:
            return "its attention has gates"
        if type(block.mlp) is not Mlp:
            return f"its {type(block.mlp).__name__} has no rule"
        if type(block.mlp.act) not in ACTIVATIONS:
            return f"its activation {type(block.mlp.act).__name__} has no rule"
    norms = [model.norm_pre, model.norm, model.fc_norm]
    for block in model.blocks:
        norms += [block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
    if others := sorted({type(norm).__name__ for norm in norms} - {norm.__name__ for norm in NORMS}):
        return f"its norm {others[0]} has no rule"
    return ""


def embedding_by_rules(backbone: Backbone, images_B3SS: Tensor) -> Tensor:
    """The backbone's embeddings [B, D], whose gradients follow the rules.

    Args:
        backbone: one for which `attn_lrp_obstacle` gives no reason.
        images_B3SS: normalised pictures.
    """
    model: Any = backbone.model
    x_BTD = normed(model.norm_pre, model._pos_embed(model.patch_embed(images_B3SS)))
    for block in model.blocks:
        x_BTD = x_BTD + block.ls1(attended(block.attn, normed(block.norm1, x_BTD)))
        x_BTD = x_BTD + block.ls2(transformed(block.mlp, normed(block.norm2, x_BTD)))
    x_BTD = normed(model.norm, x_BTD)
    if isinstance(model, VisionTransformerDistilled):
        return backbone.pool(x_BTD)
    return normed(model.fc_norm, model.pool(x_BTD))


def attended(attention: Attention, normed_BTD: Tensor) -> Tensor:
    """What an attention makes of normed tokens [B, T, D]: the uniform rule for both of its products."""
    heads = (3, attention.num_heads, attention.head_dim)
    q_BHTW, k_BHTW, v_BHTW = attention.qkv(normed_BTD).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
    q_BHTW, k_BHTW = normed(attention.q_norm, q_BHTW), normed(attention.k_norm, k_BHTW)
    # Queries and keys are factors of both products, which halve their gradient twice.
    gathered_BHTW = F.scaled_dot_product_attention(
        with_gradient_times(0.25, q_BHTW),
        with_gradient_times(0.25, k_BHTW),
        with_gradient_times(0.5, v_BHTW),
        scale=attention.scale,
    )
    branch_BTD: Tensor = attention.proj(normed(attention.norm, gathered_BHTW.transpose(1, 2).flatten(2)))
    return branch_BTD


def transformed(mlp: Mlp, normed_BTD: Tensor) -> Tensor:
    """What an MLP makes of normed tokens [B, T, D]: the identity rule for its activation."""
    hidden: Tensor = activated(mlp.act, mlp.fc1(normed_BTD))
    branch_BTD: Tensor = mlp.fc2(normed(mlp.norm, hidden))
    return branch_BTD


def activated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) of an activation with f(0) = 0, whose gradient is f(x) / x."""
    nonzero = torch.where(x == 0, 1e-6, x)
    slope = (activation(nonzero) / nonzero).detach()
    return with_gradient_of(slope * x, activation(x))


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's result, whose gradient takes what it divides by for a constant."""
    if isinstance(norm, nn.Identity):
        return x
    assert isinstance(norm, NORMS)
    known: Any = norm
    centred = x if isinstance(norm, RmsNorm) else x - x.mean(-1, keepdim=True)
    result: Tensor = centred * (centred.square().mean(-1, keepdim=True) + known.eps).rsqrt().detach()
    if known.weight is not None:
        result = result * known.weight
    bias: Tensor | None = getattr(known, "bias", None)
    return result if bias is None else result + bias


def with_gradient_times(factor: float, x: Tensor) -> Tensor:
    """x, whose gradient is multiplied by the factor."""
    return with_gradient_of(factor * x, x)


def with_gradient_of(path: Tensor, value: Tensor) -> Tensor:
    """The value, exactly, with the gradient of another tensor of its shape."""
    return value.detach() + (path - path.detach())


@dataclass(frozen=True, slots=True)
class AttnLrp:
    """Relevance for a class, signed, in the unit of its output. A head that is not linear has its own gradient.

    Raises:
        ValueError: a backbone for which `attn_lrp_obstacle` gives a reason.
    """

    backbone: Backbone
    output: Output = "logit"

    def __post_init__(self) -> None:
        if reason := attn_lrp_obstacle(self.backbone):
            raise ValueError(
                f"AttnLRP: expected a plain vision transformer of timm, got {self.backbone.config.name}: {reason}; "
                "leave this method out"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        return ("attn_lrp",)

    @torch.enable_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        self.backbone.require_images(images_B3SS)
        pixels_B3SS = images_B3SS.detach().requires_grad_()
        embedding_BD = embedding_by_rules(self.backbone, pixels_B3SS)
        patch_size = self.backbone.image_size // self.backbone.patches_per_side
        answers = {}
        for name, asked in questions.items():
            require_head(asked.head, embedding_BD.detach())
            outputs_BC = read(asked.head, embedding_BD, self.output)
            explained_B = of_class(outputs_BC[..., None, None], asked.target_B)
            (gradient_B3SS,) = torch.autograd.grad(explained_B.sum(), pixels_B3SS, retain_graph=True)
            relevance_BSS = (images_B3SS.detach() * gradient_B3SS).sum(1).float()
            map_BPP = F.avg_pool2d(relevance_BSS, patch_size, divisor_override=1)
            answers[name, self.variants[0]] = Answer(map_BPP, Cost(1, 1))
        return answers
