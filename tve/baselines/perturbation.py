"""Occlusion, Kernel SHAP and LIME over patches: captum's estimators, where a removal operator says what absent means.

    Occlusion     phi[p] = mean of l(G(x)) - l(G(x without W)) over the windows W inside the picture that contain p
    Kernel SHAP   min over b, phi of the sum over drawn S of  w(S) (l(G(x_S)) - b - sum of phi[p] over p in S)^2
    LIME          the same, with  + ridge ||phi||^2

    Kernel SHAP   sizes k drawn as 1 / (k (N - k)), then S uniformly, w = 1; once each w(∅) = w(all) = 10^6
    LIME          each patch present with probability 1/2, w(S) = exp(-(1 - sqrt(|S| / N))^2 / (2 width^2))

(Zeiler and Fergus, arXiv 1311.2901; Lundberg and Lee, arXiv 1705.07874; Ribeiro et al., arXiv 1602.04938.) captum
sees a mask of ones on the patch grid, with zeros for what is absent, and never the picture. Pictures are evaluated one
by one, so that a map does not depend on the rest of its batch, and a picture's coalitions once for all questions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tve.baselines.method import Answer, Answers, Cost, Question, generator_of
from tve.coalitions import require_whole
from tve.evaluator import CoalitionEvaluator
from tve.transfer_rule import Head, Output, TransferRule, of_class, read, require_head

BUDGETS = (10, 20, 50, 100, 200, 500, 1000)
# Masks [K, N] of one picture, ones where a patch is present, to one class's output [K].
Outputs = Callable[[Tensor], Tensor]
# (outputs, ones [1, N], number of coalitions) to coefficients [1, N].
Fit = Callable[[Outputs, Tensor, int], Tensor]


def embeddings_of(evaluator: CoalitionEvaluator, image_13SS: Tensor, present_KPP: Tensor) -> Tensor:
    """Embeddings [K, D] of bool coalitions of one picture, on the picture's device.

    The empty coalition is the evaluator's own `empty()`, which stands for it where `drop` leaves nothing to embed.
    """
    present_KPP = present_KPP.to(image_13SS.device)
    some_K = present_KPP.flatten(1).any(1)
    if bool(some_K.all()):
        return evaluator(image_13SS, present_KPP[None])[0]
    embeddings_KD = evaluator.empty().repeat(len(present_KPP), 1)
    embeddings_KD[some_K] = evaluator(image_13SS, present_KPP[some_K][None])[0]
    return embeddings_KD


def class_values(head: Head, embeddings_KD: Tensor, target_1: Tensor, output: Output) -> Tensor:
    """A head's output [K] of one class.

    Raises:
        ValueError: a head that does not fit or is in training mode, or a class that it does not have.
    """
    require_head(head, embeddings_KD)
    return of_class(read(head, embeddings_KD, output).T[None], target_1)[0]


def require_budgets(budgets: Sequence[int]) -> None:
    """Raises ValueError unless these are whole numbers, ascending, from 2."""
    for budget in budgets:
        require_whole("budgets", budget)
    if not budgets or budgets[0] < 2 or any(low >= high for low, high in pairwise(budgets)):
        raise ValueError(f"budgets: expected some coalitions a picture, at least 2, ascending, got {list(budgets)}")


def require_keys(images_B3SS: Tensor, keys: Sequence[str]) -> None:
    """Raises ValueError unless there is one key a picture."""
    if len(keys) != len(images_B3SS):
        raise ValueError(f"keys: expected one of each of {len(images_B3SS)} pictures, got {len(keys)}")


@dataclass(frozen=True, slots=True)
class Occlusion:
    """What is lost with each window of (2 radius + 1) x (2 radius + 1) patches, averaged over a patch's windows.

    This is the window mean of the second bracket of `exact_windows`, with one difference: here every window lies wholly
    inside the picture, so that a patch in a corner is in one window; there a window is around every patch, clipped at
    the border. The maps are equal at patches with at least 2 radius others between them and every border.

    Raises:
        ValueError: no such output, or a window that is larger than the grid.
    """

    evaluator: CoalitionEvaluator
    radius: int
    output: Output = "probability"

    def __post_init__(self) -> None:
        TransferRule(self.output)  # raises where there is no such output
        require_whole("radius", self.radius)
        patches = self.evaluator.backbone.patches_per_side
        if not 0 <= 2 * self.radius < patches:
            raise ValueError(
                f"radius: expected 0 to {(patches - 1) // 2} on a {patches} x {patches} grid, got {self.radius}; a "
                "window of 2 radius + 1 patches a side must lie inside the picture"
            )

    @property
    def variants(self) -> tuple[str, ...]:
        return ("occlusion",)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        """The whole picture and one coalition a window are evaluated for each picture, whatever the questions."""
        require_keys(images_B3SS, keys)
        asked = list(questions.values())
        maps_BQPP = torch.stack([self._maps(images_B3SS, index, asked) for index in range(len(keys))])
        cost = Cost(self._num_windows() + 1)
        return {
            (name, "occlusion"): Answer(map_BPP.to(images_B3SS.device), cost)
            for name, map_BPP in zip(questions, maps_BQPP.unbind(1), strict=True)
        }

    def _maps(self, images_B3SS: Tensor, index: int, questions: Sequence[Question]) -> Tensor:
        """One picture's maps [Q, P, P] of all questions."""
        # Imported where it is used: captum comes with the pipeline, and the library imports without it.
        from captum import attr

        def outputs(mask_KPP: Tensor) -> Tensor:
            embeddings_KD = embeddings_of(self.evaluator, images_B3SS[index : index + 1], mask_KPP.bool())
            columns = [
                class_values(asked.head, embeddings_KD, asked.target_B[index : index + 1], self.output)
                for asked in questions
            ]
            return torch.stack(columns, dim=1).cpu()

        patches, window = self.evaluator.backbone.patches_per_side, 2 * self.radius + 1
        maps_QPP: Tensor = attr.Occlusion(outputs).attribute(
            torch.ones(1, patches, patches), (window, window), perturbations_per_eval=self._num_windows()
        )
        return maps_QPP

    def _num_windows(self) -> int:
        return (self.evaluator.backbone.patches_per_side - 2 * self.radius) ** 2


