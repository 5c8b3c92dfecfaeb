"""Every method that a profile can name is built from its settings and answers what it says it does."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import Method, Question
from tve.coalitions import Windows
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve_pipeline.evaluate_measures import EvaluateParams
from tve_pipeline.evaluation import Given
from tve_pipeline.methods import METHODS, method_settings
from tve_pipeline.params import READINGS as NAMES
from tve_pipeline.params import parse
from tve_pipeline.readings import READINGS, reading_settings

ROOT = Path(__file__).resolve().parents[1]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1, "num_classes": 3}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
SETTINGS = {
    **{name: {"budgets": [4, 8]} for name in ("rise", "kernel_shap", "lime")},
    "tve_untrained": {"seed": 0},
    "integrated_gradients": {"num_steps": 2},
    "gradient_shap": {"num_samples": 2},
}
NOT_FOR_SWIN = {"rollout", "attn_lrp"}


ALL = (*METHODS, *READINGS)


def given_of(backbone: Backbone, removal: str) -> Given:
    params = EvaluateParams.model_validate(
        yaml.safe_load((ROOT / "profiles" / "scenes.yaml").read_text())["evaluate"] | {"precision": "float32"}
    )
    windows = Windows(backbone.patches_per_side, radius=1)
    return Given(backbone, windows, CoalitionEvaluator(backbone, removal), params)  # type: ignore[arg-type]


def built(name: str, given: Given) -> Method:
    own = SETTINGS.get(name, {})
    if name in METHODS:
        return METHODS[name].build(given, parse(own, method_settings(name), name, "test"))
    torch.manual_seed(1)
    config = ExplainerConfig(radius=1, removal=given.evaluator.removal, num_levels=1, width=8, depth=1)
    explainer = Explainer(given.backbone, config).eval()
    return READINGS[name].build(explainer, given.params, parse(own, reading_settings(name), name, "test"))


def obstacle(name: str, backbone: Backbone) -> str:
    return (METHODS[name] if name in METHODS else READINGS[name]).obstacle(backbone)


@pytest.fixture(scope="module")
def given() -> Given:
    torch.manual_seed(0)
    return given_of(load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT), "drop")


@pytest.fixture(scope="module")
def on_swin() -> Given:
    torch.manual_seed(0)
    swin = load_backbone(
        "swin_tiny_patch4_window7_224", "random", timm_args=SWIN | {"num_classes": 3}, patches_per_side=8
    )
    return given_of(swin, "zero")


def asked(given: Given) -> tuple[Tensor, dict[str, Question]]:
    generator = torch.Generator().manual_seed(2)
    backbone = given.backbone
    images = torch.randn(2, 3, 32, 32, generator=generator)
    torch.manual_seed(3)
    head = nn.Linear(backbone.embed_dim, 4).requires_grad_(False)
    return images, {"one": Question(head, torch.tensor([0, 3])), "other": Question(head, torch.tensor([1, 1]))}


def answers_of(name: str, given: Given) -> None:
    method = built(name, given)
    images, questions = asked(given)
    answers = method(images, ["a", "b"], questions)
    assert set(answers) == {(question, variant) for question in questions for variant in method.variants}
    side = given.backbone.patches_per_side
    for answer in answers.values():
        assert tuple(answer.map_BPP.shape) == (2, side, side)
        assert answer.map_BPP.dtype == torch.float32
        assert bool(answer.map_BPP.isfinite().all())
    alone = method(images[1:], ["b"], {"one": Question(questions["one"].head, questions["one"].target_B[1:])})
    for variant in method.variants:
        torch.testing.assert_close(
            alone["one", variant].map_BPP, answers["one", variant].map_BPP[1:], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ALL)
def test_a_method_answers_every_question_with_every_variant_whatever_its_batch(name: str, given: Given) -> None:
    assert obstacle(name, given.backbone) == ""
    answers_of(name, given)


@pytest.mark.parametrize("name", ALL)
def test_on_swin_a_method_answers_too_or_says_why_it_is_not_defined(name: str, on_swin: Given) -> None:
    reason = obstacle(name, on_swin.backbone)
    assert bool(reason) == (name in NOT_FOR_SWIN)
    if not reason:
        answers_of(name, on_swin)


def test_an_untrained_explainer_is_neither_the_trained_one_nor_without_a_map(given: Given) -> None:
    images, questions = asked(given)
    map_BPP = built("tve_untrained", given)(images, ["a", "b"], questions)["one", "tve_untrained"].map_BPP
    assert float(map_BPP.flatten(1).std(1).min()) > 0


def test_a_name_that_is_not_known_or_of_the_other_kind_is_an_error_that_lists_the_known_ones() -> None:
    assert tuple(READINGS) == NAMES
    for name in ("lrp", "tve"):
        with pytest.raises(ValueError, match=rf"run\.methods: expected some of exact_windows, .*got '{name}'"):
            method_settings(name)
    with pytest.raises(ValueError, match=r"run\.readings: expected some of tve, tve_hg, tve_untrained, got 'rise'"):
        reading_settings("rise")
