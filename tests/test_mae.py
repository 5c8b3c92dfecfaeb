import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tve.digests import file_sha256
from tve.mae import (
    MaskedAutoencoder,
    initialise_from_file,
    initialise_from_mae,
    normalised_pixels,
    pretrain_mae,
    random_present,
)
from tve.two_networks import TwoNetworks, TwoNetworksConfig
from tve_pipeline.scenes import scene

CONFIG = TwoNetworksConfig(embed_dim=32, encoder_depth=2, decoder_depth=1, num_heads=2, mixing_layers=3)
MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(64, 8, CONFIG).eval()


def pair(image_size: int = 64, patches_per_side: int = 8, config: TwoNetworksConfig = CONFIG) -> TwoNetworks:
    torch.manual_seed(1)
    return TwoNetworks(image_size, patches_per_side, 10, config)


def scenes(count: int) -> Tensor:
    pixels = np.stack([scene(0, "pretrain", index).pixels for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def masks(count: int) -> Tensor:
    return random_present(count, 64, 0.75, torch.Generator().manual_seed(3))


def timm_encoder(image_size: int = 64) -> VisionTransformer:
    """A model with the layout of `vit_base_patch16_224.mae`, small and untrained."""
    torch.manual_seed(2)
    model = timm.create_model(
        "vit_base_patch16_224.mae",
        pretrained=False,
        img_size=image_size,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
    )
    assert isinstance(model, VisionTransformer)
    return model.eval()


def test_the_loss_falls_on_a_few_scenes() -> None:
    mae = autoencoder()
    images = scenes(16)
    losses = pretrain_mae(mae, itertools.repeat(images), 60, 3e-3, 0.5, warmup_steps=5)
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert mae.num_steps_trained == 60


def test_changing_absent_pixels_leaves_the_prediction_unchanged() -> None:
    mae, images, present = autoencoder(), scenes(4), masks(4)
    absent = ~present.reshape(4, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(absent, torch.randn_like(images), images)
    assert torch.equal(mae(images, present), mae(changed, present))


def test_changing_a_present_pixel_changes_the_prediction_of_absent_patches() -> None:
    mae, images, present = autoencoder(), scenes(1), torch.ones(1, 64, dtype=torch.bool)
    present[0, 32:] = False
    changed = images.clone()
    changed[:, :, 0, 0] += 1
    moved = (mae(images, present) - mae(changed, present)).abs().amax(-1)[0]
    assert bool((moved[32:] > 0).all())


def test_the_loss_reads_the_absent_patches_alone() -> None:
    mae, images, present = autoencoder(), scenes(2), masks(2)
    target = normalised_pixels(images, 8)
    residual = (mae(images, present) - target).square().mean(-1)
    expected = torch.stack([residual[b, n] for b, n in (~present).nonzero()]).mean()
    torch.testing.assert_close(mae.loss(images, present), expected)


def test_targets_have_mean_zero_and_variance_one_in_every_patch_at_its_place() -> None:
    images = scenes(2)
    target = normalised_pixels(images, 8)
    assert target.shape == (2, 64, 8 * 8 * 3)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 64), atol=1e-5, rtol=0)
    patch = images[1, :, 16:24, 40:48].permute(1, 2, 0).flatten()
    torch.testing.assert_close(target[1, 2 * 8 + 5], (patch - patch.mean()) / patch.std(), atol=1e-3, rtol=0)


def test_with_everything_present_the_encoder_is_the_timm_model() -> None:
    network = autoencoder().network
    images = scenes(2)
    encoded = network.encode(network.embed(images))
    torch.testing.assert_close(encoded, network.encoder.forward_features(images))


@pytest.mark.parametrize(("ratio", "num_present"), [(0.75, 16), (0.5, 32), (0.999, 1), (0.001, 63)])
def test_every_mask_has_the_same_share_of_present_patches(ratio: float, num_present: int) -> None:
    present = random_present(7, 64, ratio, torch.Generator().manual_seed(0))
    assert present.dtype == torch.bool
    assert present.sum(1).tolist() == [num_present] * 7


def test_masks_are_uniform_over_patches() -> None:
    present = random_present(4000, 16, 0.75, torch.Generator().manual_seed(0))
    assert float((present.float().mean(0) - 0.25).abs().max()) < 0.035


def test_the_same_seed_gives_the_same_weights() -> None:
    runs = []
    for _ in range(2):
        mae = autoencoder()
        pretrain_mae(mae, itertools.repeat(scenes(4)), 3, 1e-3, seed=5)
        runs.append(mae.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_bfloat16_trains_as_well() -> None:
    losses = pretrain_mae(autoencoder(), itertools.repeat(scenes(4)), 3, 1e-3, precision="bfloat16")
    exact = pretrain_mae(autoencoder(), itertools.repeat(scenes(4)), 3, 1e-3)
    np.testing.assert_allclose(losses, exact, rtol=0.02)


def test_both_networks_receive_encoder_and_decoder_of_the_autoencoder_and_say_so() -> None:
    mae, networks = autoencoder(), pair()
    pretrain_mae(mae, itertools.repeat(scenes(4)), 3, 1e-3)
    initialise_from_mae(networks, mae)
    images = scenes(2)
    for network in (networks.kept_network, networks.removed_network):
        assert torch.equal(network(images), mae.network(images))
        assert network.encoder.pos_embed is not mae.network.encoder.pos_embed
    assert networks.initialisation == "own mae, 3 steps"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_encoder_file_gives_the_features_of_its_timm_model(tmp_path: Path, suffix: str) -> None:
    model, path = timm_encoder(), tmp_path / f"mae{suffix}"
    if suffix == ".pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    networks, images = pair(), scenes(2)
    decoder_before = networks.kept_network.decoder_norm.weight.clone()
    initialise_from_file(networks, path, mean=MEAN, std=STD)
    for network in (networks.kept_network, networks.removed_network):
        torch.testing.assert_close(network.encode(network.embed(images)), model.forward_features(images))
    assert torch.equal(networks.kept_network.decoder_norm.weight, decoder_before)
    assert networks.initialisation == f"mae file mae{suffix}, sha256 {file_sha256(path)}"


def test_a_file_with_a_decoder_gives_both(tmp_path: Path) -> None:
    mae, path = autoencoder(), tmp_path / "mae.safetensors"
    named = mae.state_dict().items()
    state = {key.removeprefix("network.").removeprefix("encoder."): value for key, value in named}
    save_file(state, path)
    networks, images = pair(), scenes(2)
    initialise_from_file(networks, path, mean=MEAN, std=STD)
    torch.testing.assert_close(networks.removed_network(images), mae.network(images))


def test_pictures_in_another_normalisation_give_the_same_tokens(tmp_path: Path) -> None:
    model, path = timm_encoder(), tmp_path / "mae.safetensors"
    save_file(model.state_dict(), path)
    networks = pair()
    initialise_from_file(networks, path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    halves = scenes(2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    network = networks.kept_network
    torch.testing.assert_close(
        network.encode(network.embed(halves)),
        model.forward_features((halves / 2 + 0.5 - mean) / std),
        atol=1e-4,
        rtol=1e-4,
    )


def test_positions_of_another_grid_are_resampled(tmp_path: Path) -> None:
    model, path = timm_encoder(image_size=128), tmp_path / "mae.safetensors"
    row = torch.linspace(-1, 1, 16)
    assert model.pos_embed is not None
    model.pos_embed.data[0, 1:, 0] = row.repeat_interleave(16)  # grows from the top row to the bottom row
    save_file(model.state_dict(), path)
    networks = pair()
    initialise_from_file(networks, path, mean=MEAN, std=STD)
    positions = networks.kept_network.encoder.pos_embed
    assert positions is not None
    assert torch.equal(positions[:, 0], model.pos_embed[:, 0])
    column = positions[0, 1:, 0].reshape(8, 8)
    torch.testing.assert_close(column[:, 0], column[:, 7])
    assert bool((column[1:, 0] > column[:-1, 0]).all())


def test_weights_of_another_width_are_an_error_that_leaves_the_networks_alone(tmp_path: Path) -> None:
    path = tmp_path / "mae.safetensors"
    save_file(timm_encoder().state_dict(), path)
    networks = pair(config=TwoNetworksConfig(16, 2, 1, 2, 3))
    before = {key: value.clone() for key, value in networks.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the two networks: other shapes: .*set embed_dim"):
        initialise_from_file(networks, path, mean=MEAN, std=STD)
    assert all(torch.equal(value, before[key]) for key, value in networks.state_dict().items())
    assert networks.initialisation == "random"


def test_weights_of_another_depth_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mae.safetensors"
    save_file(timm_encoder().state_dict(), path)
    with pytest.raises(ValueError, match=r"missing: \['encoder.blocks.2"):
        initialise_from_file(pair(config=TwoNetworksConfig(32, 3, 1, 2, 3)), path, mean=MEAN, std=STD)


def test_an_autoencoder_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="masked autoencoder does not fit"):
        initialise_from_mae(pair(config=TwoNetworksConfig(16, 2, 1, 2, 3)), autoencoder())


def test_a_file_that_is_not_there_or_not_the_pinned_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="MAE weights: expected a"):
        initialise_from_file(pair(), tmp_path / "none.safetensors", mean=MEAN, std=STD)
    path = tmp_path / "mae.safetensors"
    save_file(timm_encoder().state_dict(), path)
    with pytest.raises(ValueError, match="expected sha256 00"):
        initialise_from_file(pair(), path, mean=MEAN, std=STD, sha256="00")


def test_masks_that_do_not_fit_are_errors() -> None:
    mae, images = autoencoder(), scenes(2)
    with pytest.raises(ValueError, match=r"present: expected bool \[2, 64\], got torch.float32 \[2, 64\]"):
        mae(images, masks(2).float())
    with pytest.raises(ValueError, match=r"present: expected bool \[2, 64\]"):
        mae(images, masks(3))
    uneven = masks(2)
    uneven[0] = True
    with pytest.raises(ValueError, match=r"same number of patches in every picture, got \[16, 64\]"):
        mae(images, uneven)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_a_ratio_that_leaves_nothing_to_do_is_an_error(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio: expected more than 0 and less than 1"):
        random_present(1, 64, ratio, torch.Generator())


def test_too_few_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="batches: expected 3, got 1; repeat the pictures"):
        pretrain_mae(autoencoder(), iter([scenes(2)]), 3, 1e-3)


def test_a_loss_that_is_not_finite_stops_and_names_the_step() -> None:
    def batches() -> Iterator[Tensor]:
        yield scenes(2)
        yield scenes(2) * float("nan")

    with pytest.raises(ValueError, match="loss nan at step 1"):
        pretrain_mae(autoencoder(), batches(), 2, 1e-3)
