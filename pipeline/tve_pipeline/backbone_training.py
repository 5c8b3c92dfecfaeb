"""Trains a small vision transformer, plain, distilled or Swin, that partial pictures are not foreign to.

Most steps see a random part of every picture: an explainer's targets are embeddings of partial pictures, and they are
erratic where the backbone never saw any. A plain transformer sees them as `drop` leaves them, a Swin as `zero` does,
whatever operator its explainer is for. A smooth random warp makes up for a small number of different objects. The last
steps see pictures as they are, and more of them whole.

The matrices of the blocks are trained by Muon (momentum, orthogonalised; `tve_pipeline.muon`), which needs about
half the steps that AdamW needs here; all other parameters by AdamW, at the same learning rate.

A distilled transformer's second token has no teacher here. Both its tokens are read by one and the same classifier,
whose mean over them is what that classifier says of the mean token: the embedding.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from tve.precision import choose_precision
from tve.removal import zero_pixels
from tve_pipeline.muon import Muon

MIN_KEPT_PATCHES = 4
WARP_CELL_PIXELS = 8


@dataclass(frozen=True, slots=True)
class BackboneTrainingConfig:
    """The numbers of one training run. Shares and fractions lie between 0 and 1."""

    num_steps: int
    batch_size: int
    learning_rate: float  # the peak
    weight_decay: float
    label_smoothing: float
    full_share: float  # of the steps: whole pictures
    keep_fraction_low: float  # of the patches, in the other steps: uniform between low and high
    keep_fraction_high: float
    warmup_share: float  # of the steps: the learning rate rises; then it falls to 0 along a cosine
    warp_pixels: float  # standard deviation of the displacement of the warp's control points
    finish_share: float  # of the steps, the last ones: no warp, and `finish_full_share` in place of `full_share`
    finish_full_share: float
    seed: int


def train_backbone(
    model: nn.Module,
    images_M3SS: Tensor,
    labels_M: Tensor,
    keys: Sequence[str],
    patches_per_side: int,
    config: BackboneTrainingConfig,
) -> float:
    """Trains the model and its classifier in place; returns the seconds that it took.

    Args:
        model: a plain vision transformer with absolute positions, distilled or not, or a Swin, on the device to train
            on.
        images_M3SS: normalised pictures, of any floating dtype, on the CPU.
        labels_M: int64, indices of the classifier's classes.
        keys: the pictures' names in error messages.
        patches_per_side: of the grid whose patches are left out; of a plain transformer its own.
        config: the numbers.

    Raises:
        ValueError: another kind of model or grid, fewer pictures than a batch, a label that the classifier lacks.
        FloatingPointError: the loss became NaN or infinite; names step and pictures.
    """
    transformer = _require_trainable(model, images_M3SS, labels_M, patches_per_side, config)
    if isinstance(transformer, VisionTransformerDistilled):
        transformer.head_dist = transformer.head
    device = next(model.parameters()).device
    arithmetic = choose_precision("auto", device)
    generator = torch.Generator().manual_seed(config.seed)
    optimizers = _optimizers(transformer, config)
    batches = _batches(len(images_M3SS), config.batch_size, generator)
    started = time.perf_counter()
    model.requires_grad_(True).train()
    with (
        _unfused_attention(transformer, device),
        tqdm(total=config.num_steps, desc="train backbone", unit="step", mininterval=2.0) as progress,
    ):
        for step in range(config.num_steps):
            batch = next(batches)
            finishing = step >= config.num_steps * (1 - config.finish_share)
            images = images_M3SS[batch].float()
            if not finishing:
                images = warp(images, config.warp_pixels, generator)
            kept_BK = draw_kept(len(batch), patches_per_side**2, finishing, config, generator)
            kept_BK = None if kept_BK is None else kept_BK.to(device)
            with torch.autocast(device.type, arithmetic.dtype, enabled=arithmetic.precision != "float32"):
                logits = classify_kept(transformer, images.to(device), kept_BK, patches_per_side)
            loss = nn.functional.cross_entropy(
                logits.float(), labels_M[batch].to(device), label_smoothing=config.label_smoothing
            )
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"step {step}: expected a finite loss, got {loss.item()} on pictures "
                    f"{', '.join(keys[i] for i in batch.tolist())}; lower backbone.train.learning_rate"
                )
            _update(transformer, optimizers, loss, _share_of_peak(step, config) * config.learning_rate)
            progress.update()
            if step % 50 == 49:
                progress.set_postfix_str(f"loss {loss.item():.2f}")
    if isinstance(transformer, VisionTransformerDistilled):
        transformer.head_dist = copy.deepcopy(transformer.head)  # so that both are saved
    model.eval().requires_grad_(False)
    return time.perf_counter() - started


def classify_kept(
    model: VisionTransformer | SwinTransformer, images_B3SS: Tensor, kept_BK: Tensor | None, patches_per_side: int
) -> Tensor:
    """Logits [B, C] from the K patches of each picture whose indices `kept_BK` holds, or from all of them."""
    if isinstance(model, SwinTransformer):
        if kept_BK is not None:
            present_BN = torch.zeros(len(kept_BK), patches_per_side**2, dtype=torch.bool, device=kept_BK.device)
            present_BPP = present_BN.scatter(1, kept_BK, True).unflatten(1, (patches_per_side, patches_per_side))
            images_B3SS = zero_pixels(images_B3SS, present_BPP)
        classified: Tensor = model(images_B3SS)
        return classified
    tokens = model._pos_embed(model.patch_embed(images_B3SS))
    if kept_BK is not None:
        prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
        index = kept_BK[..., None].expand(-1, -1, patches.shape[-1])
        tokens = torch.cat([prefix, patches.gather(1, index)], dim=1)
    logits: Tensor = model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))
    return logits


def draw_kept(
    batch_size: int,
    num_patches: int,
    finishing: bool,
    config: BackboneTrainingConfig,
    generator: torch.Generator,
) -> Tensor | None:
    """Indices [B, K] of random patches of each picture, equally many of each; None for whole pictures."""
    full_share = config.finish_full_share if finishing else config.full_share
    draw, position = torch.rand(2, generator=generator).tolist()
    if draw < full_share:
        return None
    fraction = config.keep_fraction_low + (config.keep_fraction_high - config.keep_fraction_low) * position
    num_kept = min(num_patches, max(MIN_KEPT_PATCHES, round(fraction * num_patches)))
    return random_patches(batch_size, num_patches, num_kept, generator)


def random_patches(batch_size: int, num_patches: int, num_kept: int, generator: torch.Generator) -> Tensor:
    """Indices [B, K] of different patches, uniform."""
    return torch.rand(batch_size, num_patches, generator=generator).argsort(1)[:, :num_kept]


def warp(images_B3SS: Tensor, warp_pixels: float, generator: torch.Generator) -> Tensor:
    """The pictures under smooth random displacements, drawn at control points 8 pixels apart."""
    if warp_pixels == 0:
        return images_B3SS
    batch_size, _, size, _ = images_B3SS.shape
    num_points = size // WARP_CELL_PIXELS + 1
    # grid_sample measures positions in half pictures.
    strength = warp_pixels * 2 / size
    points = torch.randn(batch_size, 2, num_points, num_points, generator=generator) * strength
    displacement = nn.functional.interpolate(points, (size, size), mode="bicubic", align_corners=True)
    identity = nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], align_corners=False)
    grid = identity + displacement.permute(0, 2, 3, 1)
    return nn.functional.grid_sample(images_B3SS, grid, padding_mode="border", align_corners=False)


def _require_trainable(
    model: nn.Module, images: Tensor, labels_M: Tensor, patches_per_side: int, config: BackboneTrainingConfig
) -> VisionTransformer | SwinTransformer:
    plain = isinstance(model, VisionTransformer) and model.pos_embed is not None
    if not plain and not isinstance(model, SwinTransformer):
        raise ValueError(
            "weights: 'train' expected a plain vision transformer with absolute positions or a Swin, "
            f"got {type(model).__name__}; give a weights file"
        )
    assert isinstance(model, VisionTransformer | SwinTransformer)
    if plain and model.patch_embed.num_patches != patches_per_side**2:
        raise ValueError(
            f"patches_per_side: expected the model's own {model.patch_embed.num_patches} patches in all, "
            f"got {patches_per_side} per side"
        )
    if len(images) < config.batch_size:
        raise ValueError(f"batch_size: expected at most the {len(images)} training pictures, got {config.batch_size}")
    highest = int(labels_M.max())
    head = model.head if isinstance(model, VisionTransformer) else model.get_classifier()
    if not isinstance(head, nn.Linear) or head.out_features <= highest:
        raise ValueError(f"num_classes: expected a classifier of at least {highest + 1} classes, got {head}")
    return model


def _batches(num_pictures: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices [B], every picture once an epoch but for a remainder."""
    while True:
        order = torch.randperm(num_pictures, generator=generator)
        yield from torch.split(order[: num_pictures // batch_size * batch_size], batch_size)


def _optimizers(
    model: VisionTransformer | SwinTransformer, config: BackboneTrainingConfig
) -> list[torch.optim.Optimizer]:
    blocks = model.layers if isinstance(model, SwinTransformer) else model.blocks
    matrices = [module.weight for module in blocks.modules() if isinstance(module, nn.Linear)]
    chosen = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)),
    ]


def _share_of_peak(step: int, config: BackboneTrainingConfig) -> float:
    warmup_steps = config.warmup_share * config.num_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (config.num_steps - warmup_steps)))


def _update(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor, learning_rate: float) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


@contextmanager
def _unfused_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On a CPU, fused attention's backward pass takes several times as long on short sequences."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    if device.type != "cpu":
        fused = []
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
