"""The methods that a profile can name in `run.readings`: they read an explainer. Settings are in section `methods`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tve.backbones import Backbone
from tve.baselines.method import Method, no_classifier
from tve.baselines.readings import OwnHead, reading_of_explainer
from tve.explainer import Explainer
from tve.transfer_rule import TransferRule
from tve_pipeline.evaluate_measures import EvaluateParams
from tve_pipeline.params import Section, Seed


class NoSettings(Section):
    """A method with nothing to choose."""


class UntrainedParams(Section):
    """TVE with the weights that training starts from, but for its last layers, which start at zero: drawn here."""

    seed: Seed


@dataclass(frozen=True, slots=True)
class KnownReading:
    """A reading that a profile can name."""

    settings: type[Section]
    build: Callable[[Explainer, EvaluateParams, Any], Method]  # from the settings, an instance of that model
    obstacle: Callable[[Backbone], str] = lambda _: ""  # why it is not defined for a backbone, "" where it is


def reading_settings(name: str) -> type[Section]:
    """The model of a reading's settings.

    Raises:
        ValueError: a reading that is not known.
    """
    if name not in READINGS:
        raise ValueError(f"run.readings: expected some of {', '.join(READINGS)}, got {name!r}")
    return READINGS[name].settings


def _tve(explainer: Explainer, params: EvaluateParams, _: NoSettings) -> Method:
    return reading_of_explainer(explainer, params.output)


def _own_head(explainer: Explainer, params: EvaluateParams, _: NoSettings) -> Method:
    head = explainer.backbone.classifier()
    assert head is not None  # `no_classifier` is asked first
    return OwnHead(explainer, head, TransferRule(params.output, params.per_patch))


def _untrained(trained: Explainer, params: EvaluateParams, own: UntrainedParams) -> Method:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        explainer = Explainer(trained.backbone, trained.config).to(trained.empty_D.device).eval()
        for module in explainer.network.modules():
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                nn.init.trunc_normal_(module.weight, std=0.02)
    explainer.mean_kept_D.copy_(trained.mean_kept_D)
    explainer.empty_D.copy_(trained.empty_D)
    return reading_of_explainer(explainer, params.output, "tve_untrained")


READINGS: dict[str, KnownReading] = {
    "tve": KnownReading(NoSettings, _tve),
    "tve_hg": KnownReading(NoSettings, _own_head, no_classifier),
    "tve_untrained": KnownReading(UntrainedParams, _untrained),
}
