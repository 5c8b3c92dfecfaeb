"""Stage `backbone`: the frozen backbone of every later stage, trained here or loaded, in one format.

    python -m tve_pipeline.backbone BACKBONE

Writes models/P/backbone/BACKBONE and results/P/backbone/BACKBONE/metrics.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tve.backbones import Backbone, load_backbone, open_backbone, save_backbone
from tve.pictures import ordered_batches
from tve.shards import Shards
from tve_pipeline.backbone_training import (
    BackboneTrainingConfig,
    train_backbone,
)
from tve_pipeline.entry import run_stage
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import (
    BackboneParams,
    Count,
    Name,
    NotNegative,
    Positive,
    Section,
    Seed,
    active_profile,
    existing_path,
    load_backbone_params,
    load_section,
)

TRAIN_SPLIT = "train"
TEST_SPLIT = "test"
BATCH_SIZE = 256
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class TrainParams(Section):
    """How a backbone with `weights: train` is trained; `BackboneTrainingConfig` says what the numbers mean."""

    dataset: Name
    task: Name
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    weight_decay: NotNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    full_share: Share
    keep_fraction_low: Fraction
    keep_fraction_high: Fraction
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    warp_pixels: NotNegative
    finish_share: Share
    finish_full_share: Share
    seed: Seed

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> "TrainParams":
        low, high = self.keep_fraction_low, self.keep_fraction_high
        if low > high:
            raise ValueError(f"keep_fraction_low: expected at most keep_fraction_high, {high}, got {low}")
        return self


class BackboneStageParams(Section):
    """Section `backbone` of params.yaml."""

    train: TrainParams | None  # null where no backbone has `weights: train`


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """A split in memory."""

    images: Tensor  # normalised [M, 3, S, S], float16
    labels: Mapping[str, Tensor]  # task -> int64 [M]
    keys: list[str]


def main(argv: list[str]) -> None:
    (name,) = argv
    profile = active_profile()
    params = load_backbone_params(name)
    training = load_section("backbone", BackboneStageParams).train
    torch.manual_seed(0 if training is None else training.seed)
    if params.weights == "train":
        if training is None:
            raise ValueError(f"backbone.train: expected values, since {name} has `weights: train`, got null")
        shards = Shards.open(Path("data", profile, "shards", training.dataset))
        backbone, metrics = trained_backbone(name, params, training, shards)
    else:
        backbone = build_backbone(name, params, params.weights)
        metrics = {"weights": Path(params.weights).name}
    with whole_folder(Path("models", profile, "backbone", name)) as folder:
        save_backbone(backbone, folder)
        open_backbone(folder)  # a backbone that does not open is not published
    with whole_folder(Path("results", profile, "backbone", name)) as folder:
        write_json(folder / "metrics.json", metrics | {"weights_sha256": backbone.weights_sha256})


def build_backbone(name: str, params: BackboneParams, weights: str) -> Backbone:
    """The backbone as the parameters describe it, with these weights in place of their own.

    Raises:
        ValueError: what `load_backbone` refuses.
        FileNotFoundError: no such weights file.
    """
    return load_backbone(
        params.architecture,
        weights if weights in ("timm", "random") else existing_path(weights, "weights"),
        name=name,
        sha256=params.sha256,
        timm_args=params.timm_args,
        preprocessing=params.preprocessing.model_dump(exclude_none=True),
        patches_per_side=params.patches_per_side,
    )


def trained_backbone(
    name: str, params: BackboneParams, training: TrainParams, shards: Shards
) -> tuple[Backbone, dict[str, Any]]:
    """A backbone trained on labelled pictures, and what it can do on the test split.

    Raises:
        ValueError: a task that the pictures have no labels for, or what `train_backbone` refuses.
    """
    if training.task not in shards.tasks:
        raise ValueError(f"backbone.train.task: expected one of {', '.join(shards.tasks)}, got {training.task!r}")
    start = build_backbone(name, params, "random")
    train, test = (labelled_pictures(shards, split, start) for split in (TRAIN_SPLIT, TEST_SPLIT))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BackboneTrainingConfig(**training.model_dump(exclude={"dataset", "task"}))
    model = start.model.to(device)
    labels = train.labels[training.task]
    elapsed_s = train_backbone(model, train.images, labels, train.keys, start.patches_per_side, config)

    readings = task_readings(train.labels, training.task, len(shards.tasks[training.task]))
    accuracy = accuracies(model, test, readings)
    for task, share in accuracy.items():
        print(f"{task}: {share:.3f} of test pictures right")
    metrics = {
        "weights": "train",
        "accuracy": accuracy,
        "num_train": len(train.keys),
        "num_test": len(test.keys),
        "num_steps": config.num_steps,
        "elapsed_s": round(elapsed_s, 1),
    }
    return Backbone(start.config, model.cpu()), metrics


def labelled_pictures(shards: Shards, split: str, backbone: Backbone) -> LabelledPictures:
    """All pictures of a split, preprocessed, with their labels."""
    images, keys = [], []
    labels: dict[str, list[int]] = {task: [] for task in shards.tasks}
    for samples, images_B3SS in ordered_batches(shards, split, backbone, batch_size=BATCH_SIZE):
        images.append(images_B3SS.half())
        for sample in samples:
            keys.append(sample.key)
            assert sample.labels is not None
            for task, label in sample.labels.items():
                labels[task].append(label)
    return LabelledPictures(torch.cat(images), {task: torch.tensor(values) for task, values in labels.items()}, keys)


def task_readings(labels: Mapping[str, Tensor], task: str, num_classes: int) -> dict[str, Tensor]:
    """What a class of `task` says about other tasks, as "7 disc" says digit 7: class of `task` -> class [C].

    Only tasks that it decides: all pictures of a class have one class of them. Classes without pictures get -1.
    """
    readings = {}
    for other, other_labels_M in labels.items():
        reading_C = torch.full((num_classes,), -1)
        reading_C[labels[task]] = other_labels_M
        if torch.equal(reading_C[labels[task]], other_labels_M):
            readings[other] = reading_C
    return readings


@torch.inference_mode()
def accuracies(model: nn.Module, pictures: LabelledPictures, readings: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of pictures whose class the classifier tells, by task."""
    device = next(model.parameters()).device
    batches = torch.split(pictures.images, BATCH_SIZE)
    predicted_M = torch.cat([model(images.float().to(device)).argmax(1).cpu() for images in batches])
    return {
        task: float((reading_C[predicted_M] == pictures.labels[task]).double().mean())
        for task, reading_C in readings.items()
    }


if __name__ == "__main__":
    run_stage("backbone", main, "BACKBONE")
