from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import Answers, Method, Question
from tve.baselines.perturbation import KernelShap, Lime, Occlusion
from tve.baselines.rise import Rise
from tve.coalitions import Windows
from tve.evaluator import CoalitionEvaluator
from tve.meta_attribution import exact_windows
from tve.removal import Removal
from tve.transfer_rule import Output, TransferRule, class_maps, read

PATCHES, D, C = 6, 32, 5
TARGET = torch.tensor([1, 4])
KEYS = ("first", "second")
BUDGETS = (12, 40)
MAKE: dict[str, Callable[[CoalitionEvaluator], Method]] = {
    "occlusion": lambda evaluator: Occlusion(evaluator, radius=1),
    "kernel_shap": lambda evaluator: KernelShap(evaluator, BUDGETS),
    "lime": lambda evaluator: Lime(evaluator, BUDGETS),
    "rise": lambda evaluator: Rise(evaluator, BUDGETS),
}
DRAWING = ("kernel_shap", "lime", "rise")
OUTPUTS: tuple[Output, ...] = ("logit", "probability")


def tiny_backbone(**changes: object) -> Backbone:
    torch.manual_seed(0)
    tiny = {"img_size": 48, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 2, "num_classes": 0}
    return load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny | changes)


@pytest.fixture(scope="module")
def evaluators() -> dict[Removal, CoalitionEvaluator]:
    """By removal operator; shared, since an evaluator measures once how much memory its passes take."""
    backbone = tiny_backbone()
    return {"zero": CoalitionEvaluator(backbone, "zero"), "drop": CoalitionEvaluator(backbone, "drop")}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def questions() -> dict[str, Question]:
    torch.manual_seed(2)
    linear, deep = nn.Linear(D, C), nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, C))
    return {"linear": Question(linear, TARGET), "deep": Question(deep.eval(), TARGET.flip(0))}


