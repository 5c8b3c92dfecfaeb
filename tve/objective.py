"""What an explainer is trained to do, and how much of it was learned.

    loss = ||ĝ - g||^2 / Var(g)  +  ||ĥ - h||^2 / Var(h)             over the drawn centres, label-free
    R2   = 1 - sum ||ĝ - g||^2 / sum ||g - mean over the picture's own patches||^2     within a picture; the same for h

Each term is divided by its own variance around its trivial answer (the mean of g; G(x) for h), so that both start
near 1 (the paper's objective, arXiv 2312.15359, eq. 7, up to these two constants).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tve.meta_attribution import MetaAttribution


@dataclass(frozen=True, slots=True)
class TargetScale:
    """Mean squares of the targets around their trivial answers, per dimension."""

    kept: float  # g around its mean over the data
    removed: float  # h around G(x)


@dataclass(frozen=True, slots=True)
class WindowTargets:
    """Exact embeddings of the drawn windows: M centres a picture, out of N."""

    centre_BM: Tensor  # int64, index of the window
    kept_BMD: Tensor
    removed_BMD: Tensor


@dataclass(frozen=True, slots=True)
class ExplainedVariance:
    """R² within a picture, raw and with each picture's mean removed from the prediction."""

    kept: float
    removed: float
    kept_centred: float
    removed_centred: float


def draw_centres(batch_size: int, num_windows: int, centres_per_image: int, generator: torch.Generator) -> Tensor:
    """Distinct window indices int64 [B, M], uniform, from a CPU generator.

    Raises:
        ValueError: more centres than windows.
    """
    if not 1 <= centres_per_image <= num_windows:
        raise ValueError(f"centres_per_image: expected 1 to {num_windows}, got {centres_per_image}")
    order = torch.rand(batch_size, num_windows, generator=generator).argsort(1)
    return order[:, :centres_per_image]


def regression_loss(predicted: MetaAttribution, targets: WindowTargets, scale: TargetScale) -> tuple[Tensor, Tensor]:
    """The two scaled losses (kept, removed), scalars; their sum is minimised."""
    kept = _at(predicted.kept_BND, targets.centre_BM) - targets.kept_BMD
    removed = _at(predicted.removed_BND, targets.centre_BM) - targets.removed_BMD
    return kept.square().mean() / scale.kept, removed.square().mean() / scale.removed


def target_scale(exact: MetaAttribution) -> TargetScale:
    """The variances that the two losses are divided by, from exact meta-attributions of some pictures."""
    kept = exact.kept_BND - exact.kept_BND.mean((0, 1))
    removed = exact.removed_BND - exact.full_BD[:, None]
    return TargetScale(float(kept.square().mean()), float(removed.square().mean()))


def explained_variance(predicted: MetaAttribution, exact: MetaAttribution) -> ExplainedVariance:
    """R² within a picture of a prediction, over all pictures, windows and dimensions."""
    return ExplainedVariance(
        kept=_r2(predicted.kept_BND, exact.kept_BND),
        removed=_r2(predicted.removed_BND, exact.removed_BND),
        kept_centred=_r2(_centred(predicted.kept_BND), _centred(exact.kept_BND)),
        removed_centred=_r2(_centred(predicted.removed_BND), _centred(exact.removed_BND)),
    )


def trivial_answers(exact: MetaAttribution, mean_kept_D: Tensor) -> MetaAttribution:
    """What knows nothing of the place: the mean of g over the data, and G(x) for h."""
    return MetaAttribution(
        mean_kept_D.expand_as(exact.kept_BND),
        exact.full_BD[:, None].expand_as(exact.removed_BND),
        exact.full_BD,
        exact.empty_D,
    )


def _at(values_BND: Tensor, centre_BM: Tensor) -> Tensor:
    return values_BND.gather(1, centre_BM[..., None].expand(-1, -1, values_BND.shape[-1]))


def _centred(values_BND: Tensor) -> Tensor:
    return values_BND - values_BND.mean(1, keepdim=True)


def _r2(predicted_BND: Tensor, exact_BND: Tensor) -> float:
    residual = (predicted_BND - exact_BND).double().square().sum()
    return float(1 - residual / _centred(exact_BND).double().square().sum())
