"""The one object that evaluates coalitions: embeddings G(x_S) of a picture x with only the patches S present.

Everything in the project that needs a masked copy of a picture asks a `CoalitionEvaluator` for its embedding. Copies
are split into passes that respect a memory budget, in an order that depends on the coalitions alone.

`zero` masks pixels after normalisation. `drop` embeds each picture's patches once, gathers the tokens that each
coalition keeps, and runs coalitions of equal length together as dense batches.
"""

import copy
from typing import Literal, get_args

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tve.backbones import Backbone
from tve.coalitions import require_coalitions
from tve.removal import Removal, parse_removal, zero_pixels

Precision = Literal["float32", "bfloat16"]

# Live activations of one transformer block at inference, in multiples of the width: residual, norm, q, k, v, the
# attention output and the MLP's hidden layer before and after its nonlinearity.
WIDTHS_PER_TOKEN = 16
# The widest maps of a convolutional or hierarchical model, in multiples of the picture's own size.
MAPS_PER_PICTURE = 48


class CoalitionEvaluator:
    """Evaluates coalitions of patches under one backbone and one removal operator.

    Args:
        backbone: the frozen encoder G.
        removal: "zero" or "drop".
        memory_mib: budget for the activations of one pass, MiB.
        precision: the arithmetic of the passes; embeddings come back in float32 either way.

    Raises:
        ValueError: a setting that does not exist, or a backbone that cannot serve `drop`.
    """

    def __init__(
        self, backbone: Backbone, removal: Removal, *, memory_mib: int = 512, precision: Precision = "float32"
    ) -> None:
        if parse_removal(removal) == "drop":
            require_droppable(backbone)
        if precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {list(get_args(Precision))}, got {precision!r}")
        if memory_mib < 1:
            raise ValueError(f"memory_mib: expected at least 1, got {memory_mib}")
        self.backbone = backbone
        self.removal = removal
        self.memory_bytes = memory_mib * 2**20
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model = backbone.model
        self.model: nn.Module = model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, present_BKPP: Tensor) -> Tensor:
        """Embeddings [B, K, D], float32, of K coalitions of each picture.

        Args:
            images_B3SS: normalised pictures.
            present_BKPP: bool, True where a patch is present.

        Raises:
            ValueError: wrong shapes or dtype, pixels that are not finite, or an empty coalition that the backbone
                cannot embed.
        """
        self.backbone.require_images(images_B3SS)
        batch_size, patches = len(images_B3SS), self.backbone.patches_per_side
        require_coalitions(present_BKPP, batch_size, patches)
        num_coalitions = present_BKPP.shape[1]
        image_index_M = torch.arange(batch_size, device=images_B3SS.device).repeat_interleave(num_coalitions)
        embeddings_MD = self.ragged(images_B3SS, image_index_M, present_BKPP.reshape(-1, patches, patches))
        return embeddings_MD.reshape(batch_size, num_coalitions, self.backbone.embed_dim)

    @torch.no_grad()
    def ragged(self, images_B3SS: Tensor, image_index_M: Tensor, present_MPP: Tensor) -> Tensor:
        """Embeddings [M, D] of M coalitions, coalition m of picture `image_index_M[m]`: any number per picture."""
        self.backbone.require_images(images_B3SS)
        patches = self.backbone.patches_per_side
        require_coalitions(present_MPP[:, None], len(image_index_M), patches)
        images = images_B3SS.to(self.dtype)
        if self.removal == "zero":
            return self._zero(images, image_index_M, present_MPP)
        return self._drop(images, image_index_M, present_MPP.flatten(1))

    @torch.no_grad()
    def full(self, images_B3SS: Tensor) -> Tensor:
        """Embeddings [B, D], float32, of the whole pictures, in this evaluator's precision.

        Raises:
            ValueError: images of another form than [B, 3, S, S].
        """
        self.backbone.require_images(images_B3SS)
        images = images_B3SS.to(self.dtype)
        passes = images.split(self._copies_per_pass(self.backbone.patches_per_side**2))
        return torch.cat([self._pool(self.model.forward_features(chunk)) for chunk in passes])  # type: ignore[operator]

    @torch.no_grad()
    def empty(self) -> Tensor:
        """The embedding [D] of a picture with every patch removed, G(∅): the zero of the attribution scale.

        Without a class token `drop` leaves nothing to embed; the all-zero picture then stands for the empty one.
        """
        patches, size = self.backbone.patches_per_side, self.backbone.image_size
        device = next(self.model.parameters()).device
        images = torch.zeros(1, 3, size, size, device=device)
        if self.removal == "drop" and not _embeds_nothing(self.model):
            return self.full(images)[0]
        return self(images, torch.zeros(1, 1, patches, patches, dtype=torch.bool, device=device))[0, 0]

    def _zero(self, images: Tensor, image_index_M: Tensor, present_MPP: Tensor) -> Tensor:
        step = self._copies_per_pass(self.backbone.patches_per_side**2)
        rows = []
        for index, present in zip(image_index_M.split(step), present_MPP.split(step), strict=True):
            masked = zero_pixels(images[index], present)
            rows.append(self._pool(self.model.forward_features(masked)))  # type: ignore[operator]
        return torch.cat(rows) if rows else images.new_empty(0, self.backbone.embed_dim, dtype=torch.float32)

    def _drop(self, images: Tensor, image_index_M: Tensor, present_MN: Tensor) -> Tensor:
        model = self.model
        num_prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        tokens = model._pos_embed(model.patch_embed(images))  # type: ignore[operator]
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        lengths_M = present_MN.sum(1)
        lengths = [int(length) for length in lengths_M.unique(sorted=True)]
        if lengths and lengths[0] == 0 and not _embeds_nothing(model):
            raise ValueError(
                f"coalitions: expected at least one patch, since {self.backbone.config.name} pools patch tokens; "
                "got an empty coalition; use removal 'zero'"
            )
        embeddings_MD = images.new_empty(len(present_MN), self.backbone.embed_dim, dtype=torch.float32)
        for length in lengths:
            group = (lengths_M == length).nonzero()[:, 0]
            for rows in group.split(self._copies_per_pass(length)):
                kept = present_MN[rows].nonzero()[:, 1].reshape(len(rows), length)
                image = image_index_M[rows]
                sequence = torch.cat([prefix[image], patches[image[:, None], kept]], dim=1)
                sequence = model.norm(model.blocks(model.norm_pre(sequence)))  # type: ignore[operator]
                embeddings_MD[rows] = self._pool(sequence)
        return embeddings_MD

    def _pool(self, features: Tensor) -> Tensor:
        embedding: Tensor = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embedding.float()

    def _copies_per_pass(self, num_kept: int) -> int:
        if isinstance(self.model, VisionTransformer):
            tokens = num_kept + int(self.model.num_prefix_tokens)
            elements = tokens * int(self.model.embed_dim) * WIDTHS_PER_TOKEN
        else:
            elements = 3 * self.backbone.image_size**2 * MAPS_PER_PICTURE
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        return max(1, self.memory_bytes // (elements * itemsize))


def require_droppable(backbone: Backbone) -> None:
    """Raises ValueError unless tokens of the backbone's model can be left out: plain timm vision transformers.

    A convolutional stem (timm's hybrids) is refused: its tokens see the pixels of removed neighbours.
    """
    model = backbone.model
    if (
        not isinstance(model, VisionTransformer)
        or model.pos_embed is None
        or not isinstance(model.patch_embed, PatchEmbed)
    ):
        raise ValueError(
            f"removal: expected 'zero' for {backbone.config.name} ({type(model).__name__}), got 'drop', which needs a "
            "plain vision transformer with absolute positions and linear patches"
        )
    grid = model.patch_embed.grid_size
    assert grid is not None
    if tuple(grid) != (backbone.patches_per_side, backbone.patches_per_side):
        raise ValueError(
            f"removal: 'drop' expected the model's own {grid[0]} x {grid[1]} patches, got a grid of "
            f"{backbone.patches_per_side} per side; use 'zero'"
        )


def _embeds_nothing(model: nn.Module) -> bool:
    """Whether an empty coalition has an embedding: the model pools a class token."""
    return getattr(model, "global_pool", None) == "token" and int(getattr(model, "num_prefix_tokens", 0)) > 0
