"""A trained copy of a backbone's last blocks, which begins with the frozen backbone's own tokens.

So the blocks before it are computed once, for the embedding and for the explainer. Beyond G(x), the explainer of ViT-Ti
at 112 px that rereads three blocks takes .72 classifications with a frozen trunk, 1.01 with four trained blocks and
1.59 with a trained copy of all twelve (one core, docs/experiments.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tve.backbones import Backbone, Features, trainable_copy
from tve.rereading import most_blocks


class TrainedEnd(nn.Module):
    """The last K blocks of a plain vision transformer that pools its class tokens, to be trained.

    `end` is a backbone without a stem, for `tve.rereading`, which reads its blocks as a whole one's. Its norms are as
    in the backbone: behind the blocks they would only rescale what an explainer rescales anyway.

    Raises:
        ValueError: fewer than one block, or more than `tve.rereading.most_blocks` of the backbone.
    """

    def __init__(self, backbone: Backbone, num_blocks: int) -> None:
        super().__init__()
        if not 1 <= num_blocks <= (most := most_blocks(backbone)):
            raise ValueError(
                f"trained_blocks: expected 1 to {most} for {backbone.config.name}, got {num_blocks}"
                if most
                else f"trained_blocks: expected none for {backbone.config.name}, which is no plain vision transformer "
                f"that pools its class tokens, got {num_blocks}; leave it out to train a copy of the whole"
            )
        self.end = trainable_copy(backbone).requires_grad_(False)
        model: Any = self.end.model
        self.first = len(model.blocks) - num_blocks
        self.tokens_per_side = int(model.patch_embed.grid_size[0])
        model.blocks = model.blocks[self.first :].requires_grad_(True)
        for name in ("patch_embed", "norm_pre", "pos_embed", "cls_token", "reg_token", "dist_token"):
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        model.reset_classifier(0)

    @property
    def num_blocks(self) -> int:
        return len(self.end.model.blocks)  # type: ignore[arg-type]

    def forward(self, backbone: Backbone, images_B3SS: Tensor, num_levels: int, num_entered: int) -> Features:
        """What `Backbone.features` gives, maps and entering tokens of the backbone with this end; G(x) is its own.

        Args:
            backbone: the frozen one.
            images_B3SS: normalised pictures.
            num_levels: how many maps.
            num_entered: of how many of the last blocks also the tokens that enter them; at most `num_blocks`.

        Raises:
            ValueError: as `Backbone.features` does.
        """
        with torch.no_grad():
            frozen = backbone.features(images_B3SS, num_levels, self.num_blocks)
        levels = dict(zip(backbone.level_indices(num_levels), frozen.levels, strict=True))
        model: Any = self.end.model
        tokens_BTW, entering = frozen.entering[0], []
        for number, block in enumerate(model.blocks, self.first):
            entering.append(tokens_BTW)
            tokens_BTW = block(tokens_BTW)
            if number in levels:
                sides = (self.tokens_per_side, self.tokens_per_side)
                patches_BWT = tokens_BTW[:, model.num_prefix_tokens :].transpose(1, 2)
                levels[number] = backbone.on_grid(patches_BWT.unflatten(2, sides))
        return Features(tuple(levels.values()), frozen.embedding_BD, tuple(entering[len(entering) - num_entered :]))