@dataclass(frozen=True, slots=True)
class KernelShap:
    """Shapley values by weighted least squares, one map at each budget.

    A budget counts every coalition: the whole picture, the empty one, and budget - 2 drawn. A map sums to the output of
    the whole picture less that of the empty one, as nearly as a weight of 10^6 makes it. With fewer coalitions than
    patches it is the solution of least norm.

    Raises:
        ValueError: no such output, or budgets that do not ascend from 2.
    """

    evaluator: CoalitionEvaluator
    budgets: Sequence[int] = BUDGETS
    seed: int = 0
    output: Output = "probability"

    def __post_init__(self) -> None:
        TransferRule(self.output)  # raises where there is no such output
        require_budgets(self.budgets)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(f"kernel_shap_{budget}" for budget in self.budgets)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        """The largest budget is evaluated for each picture, whatever the questions."""
        return _fitted(self, "kernel_shap", self._fit, images_B3SS, keys, questions)

    def _fit(self, outputs: Outputs, mask_1N: Tensor, budget: int) -> Tensor:
        from captum import attr

        fitted_1N: Tensor = attr.KernelShap(outputs).attribute(
            mask_1N, n_samples=budget, perturbations_per_eval=budget, return_input_shape=False
        )
        return fitted_1N


@dataclass(frozen=True, slots=True)
class Lime:
    """A ridge regression on which patches are present, near the whole picture; one map at each budget.

    A budget counts every coalition; all are drawn. Kernel width and ridge are those of the authors' package for images.
    captum's own default, a Lasso with penalty 0.01, sets every patch to zero that changes a probability by less than
    about 0.04: nearly all of them.

    Raises:
        ValueError: no such output, budgets that do not ascend from 2, or a width or ridge that is not above 0.
    """

    evaluator: CoalitionEvaluator
    budgets: Sequence[int] = BUDGETS
    seed: int = 0
    output: Output = "probability"
    kernel_width: float = 0.25  # of the cosine distance from the whole picture
    ridge: float = 1.0  # weight of ||phi||^2, in units of a coalition near the whole picture

    def __post_init__(self) -> None:
        TransferRule(self.output)  # raises where there is no such output
        require_budgets(self.budgets)
        for name, value in (("kernel_width", self.kernel_width), ("ridge", self.ridge)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(f"lime_{budget}" for budget in self.budgets)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        """The largest budget is evaluated for each picture, whatever the questions."""
        return _fitted(self, "lime", self._fit, images_B3SS, keys, questions)

    def _fit(self, outputs: Outputs, mask_1N: Tensor, budget: int) -> Tensor:
        from captum import attr
        from captum._utils.models.linear_model import SkLearnRidge

        lime = attr.Lime(outputs, interpretable_model=SkLearnRidge(alpha=self.ridge), similarity_func=self._weight)
        fitted_1N: Tensor = lime.attribute(
            mask_1N, n_samples=budget, perturbations_per_eval=budget, return_input_shape=False
        )
        return fitted_1N

    def _weight(self, whole_1N: Tensor, mask_1N: Tensor, present_1N: Tensor, **_: object) -> float:
        cosine = math.sqrt(present_1N.sum().item() / present_1N.numel())  # of a mask and the mask of ones
        return math.exp(-((1 - cosine) ** 2) / (2 * self.kernel_width**2))


def _fitted(
    method: KernelShap | Lime,
    name: str,
    fit: Fit,
    images_B3SS: Tensor,
    keys: Sequence[str],
    questions: Mapping[str, Question],
) -> Answers:
    """Answers of a method that draws coalitions and fits a linear model, one after the other."""
    require_keys(images_B3SS, keys)
    patches = method.evaluator.backbone.patches_per_side
    maps: dict[tuple[str, int], list[Tensor]] = {}
    for index, key in enumerate(keys):
        drawn = _Drawn(method.evaluator, images_B3SS[index : index + 1])
        state = generator_of(method.seed, key, name).get_state()
        for budget in reversed(method.budgets):
            for asked, question in questions.items():
                outputs = drawn.outputs(question.head, question.target_B[index : index + 1], method.output)
                # captum draws from torch's global CPU generator. `torch.manual_seed` would seed GPUs as well, for good.
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(state)
                    fitted_1N = fit(outputs, torch.ones(1, patches**2), budget)
                maps.setdefault((asked, budget), []).append(fitted_1N.reshape(patches, patches))
    return {
        (asked, f"{name}_{budget}"): Answer(torch.stack(maps_PP).to(images_B3SS.device), Cost(budget))
        for (asked, budget), maps_PP in maps.items()
    }


class _Drawn:
    """The coalitions that captum draws of one picture, evaluated once.

    They depend on the seed alone: every question's are the same, and those of a smaller budget are the first of a
    larger one's. So whoever asks first must ask for most; the others read off the embeddings that are there.
    """

    def __init__(self, evaluator: CoalitionEvaluator, image_13SS: Tensor) -> None:
        self.evaluator = evaluator
        self.image_13SS = image_13SS
        self.mask_KN = torch.empty(0)
        self.embeddings_KD = torch.empty(0)

    def outputs(self, head: Head, target_1: Tensor, output: Output) -> Outputs:
        """One question's outputs of masks."""
        return lambda mask_KN: class_values(head, self._embeddings(mask_KN), target_1, output).cpu()

    def _embeddings(self, mask_KN: Tensor) -> Tensor:
        if not len(self.mask_KN):
            patches = self.evaluator.backbone.patches_per_side
            present_KPP = mask_KN.bool().unflatten(1, (patches, patches))
            self.mask_KN, self.embeddings_KD = mask_KN, embeddings_of(self.evaluator, self.image_13SS, present_KPP)
        assert torch.equal(mask_KN, self.mask_KN[: len(mask_KN)]), "captum drew other coalitions from the same seed"
        return self.embeddings_KD[: len(mask_KN)]