class PatchMeans(nn.Module):
    """The embedding is the mean of each patch: of a picture of ones under `zero`, which patches are present."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.num_features = patches**2
        self.pool = nn.AdaptiveAvgPool2d(patches)
        self.gain = nn.Parameter(torch.ones(()))

    def forward_features(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        return self.gain * self.pool(images_B3SS.mean(1)).flatten(1)

    def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return features


@dataclass(frozen=True)
class Game:
    """A head on which patches are present, asked about its only output."""

    worth: Callable[[torch.Tensor], torch.Tensor]  # [M, N] to [M]
    patches: int = 3

    def evaluator(self) -> CoalitionEvaluator:
        tiny = {"img_size": 4 * self.patches, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
        config = load_backbone("vit_tiny_patch16_224", "random", timm_args=tiny | {"num_classes": 0}).config
        return CoalitionEvaluator(Backbone(config, PatchMeans(self.patches)), "zero")

    def map_of(self, method: Method) -> torch.Tensor:
        """The map [P, P] of the last variant."""
        question = Question(lambda embeddings_MN: self.worth(embeddings_MN)[:, None], torch.tensor([0]))
        image = torch.ones(1, 3, 4 * self.patches, 4 * self.patches)
        return method(image, ["game"], {"game": question})["game", method.variants[-1]].map_BPP[0]


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        assert torch.equal(answer.map_BPP, expected[name].map_BPP), name


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_occlusion_of_single_patches_is_the_second_bracket_of_exact_windows(
    evaluators: dict[Removal, CoalitionEvaluator],
    images: torch.Tensor,
    questions: dict[str, Question],
    removal: Removal,
    output: Output,
) -> None:
    evaluator = evaluators[removal]
    found = Occlusion(evaluator, radius=0, output=output)(images, KEYS, questions)
    meta = exact_windows(evaluator, images, Windows(PATCHES, 0))
    for name, asked in questions.items():
        rule = TransferRule(output, "window", weight_kept=0.0)
        expected = class_maps(meta, asked.head, asked.target_B, rule)
        torch.testing.assert_close(found[name, "occlusion"].map_BPP, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_occlusion_averages_those_exact_windows_that_lie_inside_the_picture(
    evaluators: dict[Removal, CoalitionEvaluator],
    images: torch.Tensor,
    questions: dict[str, Question],
    removal: Removal,
    output: Output,
) -> None:
    evaluator = evaluators[removal]
    found = Occlusion(evaluator, radius=1, output=output)(images, KEYS, questions)
    meta = exact_windows(evaluator, images, Windows(PATCHES, 1))
    inside_NPP = Windows(PATCHES, 1).kept_NPP()
    inside_NPP = inside_NPP[inside_NPP.flatten(1).sum(1) == 9].double()  # clipped ones are smaller
    assert len(inside_NPP) == (PATCHES - 2) ** 2
    for name, asked in questions.items():
        occlusion = found[name, "occlusion"].map_BPP
        second = TransferRule(output, weight_kept=0.0, per_patch="window")
        u = class_maps(meta, asked.head, asked.target_B, second)[:, 1:-1, 1:-1].flatten(1).double()
        expected = (torch.einsum("bn,npq->bpq", u, inside_NPP) / inside_NPP.sum(0)).float()
        torch.testing.assert_close(occlusion, expected, atol=1e-5, rtol=0)
        # Two radii from the border all windows of a patch lie inside; nearer to it the two maps differ.
        phi = class_maps(meta, asked.head, asked.target_B, TransferRule(output, "mean", weight_kept=0.0))
        torch.testing.assert_close(occlusion[:, 2:-2, 2:-2], phi[:, 2:-2, 2:-2], atol=1e-5, rtol=0)
        assert (occlusion - phi).abs().amax((1, 2)).min() > 1e-4


def test_kernel_shap_recovers_the_weights_of_an_additive_game() -> None:
    weights = torch.linspace(-1, 1, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    game = Game(lambda present: present @ weights + 0.3)
    found = game.map_of(KernelShap(game.evaluator(), (100,), output="logit"))
    torch.testing.assert_close(found.flatten(), weights, atol=1e-4, rtol=0)


def test_kernel_shap_shares_what_three_patches_are_worth_only_together() -> None:
    """Their Shapley values are one third each, where an unweighted regression says one quarter; a fourth adds 0.25."""
    game = Game(lambda present: present[:, [0, 1, 3]].prod(1) + 0.25 * present[:, 2], patches=2)
    found = game.map_of(KernelShap(game.evaluator(), (2000,), output="logit"))
    torch.testing.assert_close(found.flatten(), torch.tensor([1 / 3, 1 / 3, 0.25, 1 / 3]), atol=0.03, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg", "class_token": False}], ids=["token", "average"])
@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_kernel_shap_sums_to_what_the_whole_picture_says_beyond_the_empty_one(
    images: torch.Tensor, questions: dict[str, Question], changes: dict[str, object], removal: Removal
) -> None:
    evaluator = CoalitionEvaluator(tiny_backbone(**changes), removal)
    answers = KernelShap(evaluator, (3, 30, 80))(images, KEYS, questions)
    for (name, _), answer in answers.items():
        head, target = questions[name].head, questions[name].target_B
        full, empty = (read(head, at, "probability") for at in (evaluator.full(images), evaluator.empty()))
        expected = full[torch.arange(2), target] - empty[target]
        torch.testing.assert_close(answer.map_BPP.sum((1, 2)), expected, atol=1e-4, rtol=1e-3)


def test_lime_ranks_the_patches_of_an_additive_game_that_are_worth_little_each() -> None:
    weights = 0.01 * torch.randperm(9, generator=torch.Generator().manual_seed(0))
    game = Game(lambda present: present @ weights.float())
    found = game.map_of(Lime(game.evaluator(), (500,), output="logit"))
    assert torch.equal(found.flatten().argsort(), weights.argsort())


def test_lime_recovers_an_additive_game_where_the_ridge_is_slight() -> None:
    weights = torch.linspace(-1, 1, 9)
    game = Game(lambda present: present @ weights + 0.3)
    found = game.map_of(Lime(game.evaluator(), (500,), output="logit", ridge=1e-3))
    torch.testing.assert_close(found.flatten(), weights, atol=1e-4, rtol=0)


def test_lime_with_a_narrow_kernel_sees_the_whole_pictures_neighbourhood() -> None:
    """A patch that counts only where at least 7 of 9 are present: far away, it is worth nothing."""
    game = Game(lambda present: present[:, 4] * (present.sum(1) >= 7))
    wide, narrow = (
        game.map_of(Lime(game.evaluator(), (2000,), output="logit", kernel_width=width, ridge=1e-6))[1, 1]
        for width in (10.0, 0.03)
    )
    assert wide < 0.4
    assert narrow > 0.8


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_costs_are_the_coalitions_that_are_evaluated_once_for_all_questions(
    monkeypatch: pytest.MonkeyPatch,
    evaluators: dict[Removal, CoalitionEvaluator],
    images: torch.Tensor,
    questions: dict[str, Question],
    name: str,
    removal: Removal,
) -> None:
    evaluator = evaluators[removal]
    evaluate, passes = evaluator.engine.evaluate, []

    def counting(images_B3SS: torch.Tensor, image_M: torch.Tensor, coalitions: torch.Tensor) -> torch.Tensor:
        passes.append(len(image_M))
        return evaluate(images_B3SS, image_M, coalitions)

    monkeypatch.setattr(evaluator.engine, "evaluate", counting)
    answers = MAKE[name](evaluator)(images, KEYS, questions)
    forwards = {answer.cost.forwards for answer in answers.values()}
    assert forwards == ({17} if name == "occlusion" else set(BUDGETS))
    assert sum(passes) == len(images) * max(forwards)
    assert {answer.cost.backwards for answer in answers.values()} == {0}


@pytest.mark.parametrize("name", DRAWING)
def test_a_smaller_budget_costs_what_it_says_and_gives_the_same_map_alone(
    evaluators: dict[Removal, CoalitionEvaluator], images: torch.Tensor, questions: dict[str, Question], name: str
) -> None:
    evaluator = evaluators["drop"]
    both = MAKE[name](evaluator)(images, KEYS, questions)
    alone = type(MAKE[name](evaluator))(evaluator, BUDGETS[:1])(images, KEYS, questions)  # type: ignore[call-arg]
    assert len(both) == 2 * len(alone)
    for (question, variant), answer in alone.items():
        assert variant == f"{name}_{BUDGETS[0]}"
        torch.testing.assert_close(answer.map_BPP, both[question, variant].map_BPP, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_a_picture_gets_the_same_map_whatever_the_batch_and_the_other_questions(
    evaluators: dict[Removal, CoalitionEvaluator],
    images: torch.Tensor,
    questions: dict[str, Question],
    name: str,
    removal: Removal,
) -> None:
    method = MAKE[name](evaluators[removal])
    together = method(images, KEYS, questions)
    for place in range(2):
        asked = {"deep": Question(questions["deep"].head, questions["deep"].target_B[place : place + 1])}
        alone = method(images[place : place + 1], KEYS[place : place + 1], asked)
        assert alone.keys() == {("deep", variant) for variant in method.variants}
        for key, answer in alone.items():
            assert answer.map_BPP.dtype == torch.float32
            assert torch.equal(answer.map_BPP[0], together[key].map_BPP[place])


@pytest.mark.parametrize("name", MAKE)
def test_global_generators_are_neither_read_nor_moved(
    evaluators: dict[Removal, CoalitionEvaluator], images: torch.Tensor, questions: dict[str, Question], name: str
) -> None:
    method = MAKE[name](evaluators["zero"])
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
        found.append(method(images, KEYS, questions))
        assert torch.equal(torch.get_rng_state(), torch_state)
        np.testing.assert_equal(np.random.get_state(), numpy_state)
    assert_same(*found)


@pytest.mark.parametrize("name", DRAWING)
def test_another_key_or_seed_draws_other_coalitions(
    evaluators: dict[Removal, CoalitionEvaluator], images: torch.Tensor, questions: dict[str, Question], name: str
) -> None:
    evaluator = evaluators["zero"]
    make = type(MAKE[name](evaluator))
    maps = [
        make(evaluator, BUDGETS, seed=seed)(images[:1], [key], questions)["linear", f"{name}_40"].map_BPP  # type: ignore[call-arg]
        for seed, key in ((0, "first"), (0, "second"), (1, "first"))
    ]
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_each_picture_is_asked_about_its_own_class(
    evaluators: dict[Removal, CoalitionEvaluator], images: torch.Tensor, questions: dict[str, Question]
) -> None:
    """A head whose logit of class 1 is constant, and of class 4 is not: one picture is asked about each."""
    head = nn.Linear(D, C)
    with torch.no_grad():
        head.weight[1] = 0.0
    asked = {"1 and 4": Question(head, TARGET), "4 and 1": Question(head, TARGET.flip(0))}
    for method in (
        Occlusion(evaluators["zero"], 1, output="logit"),
        KernelShap(evaluators["zero"], (40,), output="logit"),
        Lime(evaluators["zero"], (40,), output="logit"),
    ):
        answers = method(images, KEYS, asked)
        first, second = (answers[name, method.variants[0]].map_BPP.abs().amax((1, 2)) for name in asked)
        assert max(first[0], second[1]) < 1e-5
        assert min(first[1], second[0]) > 1e-3


def test_lime_survives_empty_coalitions_of_a_model_that_pools_patches_under_drop() -> None:
    pooling = tiny_backbone(img_size=16, global_pool="avg", class_token=False)  # 2 x 2: one coalition in 16 is empty
    question = Question(nn.Linear(D, C), torch.tensor([0]))
    answers = Lime(CoalitionEvaluator(pooling, "drop"), (100,))(torch.randn(1, 3, 16, 16), ["k"], {"q": question})
    assert answers["q", "lime_100"].map_BPP.isfinite().all()


@pytest.mark.parametrize("make", [KernelShap, Lime, Rise])
@pytest.mark.parametrize("budgets", [(), (1, 5), (5, 5), (20, 10), (2.5,), (True, 5)])
def test_budgets_that_do_not_ascend_from_two_are_an_error(
    evaluators: dict[Removal, CoalitionEvaluator], make: type[KernelShap | Lime | Rise], budgets: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="budgets: expected"):
        make(evaluators["zero"], budgets)


def test_settings_that_do_not_exist_are_errors_that_say_what_does(
    evaluators: dict[Removal, CoalitionEvaluator], images: torch.Tensor, questions: dict[str, Question]
) -> None:
    evaluator = evaluators["zero"]
    with pytest.raises(ValueError, match="radius: expected 0 to 2 on a 6 x 6 grid, got 3"):
        Occlusion(evaluator, radius=3)
    with pytest.raises(ValueError, match="kernel_width: expected a finite number above 0, got 0"):
        Lime(evaluator, kernel_width=0)
    with pytest.raises(ValueError, match="ridge: expected a finite number above 0, got -1"):
        Lime(evaluator, ridge=-1)
    for make in (KernelShap, Lime, Rise):
        with pytest.raises(ValueError, match="output: expected one of"):
            make(evaluator, output="odds")  # type: ignore[arg-type]
    for name, method in ((name, make(evaluator)) for name, make in MAKE.items()):
        with pytest.raises(ValueError, match="keys: expected one of each of 2 pictures, got 1"):
            method(images, ["one"], questions)
        with pytest.raises(ValueError, match=r"class: expected 0 to 4, got \[5\]"):
            method(images, KEYS, {name: Question(questions["deep"].head, torch.tensor([5, 0]))})
        with pytest.raises(ValueError, match="evaluation mode, got Dropout"):
            method(images, KEYS, {name: Question(nn.Sequential(nn.Dropout(0.5), nn.Linear(D, C)), TARGET)})
