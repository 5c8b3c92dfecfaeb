"""RISE on the patch grid: how high a class's output is, on average, when a patch is among those left in the picture.

    phi[p] = E[l(G(x_S)) | p in S]  ~  sum over k of f_k [p in S_k]  /  sum over k of [p in S_k]

f_k is the output of the k-th of K random halves of the patches. (RISE: Petsiuk et al., arXiv 1806.07421, section 3,
which draws soft masks of pixels from a coarser grid.) The paper divides by the expected number of masks that show p,
K / 2 here, not by the number drawn: then a patch that was drawn often by chance is high whatever the model says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tve.baselines.method import Answer, Answers, Cost, Question, generator_of
from tve.baselines.perturbation import BUDGETS, class_values, require_budgets, require_keys
from tve.coalitions import random_halves
from tve.evaluator import CoalitionEvaluator
from tve.transfer_rule import Output, TransferRule


def conditional_means(values_K: Tensor, present_KPP: Tensor) -> Tensor:
    """The mean [P, P], float64, of the values of the coalitions that hold each patch.

    A patch that none of them holds gets the mean of all: nothing is known of it.
    """
    values_K, present_KPP = values_K.double(), present_KPP.double()
    count_PP = present_KPP.sum(0)
    mean_PP = torch.tensordot(values_K, present_KPP, dims=1) / count_PP.clamp(min=1)
    return torch.where(count_PP > 0, mean_PP, values_K.mean())


@dataclass(frozen=True, slots=True)
class Rise:
    """Conditional means over random halves, one map at each budget: the first halves of those that are drawn.

    A budget counts every coalition; nothing else is evaluated.

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
        return tuple(f"rise_{budget}" for budget in self.budgets)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        """The largest budget is evaluated for each picture, whatever the questions."""
        require_keys(images_B3SS, keys)
        maps: dict[tuple[str, int], list[Tensor]] = {}
        for index, key in enumerate(keys):
            halves_KPP = self._halves(key).to(images_B3SS.device)
            # One picture a call: the arithmetic of a map, to the last bit, is then the same in every batch.
            embeddings_KD = self.evaluator(images_B3SS[index : index + 1], halves_KPP[None])[0]
            for asked, question in questions.items():
                target_1 = question.target_B[index : index + 1]
                values_K = class_values(question.head, embeddings_KD, target_1, self.output)
                for budget in self.budgets:
                    mean_PP = conditional_means(values_K[:budget], halves_KPP[:budget])
                    maps.setdefault((asked, budget), []).append(mean_PP)
        return {
            (asked, f"rise_{budget}"): Answer(torch.stack(maps_PP).float(), Cost(budget))
            for (asked, budget), maps_PP in maps.items()
        }

    def _halves(self, key: str) -> Tensor:
        """Bool [K, P, P]: as many halves as the largest budget, which depend on the seed and the key alone."""
        return random_halves(
            self.budgets[-1], self.evaluator.backbone.patches_per_side, generator_of(self.seed, key, "rise")
        )
