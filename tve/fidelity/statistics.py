"""What can be said of means over pictures: paired bootstrap intervals, shares of a way, densities."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Resampled counts are drawn in blocks of at most this many numbers (32 MiB).
COUNTS_PER_BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over pictures and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    differences_NK: NDArray[np.float64], num_resamples: int, seed: int, confidence: float = 0.95
) -> list[Interval]:
    """Percentile bootstrap intervals of K paired differences, pictures being resampled together for all K.

    Args:
        differences_NK: for each of N pictures, one method's score minus another's.
        num_resamples: how often N pictures are drawn with replacement.
        seed: of the draws.
        confidence: of the two-sided interval.

    Raises:
        ValueError: no pictures, values that are not finite, or no resamples.
    """
    if differences_NK.ndim != 2 or not len(differences_NK):
        raise ValueError(f"differences: expected [N, K] with N > 0, got {list(differences_NK.shape)}")
    if not np.isfinite(differences_NK).all():
        raise ValueError("differences: expected finite scores, got some that are not")
    if num_resamples < 1:
        raise ValueError(f"num_resamples: expected at least 1, got {num_resamples}")
    num_pictures = len(differences_NK)
    rng = np.random.default_rng(seed)
    uniform_N = np.full(num_pictures, 1 / num_pictures)
    step = max(1, COUNTS_PER_BLOCK // num_pictures)
    means = []
    for start in range(0, num_resamples, step):
        counts_RN = rng.multinomial(num_pictures, uniform_N, size=min(step, num_resamples - start))
        means.append(counts_RN @ differences_NK / num_pictures)
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    mean_K = differences_NK.mean(0)
    return [Interval(float(m), float(lo), float(hi)) for m, lo, hi in zip(mean_K, low_K, high_K, strict=True)]


def share_of_way(score: float, start: float, reference: float) -> float:
    """How far `score` is on the way from `start` (0) to `reference` (1).

    >>> share_of_way(0.5, start=0.25, reference=0.75)
    0.5
    """
    return (score - start) / (reference - start)


def positive_density(map_BPP: Tensor, object_BPP: Tensor) -> Tensor:
    """Positive attribution per patch of an object [B], in the map's unit; NaN where the object has no patch.

    Args:
        map_BPP: attributions.
        object_BPP: bool, True on the object's patches.
    """
    mass_B = (map_BPP.clamp(min=0) * object_BPP).sum((1, 2))
    return mass_B / object_BPP.sum((1, 2))
