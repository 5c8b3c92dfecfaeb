"""Stage `shapley`: ViT-Shapley for one backbone's own head, from the pictures that the explainer is pre-trained on.

    python -m tve_pipeline.shapley BACKBONE

The baseline that a task-specific explainer is: it is trained on the backbone's own classes, and reads no label either.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from tve.backbones import open_backbone
from tve.baselines.method import no_classifier
from tve.baselines.vit_shapley import CONFIG_FILE, VitShapleyConfig, save_vit_shapley
from tve.baselines.vit_shapley_training import train_vit_shapley
from tve.digests import file_sha256
from tve.pictures import ordered_batches, training_batches
from tve.precision import RequestedPrecision
from tve.shards import INDEX_FILE, Shards
from tve.training import Row
from tve_pipeline.entry import run_stage
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import (
    Count,
    NotNegative,
    Positive,
    RunParams,
    Section,
    Seed,
    active_profile,
    load_backbone_params,
    load_section,
)

TRAIN_SPLIT = "pretrain"
HELD_OUT_SPLIT = "pretrain_val"


class ShapleyParams(Section):
    """Section `shapley` of params.yaml; see `tve.baselines.vit_shapley.VitShapleyConfig` for what the values mean."""

    trunk: Literal["frozen", "trained"]
    width: Count
    num_heads: Count
    num_steps: Count
    batch_size: Count
    coalitions_per_picture: int = Field(ge=2)
    learning_rate: Positive
    trunk_learning_rate: NotNegative
    weight_decay: NotNegative
    warmup_steps: int = Field(ge=0)
    evaluate_every: Count
    surrogate_steps: int = Field(ge=0)
    surrogate_learning_rate: NotNegative
    num_evaluation_pictures: Count
    precision: RequestedPrecision
    memory_mib: Count
    augment: bool
    seed: Seed

    @model_validator(mode="after")
    def _fit_together(self) -> "ShapleyParams":
        self.config()
        return self

    def config(self) -> VitShapleyConfig:
        """The same, as the library takes it."""
        return VitShapleyConfig(**self.model_dump(exclude={"batch_size", "num_evaluation_pictures", "augment"}))


def main(argv: list[str]) -> None:
    (name,) = argv
    profile, run = active_profile(), load_section("run", RunParams)
    params, removal = load_section("shapley", ShapleyParams), load_backbone_params(name).removal
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = open_backbone(Path("models", profile, "backbone", name)).to(device)
    if reason := no_classifier(backbone):
        for kind, file in (("models", CONFIG_FILE), ("results", "metrics.json")):
            with whole_folder(Path(kind, profile, "shapley", name)) as folder:
                write_json(folder / file, {"not_defined": reason})
        return
    shards = Shards.open(Path("data", profile, "shards", run.pretrain_dataset))
    held_out = ordered_batches(shards, HELD_OUT_SPLIT, backbone, batch_size=64, limit=params.num_evaluation_pictures)
    batches = training_batches(
        shards, TRAIN_SPLIT, backbone, batch_size=params.batch_size, seed=params.seed, augment=params.augment
    )
    held_out_B3SS = torch.cat([images for _, images in held_out])
    result = train_vit_shapley(backbone, removal, batches, held_out_B3SS, params.config())
    with whole_folder(Path("models", profile, "shapley", name)) as folder:
        shards_sha256 = file_sha256(shards.folder / INDEX_FILE)
        save_vit_shapley(result.explainer, folder, {"held_out_r2": result.held_out_r2, "shards_sha256": shards_sha256})
    with whole_folder(Path("results", profile, "shapley", name)) as folder:
        for name_of_log, rows in (("training", result.rows), ("surrogate", result.surrogate_rows)):
            _write_rows(rows, folder / f"{name_of_log}.csv")
        metrics = {
            "held_out_r2": result.held_out_r2,
            "num_steps": params.num_steps,
            "surrogate_steps": params.surrogate_steps,
            "num_evaluation_pictures": params.num_evaluation_pictures,
            "elapsed_s": round(result.elapsed_s, 1),
        }
        write_json(folder / "metrics.json", metrics)


def _write_rows(rows: Sequence[Row], path: Path) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    run_stage("shapley", main, "BACKBONE")
