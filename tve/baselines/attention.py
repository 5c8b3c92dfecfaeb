"""Attention baselines: attention rollout, and Grad-CAM for transformers.

    rollout    A'_L ... A'_2 A'_1, with A' = (A + I) / 2 and A a block's attention, mean over heads;
               the row of what is pooled, at the patches           Abnar and Zuidema, 2020, arXiv 2005.00928
    Grad-CAM   sum over d of w_d a[n, d] at place n, with w_d the mean over n of df/da[n, d]
                                                                   Selvaraju et al., 2017, arXiv 1610.02391

The rows of A sum to one, and so do those of A' and of the rollout: nothing is left to renormalise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tve.backbones import Backbone
from tve.baselines.method import Answer, Answers, Cost, Question
from tve.plain_vits import obstacle, pooled_tokens
from tve.transfer_rule import Output, of_class, read, require_head


def rollout_obstacle(backbone: Backbone) -> str:
    """Why attention rollout is not defined for a backbone, or "" where it is."""
    model: Any = backbone.model
    if reason := obstacle(model, backbone.image_size, backbone.patches_per_side):
        return f"tokens of patches that all attend to each other are needed: {reason}"
    for block in model.blocks:
        attention = getattr(block, "attn", None)
        if type(block) not in (Block, EvaBlock) or type(attention) not in (Attention, AttentionRope, EvaAttention):
            return f"the attention of its block {type(block).__name__} ({type(attention).__name__}) cannot be read"
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by an attention of its own"
    if model.global_pool not in ("token", "avg"):
        return f"it pools by {model.global_pool}, which is no mean of rows"
    return ""


def grad_cam_obstacle(backbone: Backbone) -> str:
    """Why Grad-CAM cannot serve a backbone, or "" where it can. Other models than plain ones see one picture."""
    model: Any = backbone.model
    if _is_plain(backbone):
        block = model.blocks[-1]
        if type(block) not in (Block, EvaBlock):
            return f"its last block {type(block).__name__} has no norm right before its attention"
        return ""
    size, parameter = backbone.image_size, next(model.parameters())
    with torch.no_grad():
        features = model.forward_features(parameter.new_zeros(1, 3, size, size))
    if not isinstance(features, Tensor) or features.ndim != 4:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        return f"its last features have no rows and columns: expected [B, h, w, D] or [B, D, h, w], got {got}"
    return ""


@contextmanager
def attention_probabilities(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the attention [B, T, T] of each block in a forward pass, mean over heads, rows summing to 1.

    timm's fused attention never has these at hand, so it is turned off meanwhile; on leaving, the model is as it was.
    """
    attentions: list[Any] = [block.attn for block in model.blocks]  # type: ignore[union-attr]
    fused = [attention.fused_attn for attention in attentions]
    found: list[Tensor] = []

    def keep(_module: nn.Module, _given: tuple[Tensor, ...], probabilities_BHTT: Tensor) -> None:
        found.append(probabilities_BHTT.mean(1))

    handles = [attention.attn_drop.register_forward_hook(keep) for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for attention, was_fused in zip(attentions, fused, strict=True):
            attention.fused_attn = was_fused


@dataclass(frozen=True, slots=True)
class AttentionRollout:
    """How much attention leads from each patch to what is pooled: the same map for every head and class.

    Models that pool a class token are read at its row, distilled ones at the mean of the rows of class and distillation
    token, as their embedding is the mean of the two, and models that pool by average at the mean row of what they
    average. Values are shares of attention, 0 to 1: with those of the prefix tokens they sum to 1.

    Raises:
        ValueError: a backbone for which `rollout_obstacle` gives a reason.
    """

    backbone: Backbone

    def __post_init__(self) -> None:
        if reason := rollout_obstacle(self.backbone):
            raise ValueError(
                f"attention rollout: expected a transformer with global attention, got {self.backbone.config.name}: "
                f"{reason}; leave this method out"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        return ("rollout",)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        self.backbone.require_images(images_B3SS)
        model: Any = self.backbone.model
        with attention_probabilities(model) as attention:
            model.forward_features(images_B3SS)
        # From the last block back: one row through each block, instead of products of whole matrices.
        share_BT = _pooled_share(model, attention[-1])
        for attention_BTT in reversed(attention):
            share_BT = (share_BT + (share_BT[:, None] @ attention_BTT)[:, 0]) / 2
        answer = Answer(_on_grid(share_BT[:, model.num_prefix_tokens :], self.backbone.patches_per_side), Cost(1))
        return {(name, self.variants[0]): answer for name in questions}


@dataclass(frozen=True, slots=True)
class GradCam:
    """Features of the last layer that still tells places apart, weighted by their mean gradient over places.

    Plain transformers: the patch tokens that enter the last block's attention, behind its norm1. After that attention
    the class token is all that is pooled, and the gradient of every patch token is zero. Other models: the last
    features, interpolated bilinearly to P x P where their grid is another; of a Swin with a linear head this is the
    class's weight vector applied at each place.

    The original clips the map at zero, to show only what speaks for the class. Here it is signed by default: maps are
    ranked, and all that clipping does to a ranking is to tie its whole lower end.

    Raises:
        ValueError: a backbone for which `grad_cam_obstacle` gives a reason.
    """

    backbone: Backbone
    relu: bool = False
    output: Output = "logit"

    def __post_init__(self) -> None:
        if reason := grad_cam_obstacle(self.backbone):
            raise ValueError(
                f"Grad-CAM: expected a backbone with features on a grid, got {self.backbone.config.name}: {reason}; "
                "leave this method out"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        return ("grad_cam",)

    @torch.enable_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        self.backbone.require_images(images_B3SS)
        plain = _is_plain(self.backbone)
        features, embedding_BD = (_token_features if plain else _grid_features)(self.backbone, images_B3SS.detach())
        # A plain model's gradient passes through the last block; any other's through the pooling alone.
        cost = Cost(1, 1 if plain else 0)
        answers = {}
        for name, asked in questions.items():
            require_head(asked.head, embedding_BD.detach())
            outputs_BC = read(asked.head, embedding_BD, self.output)
            explained_B = of_class(outputs_BC[..., None, None], asked.target_B)
            (gradient,) = torch.autograd.grad(explained_B.sum(), features, retain_graph=True)
            map_BPP = (self._of_tokens if plain else self._of_grid)(features.detach(), gradient)
            answers[name, self.variants[0]] = Answer(map_BPP, cost)
        return answers

    def _of_tokens(self, features_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
        prefix = int(self.backbone.model.num_prefix_tokens)  # type: ignore[arg-type]
        weight_BD = gradient_BTD[:, prefix:].mean(1)
        cam_BN = torch.einsum("bnd,bd->bn", features_BTD[:, prefix:], weight_BD)
        return _on_grid(self._clipped(cam_BN), self.backbone.patches_per_side)

    def _of_grid(self, features: Tensor, gradient: Tensor) -> Tensor:
        rows_first = getattr(self.backbone.model, "output_fmt", "NCHW") == "NHWC"
        letters, places = ("bhwd", (1, 2)) if rows_first else ("bdhw", (2, 3))
        cam_Bhw = torch.einsum(f"{letters},bd->bhw", features, gradient.mean(places))
        size = (self.backbone.patches_per_side,) * 2
        return nn.functional.interpolate(self._clipped(cam_Bhw)[:, None], size, mode="bilinear")[:, 0].float()

    def _clipped(self, cam: Tensor) -> Tensor:
        return cam.relu() if self.relu else cam


def _is_plain(backbone: Backbone) -> bool:
    return not obstacle(backbone.model, backbone.image_size, backbone.patches_per_side)


def _pooled_share(model: Any, attention_BTT: Tensor) -> Tensor:
    """What share [B, T] each of the last tokens has in the embedding; rows sum to 1."""
    batch_size, num_tokens = attention_BTT.shape[:2]
    share_BT = attention_BTT.new_zeros(batch_size, num_tokens)
    if num_pooled := pooled_tokens(model):
        share_BT[:, :num_pooled] = 1 / num_pooled
    else:
        first = 0 if getattr(model, "pool_include_prefix", False) else int(model.num_prefix_tokens)
        share_BT[:, first:] = 1 / (num_tokens - first)
    return share_BT


def _on_grid(values_BN: Tensor, patches_per_side: int) -> Tensor:
    """The values [B, P, P], float32, of patches: the sum of those of the tokens that a patch consists of."""
    side = round(values_BN.shape[1] ** 0.5)
    values_BSS = values_BN.float().unflatten(1, (side, side))
    return nn.functional.avg_pool2d(values_BSS, side // patches_per_side, divisor_override=1)


def _token_features(backbone: Backbone, images_B3SS: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the last block's attention, [B, T, D], and the embeddings [B, D] as a function of it."""
    model: Any = backbone.model
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _given: tuple[Tensor, ...], normed_BTD: Tensor) -> Tensor:
        leaves.append(normed_BTD.detach().requires_grad_())
        return leaves[0]

    handle = model.blocks[-1].norm1.register_forward_hook(cut)
    try:
        embedding_BD = backbone.pool(model.forward_features(images_B3SS))
    finally:
        handle.remove()
    return leaves[0], embedding_BD


def _grid_features(backbone: Backbone, images_B3SS: Tensor) -> tuple[Tensor, Tensor]:
    """The last features, [B, h, w, D] or [B, D, h, w], and the embeddings [B, D] as a function of them."""
    model: Any = backbone.model
    features = model.forward_features(images_B3SS).detach().requires_grad_()
    return features, backbone.pool(features)
