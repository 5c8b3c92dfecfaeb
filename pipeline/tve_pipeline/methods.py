"""The explanation methods that a profile can name in `run.methods`, and their settings in section `methods`.

None of them reads an explainer; those that do are `tve_pipeline.readings`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, field_validator

from tve.backbones import Backbone
from tve.baselines.attention import AttentionRollout, GradCam, grad_cam_obstacle, rollout_obstacle
from tve.baselines.attn_lrp import AttnLrp, attn_lrp_obstacle
from tve.baselines.gradients import DeepLift, GradientShap, IntegratedGradients
from tve.baselines.method import Method
from tve.baselines.perturbation import KernelShap, Lime, Occlusion
from tve.baselines.readings import Controls, reading_of_windows
from tve.baselines.rise import Rise
from tve_pipeline.evaluation import Given
from tve_pipeline.params import Count, Section


class NoSettings(Section):
    """A method with nothing to choose."""


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
        raise ValueError(f"run.methods: expected some of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name].settings


def _exact_windows(given: Given, _: NoSettings) -> Method:
    return reading_of_windows(given.evaluator, given.windows, output=given.params.output)


def _controls(given: Given, _: NoSettings) -> Method:
    return Controls(given.windows.patches_per_side, given.windows.radius, given.params.seed)


METHODS: dict[str, Known] = {
    "exact_windows": Known(NoSettings, _exact_windows),
    "controls": Known(NoSettings, _controls),
    "rise": Known(BudgetParams, lambda given, own: Rise(given.evaluator, own.budgets, seed=given.params.seed)),
    "kernel_shap": Known(
        BudgetParams, lambda given, own: KernelShap(given.evaluator, own.budgets, seed=given.params.seed)
    ),
    "lime": Known(BudgetParams, lambda given, own: Lime(given.evaluator, own.budgets, seed=given.params.seed)),
    "occlusion": Known(NoSettings, lambda given, _: Occlusion(given.evaluator, radius=given.windows.radius)),
    "integrated_gradients": Known(
        StepsParams, lambda given, own: IntegratedGradients(given.backbone, num_steps=own.num_steps)
    ),
    "deep_lift": Known(NoSettings, lambda given, _: DeepLift(given.backbone)),
    "gradient_shap": Known(
        SamplesParams,
        lambda given, own: GradientShap(given.backbone, num_samples=own.num_samples, seed=given.params.seed),
    ),
    "grad_cam": Known(NoSettings, lambda given, _: GradCam(given.backbone), grad_cam_obstacle),
    "rollout": Known(NoSettings, lambda given, _: AttentionRollout(given.backbone), rollout_obstacle),
    "attn_lrp": Known(NoSettings, lambda given, _: AttnLrp(given.backbone), attn_lrp_obstacle),
}
