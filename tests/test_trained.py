"""The folder of a trained explainer between stages, and the paper's form trained beside the explainer."""

from pathlib import Path

import pytest
import torch

from tve.backbones import Backbone, load_backbone
from tve.explainer import Explainer, ExplainerConfig
from tve.two_networks import TwoNetworksConfig
from tve_pipeline.params import RunParams, load_section
from tve_pipeline.pretraining import PretrainParams, build_explainer
from tve_pipeline.trained import open_trained, save_trained
from tve_pipeline.two_networks import TwoNetworksStageParams

PROFILES = Path(__file__).resolve().parents[1] / "profiles"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
NETWORKS = TwoNetworksConfig(embed_dim=16, encoder_depth=1, decoder_depth=0, num_heads=2, mixing_layers=2)


def small_backbone(seed: int) -> Backbone:
    torch.manual_seed(seed)
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=SMALL)


@pytest.mark.parametrize("form", ["shared", "two_networks"])
def test_what_was_trained_opens_as_it_was_for_its_own_backbone_alone(tmp_path: Path, form: str) -> None:
    backbone = small_backbone(0)
    config = ExplainerConfig(1, "drop", form, num_levels=2, width=16, depth=1, two_networks=NETWORKS)  # type: ignore[arg-type]
    explainer = Explainer(backbone, config)
    torch.nn.init.normal_(explainer.mean_kept_D)
    save_trained(explainer, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(open_trained(tmp_path, backbone)(images).kept_BND, explainer(images).kept_BND)
    with pytest.raises(ValueError, match=r"expected an explainer of backbone .*; run `dvc repro`"):
        open_trained(tmp_path, small_backbone(1))


def test_the_papers_form_differs_from_the_explainer_in_form_start_and_rate_alone() -> None:
    grid = PROFILES / "scenes_grid.yaml"
    pretrain = load_section("pretrain", PretrainParams, grid)
    beside = load_section("two_networks", TwoNetworksStageParams, grid).beside(pretrain)
    differing = {name for name in PretrainParams.model_fields if getattr(beside, name) != getattr(pretrain, name)}
    assert differing == {"form", "learning_rate", "mae", "two_networks"}
    swin = load_backbone("swin_tiny_patch4_window7_224", "random", timm_args={"img_size": 64}, patches_per_side=8)
    with torch.device("meta"):
        assert build_explainer(swin, beside, "zero").config.two_networks.embed_dim == 128


def test_where_nothing_is_said_of_the_networks_none_can_be_trained() -> None:
    pretrain = load_section("pretrain", PretrainParams, PROFILES / "real.yaml")
    with pytest.raises(ValueError, match=r"two_networks\.train: expected values, since run\.two_networks names"):
        TwoNetworksStageParams(train=None).beside(pretrain)


def test_a_backbone_has_the_methods_that_run_for_it() -> None:
    run = load_section("run", RunParams, PROFILES / "scenes_grid.yaml")
    assert run.methods_of("swin_scenes") == (*run.readings, *run.methods, "vit_shapley", "tve_two_networks")
    assert load_section("run", RunParams, PROFILES / "real.yaml").methods_of("vit_tiny")[-1] == "vit_shapley"
    default = load_section("run", RunParams, PROFILES / "scenes.yaml")
    assert default.methods_of("vit_scenes") == (*default.readings, *default.methods)
