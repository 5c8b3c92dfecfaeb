"""The one object that evaluates coalitions: embeddings G(x_S) of a picture x with only the patches S present.

Everything in the project that needs a masked copy of a picture asks a `CoalitionEvaluator` for its embedding, but for
what needs gradients: training a backbone, and ViT-Shapley's surrogate. Plain
vision transformers are evaluated on packed tokens (`tve.token_engine`), without masked copies; any other model, under
`zero`, on masked copies (`tve.masked_copies`). Work is split into passes that respect a memory budget, always the same
ones for the same call.
"""

import copy

import torch
from torch import Tensor

from tve.backbones import Backbone
from tve.coalitions import Coalitions, require_coalitions, require_whole
from tve.kernels import Choice, Requested, choose
from tve.masked_copies import MaskedCopies
from tve.memory import keep_freed_pages
from tve.plain_vits import kernel_obstacle, obstacle, pools_prefix
from tve.precision import RequestedPrecision, choose_precision
from tve.removal import Removal, parse_removal
from tve.token_engine import Geometry, TokenEngine


class CoalitionEvaluator:
    """Evaluates coalitions of patches under one backbone and one removal operator.

    Args:
        backbone: the frozen encoder G.
        removal: "zero" or "drop".
        memory_mib: budget for the live tensors of an evaluation, MiB; pictures and coalitions given, and embeddings
            returned, are not counted.
        precision: the arithmetic of the passes, "auto" for the fastest that the device has; `arithmetic` says which and
            why. Embeddings come back in float32 either way.
        backend: "triton", "torch", or "auto", which takes Triton's kernels on a GPU; `choice` says which and why.
        compiled: whether torch.compile fuses what lies between the kernels; the first pass then takes a minute.

    Raises:
        ValueError: a setting that does not exist, a backbone that cannot serve `drop`, "triton" where no kernel can
            run, or `compiled` without Triton's kernels.
    """

    def __init__(
        self,
        backbone: Backbone,
        removal: Removal,
        *,
        memory_mib: int = 512,
        precision: RequestedPrecision = "float32",
        backend: Requested = "auto",
        compiled: bool = False,
    ) -> None:
        if parse_removal(removal) == "drop":
            require_droppable(backbone)
        require_whole("memory_mib", memory_mib)
        if memory_mib < 1:
            raise ValueError(f"memory_mib: expected at least 1, got {memory_mib}")
        self.backbone = backbone
        self.removal = removal
        self.device = next(backbone.model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_pages()
        reason = obstacle(backbone.model, backbone.image_size, backbone.patches_per_side)
        self.choice = _chosen(backbone, reason, backend, self.device)
        self.arithmetic = choose_precision(precision, self.device)
        own = _in_dtype(backbone, self.arithmetic.dtype)
        memory_bytes = memory_mib * 2**20
        self.engine: TokenEngine | MaskedCopies
        if reason:
            if compiled:
                raise ValueError(f"compiled: expected a plain vision transformer, got {backbone.config.name}: {reason}")
            self.engine = MaskedCopies(own, memory_bytes)
        else:
            geometry = Geometry(backbone.image_size, backbone.patches_per_side, backbone.embed_dim)
            self.engine = TokenEngine(
                own.model, removal, geometry, memory_bytes, self.choice.backend, compiled=compiled
            )

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, coalitions: Coalitions) -> Tensor:
        """Embeddings [B, K, D], float32, of K coalitions of each picture.

        Args:
            images_B3SS: normalised pictures.
            coalitions: masks bool [B, K, P, P], True where a patch is present, or windows of shape [B, K].

        Raises:
            ValueError: wrong shapes, dtype or device, pixels that are not finite, an empty coalition that the
                backbone cannot embed, or a memory budget too small for one coalition.
        """
        self._require_images(images_B3SS)
        batch_size, patches = len(images_B3SS), self.backbone.patches_per_side
        require_coalitions(coalitions, (batch_size, "K"), patches, images_B3SS.device)
        num_coalitions = coalitions.shape[1]
        image_M = torch.arange(batch_size, device=images_B3SS.device).repeat_interleave(num_coalitions)
        rows = (batch_size * num_coalitions, *coalitions.shape[2:])
        embeddings_MD = self.engine.evaluate(images_B3SS, image_M, coalitions.reshape(*rows))
        return embeddings_MD.reshape(batch_size, num_coalitions, self.backbone.embed_dim)

    @torch.no_grad()
    def ragged(self, images_B3SS: Tensor, image_index_M: Tensor, coalitions: Coalitions) -> Tensor:
        """Embeddings [M, D] of M coalitions, coalition m of picture `image_index_M[m]`: any number per picture.

        Args:
            images_B3SS: normalised pictures.
            image_index_M: int64, 0 to B - 1.
            coalitions: masks bool [M, P, P] or windows of shape [M].

        Raises:
            ValueError: as a call does, and an index of no picture.
        """
        self._require_images(images_B3SS)
        if (
            not isinstance(image_index_M, Tensor)
            or image_index_M.dtype != torch.int64
            or image_index_M.ndim != 1
            or image_index_M.device != images_B3SS.device
        ):
            got = type(image_index_M).__name__
            if isinstance(image_index_M, Tensor):
                got = f"{image_index_M.dtype} {list(image_index_M.shape)} on {image_index_M.device}"
            raise ValueError(f"image_index: expected int64 [M] on {images_B3SS.device}, a picture of each, got {got}")
        require_coalitions(coalitions, (len(image_index_M),), self.backbone.patches_per_side, images_B3SS.device)
        if image_index_M.numel():
            low, high = (int(value) for value in image_index_M.aminmax())
            if low < 0 or high >= len(images_B3SS):
                raise ValueError(f"image_index: expected 0 to {len(images_B3SS) - 1}, got {low if low < 0 else high}")
        return self.engine.evaluate(images_B3SS, image_index_M, coalitions)

    @torch.no_grad()
    def full(self, images_B3SS: Tensor) -> Tensor:
        """Embeddings [B, D], float32, of the whole pictures, in this evaluator's precision.

        Raises:
            ValueError: images of another form than [B, 3, S, S].
        """
        self._require_images(images_B3SS)
        patches, device = self.backbone.patches_per_side, images_B3SS.device
        everything = torch.ones(len(images_B3SS), patches, patches, dtype=torch.bool, device=device)
        return self.engine.evaluate(images_B3SS, torch.arange(len(images_B3SS), device=device), everything)

    @torch.no_grad()
    def empty(self) -> Tensor:
        """The embedding [D] of a picture with every patch removed, G(∅): the zero of the attribution scale.

        Without a token besides the patches `drop` leaves nothing to embed; the all-zero picture then stands for it.
        """
        patches, size = self.backbone.patches_per_side, self.backbone.image_size
        images = torch.zeros(1, 3, size, size, device=self.device)
        if self.removal == "drop" and not pools_prefix(self.backbone.model):
            return self.full(images)[0]
        return self(images, torch.zeros(1, 1, patches, patches, dtype=torch.bool, device=self.device))[0, 0]

    def _require_images(self, images_B3SS: Tensor) -> None:
        device = next(self.backbone.model.parameters()).device
        if device != self.device:
            raise ValueError(
                f"backbone: expected on {self.device}, where it was when this evaluator was made, got {device}; make "
                "a new evaluator"
            )
        if isinstance(images_B3SS, Tensor) and images_B3SS.device != device:
            raise ValueError(f"images: expected {device}, where the backbone is, got {images_B3SS.device}; move them")
        self.backbone.require_images(images_B3SS)


