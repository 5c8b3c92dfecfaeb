"""The paper's explainer: two masked-autoencoder networks, one for g and one for h, each with a mixing head.

    delta_g = head_g(decoder_g(encoder_g(x)))          delta_h = head_h(decoder_h(encoder_h(x)))

(TVE, arXiv 2312.15359, section 4; its release takes two ViT-MAE-Base networks, He et al., arXiv 2111.06377,
and 17 mixing layers.) Nothing is masked here: the networks see the whole picture. `tve.mae` initialises them.
"""

from dataclasses import dataclass

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

RANDOM_INITIALISATION = "random"


@dataclass(frozen=True, slots=True)
class TwoNetworksConfig:
    """The size of each of the two networks; the defaults are the release's, apart from `differences`."""

    embed_dim: int = 768  # of the encoder
    encoder_depth: int = 12
    decoder_depth: int = 8
    num_heads: int = 12
    mixing_layers: int = 17  # linear layers of the head, the last one included
    differences: bool = True  # predict g - mean(g) and h - G(x); g and h themselves where False (paper)
    decoder_embed_dim: int | None = None  # the encoder's where None; 512 in the release
    decoder_num_heads: int | None = None  # the encoder's where None; 16 in the release

    def __post_init__(self) -> None:
        for name, minimum in (("encoder_depth", 1), ("decoder_depth", 0), ("mixing_layers", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {getattr(self, name)}")
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_width, self.decoder_heads),
        ):
            if heads < 1:
                raise ValueError(f"heads of {name}: expected at least 1, got {heads}")
            if width < 4 or width % 4 or width % heads:
                raise ValueError(f"{name}: expected a multiple of 4 and of its {heads} heads, got {width}")

    @property
    def decoder_width(self) -> int:
        return self.embed_dim if self.decoder_embed_dim is None else self.decoder_embed_dim

    @property
    def decoder_heads(self) -> int:
        return self.num_heads if self.decoder_num_heads is None else self.decoder_num_heads


class TwoNetworks(nn.Module):
    """Two networks and two heads. `initialisation` says where their weights come from.

    Args:
        image_size: S, pixels.
        patches_per_side: P, which divides S.
        embed_dim_out: D, the width of the backbone's embedding.
        config: depth and width.
    """

    def __init__(self, image_size: int, patches_per_side: int, embed_dim_out: int, config: TwoNetworksConfig) -> None:
        super().__init__()
        self.config = config
        self.initialisation = RANDOM_INITIALISATION
        self.kept_network = PatchTransformer(image_size, patches_per_side, config)
        self.removed_network = PatchTransformer(image_size, patches_per_side, config)
        num_patches, width = patches_per_side**2, config.decoder_width
        self.kept_head = MixingHead(num_patches, width, embed_dim_out, config.mixing_layers)
        self.removed_head = MixingHead(num_patches, width, embed_dim_out, config.mixing_layers)

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """(delta_kept [B, N, D], delta_removed [B, N, D]) of normalised pictures; zero before training."""
        kept_BND: Tensor = self.kept_head(self.kept_network(images_B3SS))
        removed_BND: Tensor = self.removed_head(self.removed_network(images_B3SS))
        return kept_BND, removed_BND


