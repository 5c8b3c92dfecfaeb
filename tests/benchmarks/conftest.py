"""A vision transformer so small that a benchmark of it takes a moment: 4 x 4 patches, width 32, 3 blocks."""

import pytest
import torch

from tve.backbones import Backbone, load_backbone

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    torch.manual_seed(0)
    made = load_backbone("vit_tiny_patch16_224", "random", timm_args=TINY)
    for parameter in made.model.parameters():  # untrained positions are too small to show a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made
