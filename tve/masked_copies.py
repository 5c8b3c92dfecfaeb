"""Coalitions of any model under `zero`: copies of the picture whose absent pixels are 0, a bounded number at a time."""

import torch
from torch import Tensor

from tve.backbones import Backbone
from tve.coalitions import Coalitions, WindowCoalitions
from tve.memory import MemoryNeed, need_of
from tve.removal import zero_pixels

# Live bytes of one pass on a CPU: larger ones are slower (measured, docs/experiments.md), since the C library hands the
# pages of their largest tensors back, to be faulted in anew.
CPU_PASS_BYTES = 64 * 2**20


class MaskedCopies:
    """Evaluates coalitions of one model by masking pixels.

    Args:
        backbone: the model, with its way to pool, in the dtype of the passes.
        memory_bytes: for the live tensors of a pass, of which a CPU takes CPU_PASS_BYTES at most; pictures given and
            embeddings returned are not counted.
    """

    def __init__(self, backbone: Backbone, memory_bytes: int) -> None:
        self.backbone = backbone
        self.memory_bytes = memory_bytes
        self._need: MemoryNeed | None = None

    @property
    def _parameter(self) -> Tensor:
        return next(self.backbone.model.parameters())

    def evaluate(self, images_B3SS: Tensor, image_M: Tensor, coalitions: Coalitions) -> Tensor:
        """Embeddings [M, D], float32, of coalition m of picture image_M[m].

        Raises:
            ValueError: a memory budget too small for one copy.
        """
        size = (len(image_M), self.backbone.embed_dim)
        embeddings_MD = torch.empty(size, dtype=torch.float32, device=images_B3SS.device)
        if not len(image_M):
            return embeddings_MD
        step = self.need.units_within(self.memory_bytes)
        if not step:
            needed = self.need.fixed_bytes + self.need.per_unit_bytes
            raise ValueError(
                f"memory_mib: expected at least {-(-needed // 2**20)} for one masked copy, got "
                f"{self.memory_bytes / 2**20:g}"
            )
        if images_B3SS.device.type == "cpu":
            step = min(step, max(1, self.need.units_within(CPU_PASS_BYTES)))
        for rows in torch.arange(len(image_M), device=images_B3SS.device).split(step):
            chosen = coalitions[rows]
            present = chosen.present() if isinstance(chosen, WindowCoalitions) else chosen
            embeddings_MD[rows] = self._pass(images_B3SS, image_M[rows], present)
        return embeddings_MD

    def _pass(self, images_B3SS: Tensor, image_M: Tensor, present_MPP: Tensor) -> Tensor:
        masked = zero_pixels(images_B3SS[image_M].to(self._parameter.dtype), present_MPP)
        return self.backbone.pool(self.backbone.model.forward_features(masked)).float()  # type: ignore[operator]

    @property
    def need(self) -> MemoryNeed:
        """Memory by masked copies, measured."""
        if self._need is None:
            size, patches, device = self.backbone.image_size, self.backbone.patches_per_side, self._parameter.device
            picture = torch.zeros(1, 3, size, size, device=device)

            def passed(count: int) -> Tensor:
                present = torch.ones(count, patches, patches, dtype=torch.bool, device=device)
                return self._pass(picture, torch.zeros(count, dtype=torch.int64, device=device), present)

            self._need = need_of(passed)
        return self._need