def drop_obstacle(backbone: Backbone) -> str:
    """Why tokens of the backbone's model cannot be left out, "" where they can: plain timm vision transformers."""
    return obstacle(backbone.model, backbone.image_size, backbone.patches_per_side)


def require_droppable(backbone: Backbone) -> None:
    """Raises ValueError unless tokens of the backbone's model can be left out."""
    if reason := drop_obstacle(backbone):
        kind = type(backbone.model).__name__
        raise ValueError(f"removal: expected 'zero' for {backbone.config.name} ({kind}), got 'drop': {reason}")


def _chosen(backbone: Backbone, no_tokens: str, requested: Requested, device: torch.device) -> Choice:
    """Who runs the ops for this backbone: what its device allows, unless the kernels cannot serve the model.

    `no_tokens` says why the model is evaluated on masked copies, "" where it is not.
    """
    choice = choose(requested, device)
    if choice.backend == "torch":
        return choice
    name = backbone.config.name
    reason = f"{name} is evaluated on masked copies" if no_tokens else kernel_obstacle(backbone.model)
    if reason and requested == "triton":
        raise ValueError(f"backend: expected a model that Triton's kernels serve, got {name}: {reason}; use 'auto'")
    return Choice("torch", reason) if reason else choice


def _in_dtype(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    if next(backbone.model.parameters()).dtype == dtype:
        return backbone
    rounded = copy.deepcopy(backbone)
    rounded.model.to(dtype)
    return rounded
