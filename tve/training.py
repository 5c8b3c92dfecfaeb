"""Label-free pre-training of an explainer: draw windows, evaluate them exactly, regress.

Each step takes a batch of pictures, draws several window centres a picture, evaluates G on the kept and on the
removed windows, and moves ĝ and ĥ towards them. Several centres share one pass of the explainer and lower the
variance of its target (stochastic amortisation, arXiv 2401.15866).

Where the backbone has a linear classifier of its own, maps of the class that it predicts are compared with the exact
ones whenever R² is measured, and their error with its bound (`tve.fidelity.bound`). The classifier is only read:
nothing of it enters the loss.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tve.coalitions import coalition_pairs
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer
from tve.fidelity.bound import explanation_bound
from tve.meta_attribution import MetaAttribution, exact_windows
from tve.objective import (
    ExplainedVariance,
    TargetScale,
    WindowTargets,
    draw_centres,
    explained_variance,
    regression_loss,
    target_scale,
    trivial_answers,
)
from tve.optimisation import adamw, descend, set_learning_rates
from tve.pictures import PictureBatch
from tve.precision import RequestedPrecision, choose_precision

LOG_EVERY = 10
NUM_BOUNDED_PICTURES = 64  # whose maps are compared with exact ones while training
Row = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The numbers of one pre-training run."""

    num_steps: int
    centres_per_image: int
    learning_rate: float
    trunk_learning_rate: float
    weight_decay: float
    warmup_steps: int
    evaluate_every: int
    checkpoint_every: int
    seed: int
    precision: RequestedPrecision
    whitening_floor: float | None = None  # see `tve.objective.target_scale`


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run learned, beside the answers that know nothing of the place."""

    explained: ExplainedVariance
    trivial: ExplainedVariance
    rows: list[Row]
    elapsed_s: float
    resumed_from_step: int


def pretrain(
    explainer: Explainer,
    evaluator: CoalitionEvaluator,
    batches: Callable[[int], Iterator[PictureBatch]],
    held_out_B3SS: Tensor,
    config: TrainingConfig,
    *,
    checkpoint: Path,
    identity: str,
) -> TrainingResult:
    """Trains the explainer in place.

    Args:
        explainer: what is trained; its backbone stays frozen.
        evaluator: exact evaluations under the operator that the explainer is for.
        batches: from a step to the batches that follow it; the same for a run that was cut short.
        held_out_B3SS: normalised pictures on which R² is measured, never trained on.
        config: the numbers.
        checkpoint: file to resume from and to save to; removed when training is complete.
        identity: digest of everything that the run depends on; a checkpoint of another identity is not resumed.

    Raises:
        NonFiniteLossError: naming the step and the keys of the batch.
    """
    device = next(explainer.backbone.parameters()).device
    run_id = hashlib.sha256(json.dumps([identity, asdict(config)], sort_keys=True).encode()).hexdigest()
    empty_D = evaluator.empty()
    exact = _exact(evaluator, explainer, held_out_B3SS, empty_D)
    explainer.mean_kept_D.copy_(exact.kept_BND.mean((0, 1)))
    explainer.empty_D.copy_(empty_D)
    scale = target_scale(exact, config.whitening_floor)
    trivial = explained_variance(trivial_answers(exact, explainer.mean_kept_D), exact)

    optimizer = _optimizer(explainer, config)
    start_step, rows, elapsed_before_s = _resume(checkpoint, run_id, explainer, optimizer)
    started = time.perf_counter()
    progress = tqdm(total=config.num_steps, initial=start_step, desc="pretrain", unit="step", mininterval=2.0)
    explainer.train()
    stream = batches(start_step)
    for step in range(start_step, config.num_steps):
        batch = next(stream)
        images = batch.images_B3SS.to(device, non_blocking=True)
        set_learning_rates(optimizer, step, config.num_steps, config.warmup_steps)
        kept_loss, removed_loss = _step(explainer, evaluator, optimizer, images, scale, config, step, batch.keys)
        progress.update()
        done = step + 1
        elapsed_s = elapsed_before_s + time.perf_counter() - started
        evaluates = done % config.evaluate_every == 0 or done == config.num_steps
        if done % LOG_EVERY == 0 or evaluates:
            row: Row = {
                "step": done,
                "elapsed_s": round(elapsed_s, 2),
                "images_per_s": round(done * len(images) / elapsed_s, 2),
                "loss": kept_loss + removed_loss,
                "loss_kept": kept_loss,
                "loss_removed": removed_loss,
            }
            if evaluates:
                predicted = predict(explainer, held_out_B3SS, len(images))
                learned = explained_variance(predicted, exact)
                row |= {f"r2_{name}": value for name, value in asdict(learned).items()}
                row |= bound_columns(predicted, exact, explainer.backbone.classifier())
                progress.set_postfix_str(f"R² ĝ {learned.kept:.3f} ĥ {learned.removed:.3f}")
            rows.append(row)
        if done % config.checkpoint_every == 0 and done < config.num_steps:
            _save_checkpoint(checkpoint, run_id, explainer, optimizer, done, rows, elapsed_s)
    progress.close()
    explainer.eval()
    explained = explained_variance(predict(explainer, held_out_B3SS, 64), exact)
    elapsed_s = elapsed_before_s + time.perf_counter() - started
    checkpoint.unlink(missing_ok=True)
    return TrainingResult(explained, trivial, rows, elapsed_s, start_step)


@torch.no_grad()
def predict(explainer: Explainer, images_B3SS: Tensor, batch_size: int) -> MetaAttribution:
    """Predicted meta-attributions of many pictures, in evaluation mode, batch by batch."""
    was_training = explainer.training
    explainer.eval()
    device = next(explainer.backbone.parameters()).device
    parts = [explainer(images.to(device)) for images in images_B3SS.split(batch_size)]
    explainer.train(was_training)
    return concatenated(parts)


def bound_columns(predicted: MetaAttribution, exact: MetaAttribution, head: nn.Linear | None) -> Row:
    """How far maps of the predicted class are from the exact ones, and what bounds that; logits, of the first pictures.

    explanation_error  mean over pictures and patches of |predicted map - exact map|
    explanation_bound  the mean of its bound by the errors of the windows
    loss_bound         the mean over pictures of the bound by their pre-training loss alone
    bound_over_error   the median over pictures of bound over error

    Args:
        predicted: the explainer's.
        exact: of the same pictures.
        head: whose classes are explained; without one there are no columns.
    """
    if head is None:
        return {}
    some, of_them = predicted[:NUM_BOUNDED_PICTURES], exact[:NUM_BOUNDED_PICTURES]
    with torch.no_grad():
        found = explanation_bound(some, of_them, head, head(of_them.full_BD).argmax(-1))
    return {
        "explanation_error": float(found.actual_B.mean()),
        "explanation_bound": float(found.bound_B.mean()),
        "loss_bound": float(found.from_loss_B.mean()),
        "bound_over_error": float((found.bound_B / found.actual_B).median()),
    }


def write_training_rows(rows: list[Row], path: Path) -> None:
    """The training curve as CSV; cells of R² and of the bound are empty except where they were measured."""
    names = ["step", "elapsed_s", "images_per_s", "loss", "loss_kept", "loss_removed"]
    names += ["r2_kept", "r2_removed", "r2_kept_centred", "r2_removed_centred"]
    names += ["explanation_error", "explanation_bound", "loss_bound", "bound_over_error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _step(
    explainer: Explainer,
    evaluator: CoalitionEvaluator,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    scale: TargetScale,
    config: TrainingConfig,
    step: int,
    keys: list[str],
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    centres = draw_centres(len(images), explainer.family.num_coalitions, config.centres_per_image, generator)
    targets = _targets(evaluator, explainer, images, centres.to(images.device))
    arithmetic = choose_precision(config.precision, images.device)
    with torch.autocast(images.device.type, arithmetic.dtype, enabled=arithmetic.precision != "float32"):
        predicted = explainer(images)
    kept_loss, removed_loss = regression_loss(predicted, targets, scale)
    loss = kept_loss + removed_loss
    descend(optimizer, loss, f"step {step}", keys, "lower the learning rate")
    return kept_loss.item(), removed_loss.item()


def _targets(evaluator: CoalitionEvaluator, explainer: Explainer, images: Tensor, centre_BM: Tensor) -> WindowTargets:
    kept_BMD, removed_BMD = evaluator(images, coalition_pairs(explainer.family, centre_BM)).chunk(2, dim=1)
    return WindowTargets(centre_BM, kept_BMD, removed_BMD)


def _exact(evaluator: CoalitionEvaluator, explainer: Explainer, images: Tensor, empty_D: Tensor) -> MetaAttribution:
    device = next(explainer.backbone.parameters()).device
    parts = [
        exact_windows(evaluator, few.to(device), explainer.family, empty_D)
        for few in tqdm(images.split(8), desc="exact windows of held-out pictures", unit="batch", mininterval=2.0)
    ]
    return concatenated(parts)


def concatenated(parts: list[MetaAttribution]) -> MetaAttribution:
    """Meta-attributions of several batches as one."""
    return MetaAttribution(
        torch.cat([part.kept_BND for part in parts]),
        torch.cat([part.removed_BND for part in parts]),
        torch.cat([part.full_BD for part in parts]),
        parts[0].empty_D,
        parts[0].radius,
    )


def _optimizer(explainer: Explainer, config: TrainingConfig) -> torch.optim.Optimizer:
    trunk: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in explainer.network.named_parameters():
        if parameter.requires_grad:
            (trunk if name.startswith("trunk.") else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "peak": config.learning_rate}]
    if trunk:
        groups.append({"params": trunk, "peak": config.trunk_learning_rate})
    return adamw(groups, config.weight_decay)


def _save_checkpoint(
    path: Path,
    run_id: str,
    explainer: Explainer,
    optimizer: torch.optim.Optimizer,
    step: int,
    rows: list[Row],
    elapsed_s: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"explainer": explainer.trained_state(), "optimizer": optimizer.state_dict()}
    torch.save({"run_id": run_id, "step": step, "rows": rows, "elapsed_s": elapsed_s} | state, partial)
    os.replace(partial, path)


def _resume(
    path: Path, run_id: str, explainer: Explainer, optimizer: torch.optim.Optimizer
) -> tuple[int, list[Row], float]:
    if not path.is_file():
        return 0, [], 0.0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["run_id"] != run_id:
        tqdm.write(f"{path}: a checkpoint of another configuration; starting anew")
        return 0, [], 0.0
    explainer.load_trained_state(saved["explainer"])
    optimizer.load_state_dict(saved["optimizer"])
    tqdm.write(f"{path}: resuming after step {saved['step']}")
    return saved["step"], saved["rows"], saved["elapsed_s"]
