"""Pre-training of an explainer for one backbone, from unlabelled pictures: stages `pretrain` and `two_networks`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from tve.backbones import Backbone, open_backbone
from tve.digests import file_sha256
from tve.evaluator import CoalitionEvaluator
from tve.explainer import Explainer, ExplainerConfig
from tve.mae import MaskedAutoencoder, initialise_from_file, initialise_from_mae, pretrain_mae
from tve.pictures import ordered_batches, training_batches
from tve.precision import RequestedPrecision
from tve.removal import Removal
from tve.shards import INDEX_FILE, Shards
from tve.training import TrainingConfig, TrainingResult, pretrain, write_training_rows
from tve.two_networks import TwoNetworks, TwoNetworksConfig
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import (
    Count,
    NotNegative,
    Positive,
    RunParams,
    Section,
    Seed,
    active_profile,
    existing_path,
    load_backbone_params,
    load_section,
)
from tve_pipeline.trained import save_trained

TRAIN_SPLIT = "pretrain"
HELD_OUT_SPLIT = "pretrain_val"


class TwoNetworksParams(Section):
    """The paper's form; see `tve.two_networks`."""

    embed_dim: Count
    encoder_depth: Count
    decoder_depth: int = Field(ge=0)
    num_heads: Count
    mixing_layers: Count
    differences: bool
    decoder_embed_dim: Count | None = None
    decoder_num_heads: Count | None = None

    @model_validator(mode="after")
    def _widths_fit_heads(self) -> "TwoNetworksParams":
        TwoNetworksConfig(**self.model_dump())
        return self


class MaeParams(Section):
    """Where the two networks start: a weights file, or a short masked-autoencoder training of their own."""

    weights: str | None
    num_steps: int = Field(ge=0)
    batch_size: Count
    learning_rate: Positive
    mask_ratio: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _weights_or_steps(self) -> "MaeParams":
        if self.weights is None and self.num_steps == 0:
            raise ValueError("num_steps: expected at least 1 where `weights` is null, got 0; or set `mae` to null")
        return self


class PretrainParams(Section):
    """Section `pretrain` of params.yaml."""

    form: Literal["shared", "two_networks"]
    trunk: Literal["frozen", "trained"]
    radius: int = Field(ge=0)
    num_levels: Count
    width: Count
    depth: int = Field(ge=0)
    reread_blocks: int = Field(ge=0)
    trained_blocks: Count | None = None  # of a trained trunk: the last blocks alone; null: all of it
    num_steps: Count
    batch_size: Count
    centres_per_image: Count
    learning_rate: Positive
    trunk_learning_rate: NotNegative
    weight_decay: NotNegative
    whitening_floor: Positive | None
    warmup_steps: int = Field(ge=0)
    evaluate_every: Count
    checkpoint_every: Count
    num_evaluation_pictures: Count
    memory_mib: Count
    precision: RequestedPrecision
    augment: bool
    seed: Seed
    mae: MaeParams | None
    two_networks: TwoNetworksParams | None

    @model_validator(mode="after")
    def _warmup_ends(self) -> "PretrainParams":
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps: expected at most num_steps, {self.num_steps}, got {self.warmup_steps}")
        return self

    @model_validator(mode="after")
    def _explainer_can_be_built(self) -> "PretrainParams":
        explainer_config(self, "drop")
        return self


