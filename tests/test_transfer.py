import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tve import transfer_rule
from tve.coalitions import Windows
from tve.meta_attribution import MetaAttribution
from tve.transfer_rule import (
    SHARE_RIDGE,
    Output,
    PerPatch,
    Target,
    TransferRule,
    class_maps,
    of_class,
    read,
    shares,
    transfer,
    window_mean,
)

P, D, C = 5, 6, 3
OUTPUTS: tuple[Output, ...] = ("logit", "probability", "log_probability")


def meta(batch_size: int = 2, radius: int = 1) -> MetaAttribution:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kept, removed = normal(batch_size, P * P, D), normal(batch_size, P * P, D)
    return MetaAttribution(kept, removed, normal(batch_size, D), normal(D), radius)


def linear_head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(D, C)


def nonlinear_head() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 8), nn.GELU(), nn.Linear(8, C))


def planted(u_PP: Tensor, radius: int = 1) -> MetaAttribution:
    """A meta-attribution whose kept windows say u about class 0, and whose removed windows change nothing."""
    kept = torch.zeros(1, P * P, D)
    kept[0, :, 0] = u_PP.flatten()
    return MetaAttribution(kept, torch.zeros(1, P * P, D), torch.zeros(1, D), torch.zeros(D), radius)


def identity_head() -> nn.Linear:
    head = nn.Linear(D, D)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("head", [linear_head(), nonlinear_head()], ids=["linear", "mlp"])
