"""A trained copy of the last blocks: before training the backbone's own, and all that training changes of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_rereading import SMALL, backbone
from tve.backbones import Backbone, load_backbone
from tve.explainer import Explainer, ExplainerConfig, SharedTrunk
from tve.export import load_explainer, save_explainer
from tve.meta_attribution import MetaAttribution
from tve.trained_end import TrainedEnd

MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "class and registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "a norm before the blocks": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "tokens finer than the grid": ("vit_tiny_patch16_224", {"patch_size": 4}),
}
SETTINGS = [(1, 0), (2, 0), (2, 2), (3, 1)]  # trained_blocks, reread_blocks


def made(name: str) -> Backbone:
    torch.manual_seed(0)
    architecture, settings = MODELS[name]
    return load_backbone(architecture, "random", timm_args=SMALL | settings, patches_per_side=4)


def explainer(of: Backbone, trained_blocks: int | None, reread_blocks: int = 2) -> Explainer:
    """Whose last layers are drawn, so that every part of it says something."""
    torch.manual_seed(1)
    config = ExplainerConfig(
        1,
        "drop",
        trunk="trained",
        trained_blocks=trained_blocks,
        num_levels=2,
        width=16,
        depth=1,
        reread_blocks=reread_blocks,
    )
    built = Explainer(of, config)
    network = built.network
    assert isinstance(network, SharedTrunk)
    for last in (network.to_kept, network.to_removed):
        nn.init.normal_(last.weight)
    if reread_blocks:
        nn.init.ones_(network.reread_scale_D)
    return built


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def ends_and_wholes(name: str, trained_blocks: int, reread_blocks: int) -> tuple[Explainer, Explainer]:
    """An explainer with a trained end and one with a trained whole, equal but for that."""
    of = made(name)
    end, whole = explainer(of, trained_blocks, reread_blocks), explainer(of, None, reread_blocks)
    rest = {key: value for key, value in whole.trained_state().items() if not key.startswith("network.trunk.")}
    end.load_state_dict(rest, strict=False)
    return end.eval(), whole.eval()


def trunk_of(explains: Explainer) -> Backbone | TrainedEnd:
    assert isinstance(explains.network, SharedTrunk)
    assert explains.network.trunk is not None
    return explains.network.trunk


def assert_equal(mine: MetaAttribution, other: MetaAttribution) -> None:
    for part in ("kept_BND", "removed_BND", "full_BD"):
        assert torch.equal(getattr(mine, part), getattr(other, part)), part


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("trained_blocks", "reread_blocks"), SETTINGS)
@torch.no_grad()
def test_it_says_what_a_copy_of_the_whole_with_the_same_last_blocks_says(
    name: str, trained_blocks: int, reread_blocks: int
) -> None:
    end, whole = ends_and_wholes(name, trained_blocks, reread_blocks)
    untrained = end(images())
    assert untrained.removed_BND.std(1).mean() > 0.01
    assert_equal(untrained, whole(images()))
    own, copied = trunk_of(end), trunk_of(whole)
    assert isinstance(own, TrainedEnd)
    assert isinstance(copied, Backbone)
    for part, parameter in own.end.model.named_parameters():
        if parameter.requires_grad:
            copied.model.get_parameter(part).copy_(parameter.mul_(1.5))
    trained = end(images())
    assert not torch.allclose(untrained.kept_BND, trained.kept_BND, atol=1e-3)
    assert not torch.allclose(untrained.removed_BND, trained.removed_BND, atol=1e-3)
    assert torch.equal(untrained.full_BD, trained.full_BD)
    assert torch.equal(end.backbone(images()), trained.full_BD)
    assert_equal(trained, whole(images()))


@pytest.mark.parametrize("reread_blocks", [0, 2])
def test_the_last_blocks_alone_are_trained(reread_blocks: int) -> None:
    of = made("plain")
    explains = explainer(of, 2, reread_blocks)
    meta = explains(images())
    (meta.removed_BND.square().mean() + meta.kept_BND.square().mean()).backward()
    trained = {name: p for name, p in explains.network.named_parameters() if "trunk." in name and p.requires_grad}
    assert {name.removeprefix("trunk.end.model.blocks.").partition(".")[0] for name in trained} == {"2", "3"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for p in of.parameters())
    others = (p for name, p in explains.network.named_parameters() if "trunk." in name and name not in trained)
    assert all(p.grad is None for p in others)
    saved = {name.removeprefix("network.") for name in explains.trained_state()}
    assert set(trained) < saved
    assert not any(
        ".blocks.0." in name or ".blocks.1." in name or "pos_embed" in name for name in saved if "trunk" in name
    )


def test_the_end_is_no_backbone_of_its_own() -> None:
    end = trunk_of(explainer(made("plain"), 2))
    assert isinstance(end, TrainedEnd)
    with pytest.raises(TypeError):
        end.end(images())


def test_an_export_says_so_and_opens_the_same(tmp_path: Path) -> None:
    explains = explainer(made("distilled"), 2).eval()
    save_explainer(explains, tmp_path, {})
    assert "trunk trained (last 2 blocks), blocks reread: 2" in (tmp_path / "README.md").read_text()
    opened = load_explainer(tmp_path)
    assert opened.config == explains.config
    with torch.no_grad():
        assert torch.equal(opened(images()).removed_BND, explains(images()).removed_BND)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trunk": "frozen", "trained_blocks": 2},
            "trained_blocks: expected none where the trunk is frozen, got 2; leave it out, or set trunk",
        ),
        ({"trunk": "trained", "trained_blocks": 0}, "trained_blocks: expected 1 or more, got 0; leave it out"),
        (
            {"trunk": "trained", "trained_blocks": 2, "reread_blocks": 3},
            "trained_blocks: expected at least the 3 that are reread, got 2; copy more",
        ),
        ({"trunk": "trained", "trained_blocks": 1.5}, "trained_blocks: expected"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplainerConfig(1, "drop", **settings)  # type: ignore[arg-type]


def test_what_a_backbone_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="trained_blocks: expected 1 to 3 for vit_tiny_patch16_224, got 4"):
        TrainedEnd(backbone(), 4)
    swin = load_backbone(
        "swin_tiny_patch4_window7_224",
        "random",
        timm_args={"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)},
    )
    with pytest.raises(ValueError, match=r"trained_blocks: expected none for swin_tiny.*, got 1; leave it out"):
        TrainedEnd(swin, 1)