def train_explainer(name: str, params: PretrainParams, stage: str, section: str) -> None:
    """Pre-trains an explainer for the backbone `name`, into models/P/STAGE/NAME and results/P/STAGE/NAME.

    `section` is where params.yaml says it, for messages.
    """
    profile, removal = active_profile(), load_backbone_params(name).removal
    shards_folder = Path("data", profile, "shards", load_section("run", RunParams).pretrain_dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(params.seed)

    shards = Shards.open(shards_folder)
    backbone = open_backbone(Path("models", profile, "backbone", name)).to(device)
    explainer = build_explainer(backbone, params, removal).to(device)
    initialisation = initialise_two_networks(explainer, shards, params, section)
    checkpoint = Path(".tve", "checkpoints", profile, stage, f"{name}.pt")
    result = run(explainer, shards, params, checkpoint, index_sha256=file_sha256(shards_folder / INDEX_FILE))
    with whole_folder(Path("models", profile, stage, name)) as folder:
        save_trained(explainer, folder)
    with whole_folder(Path("results", profile, stage, name)) as folder:
        write_training_rows(result.rows, folder / "training.csv")
        write_json(folder / "metrics.json", metrics_of(explainer, result, params, initialisation))


def build_explainer(backbone: Backbone, params: PretrainParams, removal: Removal) -> Explainer:
    """An untrained explainer as the parameters describe it."""
    return Explainer(backbone, explainer_config(params, removal))


def explainer_config(params: PretrainParams, removal: Removal) -> ExplainerConfig:
    """What section `pretrain` says of the explainer.

    Raises:
        ValueError: settings that do not go together.
    """
    return ExplainerConfig(
        radius=params.radius,
        removal=removal,
        form=params.form,
        trunk=params.trunk,
        num_levels=params.num_levels,
        width=params.width,
        depth=params.depth,
        reread_blocks=params.reread_blocks,
        trained_blocks=params.trained_blocks,
        two_networks=TwoNetworksConfig(**params.two_networks.model_dump())
        if params.two_networks
        else TwoNetworksConfig(),
    )


def initialise_two_networks(explainer: Explainer, shards: Shards, params: PretrainParams, section: str) -> str:
    """Starts the paper's networks from a masked autoencoder where one is asked for; says what was done."""
    network = explainer.network
    if not isinstance(network, TwoNetworks):
        end = "" if params.trained_blocks is None else f", last {params.trained_blocks} blocks"
        return f"backbone features ({params.trunk} trunk{end})"
    if params.mae is None:
        return network.initialisation
    backbone = explainer.backbone
    preprocessing = backbone.config.preprocessing
    if params.mae.weights is not None:
        path = existing_path(params.mae.weights, f"{section}.mae.weights")
        initialise_from_file(network, path, mean=preprocessing.mean, std=preprocessing.std)
        return network.initialisation
    device = next(backbone.parameters()).device
    mae = MaskedAutoencoder(backbone.image_size, backbone.patches_per_side, explainer.config.two_networks).to(device)
    batches = training_batches(
        shards,
        TRAIN_SPLIT,
        backbone,
        batch_size=params.mae.batch_size,
        seed=params.seed,
        augment=params.augment,
    )
    pretrain_mae(
        mae,
        (batch.images_B3SS.to(device) for batch in batches),
        params.mae.num_steps,
        params.mae.learning_rate,
        params.mae.mask_ratio,
        seed=params.seed,
        precision=params.precision,
    )
    initialise_from_mae(network, mae)
    return network.initialisation


def run(
    explainer: Explainer, shards: Shards, params: PretrainParams, checkpoint: Path, *, index_sha256: str
) -> TrainingResult:
    """Pre-trains, resuming a run that was cut short with the same parameters, backbone and shards."""
    backbone = explainer.backbone
    evaluator = CoalitionEvaluator(
        backbone, explainer.config.removal, memory_mib=params.memory_mib, precision=params.precision
    )
    held_out = torch.cat(
        [
            images
            for _, images in ordered_batches(
                shards, HELD_OUT_SPLIT, backbone, batch_size=64, limit=params.num_evaluation_pictures
            )
        ]
    )
    config = TrainingConfig(
        num_steps=params.num_steps,
        centres_per_image=params.centres_per_image,
        learning_rate=params.learning_rate,
        trunk_learning_rate=params.trunk_learning_rate,
        weight_decay=params.weight_decay,
        warmup_steps=params.warmup_steps,
        evaluate_every=params.evaluate_every,
        checkpoint_every=params.checkpoint_every,
        seed=params.seed,
        whitening_floor=params.whitening_floor,
        precision=params.precision,
    )
    return pretrain(
        explainer,
        evaluator,
        lambda step: training_batches(
            shards,
            TRAIN_SPLIT,
            backbone,
            batch_size=params.batch_size,
            seed=params.seed,
            augment=params.augment,
            start_step=step,
        ),
        held_out,
        config,
        checkpoint=checkpoint,
        identity=json.dumps([params.model_dump(), backbone.weights_sha256, index_sha256], sort_keys=True),
    )


def metrics_of(
    explainer: Explainer, result: TrainingResult, params: PretrainParams, initialisation: str
) -> dict[str, Any]:
    """What metrics.json states of a training."""
    return {f"r2_{key}": value for key, value in asdict(result.explained).items()} | {
        "trivial_mean_r2_kept": result.trivial.kept,
        "trivial_full_r2_removed": result.trivial.removed,
        "num_steps": params.num_steps,
        "batch_size": params.batch_size,
        "centres_per_image": params.centres_per_image,
        "num_evaluation_pictures": params.num_evaluation_pictures,
        "elapsed_s": round(result.elapsed_s, 1),
        "resumed_from_step": result.resumed_from_step,
        "initialisation": initialisation,
        "form": params.form,
        "reread_blocks": explainer.reread_blocks,
        "trained_blocks": params.trained_blocks if params.form == "shared" else None,
        "removal": explainer.config.removal,
    }
