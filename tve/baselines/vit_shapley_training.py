"""The training of ViT-Shapley: first a surrogate, then the network of `tve.baselines.vit_shapley`; no label is read.

    loss  = E ||v(S) - v(∅) - sum over i in S of phi_i||^2     |S| = k in proportion to 1 / (k (N - k)), 0 < k < N

The minimum of the loss is the Shapley value. v comes from a surrogate: the backbone with its classifier, tuned until
its output on a part of a picture is near the backbone's on the whole one. A backbone that saw parts of pictures when
it was trained can be its own surrogate (no surrogate steps). The paper's loss (arXiv 2206.05282) has a factor N more,
and the mean over classes where a sum stands here: constants.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from tve.backbones import Backbone, trainable_copy
from tve.baselines.method import generator_of
from tve.baselines.vit_shapley import (
    NAME,
    ShapleyExplainer,
    VitShapleyConfig,
    device_of,
    own_head,
    require_pairs,
    untrained,
)
from tve.evaluator import CoalitionEvaluator, require_droppable
from tve.optimisation import adamw, descend, set_learning_rates
from tve.pictures import PictureBatch
from tve.plain_vits import pools_prefix
from tve.precision import choose_precision
from tve.removal import Removal, zero_pixels
from tve.training import LOG_EVERY, Row

HELD_OUT_BATCH = 64


@dataclass(frozen=True, slots=True)
class ShapleyResult:
    """What a training made. R² is `explained_gain` of the held-out pictures."""

    explainer: ShapleyExplainer
    held_out_r2: float
    rows: list[Row]  # step, elapsed_s, images_per_s, loss (mean since the row before), held_out_r2 where measured
    surrogate_rows: list[Row]  # the same of the surrogate; loss is the divergence, in nats
    elapsed_s: float


def train_vit_shapley(
    backbone: Backbone,
    removal: Removal,
    batches: Iterator[PictureBatch],
    held_out_B3SS: Tensor,
    config: VitShapleyConfig,
) -> ShapleyResult:
    """Trains a surrogate, if the configuration asks for one, then the network that predicts Shapley values.

    Args:
        backbone: with one linear classifier; it stays as it is.
        removal: what it means that a patch is absent.
        batches: normalised pictures, as many batches as there are steps of both; the surrogate takes the first ones.
        held_out_B3SS: normalised pictures on which R² is measured, never trained on.
        config: the network and the numbers.

    Raises:
        NonFiniteLossError: naming the step and the keys of the batch.
        ValueError: a backbone without one linear classifier, or one whose tokens cannot be left out where the removal
            operator is `drop`.
    """
    started = time.perf_counter()
    device, patches = device_of(backbone), backbone.patches_per_side
    surrogate, surrogate_rows = backbone, list[Row]()
    if config.surrogate_steps:
        surrogate, surrogate_rows = train_surrogate(backbone, removal, batches, config)
    evaluator = CoalitionEvaluator(surrogate, removal, memory_mib=config.memory_mib, precision=config.precision)
    explainer = untrained(backbone, surrogate, removal, config)

    def loss_of(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
        drawn = shapley_coalitions(len(images_B3SS), config.coalitions_per_picture, patches, generator)
        present_BKPP = drawn.to(device)
        gain_BKC = coalition_values(evaluator, images_B3SS, present_BKPP) - explainer.empty_C
        with _autocast(device, config):
            phi_BNC = explainer(images_B3SS).phi_BNC
        return shapley_loss(phi_BNC, present_BKPP, gain_BKC)

    measured = _held_out_measure(explainer, evaluator, held_out_B3SS.to(device), config)
    rows = _optimise(loss_of, _groups(explainer, config), batches, config.num_steps, config, NAME, device, measured)
    r2 = rows[-1]["held_out_r2"]
    assert r2 is not None
    return ShapleyResult(explainer.eval(), r2, rows, surrogate_rows, time.perf_counter() - started)


def train_surrogate(
    backbone: Backbone, removal: Removal, batches: Iterator[PictureBatch], config: VitShapleyConfig
) -> tuple[Backbone, list[Row]]:
    """A copy of the backbone, tuned on parts of pictures of every size to what the backbone says of the whole ones.

    Loss: KL(p(. | x) of the backbone, p(. | x_S) of the copy), nats; |S| uniform.

    Args:
        backbone: with one linear classifier; it stays as it is.
        removal: what it means that a patch is absent.
        batches: normalised pictures, a batch for each surrogate step.
        config: the numbers.

    Raises:
        ValueError, NonFiniteLossError: as `train_vit_shapley`.
    """
    head, device = own_head(backbone), device_of(backbone)
    if removal == "drop":
        _require_gatherable(backbone)
    student = trainable_copy(backbone)
    student_head = own_head(student)

    def loss_of(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            target_BC = head(backbone(images_B3SS)).log_softmax(-1)
        present_BPP = uniform_coalitions(len(images_B3SS), backbone, removal, generator).to(device)
        with _autocast(device, config):
            logits_BC = student_head(masked_embeddings(student, removal, images_B3SS, present_BPP))
        given_BC = logits_BC.float().log_softmax(-1)
        return nn.functional.kl_div(given_BC, target_BC, reduction="batchmean", log_target=True)

    groups = [{"params": list(student.parameters()), "peak": config.surrogate_learning_rate}]
    rows = _optimise(loss_of, groups, batches, config.surrogate_steps, config, "surrogate", device)
    return Backbone(backbone.config, student.model), rows


def shapley_coalitions(
    num_pictures: int, num_coalitions: int, patches_per_side: int, generator: torch.Generator
) -> Tensor:
    """Coalitions bool [B, K, P, P] of the Shapley kernel: K / 2 drawn by a CPU generator, then their complements.

    Size k has a probability in proportion to 1 / (k (N - k)), 0 < k < N; all sets of one size are alike.

    Raises:
        ValueError: an odd number of coalitions, or a grid of one patch.
    """
    require_pairs(num_coalitions)
    num_patches = patches_per_side**2
    if num_patches < 2:
        raise ValueError(f"patches_per_side: expected at least 2, got {patches_per_side}; one patch has no coalitions")
    size_S = torch.arange(1, num_patches, dtype=torch.float64)
    weight_S = 1 / (size_S * (num_patches - size_S))
    drawn = num_pictures * num_coalitions // 2
    size_M1 = 1 + torch.multinomial(weight_S, drawn, replacement=True, generator=generator)[:, None]
    present_MN = _random_ranks(drawn, num_patches, generator) < size_M1
    present_BKPP = present_MN.reshape(num_pictures, num_coalitions // 2, patches_per_side, patches_per_side)
    return torch.cat([present_BKPP, ~present_BKPP], dim=1)


def uniform_coalitions(num_pictures: int, backbone: Backbone, removal: Removal, generator: torch.Generator) -> Tensor:
    """A coalition of each picture, bool [B, P, P], whose size is uniform, by a CPU generator.

    Under `drop` all have the same size, so that what is left of each picture is equally long. The empty coalition is
    among them wherever it can be embedded.
    """
    patches = backbone.patches_per_side
    smallest = 0 if removal == "zero" or pools_prefix(backbone.model) else 1
    num_sizes = num_pictures if removal == "zero" else 1
    size_B1 = torch.randint(smallest, patches**2 + 1, (num_sizes, 1), generator=generator)
    return (_random_ranks(num_pictures, patches**2, generator) < size_B1).reshape(-1, patches, patches)


def masked_embeddings(backbone: Backbone, removal: Removal, images_B3SS: Tensor, present_BPP: Tensor) -> Tensor:
    """Embeddings [B, D] of a coalition of each picture, with gradients, unlike those of a `CoalitionEvaluator`.

    Under `drop` all coalitions have the same size, and the backbone is a plain vision transformer.
    """
    if removal == "zero":
        embeddings: Tensor = backbone(zero_pixels(images_B3SS, present_BPP))
        return embeddings
    model: Any = backbone.model
    tokens_BTD = model._pos_embed(model.patch_embed(images_B3SS))
    tokens_per_patch = model.patch_embed.grid_size[0] // backbone.patches_per_side
    present_BN = present_BPP.repeat_interleave(tokens_per_patch, 1).repeat_interleave(tokens_per_patch, 2).flatten(1)
    index_BK = present_BN.nonzero()[:, 1].reshape(len(present_BN), int(present_BN[0].sum()))
    prefix, patches = tokens_BTD.tensor_split([model.num_prefix_tokens], dim=1)
    kept = torch.cat([prefix, patches.take_along_dim(index_BK[..., None], 1)], dim=1)
    return backbone.pool(model.norm(model.blocks(model.norm_pre(kept))))


def coalition_values(evaluator: CoalitionEvaluator, images_B3SS: Tensor, present_BKPP: Tensor) -> Tensor:
    """v(S) [B, K, C]: the probabilities of the evaluator's backbone's own classes."""
    with torch.no_grad():
        logits_BKC: Tensor = own_head(evaluator.backbone)(evaluator(images_B3SS, present_BKPP))
        return logits_BKC.softmax(-1)


def shapley_loss(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> Tensor:
    """The mean over pictures and coalitions of ||v(S) - v(∅) - sum over i in S of phi_i||^2, summed over classes.

    Args:
        phi_BNC: predicted.
        present_BKPP: coalitions of the Shapley kernel.
        gain_BKC: v(S) - v(∅).
    """
    return _residuals(phi_BNC, present_BKPP, gain_BKC).square().sum(-1).mean()


def explained_gain(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> float:
    """R² of v(S) - v(∅) against the trivial answer, which shares v(Z) - v(∅) equally among the patches.

        1 - sum ||v(S) - v(∅) - sum over i in S of phi_i||^2 / sum ||v(S) - v(∅) - (v(Z) - v(∅)) |S| / N||^2

    Over many coalitions of the Shapley kernel no values that sum to v(Z) - v(∅) do better than the Shapley values; as
    far as patches interact, these too stay below 1.
    """
    equal_BNC = phi_BNC.mean(1, keepdim=True).expand_as(phi_BNC)
    left, of = (_residuals(each, present_BKPP, gain_BKC).double().square().sum() for each in (phi_BNC, equal_BNC))
    return float(1 - left / of)


def _held_out_measure(
    explainer: ShapleyExplainer, evaluator: CoalitionEvaluator, images_B3SS: Tensor, config: VitShapleyConfig
) -> Callable[[], Row]:
    """Measures R² on pictures whose coalitions are drawn and evaluated here, once."""
    patches, generator = explainer.backbone.patches_per_side, generator_of(config.seed, NAME, "held out")
    drawn = shapley_coalitions(len(images_B3SS), config.coalitions_per_picture, patches, generator)
    present_BKPP = drawn.to(images_B3SS.device)
    pairs = list(zip(images_B3SS.split(HELD_OUT_BATCH), present_BKPP.split(HELD_OUT_BATCH), strict=True))
    gain_BKC = torch.cat([coalition_values(evaluator, *pair) for pair in pairs]) - explainer.empty_C

    @torch.no_grad()
    def measured() -> Row:
        phi_BNC = torch.cat([explainer(images).phi_BNC for images, _ in pairs])
        return {"held_out_r2": explained_gain(phi_BNC, present_BKPP, gain_BKC)}

    return measured


def _groups(explainer: ShapleyExplainer, config: VitShapleyConfig) -> list[dict[str, Any]]:
    network = explainer.network
    rest = [each for name, each in network.named_parameters() if not name.startswith("trunk.")]
    groups: list[dict[str, Any]] = [{"params": rest, "peak": config.learning_rate}]
    if network.trunk is not None:
        groups.append({"params": list(network.trunk.parameters()), "peak": config.trunk_learning_rate})
    return groups


def _optimise(
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    groups: list[dict[str, Any]],
    batches: Iterator[PictureBatch],
    num_steps: int,
    config: VitShapleyConfig,
    name: str,
    device: torch.device,
    measured: Callable[[], Row] = dict,
) -> list[Row]:
    """AdamW on the loss of a batch of pictures and a generator of its own; the log of every few steps."""
    optimizer = adamw(groups, config.weight_decay)
    rows: list[Row] = []
    losses: list[float] = []  # since the last row
    started = time.perf_counter()
    for step in tqdm(range(num_steps), desc=name, unit="step", mininterval=2.0):
        batch = next(batches)
        set_learning_rates(optimizer, step, num_steps, config.warmup_steps)
        loss = loss_of(batch.images_B3SS.to(device), generator_of(config.seed, name, str(step)))
        descend(optimizer, loss, f"{name}, step {step}", batch.keys, "lower the learning rate")
        losses.append(loss.item())
        done = step + 1
        evaluates = done % config.evaluate_every == 0 or done == num_steps
        if done % LOG_EVERY == 0 or evaluates:
            elapsed_s = time.perf_counter() - started
            row: Row = {"step": done, "elapsed_s": round(elapsed_s, 2), "loss": sum(losses) / len(losses)}
            losses.clear()
            row["images_per_s"] = round(done * len(batch.keys) / elapsed_s, 2)
            rows.append(row | (measured() if evaluates else {}))
    return rows


def _residuals(phi_BNC: Tensor, present_BKPP: Tensor, gain_BKC: Tensor) -> Tensor:
    return gain_BKC - present_BKPP.flatten(2).to(phi_BNC.dtype) @ phi_BNC


def _random_ranks(num_rows: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """A random order of the patches in each row, int64 [M, N]."""
    return torch.rand(num_rows, num_patches, generator=generator).argsort(1).argsort(1)


def _require_gatherable(backbone: Backbone) -> None:
    """Raises ValueError unless some of the tokens can be taken through the model as a shorter sequence."""
    require_droppable(backbone)
    model = backbone.model
    if type(model) is not VisionTransformer or model.pos_embed is None:
        raise ValueError(
            f"surrogate_steps: expected 0 under 'drop' for {backbone.config.name} ({type(model).__name__}), which has "
            "no absolute positions or other tokens than timm's VisionTransformer; set it to 0, or use 'zero'"
        )


def _autocast(device: torch.device, config: VitShapleyConfig) -> torch.autocast:
    """The arithmetic of passes that are trained."""
    arithmetic = choose_precision(config.precision, device)
    return torch.autocast(device.type, arithmetic.dtype, enabled=arithmetic.precision != "float32")
