from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.fidelity.sanity import random_head, randomised, rank_correlation

TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def plain() -> Backbone:
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=TINY)


def distilled() -> Backbone:
    return load_backbone("deit_tiny_distilled_patch16_224", "random", timm_args=TINY)


def swin() -> Backbone:
    tiny = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    return load_backbone("swin_tiny_patch4_window7_224", "random", timm_args=tiny | {"num_classes": 5})


# The parts of each model, from the output downwards: classifier, what follows the blocks, blocks, the rest.
MODELS: dict[str, tuple[Callable[[], Backbone], str, int, tuple[str, ...]]] = {
    "plain": (plain, "blocks", 3, ("head.",)),
    "distilled": (distilled, "blocks", 3, ("head.", "head_dist.")),
    "swin": (swin, "layers", 3, ("head.",)),
}


def with_noise(backbone: Backbone) -> Backbone:
    """Norms and biases of one value each could not be told from redrawn ones."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Backbone(backbone.config, backbone.model)


def changed(one: Backbone, other: Backbone) -> set[str]:
    theirs = dict(other.model.named_parameters())
    return {name for name, parameter in one.model.named_parameters() if not parameter.equal(theirs[name])}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3])
def test_the_last_blocks_and_what_follows_them_are_redrawn_and_nothing_else(kind: str, num_blocks: int) -> None:
    make, sequence, depth, classifier = MODELS[kind]
    original = with_noise(make())
    digest = original.weights_sha256
    copy = randomised(original, num_blocks, seed=0)
    blocks = tuple(f"{sequence}.{place}." for place in range(depth - num_blocks, depth))
    names = {name for name, _ in original.model.named_parameters()}
    expected = {name for name in names if name.startswith((*blocks, "norm."))} if num_blocks else set()
    assert changed(original, copy) == expected
    assert not any(name.startswith(classifier) for name in expected)
    assert Backbone(original.config, original.model).weights_sha256 == digest
    assert (copy.weights_sha256 == digest) == (num_blocks == 0)


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_change_and_stay_finite(kind: str) -> None:
    original = with_noise(MODELS[kind][0]())
    images = torch.randn(2, 3, original.image_size, original.image_size)
    before, after = original(images), randomised(original, 2, seed=0)(images)
    assert after.isfinite().all()
    assert not torch.allclose(before, after, atol=1e-2)


def test_randomisation_cascades_what_is_redrawn_for_one_block_is_redrawn_alike_for_two() -> None:
    original = with_noise(plain())
    one, two = randomised(original, 1, seed=0), randomised(original, 2, seed=0)
    assert changed(one, two)
    assert all(name.startswith("blocks.1.") for name in changed(one, two))


def test_redrawn_parameters_have_the_mean_and_the_deviation_of_the_old_ones() -> None:
    original = plain()
    with torch.no_grad():
        original.model.blocks[2].mlp.fc1.weight.mul_(3).add_(7)  # type: ignore[index, union-attr, operator]
    old = original.model.blocks[2].mlp.fc1.weight  # type: ignore[index, union-attr]
    new = randomised(original, 1, seed=0).model.blocks[2].mlp.fc1.weight  # type: ignore[index, union-attr]
    num = old.numel()
    assert (new.mean() - old.mean()).abs() < 4 * old.std() / num**0.5
    assert (new.std() / old.std() - 1).abs() < 4 / (2 * num) ** 0.5
    assert torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1].abs() < 4 / num**0.5


def test_seeds_differ_one_seed_repeats_and_the_global_generator_stays() -> None:
    original, head = with_noise(plain()), nn.Linear(32, 5)
    state = torch.get_rng_state()
    twins = randomised(original, 1, seed=0), randomised(original, 1, seed=0)
    other = randomised(original, 1, seed=1)
    heads = random_head(head, 0), random_head(head, 0), random_head(head, 1)
    assert torch.get_rng_state().equal(state)
    assert not changed(*twins)
    assert changed(twins[0], other)
    assert heads[0].weight.equal(heads[1].weight)
    assert not heads[0].weight.equal(heads[2].weight)


def test_a_random_head_has_the_old_ones_scale_and_leaves_it_alone() -> None:
    torch.manual_seed(0)
    head = nn.Linear(100, 100)
    with torch.no_grad():
        head.weight.mul_(5).add_(1)
    before = head.weight.clone()
    found = random_head(head, seed=0)
    assert head.weight.equal(before)
    assert found.bias.shape == head.bias.shape
    assert not found.bias.equal(head.bias)
    assert (found.weight.mean() - before.mean()).abs() < 4 * before.std() / 100
    assert (found.weight.std() / before.std() - 1).abs() < 0.03
    assert random_head(nn.Linear(4, 3, bias=False), seed=0).bias is None


def test_more_blocks_than_there_are_and_models_without_blocks_are_errors() -> None:
    with pytest.raises(ValueError, match="expected 0 to 3, got 4"):
        randomised(plain(), 4, seed=0)
    convolutional = load_backbone("resnet18", "random", timm_args={"num_classes": 2})
    with pytest.raises(ValueError, match="expected a model with blocks or layers, got ResNet"):
        randomised(convolutional, 1, seed=0)


@pytest.mark.parametrize("levels", [2, 4, 10_000])
def test_rank_correlation_is_scipys_ties_included(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    one, noise = (torch.randint(levels, (50, 6, 6), generator=generator).float() for _ in range(2))
    other = (one + noise).div(2, rounding_mode="floor")
    found = rank_correlation(one, other)
    for place in range(50):
        expected = spearmanr(one[place].flatten(), other[place].flatten()).statistic
        assert found[place].item() == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_sees_order_alone_and_constant_maps_have_none() -> None:
    scores = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rank_correlation(scores, scores.exp()), torch.ones(3).double())
    torch.testing.assert_close(rank_correlation(scores, -scores), -torch.ones(3).double())
    assert rank_correlation(scores, torch.ones(3, 4, 4)).isnan().all()


def test_maps_of_different_shapes_or_not_finite_have_no_rank_correlation() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] and \[1, 3, 3\]"):
        rank_correlation(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="got 4 that are not"):
        rank_correlation(torch.zeros(1, 2, 2), torch.full((1, 2, 2), torch.inf))
