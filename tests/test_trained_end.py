"""A trained copy of the last blocks: before training the backbone's own, and all that training changes of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_rereading import SMALL, backbone
from tve.backbones import Backbone, load_backbone
from tve.explainer import Explainer, ExplainerConfig, SharedTrunk
from tve.export import load_explainer, save_explainer
from tve.trained_end import TrainedEnd

MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "class and registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "a norm before the blocks": ("vit_tiny_patch16_224", {"pre_norm": True}),
}


def made(name: str) -> Backbone:
    torch.manual_seed(0)
    architecture, settings = MODELS[name]
    return load_backbone(architecture, "random", timm_args=SMALL | settings)


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("trained_blocks", "reread_blocks"), [(1, 0), (2, 2), (3, 1)])
def test_untrained_it_says_what_a_copy_of_the_whole_says(name: str, trained_blocks: int, reread_blocks: int) -> None:
    of = made(name)
    end, whole = explainer(of, trained_blocks, reread_blocks), explainer(of, None, reread_blocks)
    rest = {key: value for key, value in whole.trained_state().items() if not key.startswith("network.trunk.")}
    end.load_state_dict(rest, strict=False)
    with torch.no_grad():
        mine, other = end(images()), whole(images())
    assert mine.removed_BND.std(1).mean() > 0.01
    for part in ("kept_BND", "removed_BND", "full_BD"):
        assert torch.equal(getattr(mine, part), getattr(other, part)), part


def test_the_last_blocks_alone_are_trained_and_saved() -> None:
    of = made("plain")
    explains = explainer(of, 2)
    explains(images()).removed_BND.square().mean().backward()
    trunk = {name: p for name, p in explains.network.named_parameters() if name.startswith("trunk.")}
    parts = {name.removeprefix("trunk.end.model.").rsplit(".", 1)[0].partition(".") for name in trunk}
    assert {first for first, _, _ in parts} == {"blocks", "norm"}
    assert {rest[0] for first, _, rest in parts if first == "blocks"} == {"2", "3"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.values())
    assert all(p.grad is None for p in of.parameters())
    assert {name.removeprefix("network.") for name in explains.trained_state() if "trunk." in name} == set(trunk)


def test_a_changed_end_changes_maps_and_neither_the_embedding_nor_the_backbone() -> None:
    of = made("plain")
    explains = explainer(of, 2)
    assert isinstance(explains.network, SharedTrunk)
    assert isinstance(explains.network.trunk, TrainedEnd)
    with torch.no_grad():
        before = explains(images())
        for parameter in explains.network.trunk.parameters():
            parameter.mul_(1.5)
        after = explains(images())
        assert torch.equal(before.full_BD, after.full_BD)
        assert torch.equal(of(images()), after.full_BD)
    assert not torch.allclose(before.kept_BND, after.kept_BND, atol=1e-3)
    assert not torch.allclose(before.removed_BND, after.removed_BND, atol=1e-3)


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
        ({"trunk": "frozen", "trained_blocks": 2}, "trained_blocks: expected None where the trunk is frozen, got 2"),
        ({"trunk": "trained", "trained_blocks": 0}, "trained_blocks: expected at least 1, .* got 0"),
        (
            {"trunk": "trained", "trained_blocks": 2, "reread_blocks": 3},
            "trained_blocks: expected at least 3, since reread_blocks is 3, got 2",
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
