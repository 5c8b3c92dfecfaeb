"""A trained copy of a backbone's last blocks: most of what a trained copy of the whole is worth, for less of its price.

The frozen backbone's tokens enter the copy, so that the blocks before it are computed once, for the embedding and for
the explainer. Beyond G(x), the explainer of ViT-Ti at 112 px that rereads three blocks takes .72 classifications with
a frozen trunk, 1.01 with four trained blocks and 1.59 with all twelve and their stem.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tve.backbones import Backbone, Features, trainable_copy
from tve.rereading import most_blocks


class TrainedEnd(nn.Module):
    """The last K blocks and the final norm of a plain vision transformer that pools its class tokens, to be trained.

    `end` is a backbone without a stem: `tve.rereading` reads its blocks as it reads a whole one's.

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
        self.end = trainable_copy(backbone)
        model: Any = self.end.model
        self.first = len(model.blocks) - num_blocks
        self.tokens_per_side = int(model.patch_embed.grid_size[0])
        model.blocks = model.blocks[self.first :]
        model.patch_embed, model.norm_pre = nn.Identity(), nn.Identity()
        for name in ("pos_embed", "cls_token", "reg_token", "dist_token"):
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        model.reset_classifier(0)

    @property
    def num_blocks(self) -> int:
        return len(self.end.model.blocks)  # type: ignore[arg-type]

    def forward(
        self, backbone: Backbone, images_B3SS: Tensor, num_levels: int, num_entered: int
    ) -> tuple[Features, Tensor]:
        """What `Backbone.features` of the backbone with this end gives, and the embedding G(x) of the one without.

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
        embedding_BD = self.end.pool(model.norm(tokens_BTW))
        features = Features(tuple(levels.values()), embedding_BD, tuple(entering[len(entering) - num_entered :]))
        return features, frozen.embedding_BD