class PatchTransformer(nn.Module):
    """A transformer encoder and decoder on the P x P patches of a picture; the two of a masked autoencoder.

    The encoder is a timm `VisionTransformer`; the decoder's names are those of the MAE release's weights.

    Raises:
        ValueError: P does not divide S.
    """

    def __init__(self, image_size: int, patches_per_side: int, config: TwoNetworksConfig) -> None:
        super().__init__()
        if patches_per_side < 1 or image_size % patches_per_side:
            raise ValueError(f"patches_per_side: expected a divisor of {image_size} pixels, got {patches_per_side}")
        self.image_size = image_size
        self.patches_per_side = patches_per_side
        self.encoder = VisionTransformer(
            img_size=image_size,
            patch_size=image_size // patches_per_side,
            num_classes=0,
            embed_dim=config.embed_dim,
            depth=config.encoder_depth,
            num_heads=config.num_heads,
        )
        width, heads = config.decoder_width, config.decoder_heads
        self.decoder_embed = nn.Linear(config.embed_dim, width)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, width))
        self.decoder_blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(config.decoder_depth)))
        self.decoder_norm = _layer_norm(width)
        self._initialise()

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Features [B, N, W] of every patch of whole pictures."""
        encoded = self.encode(self.embed(images_B3SS))
        return self.decode(self.decoder_embed(encoded))

    def embed(self, images_B3SS: Tensor) -> Tensor:
        """Patch tokens with positions [B, N, E], each of its own pixels only.

        Raises:
            ValueError: images of another shape than [B, 3, S, S].
        """
        size = self.image_size
        if images_B3SS.ndim != 4 or tuple(images_B3SS.shape[1:]) != (3, size, size):
            raise ValueError(f"images: expected [B, 3, {size}, {size}], got {list(images_B3SS.shape)}")
        tokens: Tensor = self.encoder.patch_embed(images_B3SS) + self._positions()[:, 1:]
        return tokens

    def encode(self, tokens_BKE: Tensor) -> Tensor:
        """The class token and any K patch tokens through the encoder, [B, 1 + K, E]."""
        assert self.encoder.cls_token is not None
        class_token = self.encoder.cls_token + self._positions()[:, :1]
        sequence = torch.cat([class_token.expand(len(tokens_BKE), -1, -1), tokens_BKE], dim=1)
        encoded: Tensor = self.encoder.norm(self.encoder.blocks(sequence))
        return encoded

    def decode(self, tokens_BTW: Tensor) -> Tensor:
        """Patch features [B, N, W] from the class token and all N patches, T = 1 + N, through the decoder."""
        decoded: Tensor = self.decoder_norm(self.decoder_blocks(tokens_BTW + self.decoder_pos_embed))
        return decoded[:, 1:]

    def _positions(self) -> nn.Parameter:
        assert self.encoder.pos_embed is not None
        return self.encoder.pos_embed

    def _initialise(self) -> None:
        """As MAE: Xavier-uniform matrices, sine-cosine positions (trained further here)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.data.view(len(projection), -1))
        assert self.encoder.cls_token is not None
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        grid = [self.patches_per_side, self.patches_per_side]
        for positions in (self._positions(), self.decoder_pos_embed):
            positions.data.zero_()
            positions.data[0, 1:] = build_sincos2d_pos_embed(grid, dim=positions.shape[-1])


class MixingHead(nn.Module):
    """Layers that mix features and patches in turn, then a linear layer, zero at first, to the output."""

    def __init__(self, num_patches: int, width: int, embed_dim_out: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                MixingLayer(width, num_patches if index % 2 else width, over_patches=bool(index % 2))
                for index in range(num_layers - 1)
            )
        )
        self.norm = _layer_norm(width)
        self.last = nn.Linear(width, embed_dim_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features_BNW: Tensor) -> Tensor:
        """[B, N, D]."""
        mixed: Tensor = self.last(self.norm(self.layers(features_BNW)))
        return mixed


class MixingLayer(nn.Module):
    """x + linear(GELU(norm(x))), linear over features or over patches; residual, so that any depth trains."""

    def __init__(self, width: int, mixed_dim: int, over_patches: bool) -> None:
        super().__init__()
        self.over_patches = over_patches
        self.norm = _layer_norm(width)
        self.mix = nn.Linear(mixed_dim, mixed_dim)

    def forward(self, x_BNW: Tensor) -> Tensor:
        active = nn.functional.gelu(self.norm(x_BNW))
        mixed: Tensor = self.mix(active.transpose(1, 2)).transpose(1, 2) if self.over_patches else self.mix(active)
        return x_BNW + mixed


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)
