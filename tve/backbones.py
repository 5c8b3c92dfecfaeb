"""Frozen backbones: any timm model as an encoder G from a picture to its pooled, pre-logits embedding.

A backbone carries its own preprocessing (mean, std, interpolation, crop), which is used everywhere, and the digest
of its weights, by which everything made from it is tied to it.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.layers.helpers import to_2tuple
from torch import Tensor, nn

from tve.weights import load_state, load_weights, state_digest

HIERARCHICAL_PATCH_SIZE = 16
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "backbone.json"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes a tensor; what the backbone was trained with."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """What it takes to build a backbone again, apart from its weights."""

    name: str
    architecture: str
    patches_per_side: int
    preprocessing: Preprocessing
    timm_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Features:
    """What a frozen backbone computes on the way to its embedding, and the embedding itself."""

    levels: tuple[Tensor, ...]  # each [B, W_level, P, P]
    embedding_BD: Tensor
    entering: tuple[Tensor, ...] = ()  # tokens [B, prefix + T, W] that enter each of the last blocks asked for


class Backbone(nn.Module):
    """A frozen timm model. `backbone(images)` maps normalised images [B, 3, S, S] to embeddings [B, D]."""

    def __init__(self, config: BackboneConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.weights_sha256 = state_digest(model.state_dict())
        preprocessing = asdict(config.preprocessing)
        size = preprocessing.pop("image_size")
        self.transform = create_transform(input_size=(3, size, size), **preprocessing, is_training=False)

    @property
    def image_size(self) -> int:
        return self.config.preprocessing.image_size

    @property
    def patches_per_side(self) -> int:
        return self.config.patches_per_side

    @property
    def embed_dim(self) -> int:
        # What a head before the classifier makes of the features, where the model has one.
        width = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        return int(width)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "Backbone":
        """A frozen backbone never leaves evaluation mode."""
        return super().train(False)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Embeddings [B, D].

        Raises:
            ValueError: images of another form than [B, 3, S, S], floating and finite.
        """
        self.require_images(images_B3SS)
        return self.pool(self.model.forward_features(images_B3SS))  # type: ignore[operator]

    def pool(self, features: Tensor) -> Tensor:
        """The embedding from the model's last features, as its own classifier would read it."""
        embedding: Tensor = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embedding

    def features(self, images_B3SS: Tensor, num_levels: int, num_entered: int = 0) -> Features:
        """The embedding together with `num_levels` intermediate maps on the patch grid, from one forward pass.

        Plain transformers: `num_levels` blocks, evenly spaced, the last one included. Hierarchical models: the stages
        that `level_indices` names. Of a map finer than the grid each patch has all its places, stacked as channels, so
        that nothing of what lies within a patch is lost; a coarser one is upsampled.

        Args:
            images_B3SS: normalised pictures.
            num_levels: how many maps.
            num_entered: of a plain transformer with prefix tokens, of how many of the last blocks also the tokens
                that enter them; fewer than it has blocks.

        Raises:
            ValueError: as `forward` and `level_indices` do, and more blocks than that, or any where there is no prefix.
        """
        self.require_images(images_B3SS)
        levels = self.level_indices(num_levels)
        last = len(self.model.feature_info) - 1  # type: ignore[arg-type]
        most = last if getattr(self.model, "num_prefix_tokens", 0) else 0
        if not 0 <= num_entered <= most:
            raise ValueError(f"num_entered: expected 0 to {most} for {self.config.name}, got {num_entered}")
        before = list(range(last - num_entered, last))
        indices = sorted({*levels, *before})
        final, found = self.model.forward_intermediates(  # type: ignore[operator]
            images_B3SS, indices=indices, output_fmt="NCHW", **({"return_prefix_tokens": True} if before else {})
        )
        maps = dict(zip(indices, found, strict=True))
        entering = tuple(torch.cat([maps[i][1], maps[i][0].flatten(2).transpose(1, 2)], 1) for i in before)
        on_grid = tuple(self.on_grid(maps[i][0] if before else maps[i]) for i in levels)
        return Features(on_grid, self.pool(final), entering)

    def level_channels(self, num_levels: int) -> list[int]:
        """The channels of the maps that `features` returns, in order.

        Raises:
            ValueError: as `level_indices` does.
        """
        stages: list[dict[str, int]] = list(self.model.feature_info)  # type: ignore[arg-type]
        channels = []
        for stage in (stages[index] for index in self.level_indices(num_levels)):
            places = self._places_across_patch(self.image_size // stage["reduction"])
            channels.append(stage["num_chs"] * max(places, 1) ** 2)
        return channels

    def level_indices(self, num_levels: int) -> list[int]:
        """Which of the model's blocks or stages `features` returns, in order.

        Of a hierarchical model these are the stages with a P x P grid and the last one, whatever `num_levels` is, and
        as many of the finer ones as it leaves room for, coarse ones first.

        Raises:
            ValueError: not one level, more levels than a plain transformer has blocks, or no stage with a P x P grid.
        """
        reductions = [int(info["reduction"]) for info in self.model.feature_info]  # type: ignore[union-attr]
        last = len(reductions) - 1
        if len(set(reductions)) == 1:
            if not 1 <= num_levels <= last + 1:
                raise ValueError(f"num_levels: expected 1 to {last + 1} for {self.config.name}, got {num_levels}")
            return sorted({round((step + 1) * (last + 1) / num_levels) - 1 for step in range(num_levels)})
        if num_levels < 1:
            raise ValueError(f"num_levels: expected 1 or more for {self.config.name}, got {num_levels}")
        grids = [self.image_size / reduction / self.patches_per_side for reduction in reductions]
        if 1 not in grids:
            sides = [self.image_size // reduction for reduction in reductions]
            raise ValueError(
                f"{self.config.name}: expected a stage with a {self.patches_per_side} x {self.patches_per_side} grid, "
                f"got stages of {sides} per side; choose patches_per_side among them"
            )
        always = {*(i for i, grid in enumerate(grids) if grid == 1), last}
        finer = [i for i, grid in enumerate(grids) if grid > 1 and grid.is_integer()]
        return sorted({*always, *finer[::-1][: max(num_levels - len(always), 0)]})

    def _places_across_patch(self, side: int) -> int:
        """How many places of a map [.., side, side] a patch has in each direction; 0 where they do not divide."""
        return 0 if side % self.patches_per_side else side // self.patches_per_side

    def on_grid(self, level_BWHH: Tensor) -> Tensor:
        """A map on the patch grid: each patch's places stacked as channels where they divide, else resized."""
        if places := self._places_across_patch(level_BWHH.shape[-1]):
            return nn.functional.pixel_unshuffle(level_BWHH, places)
        size = (self.patches_per_side, self.patches_per_side)
        return nn.functional.interpolate(level_BWHH, size, mode="bilinear")

    def classifier(self) -> nn.Linear | None:
        """The head H_g that the backbone was trained with, or None where it has no single linear one.

        Of a distilled model's two heads, one to a token, the mean is the classifier's output; where they are equal,
        that is what one of them says of the embedding, the mean token.
        """
        head = self.model.get_classifier()  # type: ignore[operator]
        if isinstance(head, tuple) and len({state_digest(each.state_dict()) for each in head}) == 1:
            head = head[0]
        return head if isinstance(head, nn.Linear) else None

    def preprocess(self, image: Image.Image) -> Tensor:
        """One normalised picture [3, S, S], float32.

        Raises:
            ValueError: anything but a PIL image.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"image: expected a PIL image, got {type(image).__name__}; open it with PIL.Image.open, "
                "or make one from an array with PIL.Image.fromarray"
            )
        tensor: Tensor = self.transform(image.convert("RGB"))
        return tensor

    def pixels(self, image_3SS: Tensor) -> NDArray[np.uint8]:
        """What the model saw of a normalised picture, as pixels uint8 [S, S, 3].

        Raises:
            ValueError: a picture of another form than [3, S, S].
        """
        if isinstance(image_3SS, Tensor) and image_3SS.ndim == 4:
            raise ValueError(
                f"image: expected one picture [3, S, S], got {list(image_3SS.shape)}; take one of the batch"
            )
        self.require_images(image_3SS[None] if isinstance(image_3SS, Tensor) else image_3SS)
        preprocessing = self.config.preprocessing
        mean, std = (image_3SS.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        pixels_3SS = ((image_3SS * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels_3SS.permute(1, 2, 0).cpu().numpy()

    def require_images(self, images: Tensor) -> None:
        """Raises ValueError unless these are normalised pictures: a tensor [B, 3, S, S], floating and finite."""
        size = self.image_size
        if not isinstance(images, Tensor):
            got = type(images).__name__
        elif not images.is_floating_point() or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        elif not bool(images.isfinite().all()):
            got = f"NaN or infinity in picture {int((~images.isfinite()).flatten(1).any(1).nonzero()[0])}"
        else:
            return
        raise ValueError(
            f"images: expected [B, 3, {size}, {size}] for {self.config.name}, floating and finite, got {got}; "
            "use backbone.preprocess on a PIL image"
        )


def load_backbone(
    architecture: str,
    weights: str | Path = "timm",
    *,
    name: str | None = None,
    sha256: str | None = None,
    timm_args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    patches_per_side: int | None = None,
) -> Backbone:
    """Any timm model as a frozen backbone.

    Args:
        architecture: a timm model name, with or without a pretrained tag.
        weights: "timm" for timm's pretrained weights, "random" for an untrained model, or a .safetensors/.pth file.
        name: what the backbone is called in results; the architecture by default.
        sha256: expected digest of the weights file; with "timm", of the weights themselves (`weights_sha256`).
        timm_args: further arguments of `timm.create_model`, such as img_size or depth.
        preprocessing: what differs from timm's own configuration (mean, std, interpolation, crop_pct).
        patches_per_side: the grid of explanations; by default the model's own patches, 16 pixels for hierarchical
            models, or where these do not divide the picture the nearest number that does.

    Raises:
        ValueError: unknown architecture, weights that do not fit, another digest, a grid that does not divide.
        FileNotFoundError: no such weights file.
    """
    arguments = dict(timm_args or {})
    model = _create(architecture, pretrained=str(weights) == "timm", arguments=arguments)
    if str(weights) not in ("timm", "random"):
        load_weights(model, Path(weights), sha256, architecture)
    settings = _preprocessing(model, arguments, dict(preprocessing or {}))
    grid = patches_per_side if patches_per_side is not None else _default_grid(model, settings.image_size)
    if grid < 1 or settings.image_size % grid:
        raise ValueError(f"patches_per_side: expected a divisor of {settings.image_size} pixels, got {grid}")
    backbone = Backbone(BackboneConfig(name or architecture, architecture, grid, settings, arguments), model)
    if str(weights) == "timm" and sha256 is not None and sha256 != backbone.weights_sha256:
        raise ValueError(f"{architecture}: expected weights {sha256}, timm gave {backbone.weights_sha256}")
    return backbone


def trainable_copy(backbone: Backbone) -> Backbone:
    """A copy whose weights take gradients."""
    return copy.deepcopy(backbone).requires_grad_(True)


def save_backbone(backbone: Backbone, folder: str | Path) -> None:
    """Writes model.safetensors and backbone.json; the same weights give the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous().cpu() for key, tensor in backbone.model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    document = asdict(backbone.config) | {"weights_sha256": backbone.weights_sha256}
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def open_backbone(folder: str | Path) -> Backbone:
    """The backbone that `save_backbone` wrote.

    Raises:
        FileNotFoundError: no backbone there.
        ValueError: damaged files, or weights that are not those that the configuration names.
    """
    config_file, weights_file = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
    with damage_named(config_file):
        document = json.loads(config_file.read_text())
        expected = document.pop("weights_sha256")
        document["preprocessing"] = _preprocessing_from(document["preprocessing"])
        config = BackboneConfig(**document)
    model = _create(config.architecture, pretrained=False, arguments=config.timm_args)
    with damage_named(weights_file):
        state = load_file(weights_file)
    load_state(model, state, weights_file, config.architecture)
    backbone = Backbone(config, model)
    if backbone.weights_sha256 != expected:
        raise ValueError(f"{weights_file}: expected weights {expected}, got {backbone.weights_sha256}; export again")
    return backbone


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Makes a ValueError that names the file of what reading a damaged export raises."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path}: not an export, or damaged; export again ({error!r})") from error


def _create(architecture: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    base = architecture.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=8)
        close = close or timm.list_models(f"*{base.split('_')[0]}*")[:8]
        hint = f"; similar names: {', '.join(close)}" if close else "; timm.list_models() lists them"
        raise ValueError(f"backbone: expected a timm model name, got {architecture!r}{hint}")
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except (TypeError, RuntimeError, AssertionError) as error:  # what timm raises on arguments and tags
        raise ValueError(f"timm could not build {architecture} with timm_args {dict(arguments)}: {error}") from error
    return model


def _preprocessing(model: nn.Module, arguments: Mapping[str, Any], changes: dict[str, Any]) -> Preprocessing:
    own: dict[str, Any] = dict(model.pretrained_cfg or {})  # type: ignore[arg-type]
    known = {"mean", "std", "interpolation", "crop_pct"}
    if unknown := set(changes) - known:
        raise ValueError(f"preprocessing: unknown {sorted(unknown)}; known: {sorted(known)}")
    resolved = resolve_data_config({}, pretrained_cfg=own | changes)  # type: ignore[no-untyped-call]
    height, width = to_2tuple(arguments.get("img_size", resolved["input_size"][1:]))
    if height != width:
        raise ValueError(f"img_size: expected square pictures, got {height} x {width}")
    return _preprocessing_from(resolved | {"image_size": width})


def _preprocessing_from(values: Mapping[str, Any]) -> Preprocessing:
    mean, std = (tuple(float(value) for value in values[key]) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"preprocessing: expected mean and std of 3 channels, std positive, got {mean} and {std}")
    if values["interpolation"] not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {list(INTERPOLATIONS)}, got {values['interpolation']!r}")
    return Preprocessing(
        image_size=int(values["image_size"]),
        mean=mean,
        std=std,
        interpolation=str(values["interpolation"]),
        crop_pct=float(values["crop_pct"]),
    )


def _default_grid(model: nn.Module, image_size: int) -> int:
    reductions = {int(info["reduction"]) for info in model.feature_info}  # type: ignore[union-attr]
    patch_size = reductions.pop() if len(reductions) == 1 else HIERARCHICAL_PATCH_SIZE
    natural = image_size // patch_size
    divisors = (number for number in range(1, image_size + 1) if image_size % number == 0)
    return min(divisors, key=lambda number: (abs(number - natural), number))
