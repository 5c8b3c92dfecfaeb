"""The explanation methods that a profile can name in `run.methods`, and their settings in section `methods`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import nn

from tve.backbones import Backbone
from tve.baselines.attention import AttentionRollout, GradCam, grad_cam_obstacle, rollout_obstacle
from tve.baselines.attn_lrp import AttnLrp, attn_lrp_obstacle
from tve.baselines.gradients import DeepLift, GradientShap, IntegratedGradients
from tve.baselines.method import Method, no_classifier
from tve.baselines.perturbation import KernelShap, Lime, Occlusion
from tve.baselines.readings import Controls, OwnHead, reading_of_explainer, reading_of_windows
from tve.baselines.rise import Rise
from tve.explainer import Explainer
from tve.transfer_rule import TransferRule
from tve_pipeline.evaluation import Given
from tve_pipeline.params import Count, Section, Seed


class NoSettings(Section):
    """A method with nothing to choose."""


class UntrainedParams(Section):
    """TVE with the weights that training starts from, but for its last layers, which start at zero: drawn here."""

    seed: Seed


class BudgetParams(Section):
    """A method that evaluates as many coalitions of a picture as it is given, with a map at each of these numbers."""

    budgets: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)

    @field_validator("budgets")
    @classmethod
    def _ascend(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if any(low >= high for low, high in pairwise(budgets)):
            raise ValueError(f"expected ascending numbers of evaluations, got {list(budgets)}")
        return budgets


class StepsParams(Section):
    """Points on the line from the zero picture to the picture."""

    num_steps: Count


class SamplesParams(Section):
    """Points drawn on such lines, with noise."""

    num_samples: Count


@dataclass(frozen=True, slots=True)
class Known:
    """A method that a profile can name."""

    settings: type[Section]
    build: Callable[[Given, Any], Method]  # from the settings, an instance of that model
    obstacle: Callable[[Backbone], str] = lambda _: ""  # why it is not defined for a backbone, "" where it is


def method_settings(name: str) -> type[Section]:
    """The model of a method's settings.

    Raises:
        ValueError: a method that is not known.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name].settings


def _exact_windows(given: Given, _: NoSettings) -> Method:
    explainer = given.explainer
    return reading_of_windows(given.evaluator, explainer.family, explainer.empty_D, given.params.output)


def _controls(given: Given, _: NoSettings) -> Method:
    explainer = given.explainer
    return Controls(explainer.backbone.patches_per_side, explainer.config.radius, given.params.seed)


def _untrained(given: Given, own: UntrainedParams) -> Method:
    trained = given.explainer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        explainer = Explainer(trained.backbone, trained.config).to(trained.empty_D.device).eval()
        for module in explainer.network.modules():
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                nn.init.trunc_normal_(module.weight, std=0.02)
    explainer.mean_kept_D.copy_(trained.mean_kept_D)
    explainer.empty_D.copy_(trained.empty_D)
    return reading_of_explainer(explainer, given.params.output, "tve_untrained")


def _own_head(given: Given, _: NoSettings) -> Method:
    head = given.explainer.backbone.classifier()
    assert head is not None  # `no_classifier` is asked first
    return OwnHead(given.explainer, head, TransferRule(given.params.output, given.params.per_patch))


METHODS: dict[str, Known] = {
    "tve": Known(NoSettings, lambda given, _: reading_of_explainer(given.explainer, given.params.output)),
    "exact_windows": Known(NoSettings, _exact_windows),
    "tve_hg": Known(NoSettings, _own_head, no_classifier),
    "tve_untrained": Known(UntrainedParams, _untrained),
    "controls": Known(NoSettings, _controls),
    "rise": Known(BudgetParams, lambda given, own: Rise(given.evaluator, own.budgets, seed=given.params.seed)),
    "kernel_shap": Known(
        BudgetParams, lambda given, own: KernelShap(given.evaluator, own.budgets, seed=given.params.seed)
    ),
    "lime": Known(BudgetParams, lambda given, own: Lime(given.evaluator, own.budgets, seed=given.params.seed)),
    "occlusion": Known(NoSettings, lambda given, _: Occlusion(given.evaluator, radius=given.explainer.config.radius)),
    "integrated_gradients": Known(
        StepsParams, lambda given, own: IntegratedGradients(given.explainer.backbone, num_steps=own.num_steps)
    ),
    "deep_lift": Known(NoSettings, lambda given, _: DeepLift(given.explainer.backbone)),
    "gradient_shap": Known(
        SamplesParams,
        lambda given, own: GradientShap(given.explainer.backbone, num_samples=own.num_samples, seed=given.params.seed),
    ),
    "grad_cam": Known(NoSettings, lambda given, _: GradCam(given.explainer.backbone), grad_cam_obstacle),
    "rollout": Known(NoSettings, lambda given, _: AttentionRollout(given.explainer.backbone), rollout_obstacle),
    "attn_lrp": Known(NoSettings, lambda given, _: AttnLrp(given.explainer.backbone), attn_lrp_obstacle),
}
