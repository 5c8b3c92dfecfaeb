"""Pictures whose only informative patch is known: where maps must peak, for every place of it.

With r = 0 the peak is unique. With r >= 1 and the window mean the patch is among the maxima, and the
only one where each of its coordinates is at a border or more than r away from both. A transposition
anywhere fails for every patch off the diagonal.
"""

from functools import cache

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tve.backbones import Backbone, BackboneConfig, Preprocessing
from tve.coalitions import Windows
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.levels import nested_levels
from tve.fidelity.scores import ScoredMap, fidelity
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.removal import Removal
from tve.transfer_rule import Output, TransferRule, transfer

PATCHES_PER_SIDE = 7
PATCH_SIZE = 2
NUM_CHANNELS = 3
PREPROCESSING = Preprocessing(PATCHES_PER_SIDE * PATCH_SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
PLACES = [(p, q) for p in range(PATCHES_PER_SIDE) for q in range(PATCHES_PER_SIDE)]
RULES = [(radius, output) for radius in (0, 1, 2) for output in ("logit", "probability", "log_probability")]


class BrightestPixel(nn.Module):
    """The highest value of each colour, wherever it is: the embedding depends on a planted patch alone."""

    num_features = NUM_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward_features(self, images_B3SS: Tensor) -> Tensor:
        return self.gain * images_B3SS.amax((2, 3))

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features


def brightest_pixel() -> Backbone:
    return Backbone(BackboneConfig("brightest", "none", PATCHES_PER_SIDE, PREPROCESSING), BrightestPixel())


def coloured_patch_finder() -> Backbone:
    """A timm transformer with crafted weights: its class token looks for colours and copies them.

    Channels 0-2 of a token are its patch's colour; the class token collects colours in channels 4-6.
    """
    model = VisionTransformer(
        img_size=PREPROCESSING.image_size,
        patch_size=PATCH_SIZE,
        embed_dim=8,
        depth=1,
        num_heads=1,
        num_classes=0,
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    block = model.blocks[0]
    block.norm1, model.norm = nn.Identity(), nn.Identity()
    with torch.no_grad():
        for colour in range(NUM_CHANNELS):
            model.patch_embed.proj.weight[colour, colour] = 1 / PATCH_SIZE**2
            block.attn.qkv.weight[8, colour] = 200  # keys: any colour at all
            block.attn.qkv.weight[16 + colour, colour] = 1  # values
            block.attn.proj.weight[4 + colour, colour] = 1
        block.attn.qkv.bias[0] = 1  # queries
    return Backbone(BackboneConfig("finder", "vit", PATCHES_PER_SIDE, PREPROCESSING), model)


def planted(places: list[tuple[int, int]], colours: list[int]) -> Tensor:
    """One blank picture [3, S, S] with a bright patch of its colour at each of the places."""
    image = torch.zeros(3, PREPROCESSING.image_size, PREPROCESSING.image_size)
    for (p, q), colour in zip(places, colours, strict=True):
        image[colour, p * PATCH_SIZE : (p + 1) * PATCH_SIZE, q * PATCH_SIZE : (q + 1) * PATCH_SIZE] = 1.0
    return image


def one_per_place() -> Tensor:
    return torch.stack([planted([place], [0]) for place in PLACES])


def head_of_colours(backbone: Backbone) -> nn.Linear:
    """Three classes: the picture is red, green, blue."""
    head = nn.Linear(backbone.embed_dim, NUM_CHANNELS)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    offset = backbone.embed_dim - 4 if backbone.embed_dim > NUM_CHANNELS else 0
    with torch.no_grad():
        for colour in range(NUM_CHANNELS):
            head.weight[colour, offset + colour] = 2.0
    return head.requires_grad_(False)


def backbone_for(removal: Removal) -> Backbone:
    return brightest_pixel() if removal == "zero" else coloured_patch_finder()


def in_window(centre: tuple[int, int], place: tuple[int, int], radius: int) -> bool:
    return max(abs(centre[0] - place[0]), abs(centre[1] - place[1])) <= radius


@cache
def hand_made_meta(radius: int) -> MetaAttribution:
    """The meta-attributions of `one_per_place`, written down place by place and window by window."""
    inside = torch.tensor([[in_window(centre, place, radius) for centre in PLACES] for place in PLACES])
    red, nothing = torch.tensor([1.0, 0, 0]), torch.zeros(3)
    kept = torch.where(inside[..., None], red, nothing)
    removed = torch.where(inside[..., None], nothing, red)
    return MetaAttribution(kept, removed, red.expand(len(PLACES), -1), nothing, radius)


def assert_peak(map_PP: Tensor, place: tuple[int, int], radius: int) -> None:
    peaks = [divmod(n, PATCHES_PER_SIDE) for n in (map_PP >= map_PP.max() - 1e-5).flatten().nonzero()[:, 0].tolist()]
    assert place in peaks, f"planted at {place}, peaks at {peaks}"
    last = PATCHES_PER_SIDE - 1
    if all(coordinate in (0, last) or radius < coordinate < last - radius for coordinate in place):
        assert peaks == [place], f"planted at {place}, peaks at {peaks}"


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize(("radius", "output"), RULES)
def test_exact_windows_peak_at_the_planted_patch_wherever_it_is(radius: int, output: Output, removal: Removal) -> None:
    backbone = backbone_for(removal)
    images = one_per_place()
    meta = exact_windows(CoalitionEvaluator(backbone, removal), images, Windows(PATCHES_PER_SIDE, radius))
    maps = transfer(meta, head_of_colours(backbone), TransferRule(output))[:, 0]
    for place, map_PP in zip(PLACES, maps, strict=True):
        assert_peak(map_PP, place, radius)


@pytest.mark.parametrize(("radius", "output"), RULES)
def test_the_transfer_rule_peaks_at_the_planted_patch_wherever_it_is(radius: int, output: Output) -> None:
    head = head_of_colours(brightest_pixel())
    maps = transfer(hand_made_meta(radius), head, TransferRule(output))[:, 0]
    for place, map_PP in zip(PLACES, maps, strict=True):
        assert_peak(map_PP, place, radius)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_each_bracket_alone_peaks_at_the_planted_patch(radius: int, weights: tuple[float, float]) -> None:
    head = head_of_colours(brightest_pixel())
    rule = TransferRule(weight_kept=weights[0], weight_removed=weights[1])
    for place, map_PP in zip(PLACES, transfer(hand_made_meta(radius), head, rule)[:, 0], strict=True):
        assert_peak(map_PP, place, radius)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_exact_windows_are_the_meta_attribution_written_down_by_hand(radius: int) -> None:
    evaluator = CoalitionEvaluator(brightest_pixel(), "zero")
    meta = exact_windows(evaluator, one_per_place(), Windows(PATCHES_PER_SIDE, radius))
    torch.testing.assert_close(meta.kept_BND, hand_made_meta(radius).kept_BND)
    torch.testing.assert_close(meta.removed_BND, hand_made_meta(radius).removed_BND)


def test_without_the_window_mean_u_is_highest_exactly_on_the_windows_that_hold_the_patch() -> None:
    head, radius = head_of_colours(brightest_pixel()), 1
    maps = transfer(hand_made_meta(radius), head, TransferRule(per_patch="window"))[:, 0]
    for place, map_PP in zip(PLACES, maps, strict=True):
        highest = {PLACES[n] for n in (map_PP == map_PP.max()).flatten().nonzero()[:, 0].tolist()}
        assert highest == {centre for centre in PLACES if in_window(centre, place, radius)}


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("radius", [0, 1])
def test_two_patches_that_mirror_each_other_keep_their_own_classes(radius: int, removal: Removal) -> None:
    backbone = backbone_for(removal)
    places = [(p, q) for p, q in PLACES if abs(p - q) > 2 * radius]
    images = torch.stack([planted([(p, q), (q, p)], [1, 2]) for p, q in places])
    meta = exact_windows(CoalitionEvaluator(backbone, removal), images, Windows(PATCHES_PER_SIDE, radius))
    maps = transfer(meta, head_of_colours(backbone))
    for (p, q), map_CPP in zip(places, maps, strict=True):
        assert_peak(map_CPP[1], (p, q), radius)
        assert_peak(map_CPP[2], (q, p), radius)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_taking_the_planted_patch_away_is_all_that_fidelity_sees(removal: Removal) -> None:
    backbone = backbone_for(removal)
    head, images = head_of_colours(backbone), one_per_place()
    evaluator = CoalitionEvaluator(backbone, removal)
    target = torch.zeros(len(images), dtype=torch.long)
    full = evaluator.full(images)
    right = torch.eye(len(PLACES)).reshape(-1, PATCHES_PER_SIDE, PATCHES_PER_SIDE)
    assert nested_levels(right, [1 / len(PLACES)])[:, 0].equal(right.bool())
    found = fidelity(
        evaluator,
        images,
        full,
        {"right": ScoredMap(right, head, target), "wrong": ScoredMap(-right, head, target)},
        [0.02, 0.5, 0.98],
    )
    present = head(full).softmax(-1)[0, 0] - head(evaluator.empty()).softmax(-1)[0]
    assert present > 0.3
    torch.testing.assert_close(found["right"].removed_drop_BF, present.expand(len(PLACES), 3))
    torch.testing.assert_close(found["right"].kept_drop_BF, torch.zeros(len(PLACES), 3))
    torch.testing.assert_close(found["wrong"].removed_drop_BF, torch.zeros(len(PLACES), 3))
    torch.testing.assert_close(found["wrong"].kept_drop_BF, present.expand(len(PLACES), 3))
