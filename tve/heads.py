"""Heads: how a task reads a backbone's pooled, pre-logits embedding. Linear ones are fitted, or given as files.

A head's file is safetensors with `weight` [C, D] and, optionally, `bias` [C].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tve.backbones import Backbone
from tve.coalitions import random_halves
from tve.evaluator import CoalitionEvaluator
from tve.pictures import ordered_batches
from tve.shards import Shards


@dataclass(frozen=True, slots=True)
class EmbeddedPictures:
    """The pictures of a split as a head sees them, in the order of the shards."""

    embeddings: Tensor  # [M, D], float32, on the CPU
    labels: Mapping[str, Tensor]  # task -> int64 [M], indices of classes; empty for pictures without labels
    keys: tuple[str, ...]

    def labels_of(self, task: str) -> Tensor:
        """Class indices [M] of one task.

        Raises:
            ValueError: a task that these pictures have no labels for.
        """
        if task not in self.labels:
            known = ", ".join(sorted(self.labels)) or "none, the pictures have no labels"
            raise ValueError(f"task: expected one of the pictures' tasks ({known}), got {task!r}")
        return self.labels[task]


@torch.no_grad()
def embed_pictures(
    backbone: Backbone,
    shards: Shards,
    split: str,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    halved_by: CoalitionEvaluator | None = None,
) -> EmbeddedPictures:
    """Embeddings and labels of the pictures of a split, or of a random half of each picture's patches.

    Args:
        backbone: the frozen encoder G.
        shards: where the pictures are.
        split: which of them.
        batch_size: pictures in a pass.
        limit: only the first so many, all if None.
        halved_by: evaluates the halves, which are the same in every call; whole pictures if None.

    Raises:
        ValueError: unknown split.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(backbone.parameters()).device
    num_pictures = shards.num_samples(split)
    rows: list[Tensor] = []
    keys: list[str] = []
    labels: dict[str, list[int]] = {task: [] for task in shards.tasks}
    with tqdm(
        total=num_pictures if limit is None else min(limit, num_pictures),
        desc=f"embed {split}" if halved_by is None else f"embed halves of {split}",
        unit="picture",
        mininterval=2.0,
    ) as progress:
        for samples, images in ordered_batches(shards, split, backbone, batch_size=batch_size, limit=limit):
            images = images.to(device)
            if halved_by is None:
                rows.append(backbone(images).cpu())
            else:
                half_BPP = random_halves(len(images), backbone.patches_per_side, generator).to(device)
                rows.append(halved_by(images, half_BPP[:, None])[:, 0].cpu())
            keys += [sample.key for sample in samples]
            for sample in samples:
                for task, label in (sample.labels or {}).items():
                    labels[task].append(label)
            progress.update(len(samples))
    return EmbeddedPictures(
        torch.cat(rows), {task: torch.tensor(values) for task, values in labels.items()}, tuple(keys)
    )


def fit_linear_head(
    embeddings_MD: Tensor,
    labels_M: Tensor,
    num_classes: int,
    *,
    regularization: float = 1.0,
    max_iter: int = 1000,
) -> nn.Linear:
    """Multinomial logistic regression on standardised embeddings, as a layer on embeddings as they are.

    Args:
        embeddings_MD: pooled, pre-logits embeddings.
        labels_M: int64, 0 to num_classes - 1.
        num_classes: C; every class must occur.
        regularization: weight of the squared weights against the summed loss (1 / C of scikit-learn).
        max_iter: iterations of L-BFGS at most.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, a label out of range, a class
            without a picture.
    """
    from sklearn.linear_model import LogisticRegression

    _require_trainable(embeddings_MD, labels_M, num_classes, regularization)
    embeddings = embeddings_MD.double()
    mean_D, std_D = embeddings.mean(0), embeddings.std(0, correction=0)
    # A dimension that never changes tells nothing, and stays 0 when it is divided by 1.
    std_D = torch.where(std_D > 0, std_D, torch.ones_like(std_D))
    regression = LogisticRegression(C=1 / regularization, max_iter=max_iter)
    regression.fit(((embeddings - mean_D) / std_D).numpy(), labels_M.numpy())
    weight_CD, bias_C = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if num_classes == 2:  # one row, the logit of class 1 against class 0: half of it for, half of it against
        weight_CD, bias_C = torch.cat([-weight_CD, weight_CD]) / 2, torch.cat([-bias_C, bias_C]) / 2
    weight_CD = weight_CD / std_D
    return _linear(weight_CD, bias_C - weight_CD @ mean_D)


@torch.no_grad()
def accuracy(head: nn.Module, embeddings_MD: Tensor, labels_M: Tensor) -> float:
    """The share of pictures whose class the head predicts."""
    return float((head(embeddings_MD).argmax(1) == labels_M).double().mean())


def save_head(head: nn.Linear, path: str | Path) -> None:
    """Writes `weight` [C, D] and `bias` [C]; the same head gives the same bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}, path)


def load_head(path: str | Path, embed_dim: int | None = None) -> nn.Linear:
    """A linear head from a file, frozen.

    Args:
        path: a .safetensors file with `weight` and, optionally, `bias`.
        embed_dim: the width of the embeddings that it will read, checked if given.

    Raises:
        ValueError: a folder, no such tensors, or a head of another width.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"head: expected a .safetensors file, got {path}, which is a folder; name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"head: expected a .safetensors file, got {path}, which does not exist")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in sorted(state.items())}
    weight = state.get("weight")
    if weight is None or weight.ndim != 2 or not {"weight", "bias"} >= state.keys():
        raise ValueError(f"{path}: expected a linear head, `weight` [C, D] and `bias` [C], got {shapes}")
    bias = state.get("bias", weight.new_zeros(len(weight)))
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{path}: expected a bias for each of {len(weight)} classes, got {shapes}")
    if embed_dim is not None and weight.shape[1] != embed_dim:
        raise ValueError(
            f"{path}: expected a head on embeddings of width {embed_dim}, got one of width {weight.shape[1]}; "
            "heads read the backbone's pooled, pre-logits embedding"
        )
    return _linear(weight, bias)


def _linear(weight_CD: Tensor, bias_C: Tensor) -> nn.Linear:
    num_classes, embed_dim = weight_CD.shape
    head = nn.Linear(embed_dim, num_classes).requires_grad_(False)
    head.load_state_dict({"weight": weight_CD.float(), "bias": bias_C.float()})
    return head


def _require_trainable(embeddings_MD: Tensor, labels_M: Tensor, num_classes: int, regularization: float) -> None:
    if embeddings_MD.ndim != 2 or labels_M.shape != embeddings_MD.shape[:1]:
        raise ValueError(
            "embeddings and labels: expected [M, D] and [M], "
            f"got {list(embeddings_MD.shape)} and {list(labels_M.shape)}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if not regularization > 0:
        raise ValueError(f"regularization: expected a positive number, got {regularization}")
    if not bool(embeddings_MD.isfinite().all()):
        raise ValueError("embeddings: expected finite numbers, got NaN or infinity; look at the backbone's weights")
    present = set(labels_M.tolist())
    if outside := sorted(present - set(range(num_classes))):
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {outside}")
    if missing := sorted(set(range(num_classes)) - present):
        raise ValueError(f"labels: expected a picture of every class, got none of {missing}; use more pictures")
