"""The counter against arithmetic by hand (docs/method.md, what a coalition costs)."""

from typing import Any

import pytest
import timm
import torch

from benchmarks.baselines import sides
from benchmarks.cases import Amounts, case, masks
from benchmarks.flops import _attention_flops, flops, full_pass_flops
from tve.backbones import Backbone, load_backbone
from tve.precision import DTYPES, Precision

D, N, DEPTH, PIXELS = 32, 16, 3, 8 * 8 * 3  # of the model `tiny`
STEM = 2 * N * PIXELS * D
AMOUNTS = Amounts(pictures=1, halves=1, orders=1, zeros=3)


def layer(tokens: int) -> int:
    """Queries, keys and values; scores and what they gather; projection; MLP."""
    return 24 * tokens * D**2 + 4 * tokens**2 * D


def test_a_full_pass_is_the_stem_and_its_layers(tiny: Backbone) -> None:
    assert full_pass_flops(tiny) == STEM + DEPTH * layer(N + 1)


@pytest.mark.parametrize(("name", "gflop"), [("vit_tiny_patch16_224", 2.5), ("vit_base_patch16_224", 35.1)])
def test_a_full_pass_of_a_real_model_costs_what_is_known_of_it(name: str, gflop: float) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
        images = torch.zeros(1, 3, 224, 224)
    assert flops(lambda: model.forward_head(model.forward_features(images), pre_logits=True)) * 1e-9 == pytest.approx(
        gflop, rel=0.01
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gathering_costs_a_stem_and_the_layers_of_the_kept_tokens(precision: Precision) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": 2}
    made = load_backbone("vit_tiny_patch16_224", "random", timm_args=size)
    made.model.to(DTYPES[precision])
    given = case("kept", 4, 1, AMOUNTS, "cpu")
    lengths = [int(kept) + 1 for kept in masks(given.coalitions).flatten(0, 1).flatten(1).sum(1)]
    made_sides = sides(made, "drop", precision, ("grouped_eager", "evaluator"))
    images = torch.zeros(1, 3, 32, 32)
    grouped = flops(lambda: made_sides["grouped_eager"].eager(images, given.coalitions))
    assert grouped == STEM + sum(DEPTH * layer(length) for length in lengths)

    # Shared: the stem, and queries, keys and values of the first layer. Of the last layer: keys and values of all
    # tokens, and everything else of the class token alone.
    first = 6 * (N + 1) * D**2 + sum(layer(length) - 6 * length * D**2 for length in lengths)
    middle = (DEPTH - 2) * sum(layer(length) for length in lengths)
    last = sum(4 * length * D**2 + 20 * D**2 + 4 * length * D for length in lengths)
    evaluator = made_sides["evaluator"].eager
    evaluator(images, given.coalitions)  # measures its memory
    assert flops(lambda: evaluator(images, given.coalitions)) == STEM + first + middle + last


def test_zero_costs_the_evaluator_nearly_a_full_pass_each(tiny: Backbone) -> None:
    given = case("zero", 4, 1, AMOUNTS, "cpu")
    evaluator = sides(tiny, "zero", "float32", ("evaluator",))["evaluator"].eager
    images = torch.zeros(1, 3, 32, 32)
    evaluator(images, given.coalitions)
    last = 4 * (N + 1) * D**2 + 20 * D**2 + 4 * (N + 1) * D
    each = layer(N + 1) - 6 * (N + 1) * D**2 + (DEPTH - 2) * layer(N + 1) + last
    # The bank holds the rows of the picture and those of a blank one.
    assert flops(lambda: evaluator(images, given.coalitions)) == 3 * each + 2 * (STEM + 6 * (N + 1) * D**2)


def test_attention_on_a_cpu_has_a_formula_where_pytorch_brings_none() -> None:
    shape = (2, 3, 5, 7)
    assert _attention_flops(shape, shape, shape) == 4 * 2 * 3 * 5 * 5 * 7


def test_a_product_without_a_formula_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected ops with a formula, got \['aten.dot'\]"):
        flops(lambda: torch.ones(2) @ torch.ones(2))


def test_a_matrix_times_a_vector_is_counted() -> None:
    assert flops(lambda: torch.ones(3, 5) @ torch.ones(5)) == 2 * 3 * 5
