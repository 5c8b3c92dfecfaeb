import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.levels import nested_levels
from tve.fidelity.scores import Fidelity, ScoredMap, fidelity, target_probability
from tve.removal import Removal

FRACTIONS = (0.25, 0.5, 0.75)
PATCHES = 4


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def maps_and_heads() -> dict[tuple[str, str], ScoredMap]:
    """Two tasks with a map of their own each, and a map that they share."""
    torch.manual_seed(2)
    heads = {"two": nn.Linear(24, 2), "five": nn.Linear(24, 5)}
    shared, target = torch.rand(3, PATCHES, PATCHES), torch.tensor([1, 0, 1])
    maps = {(task, "own"): ScoredMap(torch.rand_like(shared), head, target) for task, head in heads.items()}
    return maps | {(task, "shared"): ScoredMap(shared, head, target) for task, head in heads.items()}


def evaluated_one_by_one(
    evaluator: CoalitionEvaluator, images: torch.Tensor, scored: ScoredMap, present: torch.Tensor
) -> torch.Tensor:
    """p(y|x) - p(y|x_S) [B, F] for coalitions [B, F, P, P], by the definition."""
    full = target_probability(scored.head, evaluator.full(images), scored.target_B)
    return full[:, None] - target_probability(scored.head, evaluator(images, present), scored.target_B)


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_sharing_coalitions_gives_what_evaluating_each_gives(
    backbone: Backbone, images: torch.Tensor, removal: Removal
) -> None:
    evaluator, maps = CoalitionEvaluator(backbone, removal), maps_and_heads()
    found = fidelity(evaluator, images, evaluator.full(images), maps, FRACTIONS)
    assert found.keys() == maps.keys()
    for name, scored in maps.items():
        top = nested_levels(scored.map_BPP, FRACTIONS)
        removed = evaluated_one_by_one(evaluator, images, scored, ~top)
        kept = evaluated_one_by_one(evaluator, images, scored, top)
        torch.testing.assert_close(found[name].removed_drop_BF, removed, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].kept_drop_BF, kept, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].plus_B, removed.mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].minus_B, kept.mean(1), atol=1e-5, rtol=1e-4)


def test_a_coalition_that_several_maps_share_is_evaluated_once(backbone: Backbone, images: torch.Tensor) -> None:
    class Counting(CoalitionEvaluator):
        num_rows = 0

        def ragged(
            self, images_B3SS: torch.Tensor, image_index_M: torch.Tensor, present_MPP: torch.Tensor
        ) -> torch.Tensor:
            self.num_rows += len(present_MPP)
            return super().ragged(images_B3SS, image_index_M, present_MPP)

    evaluator = Counting(backbone, "zero")
    full = evaluator.full(images)
    scored = maps_and_heads()["two", "shared"]
    fidelity(evaluator, images, full, {"once": scored}, FRACTIONS)
    once, evaluator.num_rows = evaluator.num_rows, 0
    fidelity(evaluator, images, full, dict.fromkeys("abc", scored), FRACTIONS)
    assert once == evaluator.num_rows == len(images) * 2 * len(FRACTIONS)
    # The complement of a map's top half is the top half of its negative.
    evaluator.num_rows = 0
    negative = ScoredMap(-scored.map_BPP, scored.head, scored.target_B)
    fidelity(evaluator, images, full, {"map": scored, "negative": negative}, FRACTIONS)
    assert once == evaluator.num_rows


def test_equal_coalitions_of_different_pictures_stay_apart(backbone: Backbone, images: torch.Tensor) -> None:
    evaluator = CoalitionEvaluator(backbone, "zero")
    head = nn.Linear(24, 3)
    same_map = torch.rand(1, PATCHES, PATCHES).expand(3, -1, -1)
    target = torch.tensor([0, 1, 2])
    together = fidelity(evaluator, images, evaluator.full(images), {"m": ScoredMap(same_map, head, target)}, FRACTIONS)
    for place in range(3):
        one, of_one = images[place : place + 1], ScoredMap(same_map[:1], head, target[place : place + 1])
        apart = fidelity(evaluator, one, evaluator.full(one), {"m": of_one}, FRACTIONS)
        torch.testing.assert_close(together["m"].plus_B[place], apart["m"].plus_B[0], atol=1e-5, rtol=1e-4)


class SumOfPatches(nn.Module):
    """A planted game: the embedding is the number of bright patches that are present."""

    num_features = 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward_features(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        return self.gain * images_B3SS.mean((1, 2, 3))[:, None] * PATCHES**2

    def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return features


def scored_in_the_sum_game(backbone: Backbone, importance: torch.Tensor) -> Fidelity:
    """Fidelity of a map of a picture with 4 bright patches, under a head whose logit is their number."""
    game = Backbone(backbone.config, SumOfPatches())
    bright = torch.zeros(PATCHES, PATCHES)
    bright[0] = 1.0
    images = bright.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, -1, -1)
    head = nn.Linear(1, 2)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    evaluator = CoalitionEvaluator(game, "zero")
    scored = ScoredMap(importance[None], head, torch.tensor([0]))
    return fidelity(evaluator, images, evaluator.full(images), {"map": scored}, FRACTIONS)["map"]


def test_a_planted_sum_has_the_fidelity_of_a_hand_calculation(backbone: Backbone) -> None:
    right = torch.zeros(PATCHES, PATCHES)
    right[0] = 1.0
    found = scored_in_the_sum_game(backbone, right)
    everything = torch.tensor(4.0).sigmoid() - 0.5  # all four bright patches lost, at every level
    torch.testing.assert_close(found.plus_B, everything[None])
    torch.testing.assert_close(found.minus_B, torch.zeros(1))


def test_the_more_bright_patches_a_map_ranks_high_the_more_faithful_it_is(backbone: Backbone) -> None:
    """Bright patches move from last to first place one at a time."""
    scores = []
    for num_first in range(5):
        importance = torch.rand(PATCHES, PATCHES, generator=torch.Generator().manual_seed(0))
        importance[0] = torch.where(torch.arange(PATCHES) < num_first, 2.0, -1.0)
        scores.append(scored_in_the_sum_game(backbone, importance))
    plus, minus = torch.cat([s.plus_B for s in scores]), torch.cat([s.minus_B for s in scores])
    assert (plus.diff() > 0).all()
    assert (minus.diff() < 0).all()


def test_a_map_of_another_grid_is_an_error_that_names_it(backbone: Backbone, images: torch.Tensor) -> None:
    evaluator = CoalitionEvaluator(backbone, "zero")
    scored = ScoredMap(torch.rand(3, 5, 5), nn.Linear(24, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"map coarse: expected \[3, 4, 4\], got \[3, 5, 5\]"):
        fidelity(evaluator, images, evaluator.full(images), {"coarse": scored}, FRACTIONS)
