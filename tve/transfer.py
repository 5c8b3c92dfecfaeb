"""Transfer: a meta-attribution read through any head becomes a heatmap for any class. Nothing is trained.

    u[p, q]   = w+ (l(g[p, q]) - l(G(∅)))  +  w- (l(G(x)) - l(h[p, q]))
    phi[p, q] = mean of u over the windows that contain patch (p, q)

l is the logit, the probability or the log-probability of a class under the head. The paper (arXiv 2312.15359,
section 4) writes a sum over windows; a mean is what its release computes, and right: a clipped sum has 9 terms in a
corner and 25 inside. G(∅) and G(x) do not change the order of patches; they fix the zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tve.meta_attribution import MetaAttribution

Output = Literal["logit", "probability", "log_probability"]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TransferRule:
    """How a meta-attribution is read."""

    radius: int  # of the windows
    output: Output = "logit"
    window_mean: bool = True  # phi; u where False
    weight_kept: float = 1.0
    weight_removed: float = 1.0

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output: expected one of {list(get_args(Output))}, got {self.output!r}")
        if self.radius < 0:
            raise ValueError(f"radius: expected at least 0, got {self.radius}")


@torch.inference_mode()
def transfer(meta: MetaAttribution, head: Head, rule: TransferRule) -> Tensor:
    """Attribution maps phi [B, C, P, P] of all C classes of a head, in the unit of the rule's output.

    Positive: the patch speaks for the class. Maps are neither rescaled nor clipped.

    Args:
        meta: exact or predicted.
        head: embeddings [..., D] to logits [..., C]: linear, or any module.
        rule: output, window mean, weights.

    Raises:
        ValueError: a head of the wrong width.
    """
    require_head(head, meta.full_BD.shape[-1])
    kept_BNC = rule.weight_kept * (read(head, meta.kept_BND, rule.output) - read(head, meta.empty_D, rule.output))
    full_B1C = read(head, meta.full_BD, rule.output)[:, None]
    removed_BNC = rule.weight_removed * (full_B1C - read(head, meta.removed_BND, rule.output))
    u_BNC = kept_BNC + removed_BNC
    side = round(u_BNC.shape[1] ** 0.5)
    u_BCPP = u_BNC.transpose(1, 2).unflatten(2, (side, side))
    return window_mean(u_BCPP, rule.radius) if rule.window_mean else u_BCPP


def window_mean(u_BCPP: Tensor, radius: int) -> Tensor:
    """The mean of u over the windows that contain each patch: over N_r(p, q), clipped at the border."""
    return nn.functional.avg_pool2d(u_BCPP, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def read(head: Head, embeddings: Tensor, output: Output = "logit") -> Tensor:
    """A head's output [..., C] on embeddings [..., D]."""
    logits = head(embeddings)
    if output == "logit":
        return logits
    return logits.softmax(-1) if output == "probability" else logits.log_softmax(-1)


def of_class(maps_BCPP: Tensor, target_B: Tensor) -> Tensor:
    """Each picture's map [B, P, P] of its own class.

    Raises:
        ValueError: a class that the head does not have, or not one class per picture.
    """
    batch_size, num_classes = maps_BCPP.shape[:2]
    if tuple(target_B.shape) != (batch_size,):
        raise ValueError(f"class: expected one per picture, [{batch_size}], got {list(target_B.shape)}")
    if len(target_B) and not bool(((target_B >= 0) & (target_B < num_classes)).all()):
        raise ValueError(f"class: expected 0 to {num_classes - 1}, got {target_B.tolist()}")
    return maps_BCPP[torch.arange(batch_size, device=maps_BCPP.device), target_B]


def require_head(head: Head, embed_dim: int) -> None:
    """Raises ValueError unless the head reads embeddings of this width, where its width can be known."""
    linear = (
        next((m for m in head.modules() if isinstance(m, nn.Linear)), None) if isinstance(head, nn.Module) else None
    )
    if linear is not None and linear.in_features != embed_dim:
        raise ValueError(
            f"head: expected a head on embeddings of width {embed_dim}, got one of width {linear.in_features}; "
            "heads read the backbone's pooled, pre-logits embedding"
        )
