from collections.abc import Callable

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import generator_of
from tve.evaluator import CoalitionEvaluator
from tve.fidelity import road as module
from tve.fidelity.levels import nested_levels
from tve.fidelity.road import NOISE, imputed, road
from tve.fidelity.scores import ScoredMap

PATCHES, SIZE = 6, 48
FRACTIONS = (0.25, 0.5, 0.75)
KEYS = ("a", "b", "c")
# Of each of the eight neighbours of a pixel.
WEIGHTS = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64)[None, None] / 12


@pytest.fixture(scope="module")
def evaluator() -> CoalitionEvaluator:
    torch.manual_seed(0)
    tiny = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return CoalitionEvaluator(load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny), "drop")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps() -> dict[str, ScoredMap]:
    """Two tasks, with heads steep enough for probabilities to differ."""
    torch.manual_seed(2)
    made = {}
    for name, classes in (("two", 2), ("five", 5)):
        head = nn.Linear(32, classes)
        with torch.no_grad():
            head.weight.mul_(8)
        made[name] = ScoredMap(torch.randn(3, PATCHES, PATCHES), head, torch.tensor([1, 0, 1]))
    return made


def random_mask(seed: int, side: int = PATCHES, share: float = 0.6) -> torch.Tensor:
    return torch.rand(side, side, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("seed", range(4))
def test_every_removed_pixel_is_the_weighted_mean_of_its_neighbours_inside_the_picture(
    images: torch.Tensor, seed: int
) -> None:
    removed = random_mask(seed)
    found = imputed(images[0].double(), removed)
    weighted = nn.functional.conv2d(found[:, None], WEIGHTS, padding=1)[:, 0]
    inside = nn.functional.conv2d(torch.ones(1, 1, SIZE, SIZE).double(), WEIGHTS, padding=1)[0]
    pixels = removed.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close((weighted / inside)[:, pixels], found[:, pixels])
    assert found[:, ~pixels].equal(images[0].double()[:, ~pixels])


def test_one_removed_pixel_has_the_mean_of_a_hand_calculation() -> None:
    """Patches of one pixel, in the middle and in a corner."""
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 6.0], [7.0, 8.0, 12.0]]).expand(3, -1, -1)
    middle, corner = torch.zeros(2, 3, 3, dtype=torch.bool)
    middle[1, 1] = corner[2, 2] = True
    in_the_middle, in_the_corner = imputed(image, middle), imputed(image, corner)
    expected = (2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 12) / 12
    torch.testing.assert_close(in_the_middle[:, 1, 1], torch.full((3,), expected))
    torch.testing.assert_close(in_the_corner[:, 2, 2], torch.full((3,), (2 * 6 + 2 * 8 + 100) / 5))


def test_a_picture_that_rises_evenly_is_restored_inside_its_border() -> None:
    ramp = torch.arange(SIZE).double()
    image = torch.stack([ramp[:, None] + 2 * ramp, ramp[:, None] - ramp, torch.full((SIZE, SIZE), 7.0).double()])
    removed = random_mask(0)
    removed[0] = removed[-1] = removed[:, 0] = removed[:, -1] = False
    assert removed.any()
    torch.testing.assert_close(imputed(image, removed), image)


def test_imputed_pixels_lie_between_the_extremes_of_those_that_are_left(images: torch.Tensor) -> None:
    removed = ~nn.functional.one_hot(torch.tensor(5), PATCHES**2).bool().reshape(PATCHES, PATCHES)
    found = imputed(images[1], removed)
    left = images[1, :, :8, 40:]
    for channel in range(3):
        assert found[channel].min() >= left[channel].min() - 1e-5
        assert found[channel].max() <= left[channel].max() + 1e-5


def test_noise_is_added_to_removed_pixels_alone(images: torch.Tensor) -> None:
    removed, noise = random_mask(1), torch.randn(3, SIZE, SIZE)
    difference = imputed(images[0], removed, noise) - imputed(images[0], removed)
    pixels = removed.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(difference, noise * pixels, atol=1e-5, rtol=1e-5)


