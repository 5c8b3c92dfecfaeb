"""What an explainer is trained to do, and how much of it was learned.

    loss = ||ĝ - g||^2_A / Var_A(g)  +  ||ĥ - h||^2_B / Var_B(h)     over the drawn centres, label-free
    R2   = 1 - sum ||ĝ - g||^2 / sum ||g - mean over the picture's own patches||^2     within a picture; the same for h

Each term is divided by its own variance around its trivial answer (the mean of g; G(x) for h), so that both start
near 1 (the paper's objective, arXiv 2312.15359, eq. 7, up to these two constants and the norms).

The norms are plain, or partly whitened: an error along a direction in which the targets vary little then counts for
more. A head may read any direction, also one that the backbone's own labels left faint; whitening is what makes the
objective impartial to heads, as the absence of labels makes it impartial to tasks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tve.meta_attribution import MetaAttribution


@dataclass(frozen=True, slots=True)
class TargetScale:
    """Linear maps under which the two errors are squared; the trivial answers' mean squared error is 1 under them."""

    kept_DD: Tensor  # for g, around its mean over the data
    removed_DD: Tensor  # for h, around G(x)


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
    return (
        _loss(predicted.kept_BND, targets.kept_BMD, targets.centre_BM, scale.kept_DD),
        _loss(predicted.removed_BND, targets.removed_BMD, targets.centre_BM, scale.removed_DD),
    )


def target_scale(exact: MetaAttribution, whitening_floor: float | None = None) -> TargetScale:
    """The norms of the two losses, from exact meta-attributions of some pictures.

    Args:
        exact: of pictures that need no label.
        whitening_floor: directions are divided by their standard deviation, but variances count as at least this
            multiple of the mean variance. None: the plain norm, every direction alike.

    Raises:
        ValueError: a floor that is not positive.
    """
    if whitening_floor is not None and not whitening_floor > 0:
        raise ValueError(f"whitening_floor: expected a positive number or None, got {whitening_floor}")
    kept = exact.kept_BND - exact.kept_BND.mean((0, 1))
    removed = exact.removed_BND - exact.full_BD[:, None]
    return TargetScale(_norm(kept, whitening_floor), _norm(removed, whitening_floor))


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
        exact.radius,
    )


def _loss(predicted_BND: Tensor, target_BMD: Tensor, centre_BM: Tensor, norm_DD: Tensor) -> Tensor:
    """Mean over B, M and D of ((predicted[b, centre[b, m]] - target[b, m]) @ norm)²."""
    drawn_BMD = predicted_BND.gather(1, centre_BM[..., None].expand(-1, -1, predicted_BND.shape[-1]))
    return ((drawn_BMD - target_BMD) @ norm_DD).square().mean()


def _centred(values_BND: Tensor) -> Tensor:
    return values_BND - values_BND.mean(1, keepdim=True)


def _r2(predicted_BND: Tensor, exact_BND: Tensor) -> float:
    residual = (predicted_BND - exact_BND).double().square().sum()
    return float(1 - residual / _centred(exact_BND).double().square().sum())


def _norm(deviations_BND: Tensor, whitening_floor: float | None) -> Tensor:
    deviations_MD = deviations_BND.flatten(0, 1).double()
    variances_D, directions_DD = torch.linalg.eigh(deviations_MD.T @ deviations_MD / len(deviations_MD))
    variances_D = variances_D.clamp(min=0)
    weights_D = torch.ones_like(variances_D)
    if whitening_floor is not None:
        weights_D = 1 / (variances_D + whitening_floor * variances_D.mean())
    weights_D = weights_D / (weights_D * variances_D).mean()
    norm_DD: Tensor = (directions_DD * weights_D.sqrt()).float()
    return norm_DD
