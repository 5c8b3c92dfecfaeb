import pytest
import torch
from torch import Tensor, nn

from tve.two_networks import MixingLayer, PatchTransformer, TwoNetworks, TwoNetworksConfig

SMALL = TwoNetworksConfig(embed_dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, mixing_layers=3)


def networks(config: TwoNetworksConfig = SMALL) -> TwoNetworks:
    torch.manual_seed(0)
    return TwoNetworks(image_size=32, patches_per_side=4, embed_dim_out=10, config=config)


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixing_layers", [1, 2, 3, 17])
@pytest.mark.parametrize(("encoder_depth", "decoder_depth"), [(1, 0), (2, 1)])
def test_every_depth_gives_an_embedding_for_each_patch(
    mixing_layers: int, encoder_depth: int, decoder_depth: int
) -> None:
    config = TwoNetworksConfig(16, encoder_depth, decoder_depth, 2, mixing_layers)
    kept, removed = networks(config)(pictures())
    assert kept.shape == removed.shape == (2, 16, 10)


def test_the_decoder_may_have_a_width_and_heads_of_its_own() -> None:
    config = TwoNetworksConfig(16, 1, 1, 2, 3, decoder_embed_dim=24, decoder_num_heads=3)
    model = networks(config)
    assert model(pictures())[0].shape == (2, 16, 10)
    assert model.kept_network(pictures()).shape == (2, 16, 24)


def test_before_any_training_both_differences_are_zero() -> None:
    kept, removed = networks()(pictures())
    assert not kept.any()
    assert not removed.any()


def test_the_two_networks_share_no_parameter() -> None:
    model = networks()
    for head in (model.kept_head, model.removed_head):
        nn.init.normal_(head.last.weight)
    kept, removed = model(pictures())
    kept.sum().backward()
    named = model.named_parameters()
    reached = {name.split("_")[0] for name, parameter in named if parameter.grad is not None}
    assert reached == {"kept"}
    assert not torch.allclose(kept, removed)


def test_seventeen_mixing_layers_learn_which_patch_is_bright() -> None:
    """The target of a patch is its own brightness, which the random networks do not know."""
    model = networks(TwoNetworksConfig(16, 1, 1, 2, 17))
    generator = torch.Generator().manual_seed(2)
    brightness_BN1 = torch.randn(32, 16, 1, generator=generator)
    images = nn.functional.interpolate(brightness_BN1.reshape(32, 1, 4, 4), 32).expand(-1, 3, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        kept, removed = model(images)
        loss = (kept - brightness_BN1).square().mean() + (removed + brightness_BN1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * 2 * float(brightness_BN1.square().mean())


@pytest.mark.parametrize("over_patches", [False, True])
def test_a_mixing_layer_adds_its_definition_to_what_it_reads(over_patches: bool) -> None:
    torch.manual_seed(0)
    layer = MixingLayer(6, 4 if over_patches else 6, over_patches)
    x_BNW = torch.randn(2, 4, 6)
    active = nn.functional.gelu(nn.functional.layer_norm(x_BNW, (6,), eps=1e-6))
    if over_patches:
        mixed = torch.einsum("mn,bnw->bmw", layer.mix.weight, active) + layer.mix.bias[:, None]
    else:
        mixed = torch.einsum("vw,bnw->bnv", layer.mix.weight, active) + layer.mix.bias
    torch.testing.assert_close(layer(x_BNW), x_BNW + mixed)


def test_every_parameter_is_reached_by_the_loss_once_the_last_layers_are_not_zero() -> None:
    model = networks()
    for head in (model.kept_head, model.removed_head):
        nn.init.normal_(head.last.weight)
    kept, removed = model(pictures())
    (kept.square().sum() + removed.square().sum()).backward()
    unreached = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unreached == []


def test_features_of_a_patch_stand_at_its_own_place_in_row_major_order() -> None:
    """Without attention between patches, a change in patch (1, 2) reaches row 1 * 4 + 2 alone."""
    network = PatchTransformer(32, 4, TwoNetworksConfig(16, 1, 0, 2, 1))
    for name, parameter in network.encoder.named_parameters():
        if name.endswith("attn.proj.weight"):
            nn.init.zeros_(parameter)
    images = pictures(1)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1
    moved = (network(images) - network(changed)).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_a_fresh_pair_says_that_it_is_random() -> None:
    assert networks().initialisation == "random"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_depth": 0}, "encoder_depth: expected at least 1"),
        ({"decoder_depth": -1}, "decoder_depth: expected at least 0"),
        ({"mixing_layers": 0}, "mixing_layers: expected at least 1"),
        ({"embed_dim": 18}, "embed_dim: expected a multiple of 4 and of its 2 heads, got 18"),
        ({"num_heads": 3}, "embed_dim: expected a multiple of 4 and of its 3 heads"),
        ({"num_heads": 0}, "heads of embed_dim: expected at least 1"),
        ({"decoder_embed_dim": 20, "decoder_num_heads": 3}, "decoder_embed_dim: expected a multiple"),
    ],
)
def test_a_size_that_cannot_be_built_is_an_error(changes: dict[str, int], message: str) -> None:
    sizes = {"embed_dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mixing_layers": 1}
    with pytest.raises(ValueError, match=message):
        TwoNetworksConfig(**(sizes | changes))  # type: ignore[arg-type]


def test_a_grid_that_does_not_divide_the_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a divisor of 32 pixels, got 5"):
        TwoNetworks(32, 5, 10, SMALL)


def test_pictures_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 32, 32\], got \[1, 3, 16, 16\]"):
        networks()(torch.zeros(1, 3, 16, 16))