def test_every_map_is_its_definition_for_each_patch_and_class(output: Output, head: nn.Module) -> None:
    given, rule = meta(), TransferRule(output, "mean", weight_kept=0.7, weight_removed=1.3)
    maps = transfer(given, head, rule)
    assert maps.shape == (2, C, P, P)

    def says(embedding_D: Tensor) -> Tensor:
        logits: Tensor = head(embedding_D[None])[0]
        outputs = {
            "logit": logits,
            "probability": logits.softmax(0),
            "log_probability": logits.log_softmax(0),
        }
        return outputs[output]

    with torch.no_grad():
        for b in range(2):
            gained = [says(given.kept_BND[b, n]) - says(given.empty_D) for n in range(P * P)]
            lost = [says(given.full_BD[b]) - says(given.removed_BND[b, n]) for n in range(P * P)]
            u_NC = 0.7 * torch.stack(gained) + 1.3 * torch.stack(lost)
            for n, window_PP in enumerate(Windows(P, 1).kept_NPP()):
                expected_C = u_NC[window_PP.flatten()].mean(0)
                torch.testing.assert_close(maps[b, :, n // P, n % P], expected_C, atol=1e-5, rtol=1e-5)


def test_maps_are_linear_in_the_two_weights() -> None:
    given, head = meta(), linear_head()

    def maps(kept: float, removed: float) -> Tensor:
        return transfer(given, head, TransferRule(weight_kept=kept, weight_removed=removed))

    torch.testing.assert_close(maps(2.0, -3.0), 2 * maps(1, 0) - 3 * maps(0, 1), atol=1e-5, rtol=1e-5)
    assert not maps(0, 0).any()


@pytest.mark.parametrize("output", OUTPUTS)
def test_all_classes_at_once_equal_each_class_alone(output: Output) -> None:
    """A head of one class read alone gives the same map, where classes do not share a softmax."""
    given, head = meta(radius=2), linear_head()
    maps = transfer(given, head, TransferRule(output))
    for y in range(C):

        def one_class(embeddings: Tensor, y: int = y) -> Tensor:
            return read(head, embeddings, output)[..., y : y + 1]

        alone = transfer(given, one_class)
        torch.testing.assert_close(maps[:, y], alone[:, 0])


def test_each_picture_is_explained_by_itself() -> None:
    both, head, rule = meta(2), linear_head(), TransferRule()
    second = both[1:]
    torch.testing.assert_close(transfer(both, head, rule)[1:], transfer(second, head, rule))


def test_a_bias_of_the_head_moves_no_logit_map() -> None:
    given, head = meta(), linear_head()
    before = transfer(given, head)
    head.bias.data += 5
    torch.testing.assert_close(transfer(given, head), before, atol=1e-5, rtol=1e-5)


def test_a_picture_whose_windows_say_nothing_has_a_map_of_zeros() -> None:
    given = meta()
    same = MetaAttribution(
        given.empty_D.expand_as(given.kept_BND),
        given.full_BD[:, None].expand_as(given.removed_BND),
        given.full_BD,
        given.empty_D,
        radius=1,
    )
    for output in OUTPUTS:
        maps = transfer(same, linear_head(), TransferRule(output))
        torch.testing.assert_close(maps, torch.zeros_like(maps), atol=1e-6, rtol=0)


def test_without_the_window_mean_a_planted_u_comes_back_in_row_major_order() -> None:
    u = torch.arange(P * P).reshape(P, P).float()
    maps = transfer(planted(u, radius=2), identity_head(), TransferRule(per_patch="window"))
    assert torch.equal(maps[0, 0], u)
    assert not maps[0, 1:].any()


@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_the_window_mean_of_a_planted_u_is_the_mean_over_the_windows_that_hold_the_patch(radius: int) -> None:
    u = torch.randn(P, P, generator=torch.Generator().manual_seed(3))
    phi = transfer(planted(u, radius), identity_head(), TransferRule(per_patch="mean"))[0, 0]
    windows_NPP = Windows(P, radius).kept_NPP()
    for p, q in itertools.product(range(P), repeat=2):
        holds_N = windows_NPP[:, p, q]
        assert float(phi[p, q]) == pytest.approx(float(u.flatten()[holds_N].mean()), abs=1e-5)


@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_shares_are_the_ridge_regression_whose_window_sums_are_nearest_to_half_of_u(radius: int) -> None:
    u = torch.randn(P, P, generator=torch.Generator().manual_seed(3))
    phi = transfer(planted(u, radius), identity_head())[0, 0]
    window_NN = Windows(P, radius).kept_NPP().flatten(1).double()
    if radius == 0:
        torch.testing.assert_close(phi, u / 2)
        return
    with_constant = torch.cat([window_NN, torch.ones(P * P, 1).double()], 1)
    ridge = SHARE_RIDGE * ((2 * radius + 1) ** 2 - 1) * torch.eye(P * P + 1).double()
    ridge[-1, -1] = 0
    normal = with_constant.T @ with_constant + ridge
    expected = torch.linalg.solve(normal, with_constant.T @ u.double().flatten() / 2)[:-1]
    torch.testing.assert_close(phi.double().flatten(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("radius", [1, 2])
def test_what_all_windows_have_alike_changes_no_share(radius: int) -> None:
    """A constant u has none, and so neither G(∅) nor a large offset common to all windows makes a pattern."""
    u = torch.randn(2, 3, P, P, generator=torch.Generator().manual_seed(3))
    flat = shares(torch.full((1, 1, P, P), 7.0), radius)
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-5, rtol=0)
    torch.testing.assert_close(shares(u + 5, radius), shares(u, radius), atol=1e-5, rtol=0)


def test_shares_keep_their_precision_and_can_be_differentiated_whatever_came_before() -> None:
    u = torch.randn(1, 2, 7, 7, generator=torch.Generator().manual_seed(3))
    transfer_rule._share_parts.cache_clear()
    with torch.inference_mode():
        expected = shares(u, 1).clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shares(u, 1), expected)
    shares(u.requires_grad_(), 1).sum().backward()
    assert u.grad is not None
    assert shares(u.bfloat16(), 1).dtype == torch.bfloat16


@pytest.mark.parametrize("radius", [1, 2])
def test_a_patch_that_alone_counts_has_the_largest_share_wherever_it_is(radius: int) -> None:
    """The mean gives as much to its neighbours: a window says 1 exactly when it holds the patch."""
    for n, place in enumerate(itertools.product(range(P), repeat=2)):
        holds_N = Windows(P, radius).kept_NPP().flatten(1)[:, n].float()
        phi = transfer(planted(2 * holds_N.reshape(P, P), radius), identity_head())[0, 0]
        if bool(holds_N.all()):  # every window has it, which is the constant's
            torch.testing.assert_close(phi, torch.zeros_like(phi), atol=1e-6, rtol=0)
            continue
        others = phi.flatten()[torch.arange(P * P) != n]
        # Sums over windows do not tell all: along some directions they are zero.
        assert phi[place] > 0.15
        assert others.max() < 0.95 * phi[place]


def test_a_constant_u_stays_constant_to_the_very_corner() -> None:
    phi = window_mean(torch.full((1, 1, P, P), -2.0), 2)
    torch.testing.assert_close(phi, torch.full((1, 1, P, P), -2.0))


@pytest.mark.parametrize(("p", "q"), list(itertools.product(range(P), repeat=2)))
def test_the_only_informative_patch_is_the_peak(p: int, q: int) -> None:
    """A window says 1 exactly when it holds patch (p, q): unique peak at r = 0, a maximum at r = 1."""
    for radius in (0, 1):
        holds_N = Windows(P, radius).kept_NPP()[:, p, q].float()
        phi = transfer(planted(holds_N.reshape(P, P), radius), identity_head(), TransferRule(per_patch="mean"))[0, 0]
        maxima = (phi >= phi.max() - 1e-6).nonzero().tolist()
        assert [p, q] in maxima
        clear = all(place in (0, P - 1) or radius < place < P - 1 - radius for place in (p, q))
        if radius == 0 or clear:
            assert maxima == [[p, q]]


def test_probabilities_sum_to_one_and_their_maps_to_zero() -> None:
    torch.testing.assert_close(read(linear_head(), meta().full_BD, "probability").sum(-1), torch.ones(2))
    total = transfer(meta(), linear_head(), TransferRule("probability")).sum(1)
    torch.testing.assert_close(total, torch.zeros(2, P, P), atol=1e-5, rtol=0)


def test_each_picture_gets_the_map_of_its_own_class() -> None:
    maps = torch.arange(2 * C).reshape(2, C, 1, 1).float()
    assert of_class(maps, torch.tensor([2, 0])).flatten().tolist() == [2, 3]
    assert of_class(maps[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 1, 1)


@pytest.mark.parametrize(
    ("target", "values"),
    [
        (1, [1, 4]),
        (np.int64(1), [1, 4]),
        (torch.tensor(1), [1, 4]),
        (np.array(1), [1, 4]),
        ([2, 0], [2, 3]),
        ((2, 0), [2, 3]),
        (np.array([2, 0], dtype=np.uint8), [2, 3]),
        (torch.tensor([2, 0], dtype=torch.int32), [2, 3]),
    ],
    ids=repr,
)
def test_a_target_is_one_class_for_all_or_one_per_picture_in_any_form_of_integers(
    target: Target, values: list[int]
) -> None:
    maps = torch.arange(2 * C).reshape(2, C, 1, 1).float()
    assert of_class(maps, target).flatten().tolist() == values


@pytest.mark.parametrize(
    "wrong", [True, 1.0, [1.0, 2.0], [True, False], np.array([0.5, 1]), torch.tensor([True, False]), "1", ["a", "b"]]
)
def test_a_target_that_is_no_integer_is_an_error_that_says_what_came(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"class: expected an int, or one per picture, \[2\], got"):
        of_class(torch.zeros(2, C, P, P), wrong)


@pytest.mark.parametrize("wrong", [-1, C])
def test_a_class_that_the_head_does_not_have_is_an_error(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"class: expected 0 to 2, got \[0, {wrong}\]"):
        of_class(torch.zeros(2, C, P, P), torch.tensor([0, wrong]))


def test_another_number_of_classes_than_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"class: expected an int, or one per picture, \[2\], got \[1\]"):
        of_class(torch.zeros(2, C, P, P), torch.tensor([0]))


@pytest.mark.parametrize("head", [nn.Linear(D + 1, C), nn.Sequential(nn.Linear(D + 1, D), nn.Linear(D, C))])
def test_a_head_of_another_width_is_an_error_that_says_what_the_head_said(head: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"embeddings of width {D}, got one that fails on them .*{D + 1}") as caught:
        transfer(meta(), head)
    assert isinstance(caught.value.__cause__, RuntimeError)


class OutputLayerFirst(nn.Module):
    """A head whose registration order is not its order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(8, C)
        self.hidden = nn.Linear(D, 8)

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.output(self.hidden(embeddings).relu())
        return logits


def test_a_head_may_declare_its_layers_in_any_order() -> None:
    assert transfer(meta(), OutputLayerFirst()).shape == (2, C, P, P)


def test_a_head_is_read_row_by_row_so_batch_norm_sees_dimensions_and_not_patches() -> None:
    torch.manual_seed(1)
    normed = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, C))
    nn.init.normal_(normed[0].running_mean)  # type: ignore[arg-type]
    normed.eval()
    maps = transfer(meta(), normed)
    assert maps.shape == (2, C, P, P)
    given = meta()
    torch.testing.assert_close(read(normed, given.kept_BND)[1], normed(given.kept_BND[1]))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, r"expected a callable .*, got None; this backbone may have no single linear classifier: pass a head"),
        ("digit", r"expected a callable from embeddings \[\.\.\., 6\] to logits \[\.\.\., C\], got str"),
        (lambda embeddings: embeddings.argmax(-1), r"expected logits \[1, C\], floating, .*got torch\.int64 \[1\]"),
        (lambda embeddings: embeddings.sum(-1), r"expected logits \[1, C\], floating, .*got torch\.float32 \[1\]"),
        (lambda embeddings: (embeddings, embeddings), r"expected logits \[1, C\].*got tuple; return one tensor"),
    ],
)
def test_what_is_no_head_is_an_error_that_says_what_a_head_is(head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"head: {message}"):
        transfer(meta(), head)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(D), nn.AlphaDropout(0.1)])
def test_a_head_that_chance_or_the_batch_would_change_must_be_in_evaluation_mode(layer: nn.Module) -> None:
    head = nn.Sequential(layer, nn.Linear(D, C))
    with pytest.raises(ValueError, match=rf"evaluation mode, got {type(layer).__name__} in training mode.*head\.eval"):
        transfer(meta(), head)
    assert transfer(meta(), head.eval()).shape == (2, C, P, P)


def test_a_head_in_training_mode_is_read_where_the_mode_changes_nothing() -> None:
    head = nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(D), nn.Linear(D, C)).train()
    assert torch.equal(transfer(meta(), head), transfer(meta(), head.eval()))


def test_maps_can_enter_a_computation_that_is_differentiated() -> None:
    weight = torch.ones(P, P, requires_grad=True)
    maps = transfer(meta(), linear_head())
    assert not maps.requires_grad
    (weight * maps).sum().backward()
    torch.testing.assert_close(weight.grad, maps.sum((0, 1)))


def test_maps_are_averaged_over_the_windows_that_the_meta_attribution_is_of() -> None:
    head = linear_head()
    u = transfer(meta(), head, TransferRule(per_patch="window"))
    for radius in (0, 1, 2):
        assert torch.equal(transfer(meta(radius=radius), head, TransferRule(per_patch="mean")), window_mean(u, radius))
        assert torch.equal(transfer(meta(radius=radius), head), shares(u, radius))


def test_a_rule_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"output: expected one of .*, got 'odds'"):
        TransferRule("odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"per_patch: expected one of .*, got True"):
        TransferRule("logit", True)  # type: ignore[arg-type]


def test_a_meta_attribution_of_a_radius_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="radius: expected at least 0, got -1"):
        meta(radius=-1)
    with pytest.raises(ValueError, match=r"radius: expected a whole number \(int\), got 1\.5"):
        meta(radius=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("per_patch", ["share", "mean", "window"])
def test_maps_of_one_class_are_those_of_all_read_there(output: Output, per_patch: PerPatch) -> None:
    rule, target = TransferRule(output, per_patch, weight_kept=0.7, weight_removed=1.3), torch.tensor([2, 0])
    for head in (linear_head(), nn.Linear(D, C, bias=False), nonlinear_head()):
        torch.testing.assert_close(
            class_maps(meta(), head, target, rule), of_class(transfer(meta(), head, rule), target)
        )


def test_a_class_or_head_that_does_not_fit_is_the_same_error_for_one_map() -> None:
    with pytest.raises(ValueError, match=r"class: expected 0 to 2, got \[3, 3\]"):
        class_maps(meta(), linear_head(), 3)
    with pytest.raises(ValueError, match=f"head: expected a head on embeddings of width {D}"):
        class_maps(meta(), nn.Linear(D + 1, C), 0)
