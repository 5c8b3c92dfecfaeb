"""The token engine with Triton's kernels beside the same engine with PyTorch's ops, and what compiling it needs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tve.backbones import Backbone, load_backbone
from tve.coalitions import WindowCoalitions, Windows
from tve.evaluator import CoalitionEvaluator
from tve.kernels import Ragged
from tve.removal import Removal
from tve.token_engine import TokenEngine

GRID = 4
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
# Plain; LayerScale and registers; pooled by average; rotary positions and gated MLPs; grouped keys and RMS norms.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},
    "vit_medium_patch16_gap_240": {},
    "eva02_base_patch16_clip_224": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": (2, 1)},
}


def backbone(architecture: str, device: torch.device) -> Backbone:
    torch.manual_seed(0)
    made = load_backbone(architecture, "random", timm_args=SMALL | ARCHITECTURES[architecture])
    for parameter in made.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.to(device)


def pictures(device: torch.device) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)


def masks(device: torch.device) -> Tensor:
    present = torch.rand(2, 3, GRID, GRID, generator=torch.Generator().manual_seed(2)) < 0.4
    present[:, 0], present[:, 1, 2, 1] = True, True
    present[:, 2, 0, 3] = True
    return present.to(device)


def windows(device: torch.device) -> WindowCoalitions:
    centre, kept = torch.tensor([[0, 6, 5], [15, 1, 5]]), torch.tensor([[True, True, False]] * 2)
    return WindowCoalitions(Windows(GRID, 1), centre.to(device), kept.to(device))


@pytest.mark.parametrize("removal", ["drop", "zero"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_and_plain_ops_make_the_same_embeddings(
    architecture: str, removal: Removal, device: torch.device
) -> None:
    made, images = backbone(architecture, device), pictures(device)
    plain = CoalitionEvaluator(made, removal, backend="torch")
    kernels = CoalitionEvaluator(made, removal, backend="triton")
    for coalitions in (masks(device), windows(device)):
        torch.testing.assert_close(kernels(images, coalitions), plain(images, coalitions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "eva02_base_patch16_clip_224"])
def test_the_blocks_are_one_graph_for_all_lengths(architecture: str, device: torch.device) -> None:
    made, images = backbone(architecture, device), pictures(device)
    expected = CoalitionEvaluator(made, "drop", backend="torch")(images, masks(device))
    evaluator = CoalitionEvaluator(made, "drop", backend="triton")
    engine, graphs = evaluator.engine, []
    assert isinstance(engine, TokenEngine)

    def counting(module: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(module)
        return module.forward

    engine._program = torch.compile(engine._blocks, backend=counting, dynamic=True, fullgraph=True)
    engine._run = engine._run_compiled
    torch.testing.assert_close(evaluator(images, masks(device)), expected, atol=1e-5, rtol=1e-5)
    of_other_lengths = evaluator(images, windows(device))
    assert len(graphs) == 1
    torch.testing.assert_close(
        of_other_lengths,
        CoalitionEvaluator(made, "drop", backend="torch")(images, windows(device)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_compiling_is_refused_where_it_cannot_be() -> None:
    made = backbone("vit_tiny_patch16_224", torch.device("cpu"))
    with pytest.raises(ValueError, match="compiled: expected Triton's kernels and blocks that are read apart, got the"):
        CoalitionEvaluator(made, "drop", backend="torch", compiled=True)
    resnet = load_backbone("resnet18", "random", patches_per_side=7)
    with pytest.raises(ValueError, match="compiled: expected a plain vision transformer, got resnet18"):
        CoalitionEvaluator(resnet, "zero", compiled=True)


def test_a_layout_refuses_a_sequence_without_rows() -> None:
    with pytest.raises(ValueError, match="lengths: expected at least 1 row a sequence, got 0"):
        Ragged.of([3, 0])