def test_sharing_masks_gives_what_imputing_each_gives(
    evaluator: CoalitionEvaluator, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    found = road(evaluator, images, KEYS, maps | {"again": maps["five"]}, FRACTIONS, seed=4)
    for name, scored in maps.items():
        for place, key in enumerate(KEYS):
            noise = NOISE * torch.randn(3, SIZE, SIZE, generator=generator_of(4, key, "road"))
            for sign, curve in ((1, found[name].most_first_BF), (-1, found[name].least_first_BF)):
                removed = nested_levels(sign * scored.map_BPP[place : place + 1], FRACTIONS)[0]
                copies = torch.stack([imputed(images[place], mask, noise) for mask in removed])
                with torch.no_grad():
                    probability = scored.head(evaluator.backbone(copies)).softmax(-1)[:, scored.target_B[place]]
                torch.testing.assert_close(curve[place], probability, atol=1e-4, rtol=1e-4)
    assert found["again"].score_B.equal(found["five"].score_B)


def test_a_mask_that_several_maps_share_is_imputed_once(
    evaluator: CoalitionEvaluator,
    images: torch.Tensor,
    maps: dict[str, ScoredMap],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.Tensor] = []

    def counted(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: torch.Tensor) -> torch.Tensor:
            calls.append(arguments[1])
            return original(*arguments)

        return call

    monkeypatch.setattr(module, "imputed", counted(imputed))
    scored = maps["two"]
    negative = ScoredMap(-scored.map_BPP, maps["five"].head, maps["five"].target_B)
    road(evaluator, images, KEYS, {"map": scored, "again": scored, "negative": negative}, FRACTIONS)
    assert len(calls) == len(KEYS) * 2 * len(FRACTIONS)


def test_a_negative_map_has_the_negative_score_and_a_constant_map_none(
    evaluator: CoalitionEvaluator, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    scored = maps["two"]
    negative = ScoredMap(-scored.map_BPP, scored.head, scored.target_B)
    constant = ScoredMap(torch.ones(3, PATCHES, PATCHES), scored.head, scored.target_B)
    found = road(evaluator, images, KEYS, {"map": scored, "negative": negative, "constant": constant}, FRACTIONS)
    assert (found["map"].score_B.abs() > 1e-4).all()
    torch.testing.assert_close(found["negative"].score_B, -found["map"].score_B)
    # The last bits of a picture's numbers depend on its place in a batch on some processors.
    torch.testing.assert_close(found["constant"].score_B, torch.zeros(3), atol=1e-6, rtol=0)


def test_a_pictures_score_depends_on_seed_and_key_and_not_on_the_batch(
    evaluator: CoalitionEvaluator, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    state, scored = torch.get_rng_state(), maps["five"]
    alone = ScoredMap(scored.map_BPP[2:], scored.head, scored.target_B[2:])
    together = road(evaluator, images, KEYS, maps, FRACTIONS, seed=1)["five"].most_first_BF[2]
    apart = road(evaluator, images[2:], KEYS[2:], {"five": alone}, FRACTIONS, seed=1)["five"].most_first_BF[0]
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=1e-5)
    for keys, seed in ((["d"], 1), (["c"], 2)):
        other = road(evaluator, images[2:], keys, {"five": alone}, FRACTIONS, seed=seed)["five"].most_first_BF[0]
        assert not torch.allclose(other, together, atol=1e-6)
    assert torch.get_rng_state().equal(state)


class Brightness(nn.Module):
    """A planted model: the embedding is the sum of the pixels."""

    num_features = 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward_features(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        return self.gain * images_B3SS.mean((1, 2, 3))[:, None] * PATCHES**2

    def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return features


def test_a_map_that_ranks_bright_patches_first_beats_one_that_ranks_them_by_chance(
    evaluator: CoalitionEvaluator,
) -> None:
    game = CoalitionEvaluator(Backbone(evaluator.backbone.config, Brightness()), "zero")
    bright = random_mask(3, share=0.3)
    image = bright.float().repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, 3, -1, -1)
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.zero_()
    target = torch.tensor([0])
    maps = {
        "right": ScoredMap(bright.float()[None], head, target),
        "chance": ScoredMap(torch.rand(1, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0)), head, target),
        "wrong": ScoredMap(-bright.float()[None], head, target),
    }
    scores = {name: float(found.score_B) for name, found in road(game, image, ["k"], maps, FRACTIONS).items()}
    assert scores["right"] > 0.1
    assert scores["wrong"] < -0.1
    assert scores["wrong"] < scores["chance"] < scores["right"]


def test_wrong_keys_and_maps_are_errors_and_no_maps_or_pictures_have_no_scores(
    evaluator: CoalitionEvaluator, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    scored = maps["two"]
    coarse = ScoredMap(torch.rand(3, 5, 5), scored.head, scored.target_B)
    with pytest.raises(ValueError, match=r"map coarse: expected \[3, 6, 6\], got \[3, 5, 5\]"):
        road(evaluator, images, KEYS, {"coarse": coarse})
    with pytest.raises(ValueError, match="keys: expected one of each of 3 pictures, got 2"):
        road(evaluator, images, KEYS[:2], maps)
    infinite = ScoredMap(scored.map_BPP / 0, scored.head, scored.target_B)
    with pytest.raises(ValueError, match="map infinite: expected finite attributions, got 108"):
        road(evaluator, images, KEYS, {"infinite": infinite})
    assert road(evaluator, images, KEYS, {}) == {}
    none = ScoredMap(scored.map_BPP[:0], scored.head, scored.target_B[:0])
    assert road(evaluator, images[:0], [], {"none": none}, FRACTIONS)["none"].score_B.shape == (0,)
