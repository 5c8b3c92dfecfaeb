"""What `examine` states, on an untrained backbone whose explainer is noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve.fidelity.bound import explanation_bound
from tve.fidelity.sanity import random_head, randomised, rank_correlation
from tve.meta_attribution import exact_windows
from tve.transfer_rule import class_maps
from tve_pipeline.evaluate_measures import EvaluateParams, TaskHead
from tve_pipeline.examine import ExamineParams, bound_numbers, cascade, examined, on_backbone
from tve_pipeline.params import load_section

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
EVALUATION = load_section(
    "evaluate", EvaluateParams, Path(__file__).parents[1] / "profiles" / "scenes.yaml"
).model_copy(update={"precision": "float32"})
PARAMS = ExamineParams(num_pictures=6, num_heads=2, seed=3)
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=VIT)


@pytest.fixture(scope="module")
def explainer(backbone: Backbone) -> Explainer:
    torch.manual_seed(1)
    made = Explainer(backbone, ExplainerConfig(radius=1, removal="drop", num_levels=2, width=16, depth=1)).eval()
    for parameter in (made.network.to_kept.weight, made.network.to_removed.weight):  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.3)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def head() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(16, 4)


@pytest.fixture(scope="module")
def found(explainer: Explainer, head: nn.Linear) -> dict[str, Any]:
    return examined(explainer, {"task": TaskHead(tuple("abcd"), head)}, IMAGES, PARAMS, EVALUATION)


def test_correlations_are_of_exact_maps_with_those_of_what_was_redrawn(
    backbone: Backbone, explainer: Explainer, head: nn.Linear, found: dict[str, Any]
) -> None:
    def maps(of: Backbone, read_by: nn.Linear, target_B: torch.Tensor) -> torch.Tensor:
        meta = exact_windows(CoalitionEvaluator(of, "drop", precision="float32"), IMAGES, explainer.family)
        return class_maps(meta, read_by, target_B)

    def mean_correlation(other_BPP: torch.Tensor) -> float:
        return float(rank_correlation(own_BPP, other_BPP).mean())

    target_B = head(backbone(IMAGES)).argmax(-1)
    own_BPP = maps(backbone, head, target_B)
    stated = found["tasks"]["task"]["exact_windows"]
    by_head = [mean_correlation(maps(backbone, random_head(head, seed), target_B)) for seed in (3, 4)]
    assert stated["random_head"] == pytest.approx(sum(by_head) / 2, abs=1e-4)
    by_block = [mean_correlation(maps(randomised(backbone, count, 3), head, target_B)) for count in (1, 2)]
    assert stated["blocks"] == pytest.approx(by_block, abs=1e-4)
    other = torch.stack([maps(backbone, head, target_B.roll(-1))[(place - 1) % 6] for place in range(6)])
    assert stated["other_picture"] == pytest.approx(mean_correlation(other), abs=1e-4)
    assert all(value < 0.9 for value in (stated["random_head"], stated["other_picture"], *stated["blocks"]))


def test_an_explainer_is_asked_about_a_redrawn_backbone_with_the_weights_that_it_has(
    explainer: Explainer, found: dict[str, Any]
) -> None:
    first, _ = cascade(explainer.backbone, 3)
    moved = on_backbone(explainer, first)
    assert moved.backbone.weights_sha256 != explainer.backbone.weights_sha256
    for name, tensor in explainer.trained_state().items():
        assert torch.equal(tensor, moved.trained_state()[name])
    assert not torch.allclose(moved(IMAGES).kept_BND, explainer(IMAGES).kept_BND)
    assert len(found["tasks"]["task"]["tve"]["blocks"]) == 2


@pytest.mark.parametrize(("trained_blocks", "stated"), [(1, [False, True]), (None, [])])
def test_blocks_of_which_an_explainer_has_copies_of_its_own_are_not_asked_about(
    backbone: Backbone, head: nn.Linear, trained_blocks: int | None, stated: list[bool]
) -> None:
    config = ExplainerConfig(1, "drop", trunk="trained", trained_blocks=trained_blocks, num_levels=2, width=16, depth=1)
    made = Explainer(backbone, config).eval()
    nn.init.normal_(made.network.to_kept.weight)  # type: ignore[union-attr,arg-type]
    found = examined(made, {"task": TaskHead(tuple("abcd"), head)}, IMAGES, PARAMS, EVALUATION)["tasks"]["task"]
    assert [value is not None for value in found["tve"]["blocks"]] == stated
    assert all(value is not None for value in found["exact_windows"]["blocks"])


def test_the_bound_is_the_librarys_and_a_broken_one_is_counted(
    explainer: Explainer, head: nn.Linear, found: dict[str, Any]
) -> None:
    exact = exact_windows(CoalitionEvaluator(explainer.backbone, "drop"), IMAGES, explainer.family)
    with torch.no_grad():
        bound = explanation_bound(explainer(IMAGES), exact, head, head(exact.full_BD).argmax(-1))
    stated = found["tasks"]["task"]["bound"]
    assert stated["error"] == pytest.approx(float(bound.actual_B.mean()), rel=1e-3)
    assert stated["bound_over_error"] == pytest.approx(float((bound.bound_B / bound.actual_B).median()), rel=1e-3)
    assert 0 < stated["error"] < stated["bound"] < stated["loss_bound"]
    assert stated["num_broken"] == 0
    bound.bound_BPP[2, 1, 1] = 0
    bound.from_loss_B[4] = 0
    assert bound_numbers(bound)["num_broken"] == 2
