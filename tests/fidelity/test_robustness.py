import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import generator_of
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.robustness import infidelity, infidelity_of, removed_sets, sensitivity
from tve.fidelity.scores import ScoredMap, target_probability
from tve.removal import Removal
from tve.transfer_rule import Output

PATCHES, SIZE, NUM_SETS = 6, 48, 20
KEYS = ("a", "b", "c")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    tiny = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny)


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


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_infidelity_is_what_a_line_through_zero_leaves_of_the_drops(
    backbone: Backbone, images: torch.Tensor, maps: dict[str, ScoredMap], removal: Removal
) -> None:
    """Least squares, solved by another way, on coalitions evaluated one picture after the other."""
    evaluator = CoalitionEvaluator(backbone, removal)
    zeros = ScoredMap(torch.zeros(3, PATCHES, PATCHES), maps["five"].head, maps["five"].target_B)
    found = infidelity(evaluator, images, KEYS, maps | {"zeros": zeros}, NUM_SETS, seed=3)
    for name, scored in maps.items():
        for place, key in enumerate(KEYS):
            removed = removed_sets(NUM_SETS, PATCHES**2, generator_of(3, key, "infidelity"))
            target, image = scored.target_B[place : place + 1], images[place : place + 1]
            full = target_probability(scored.head, evaluator.full(image), target)
            embeddings = evaluator(image, ~removed.reshape(1, -1, PATCHES, PATCHES))
            drops = (full[:, None] - target_probability(scored.head, embeddings, target))[0].double()
            sums = (removed * scored.map_BPP[place].flatten()).double().sum(1)[:, None]
            line = sums @ torch.linalg.lstsq(sums, drops[:, None]).solution
            expected = (line[:, 0] - drops).square().mean()
            torch.testing.assert_close(found[name][place], expected, atol=1e-7, rtol=1e-3)
            if name == "five":
                torch.testing.assert_close(found["zeros"][place], drops.square().mean(), atol=1e-7, rtol=1e-3)


class SumOfPatches(nn.Module):
    """A planted game: the embedding is the sum of the pixels, so that logits add up over patches."""

    num_features = 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward_features(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        return self.gain * images_B3SS.mean((1, 2, 3))[:, None] * PATCHES**2

    def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return features


def of_the_sum_game(
    backbone: Backbone, images: torch.Tensor, maps: dict[str, torch.Tensor], output: Output
) -> list[float]:
    """Mean infidelity of each map, under a head whose first logit is twice the sum, less 1."""
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0], [0.0]]))
        head.bias.copy_(torch.tensor([-1.0, 0.0]))
    evaluator = CoalitionEvaluator(Backbone(backbone.config, SumOfPatches()), "zero")
    scored = {name: ScoredMap(map_BPP, head, torch.zeros(3, dtype=torch.long)) for name, map_BPP in maps.items()}
    found = infidelity(evaluator, images, KEYS, scored, 50, seed=0, output=output)
    return [float(score.mean()) for score in found.values()]


def test_the_contributions_of_an_additive_game_have_no_infidelity_in_any_unit(
    backbone: Backbone, images: torch.Tensor
) -> None:
    right = nn.functional.avg_pool2d(images.mean(1), 8)
    noisy = right + 0.1 * torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    maps = {"right": right, "scaled": 1000 * right, "negative": -right, "noisy": noisy, "zeros": 0 * right}
    exact, scaled, negative, near, worst = of_the_sum_game(backbone, images, maps, "logit")
    assert max(exact, scaled, negative) < 1e-9
    assert 1e-3 < near < worst
    assert of_the_sum_game(backbone, images, {"right": right}, "probability")[0] > 1e-5  # a probability does not add up


