"""ViT-Shapley: the kernel's coalitions, efficiency, exact Shapley values where all coalitions can be enumerated."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tve.backbones import Backbone, load_backbone
from tve.baselines.method import Cost, Question
from tve.baselines.vit_shapley import (
    ShapleyExplainer,
    VitShapley,
    VitShapleyConfig,
    load_vit_shapley,
    own_head,
    save_vit_shapley,
    untrained,
)
from tve.baselines.vit_shapley_training import (
    coalition_values,
    explained_gain,
    masked_embeddings,
    shapley_coalitions,
    shapley_loss,
    train_surrogate,
    train_vit_shapley,
    uniform_coalitions,
)
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.v_information import all_coalitions, coalition_index, shapley_values
from tve.optimisation import NonFiniteLossError
from tve.pictures import PictureBatch
from tve.removal import Removal
from tve.weights import state_digest

CONFIG = VitShapleyConfig(
    trunk="trained",
    width=32,
    num_heads=2,
    num_steps=3,
    coalitions_per_picture=4,
    learning_rate=3e-3,
    trunk_learning_rate=3e-4,
    weight_decay=0.0,
    warmup_steps=0,
    evaluate_every=2,
    surrogate_steps=0,
    surrogate_learning_rate=1e-3,
    precision="float32",
    memory_mib=64,
    seed=0,
)


def made(architecture: str = "vit_tiny_patch16_224", **changes: object) -> Backbone:
    """A 2 x 2 grid, and a classifier of random weights large enough that patches make a difference."""
    torch.manual_seed(0)
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    loaded = load_backbone(architecture, "random", timm_args=tiny | changes)
    model = loaded.model
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if isinstance(head := model.get_classifier(), nn.Linear):  # type: ignore[operator]
        nn.init.normal_(head.weight, std=0.5)
    return Backbone(loaded.config, model)  # its digest is of the weights as they are now


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return made()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def repeated(images: torch.Tensor) -> Iterator[PictureBatch]:
    return itertools.repeat(PictureBatch(images, [f"picture{i}" for i in range(len(images))]))


def with_drawn_last_layer(explainer: ShapleyExplainer) -> ShapleyExplainer:
    """Values that differ between patches, classes and pictures, as after training."""
    torch.manual_seed(2)
    nn.init.normal_(explainer.network.to_values[-1].weight, std=0.5)  # type: ignore[arg-type]
    return explainer


def test_sizes_of_coalitions_follow_the_shapley_kernel_and_patches_are_alike() -> None:
    present = shapley_coalitions(100, 400, 3, torch.Generator().manual_seed(0))[:, :200].flatten(2).flatten(0, 1)
    weight = torch.tensor([1 / (size * (9 - size)) for size in range(1, 9)])
    expected = len(present) * weight / weight.sum()
    found = present.sum(1).bincount(minlength=10)[1:9]
    assert ((found - expected).square() / expected).sum() < 24.3  # chi-square, 7 degrees of freedom: 0.1 %
    for size in (1, 2, 7):
        of_size = present[present.sum(1) == size]
        each = len(of_size) * size / 9
        # With sets of equal size the counts vary less than independent ones: a generous bound of the same level.
        assert ((of_size.sum(0) - each).square() / each).sum() < 26.1


@pytest.mark.parametrize("patches", [2, 5])
def test_coalitions_come_with_their_complements_and_are_neither_empty_nor_whole(patches: int) -> None:
    present = shapley_coalitions(20, 32, patches, torch.Generator().manual_seed(0))
    assert present.shape == (20, 32, patches, patches)
    assert torch.equal(present[:, :16], ~present[:, 16:])
    sizes = present.flatten(2).sum(2)
    assert int(sizes.min()) >= 1
    assert int(sizes.max()) <= patches**2 - 1
    assert not torch.equal(present[0], present[1])


def test_coalitions_need_pairs_and_two_patches() -> None:
    with pytest.raises(ValueError, match="even number, at least 2, got 5"):
        shapley_coalitions(1, 5, 3, torch.Generator())
    with pytest.raises(ValueError, match="at least 2, got 1"):
        shapley_coalitions(1, 4, 1, torch.Generator())


def test_the_loss_is_zero_for_additive_games_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(2, 9, 3, generator=generator)
    present = shapley_coalitions(2, 8, 3, generator)
    gain = torch.einsum("bkn,bnc->bkc", present.flatten(2).float(), phi)
    assert shapley_loss(phi, present, gain) < 1e-10
    torch.testing.assert_close(shapley_loss(phi, present, gain + 0.5), torch.tensor(3 * 0.25))
    torch.testing.assert_close(explained_gain(phi, present, gain), 1.0)


def test_of_all_values_with_the_same_sum_the_shapley_values_explain_most() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 3, generator=generator)
    exact = shapley_values(table).float()[None]
    present = shapley_coalitions(1, 20_000, 2, generator)
    gain = (table[coalition_index(present[0])] - table[0])[None]
    best = explained_gain(exact, present, gain)
    assert 0 < best < 1
    for scale in (0.05, 0.2, 1.0):
        other = torch.randn(1, 4, 3, generator=generator) * scale
        assert explained_gain(exact + other - other.mean(1, keepdim=True), present, gain) < best


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_values_sum_to_the_surrogates_gain_in_training_and_after_it(
    backbone: Backbone, images: torch.Tensor, removal: Removal, trunk: str
) -> None:
    surrogate = made(depth=1)  # another network: v is the surrogate's
    explainer = with_drawn_last_layer(untrained(backbone, surrogate, removal, replace(CONFIG, trunk=trunk)))  # type: ignore[arg-type]
    evaluator = CoalitionEvaluator(surrogate, removal)
    ends = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]).bool().expand(3, -1, -1, -1)
    empty, full = coalition_values(evaluator, images, ends).unbind(1)
    explainer.train()
    in_training = explainer(images).phi_BNC
    assert in_training.requires_grad
    assert in_training.std(1).min() > 0.01
    torch.testing.assert_close(in_training.sum(1), full - empty, atol=1e-5, rtol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(explainer(images).phi_BNC.sum(1), full - empty, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(explainer.eval()(images).phi_BNC.sum(1), full - empty, atol=1e-5, rtol=0)


def test_training_starts_from_the_equal_split(backbone: Backbone, images: torch.Tensor) -> None:
    values = untrained(backbone, backbone, "zero", CONFIG)(images)
    gain = values.full_BC - values.empty_C
    torch.testing.assert_close(values.phi_BNC, (gain / 4)[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize(("removal", "trunk"), [("drop", "trained"), ("zero", "frozen")])
def test_trained_on_one_picture_the_values_are_its_exact_shapley_values(
    backbone: Backbone, images: torch.Tensor, removal: Removal, trunk: str
) -> None:
    config = replace(CONFIG, trunk=trunk, num_steps=100, coalitions_per_picture=32, evaluate_every=100)  # type: ignore[arg-type]
    one = images[:1]
    result = train_vit_shapley(backbone, removal, repeated(one), one, config)
    table = coalition_values(CoalitionEvaluator(backbone, removal), one, all_coalitions(2)[None])[0]
    exact = shapley_values(table).float()
    with torch.no_grad():
        found = result.explainer(one).phi_BNC[0]
    assert exact.std() > 0.02
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.999
    equal = (table[-1] - table[0]) / 4
    assert (found - exact).square().sum() < 0.01 * (equal - exact).square().sum()
    assert result.held_out_r2 > 0.5


def test_the_logged_loss_is_that_of_the_equal_split_where_nothing_is_learned(
    backbone: Backbone, images: torch.Tensor
) -> None:
    config = replace(CONFIG, num_steps=1, coalitions_per_picture=2000, learning_rate=0.0, trunk_learning_rate=0.0)
    result = train_vit_shapley(backbone, "drop", repeated(images[:1]), images[:1], config)
    parts = all_coalitions(2)
    table = coalition_values(CoalitionEvaluator(backbone, "drop"), images[:1], parts[None])[0].double()
    size = parts.flatten(1).sum(1).double()
    residual = (table - table[0] - (table[-1] - table[0]) * size[:, None] / 4).square().sum(1)
    sets_of_size = torch.tensor([1, 4, 6, 4, 1])[size.long()]
    weight = (1 / (size * (4 - size) * sets_of_size)).nan_to_num(posinf=0)
    expected = float((weight * residual).sum() / weight.sum())
    assert result.rows[0]["loss"] == pytest.approx(expected, rel=0.05)
    assert result.held_out_r2 == pytest.approx(0, abs=1e-5)


def test_training_is_a_function_of_the_seed_and_leaves_the_backbone_as_it_is(
    backbone: Backbone, images: torch.Tensor
) -> None:
    def trained(seed: int) -> str:
        torch.manual_seed(seed + torch.seed() % 1000)  # must not matter
        config = replace(CONFIG, seed=seed, surrogate_steps=2)
        result = train_vit_shapley(backbone, "drop", repeated(images), images, config)
        assert not result.explainer.is_own_surrogate
        return state_digest(result.explainer.state_dict())

    before = state_digest(backbone.state_dict())
    first = trained(0)
    assert trained(0) == first
    assert trained(1) != first
    assert state_digest(backbone.state_dict()) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.parameters())


def test_a_trained_trunk_leaves_the_surrogate_behind_and_a_frozen_one_is_the_surrogate(
    backbone: Backbone, images: torch.Tensor
) -> None:
    trained = train_vit_shapley(backbone, "zero", repeated(images), images, CONFIG).explainer.network.trunk
    assert trained is not None
    assert state_digest(trained.state_dict()) != state_digest(backbone.state_dict())
    frozen = train_vit_shapley(backbone, "zero", repeated(images), images, replace(CONFIG, trunk="frozen")).explainer
    assert not any("trunk" in name for name in frozen.trained_state())


def test_the_weights_that_training_starts_from_depend_on_the_seed_alone(backbone: Backbone) -> None:
    seeds = (0, 0, 1)
    starts = [untrained(backbone, backbone, "zero", replace(CONFIG, seed=seed)).state_dict() for seed in seeds]
    first, again, other = map(state_digest, starts)
    assert first == again
    assert first != other


def test_r2_is_logged_where_it_was_asked_for(backbone: Backbone, images: torch.Tensor) -> None:
    result = train_vit_shapley(backbone, "zero", repeated(images), images, CONFIG)
    assert [(row["step"], "held_out_r2" in row) for row in result.rows] == [(2, True), (3, True)]
    assert result.held_out_r2 == result.rows[-1]["held_out_r2"]
    assert result.surrogate_rows == []


@pytest.mark.parametrize("removal", ["zero", "drop"])
@pytest.mark.parametrize("changes", [{}, {"img_size": 32, "global_pool": "avg", "class_token": False, "reg_tokens": 2}])
def test_masked_embeddings_are_the_evaluators(removal: Removal, changes: dict[str, object]) -> None:
    backbone = made(**changes)
    generator = torch.Generator().manual_seed(3)
    size = backbone.image_size
    images = torch.randn(3, 3, size, size, generator=generator)
    evaluator = CoalitionEvaluator(backbone, removal)
    for _ in range(4):
        present = uniform_coalitions(3, backbone, removal, generator)
        expected = evaluator(images, present[:, None])[:, 0]
        torch.testing.assert_close(
            masked_embeddings(backbone, removal, images, present), expected, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("removal", "pool", "smallest"), [("zero", "token", 0), ("drop", "token", 0), ("drop", "avg", 1)]
)
def test_sizes_of_the_surrogates_coalitions_are_uniform(removal: Removal, pool: str, smallest: int) -> None:
    backbone, generator = made(global_pool=pool), torch.Generator().manual_seed(0)
    draws = [uniform_coalitions(2, backbone, removal, generator).flatten(1).sum(1) for _ in range(1000)]
    sizes = torch.stack(draws)
    num_sizes = 5 - smallest
    found = sizes[:, 0].bincount(minlength=5)[smallest:]
    expected = 1000 / num_sizes
    assert int(sizes.min()) == smallest
    assert ((found - expected).square() / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: 0.1 %
    assert bool((sizes[:, 0] == sizes[:, 1]).all()) == (removal == "drop")


@pytest.mark.parametrize("removal", ["zero", "drop"])
def test_a_surrogate_says_of_parts_what_the_backbone_says_of_the_whole(
    backbone: Backbone, images: torch.Tensor, removal: Removal
) -> None:
    def divergence(model: Backbone) -> float:
        parts = all_coalitions(2)[None].expand(3, -1, -1, -1)
        given = coalition_values(CoalitionEvaluator(model, removal), images, parts)
        whole = own_head(backbone)(backbone(images)).softmax(-1)[:, None]
        return float((whole * (whole / given).log()).sum(-1).mean())

    config = replace(CONFIG, surrogate_steps=60)
    surrogate, rows = train_surrogate(backbone, removal, repeated(images), config)
    assert divergence(surrogate) < 0.5 * divergence(backbone)
    assert rows[-1]["step"] == 60
    assert not any(parameter.requires_grad for parameter in surrogate.parameters())


def test_a_surrogate_that_tokens_cannot_be_left_out_of_is_an_error() -> None:
    backbone = made("eva02_tiny_patch14_224", patch_size=8, use_rot_pos_emb=True)
    with pytest.raises(ValueError, match="surrogate_steps: expected 0 under 'drop'"):
        train_surrogate(backbone, "drop", repeated(torch.zeros(1, 3, 16, 16)), replace(CONFIG, surrogate_steps=1))


def test_a_hierarchical_model_is_explained_on_its_grid() -> None:
    arguments = {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 16, "num_classes": 3}
    arguments |= {"num_heads": (1, 2, 4, 8)}
    torch.manual_seed(0)
    backbone = load_backbone("swin_tiny_patch4_window7_224", "random", timm_args=arguments)
    images = torch.randn(2, 3, 64, 64)
    config = replace(CONFIG, num_steps=1, surrogate_steps=1)
    result = train_vit_shapley(backbone, "zero", repeated(images), images, config)
    assert result.explainer(images).phi_BNC.shape == (2, 16, 3)


def test_saved_and_loaded_it_predicts_the_same(backbone: Backbone, images: torch.Tensor, tmp_path: Path) -> None:
    for surrogate_steps in (0, 1):
        config = replace(CONFIG, surrogate_steps=surrogate_steps)
        trained = train_vit_shapley(backbone, "drop", repeated(images), images, config).explainer
        folder = tmp_path / str(surrogate_steps)
        save_vit_shapley(trained, folder, {"held_out_r2": 0.5})
        loaded = load_vit_shapley(folder, backbone)
        assert (loaded.config, loaded.removal) == (config, "drop")
        assert loaded.is_own_surrogate == (surrogate_steps == 0)
        found, expected = loaded(images), trained(images)
        assert torch.equal(found.phi_BNC, expected.phi_BNC)
        assert torch.equal(found.full_BC, expected.full_BC)


def test_another_backbone_or_altered_weights_are_not_loaded(
    backbone: Backbone, images: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_vit_shapley(tmp_path, backbone)
    explainer = untrained(backbone, backbone, "zero", CONFIG)
    save_vit_shapley(explainer, tmp_path / "right")
    with pytest.raises(ValueError, match=f"expected the backbone {backbone.weights_sha256}, got"):
        load_vit_shapley(tmp_path / "right", made(depth=1))
    save_vit_shapley(with_drawn_last_layer(explainer), tmp_path / "other")
    (tmp_path / "other" / "vit_shapley.safetensors").rename(tmp_path / "right" / "vit_shapley.safetensors")
    with pytest.raises(ValueError, match="expected surrogate and state"):
        load_vit_shapley(tmp_path / "right", backbone)


@pytest.mark.parametrize("with_surrogate", [False, True])
def test_other_tasks_get_the_map_of_the_class_that_the_own_head_predicts(
    backbone: Backbone, images: torch.Tensor, with_surrogate: bool
) -> None:
    surrogate = made(depth=1) if with_surrogate else backbone
    explainer = with_drawn_last_layer(untrained(backbone, surrogate, "zero", CONFIG)).eval()
    head = own_head(backbone)
    copy_of_head = nn.Linear(32, 5)
    copy_of_head.load_state_dict(head.state_dict())
    asked = torch.tensor([4, 0, 2])
    heads = {"other": nn.Linear(32, 5), "function": head.forward, "own": head, "copy": copy_of_head}
    questions = {name: Question(each, asked) for name, each in heads.items()}
    method = VitShapley(explainer)
    answers = method(images, ["a", "b", "c"], questions)
    assert answers.keys() == {(name, variant) for name in heads for variant in method.variants}

    phi = explainer(images).phi_BNC.reshape(3, 2, 2, 5)
    predicted = head(backbone(images)).argmax(1).tolist()
    assert predicted != asked.tolist()
    if with_surrogate:
        assert predicted != own_head(surrogate)(surrogate(images)).argmax(1).tolist()
    carried_over = torch.stack([phi[row, :, :, label] for row, label in enumerate(predicted)])
    own = torch.stack([phi[row, :, :, label] for row, label in enumerate(asked.tolist())])
    for name, expected in (("other", carried_over), ("function", carried_over), ("own", own), ("copy", own)):
        answer = answers[name, "vit_shapley"]
        torch.testing.assert_close(answer.map_BPP, expected)
        assert answer.cost == Cost(1)


def test_a_loss_that_is_not_finite_names_the_step_and_the_pictures(backbone: Backbone, images: torch.Tensor) -> None:
    config = replace(CONFIG, learning_rate=1e30, num_steps=20)
    with pytest.raises(NonFiniteLossError, match=r"vit_shapley, step \d+: .* picture0, picture1, picture2"):
        train_vit_shapley(backbone, "zero", repeated(images), images, config)


def test_a_backbone_without_a_classifier_is_an_error(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected one with one linear classifier"):
        train_vit_shapley(made(num_classes=0), "zero", repeated(images), images, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "thawed"}, "trunk: expected 'frozen' or 'trained'"),
        ({"precision": "half"}, "precision: expected one of"),
        ({"num_steps": 0}, "num_steps: expected at least 1"),
        ({"num_steps": 1.5}, "num_steps: expected a whole number"),
        ({"coalitions_per_picture": 7}, "coalitions_per_picture: expected an even number"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"num_heads": 5}, "width: expected a multiple of the 5 heads"),
        ({"warmup_steps": 3, "surrogate_steps": 2}, "warmup_steps: expected at most 2"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]
