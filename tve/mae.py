"""The masked autoencoder that the paper's two networks start from (He et al., arXiv 2111.06377).

    loss = mean over absent patches of || prediction - (pixels - patch mean) / patch std ||^2

A mask is True where a patch is PRESENT, as everywhere here (MAE's own release: 1 = removed). Absent patches
never reach the encoder. One that was trained here, or a file of MAE weights, initialises both networks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from tve.digests import file_sha256
from tve.precision import RequestedPrecision, choose_precision
from tve.two_networks import PatchTransformer, TwoNetworks, TwoNetworksConfig

# Parts of an MAE checkpoint that a network which sees whole pictures and predicts no pixels has no place for.
UNUSED_IN_NETWORKS = ("head.", "decoder_pred.", "mask_token")


class MaskedAutoencoder(nn.Module):
    """Encodes the present patches of a picture and predicts the pixels of all of them.

    Args:
        image_size: S, pixels.
        patches_per_side: P, which divides S.
        config: encoder and decoder as in the two networks; mixing layers play no part.
    """

    def __init__(self, image_size: int, patches_per_side: int, config: TwoNetworksConfig) -> None:
        super().__init__()
        self.config = config
        self.num_steps_trained = 0
        self.network = PatchTransformer(image_size, patches_per_side, config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pred = nn.Linear(config.decoder_width, 3 * (image_size // patches_per_side) ** 2)
        nn.init.xavier_uniform_(self.decoder_pred.weight)
        nn.init.zeros_(self.decoder_pred.bias)

    def forward(self, images_B3SS: Tensor, present_BN: Tensor) -> Tensor:
        """Predicted normalised pixels [B, N, 3 * pixels * pixels] of every patch.

        Args:
            images_B3SS: normalised pictures.
            present_BN: bool, True = present; the same number of patches in every picture.

        Raises:
            ValueError: wrong shapes or dtype, or different numbers of patches.
        """
        tokens_BNE = self.network.embed(images_B3SS)
        batch_size, num_patches = tokens_BNE.shape[:2]
        num_present = _require_present(present_BN, batch_size, num_patches)
        kept_BK = present_BN.nonzero()[:, 1].reshape(batch_size, num_present)
        row_B1 = torch.arange(batch_size, device=images_B3SS.device)[:, None]
        encoded = self.network.decoder_embed(self.network.encode(tokens_BNE[row_B1, kept_BK]))
        patches = self.mask_token.to(encoded.dtype).expand(batch_size, num_patches, -1).clone()
        patches[row_B1, kept_BK] = encoded[:, 1:]
        decoded = self.network.decode(torch.cat([encoded[:, :1], patches], dim=1))
        predicted: Tensor = self.decoder_pred(decoded)
        return predicted

    def loss(self, images_B3SS: Tensor, present_BN: Tensor) -> Tensor:
        """The mean squared error over the absent patches, a scalar."""
        predicted = self(images_B3SS, present_BN).float()
        target = normalised_pixels(images_B3SS, self.network.patches_per_side)
        error_BN: Tensor = (predicted - target).square().mean(-1)
        return error_BN[~present_BN].mean()


def normalised_pixels(images_B3SS: Tensor, patches_per_side: int) -> Tensor:
    """Each patch's pixels [B, N, 3 * pixels * pixels], float32, with mean 0 and variance 1."""
    batch_size, _, size, _ = images_B3SS.shape
    side, pixels = patches_per_side, size // patches_per_side
    tiles = images_B3SS.float().reshape(batch_size, 3, side, pixels, side, pixels)
    patches = tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, side * side, -1)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def random_present(batch_size: int, num_patches: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Random masks, bool [B, N], True = present: round((1 - mask_ratio) N) patches each, from 1 to N - 1.

    Raises:
        ValueError: a ratio outside (0, 1).
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio: expected more than 0 and less than 1, got {mask_ratio}")
    num_present = min(max(round((1 - mask_ratio) * num_patches), 1), num_patches - 1)
    order = torch.rand(batch_size, num_patches, generator=generator).argsort(1)
    return order < num_present


def pretrain_mae(
    mae: MaskedAutoencoder,
    batches: Iterator[Tensor],
    num_steps: int,
    learning_rate: float,
    mask_ratio: float = 0.75,
    *,
    weight_decay: float = 0.05,
    warmup_steps: int = 0,
    precision: RequestedPrecision = "float32",
    seed: int = 0,
) -> list[float]:
    """Trains a masked autoencoder where it lies: AdamW, linear warm-up, cosine decay to 0. Reads no label.

    Args:
        batches: normalised pictures [B, 3, S, S], one batch a step.
        learning_rate: at the peak.
        mask_ratio: the share of patches that is absent.
        weight_decay: of weight matrices.
        precision: of the forward pass.
        seed: of the masks.

    Returns:
        The loss of each step.

    Raises:
        ValueError: too few batches, a ratio outside (0, 1), or a loss that is not finite, named by its step.
    """
    device = mae.mask_token.device
    arithmetic = choose_precision(precision, device)
    optimizer = _optimizer(mae, learning_rate, weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps, warmup_steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    mae.train()
    for step in range(num_steps):
        images = next(batches, None)
        if images is None:
            raise ValueError(f"batches: expected {num_steps}, got {step}; repeat the pictures")
        images = images.to(device)
        present = random_present(len(images), mae.network.num_patches, mask_ratio, generator).to(device)
        with torch.autocast(device.type, arithmetic.dtype, enabled=arithmetic.precision != "float32"):
            loss = mae.loss(images, present)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"masked autoencoder: loss {losses[-1]} at step {step}; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mae.num_steps_trained += 1
    mae.eval()
    return losses


def initialise_from_mae(networks: TwoNetworks, mae: MaskedAutoencoder) -> None:
    """Gives both networks the encoder and decoder of a masked autoencoder; their heads stay as they are.

    Raises:
        ValueError: the autoencoder is of another size.
    """
    state = mae.network.state_dict()
    _load_into_both(networks, state, "masked autoencoder")
    networks.initialisation = f"own mae, {mae.num_steps_trained} steps"


def initialise_from_file(
    networks: TwoNetworks,
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sha256: str | None = None,
) -> None:
    """Gives both networks the weights of a file: timm's `vit_base_patch16_224.mae`, or the MAE release's own.

    The encoder must be there and fit; a decoder is taken where the file has one, and must fit then. Positions
    are resampled if the grid differs. MAE weights expect ImageNet's mean and std: the patch projection is
    changed so that pictures in the backbone's normalisation give the same tokens.

    Args:
        path: .safetensors or .pth.
        mean: of the backbone's preprocessing.
        std: of the backbone's preprocessing.
        sha256: expected digest of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another digest, or weights that do not fit the configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"MAE weights: expected a .safetensors or .pth file, got {path}")
    digest = file_sha256(path)
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {digest}; not the file that was pinned")
    network = networks.kept_network
    state = {}
    for key, tensor in _read(path).items():
        if key.startswith(UNUSED_IN_NETWORKS):
            continue
        name = key if key.startswith("decoder_") else f"encoder.{key}"
        state[name] = _resampled(tensor, network.patches_per_side) if key.endswith("pos_embed") else tensor
    if not any(name.startswith("decoder_") for name in state):
        own = network.state_dict()
        state |= {name: tensor for name, tensor in own.items() if name.startswith("decoder_")}
    _require_fit(network, state, str(path))
    _renormalise(state, mean, std)
    _load_into_both(networks, state, str(path))
    networks.initialisation = f"mae file {path.name}, sha256 {digest}"


def _require_present(present_BN: Tensor, batch_size: int, num_patches: int) -> int:
    if present_BN.dtype != torch.bool or tuple(present_BN.shape) != (batch_size, num_patches):
        raise ValueError(
            f"present: expected bool [{batch_size}, {num_patches}], got {present_BN.dtype} {list(present_BN.shape)}"
        )
    counts = sorted(set(present_BN.sum(1).tolist()))
    if len(counts) > 1:
        raise ValueError(f"present: expected the same number of patches in every picture, got {counts}")
    return int(counts[0]) if counts else 0


def _optimizer(mae: MaskedAutoencoder, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    named = list(mae.named_parameters())
    matrices = [parameter for name, parameter in named if name.endswith("weight") and parameter.ndim > 1]
    others = [parameter for name, parameter in named if not (name.endswith("weight") and parameter.ndim > 1)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def _rate(step: int, num_steps: int, warmup_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
    return {key: tensor.float() for key, tensor in state.items()}


def _resampled(positions_1TE: Tensor, patches_per_side: int) -> Tensor:
    grid = [patches_per_side, patches_per_side]
    resampled: Tensor = resample_abs_pos_embed(positions_1TE, new_size=grid, num_prefix_tokens=1)
    return resampled


def _renormalise(state: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> None:
    """Folds (x * std + mean - ImageNet's mean) / ImageNet's std into the patch projection."""
    imagenet_std = torch.tensor(IMAGENET_DEFAULT_STD)
    scale = torch.tensor(std) / imagenet_std
    shift = (torch.tensor(mean) - torch.tensor(IMAGENET_DEFAULT_MEAN)) / imagenet_std
    weight, bias = state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"]
    state["encoder.patch_embed.proj.bias"] = bias + (weight * shift[:, None, None]).sum((1, 2, 3))
    state["encoder.patch_embed.proj.weight"] = weight * scale[:, None, None]


def _require_fit(network: PatchTransformer, state: Mapping[str, Tensor], source: str) -> None:
    own = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    if own == given:
        return
    differing = [
        f"{name} {given[name]} instead of {own[name]}" for name in own if own[name] != given.get(name, own[name])
    ]
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    raise ValueError(
        f"{source} does not fit the two networks: other shapes: {differing[:3]}, missing: {missing[:3]}, "
        f"unknown: {unknown[:3]}; set embed_dim, depths, heads and patches_per_side to those of the weights"
    )


def _load_into_both(networks: TwoNetworks, state: Mapping[str, Tensor], source: str) -> None:
    for network in (networks.kept_network, networks.removed_network):
        _require_fit(network, state, source)
        network.load_state_dict(state)