def test_all_maps_of_a_picture_share_its_evaluations(
    backbone: Backbone, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    class Counting(CoalitionEvaluator):
        num_rows = 0

        def __call__(self, images_B3SS: torch.Tensor, coalitions: object) -> torch.Tensor:
            assert isinstance(coalitions, torch.Tensor)
            self.num_rows += coalitions.shape[:2].numel()
            return super().__call__(images_B3SS, coalitions)

    evaluator = Counting(backbone, "drop")
    infidelity(evaluator, images, KEYS, maps | {"again": maps["two"]}, NUM_SETS, seed=0)
    assert evaluator.num_rows == len(KEYS) * (1 + NUM_SETS)


def test_sets_have_every_size_but_none_and_all_and_every_patch_equally_often() -> None:
    removed = removed_sets(9000, 4, torch.Generator().manual_seed(0))
    sizes = removed.sum(1).bincount(minlength=5) / 9000
    torch.testing.assert_close(sizes, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(removed.float().mean(0), torch.full((4,), 0.5), atol=0.02, rtol=0)
    pairs = removed[removed.sum(1) == 2]
    assert len(pairs.unique(dim=0)) == 6


def test_one_set_alone_is_fitted_by_any_map_that_is_not_zero_on_it() -> None:
    removed, values = torch.tensor([[True, False, False, True]]), torch.tensor([0.9, 0.4])
    on_it, off_it = torch.tensor([[3.0, 5.0], [0.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    assert float(infidelity_of(on_it, removed, values)) == pytest.approx(0, abs=1e-12)
    assert float(infidelity_of(off_it, removed, values)) == pytest.approx(0.25)


def test_a_pictures_infidelity_depends_on_seed_and_key_and_not_on_the_batch(
    backbone: Backbone, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    evaluator, state, scored = CoalitionEvaluator(backbone, "drop"), torch.get_rng_state(), maps["five"]
    alone = {"five": ScoredMap(scored.map_BPP[2:], scored.head, scored.target_B[2:])}
    together = infidelity(evaluator, images, KEYS, maps, NUM_SETS, seed=1)["five"][2]
    assert infidelity(evaluator, images[2:], KEYS[2:], alone, NUM_SETS, seed=1)["five"][0] == together
    assert infidelity(evaluator, images[2:], ["d"], alone, NUM_SETS, seed=1)["five"][0] != together
    assert infidelity(evaluator, images[2:], KEYS[2:], alone, NUM_SETS, seed=2)["five"][0] != together
    assert torch.get_rng_state().equal(state)


def first_channel(images: torch.Tensor, key: str) -> torch.Tensor:
    return images[:, 0]


def test_the_sensitivity_of_a_picture_as_its_own_map_is_the_size_of_the_largest_draw(images: torch.Tensor) -> None:
    found = sensitivity(first_channel, images, KEYS, radius=0.1, num_draws=5, seed=0)
    for place, key in enumerate(KEYS):
        uniform = torch.rand(5, 3, SIZE, SIZE, generator=generator_of(0, key, "sensitivity"))
        largest = (0.1 * (2 * uniform[:, 0] - 1)).flatten(1).norm(dim=1).max()
        torch.testing.assert_close(found[place], largest / images[place, 0].norm(), rtol=1e-4, atol=0)
    # Uniform draws from -r to r have a root mean square of r / sqrt(3).
    relative = found * images[:, 0].flatten(1).norm(dim=1) / SIZE
    torch.testing.assert_close(relative, torch.full((3,), 0.1 / 3**0.5), rtol=0.05, atol=0)


def test_draws_stay_inside_the_ball_and_belong_to_one_picture_each(images: torch.Tensor) -> None:
    seen: list[tuple[str, int]] = []

    def explain(pictures: torch.Tensor, key: str) -> torch.Tensor:
        seen.append((key, len(pictures)))
        distance = (pictures - images[KEYS.index(key)]).abs().flatten(1).amax(1)
        assert distance.max() <= 0.2 + 1e-6
        assert len(pictures) == 1 or distance.min() > 0.19
        return pictures.mean(1)

    sensitivity(explain, images, KEYS, radius=0.2, num_draws=4, seed=0)
    assert seen == [(key, count) for key in KEYS for count in (1, 4)]


def test_sensitivity_is_relative_to_the_map_and_more_draws_find_no_less(images: torch.Tensor) -> None:
    few = sensitivity(first_channel, images, KEYS, radius=0.1, num_draws=2, seed=0)
    many = sensitivity(first_channel, images, KEYS, radius=0.1, num_draws=20, seed=0)
    assert (many >= few).all()
    assert (many > few).any()
    thousandfold = sensitivity(lambda x, _: 1000 * x[:, 0], images, KEYS, radius=0.1, num_draws=2, seed=0)
    torch.testing.assert_close(thousandfold, few, rtol=1e-4, atol=0)
    assert sensitivity(first_channel, images, KEYS, radius=0.0, num_draws=2, seed=0).tolist() == [0, 0, 0]
    constant = sensitivity(lambda x, _: torch.ones(len(x), 4, 4), images, KEYS, radius=1.0, num_draws=2, seed=0)
    assert constant.tolist() == [0, 0, 0]


def test_explanations_by_gradients_can_take_them(images: torch.Tensor) -> None:
    def gradient(pictures: torch.Tensor, key: str) -> torch.Tensor:
        pictures = pictures.clone().requires_grad_()
        (found,) = torch.autograd.grad(pictures.square().sum() / 2, pictures)
        return found[:, 0]

    by_gradients = sensitivity(gradient, images, KEYS, radius=0.1, num_draws=2, seed=0)
    torch.testing.assert_close(by_gradients, sensitivity(first_channel, images, KEYS, radius=0.1, num_draws=2, seed=0))


def test_a_pictures_sensitivity_depends_on_seed_and_key_and_not_on_the_batch(images: torch.Tensor) -> None:
    state = torch.get_rng_state()
    together = sensitivity(first_channel, images, KEYS, radius=0.1, num_draws=3, seed=1)[1]
    assert sensitivity(first_channel, images[1:2], ["b"], radius=0.1, num_draws=3, seed=1)[0] == together
    assert sensitivity(first_channel, images[1:2], ["d"], radius=0.1, num_draws=3, seed=1)[0] != together
    assert sensitivity(first_channel, images[1:2], ["b"], radius=0.1, num_draws=3, seed=2)[0] != together
    assert torch.get_rng_state().equal(state)


def test_numbers_and_explanations_that_make_no_sense_are_errors(
    backbone: Backbone, images: torch.Tensor, maps: dict[str, ScoredMap]
) -> None:
    evaluator = CoalitionEvaluator(backbone, "drop")
    with pytest.raises(ValueError, match="num_sets: expected at least 1, got 0"):
        infidelity(evaluator, images, KEYS, maps, 0, seed=0)
    with pytest.raises(ValueError, match="keys: expected one of each of 3"):
        infidelity(evaluator, images, ["a"], maps, 1, seed=0)
    with pytest.raises(ValueError, match="radius: expected a finite number, at least 0, got -1"):
        sensitivity(first_channel, images, KEYS, radius=-1, num_draws=1, seed=0)
    with pytest.raises(ValueError, match=r"explain: expected maps \[1, P, P\], got \[1, 48\]"):
        sensitivity(lambda x, _: x[:, 0, 0], images, KEYS, radius=0.1, num_draws=1, seed=0)
    with pytest.raises(ValueError, match=r"explain: expected maps \[1, P, P\], got \[48, 48, 1\]"):
        sensitivity(lambda x, _: x[0, 0, :, :, None], images, KEYS, radius=0.1, num_draws=1, seed=0)
