"""Maps that are read off a meta-attribution, TVE's own and the exact windows', and maps that know nothing of the model.

A meta-attribution is made once a picture and read over every head; shares, window means and u itself are all given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tve.baselines.method import SUFFIXES, Answer, Answers, Cost, Question
from tve.coalitions import CoalitionFamily
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.controls import CONTROLS, control_maps
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.transfer_rule import Head, Output, TransferRule, class_maps, of_patches

if TYPE_CHECKING:
    from tve.explainer import Explainer


@dataclass(frozen=True, slots=True)
class Reading:
    """A meta-attribution read over each question's own head: `name` of shares, `name`_mean of means, `name`_u u."""

    name: str
    meta: Callable[[Tensor], MetaAttribution]  # of normalised pictures
    cost: Cost
    output: Output = "logit"

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.name + suffix for suffix in SUFFIXES.values())

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        meta = self.meta(images_B3SS)
        answers = {}
        for name, asked in questions.items():
            u_BPP = class_maps(meta, asked.head, asked.target_B, TransferRule(self.output, "window"))
            for per_patch, suffix in SUFFIXES.items():
                map_BPP = of_patches(u_BPP[:, None], meta.radius, per_patch)[:, 0]
                answers[name, self.name + suffix] = Answer(map_BPP, self.cost)
        return answers


def reading_of_explainer(explainer: "Explainer", output: Output = "logit", name: str = "tve") -> Reading:
    """TVE: what an explainer predicts in one forward pass, which includes G(x)."""
    return Reading(name, explainer, Cost(1), output)


def reading_of_windows(
    evaluator: CoalitionEvaluator, family: CoalitionFamily, empty_D: Tensor | None = None, output: Output = "logit"
) -> Reading:
    """Exact windows: what an explainer imitates, evaluated."""
    known_D = evaluator.empty() if empty_D is None else empty_D

    def meta(images_B3SS: Tensor) -> MetaAttribution:
        return exact_windows(evaluator, images_B3SS, family, known_D)

    return Reading("exact_windows", meta, Cost(2 * family.num_coalitions + 1), output)


@dataclass(frozen=True, slots=True)
class OwnHead:
    """TVE-H_g: the map of the class that the backbone's own head predicts, whatever head is asked about.

    The paper's ablation (arXiv 2312.15359, section 5): the explanation of another task than the one that is scored.
    """

    meta: Callable[[Tensor], MetaAttribution]
    head: Head  # H_g
    rule: TransferRule

    @property
    def variants(self) -> tuple[str, ...]:
        return ("tve_hg",)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        meta = self.meta(images_B3SS)
        answer = Answer(class_maps(meta, self.head, self.head(meta.full_BD).argmax(-1), self.rule), Cost(1))
        return {(name, "tve_hg"): answer for name in questions}


@dataclass(frozen=True, slots=True)
class Controls:
    """Noise, blurred noise, and the centre of the picture (`tve.fidelity.controls`)."""

    patches_per_side: int
    radius: int
    seed: int

    @property
    def variants(self) -> tuple[str, ...]:
        return CONTROLS

    def __call__(self, images_B3SS: Tensor, keys: Sequence[str], questions: Mapping[str, Question]) -> Answers:
        maps = control_maps(keys, self.patches_per_side, self.radius, self.seed)
        return {
            (name, variant): Answer(map_BPP.to(images_B3SS.device), Cost(0))
            for name in questions
            for variant, map_BPP in maps.items()
        }
