"""Sanity of a map: it should change when what it explains is replaced by noise, from the output downwards.

    rank correlation = Pearson correlation of the ranks of two maps' patches, equal scores sharing the mean of theirs
    redrawn          ~ Normal(mean of the parameter's entries, their standard deviation), entry by entry

(Adebayo et al., NeurIPS 2018, arXiv 1810.03292: cascading randomisation, compared by Spearman's rank correlation.) A
map that hardly changes does not tell about the model. Redrawn entries keep each parameter's own scale, which timm's
initial values would not; a parameter whose entries are all equal, as a norm's are before training, stays.
"""

import copy

import torch
from torch import Tensor, nn

from tve.backbones import Backbone
from tve.baselines.method import generator_of
from tve.coalitions import require_whole

# Where timm's vision transformers keep their blocks, and Swin its stages.
SEQUENCES = ("blocks", "layers")


def rank_correlation(map_a_BPP: Tensor, map_b_BPP: Tensor) -> Tensor:
    """Spearman's correlation [B], float64, -1 to 1, of two maps a picture; NaN where a map is constant.

    Raises:
        ValueError: maps of other shapes, or not finite.
    """
    if map_a_BPP.ndim != 3 or map_a_BPP.shape != map_b_BPP.shape:
        raise ValueError(f"maps: expected two [B, P, P], got {list(map_a_BPP.shape)} and {list(map_b_BPP.shape)}")
    if num_bad := int((~map_a_BPP.isfinite()).sum() + (~map_b_BPP.isfinite()).sum()):
        raise ValueError(f"maps: expected finite scores, got {num_bad} that are not")
    a_BN, b_BN = (_centred_ranks(map_BPP.flatten(1)) for map_BPP in (map_a_BPP, map_b_BPP))
    return (a_BN * b_BN).sum(1) / (a_BN.square().sum(1) * b_BN.square().sum(1)).sqrt()


def randomised(backbone: Backbone, num_blocks_from_the_top: int, seed: int) -> Backbone:
    """A copy whose last blocks (Swin: stages), and all that follows them up to the embedding, are redrawn.

    Cascading: with the same seed, what is redrawn for fewer blocks is redrawn alike for more. The classifier stays as
    it is (`random_head`), and so does the original. With 0 blocks the copy is the original.

    Args:
        backbone: a vision transformer of timm, plain or hierarchical.
        num_blocks_from_the_top: 0 to the number of blocks.
        seed: of the draws; a parameter's depend on the seed and its name alone.

    Raises:
        ValueError: a model without blocks or layers, or more blocks than it has.
    """
    model = copy.deepcopy(backbone.model)
    found = [name for name in SEQUENCES if isinstance(getattr(model, name, None), nn.Sequential | nn.ModuleList)]
    if not found:
        raise ValueError(
            f"backbone: expected a model with {' or '.join(SEQUENCES)}, got {type(model).__name__}; only vision "
            "transformers can be randomised block by block"
        )
    num_blocks = len(getattr(model, found[0]))
    require_whole("num_blocks_from_the_top", num_blocks_from_the_top)
    if not 0 <= num_blocks_from_the_top <= num_blocks:
        raise ValueError(f"num_blocks_from_the_top: expected 0 to {num_blocks}, got {num_blocks_from_the_top}")
    if num_blocks_from_the_top:
        first_kept = num_blocks - num_blocks_from_the_top
        upper = [f"{found[0]}.{place}." for place in range(first_kept, num_blocks)] + _above(model, found[0])
        for name, parameter in model.named_parameters():
            if name.startswith(tuple(upper)):
                _redraw(parameter, generator_of(seed, name))
    return Backbone(backbone.config, model)


def random_head(head: nn.Linear, seed: int) -> nn.Linear:
    """A copy of a linear head with weight and bias redrawn; the original stays as it is."""
    redrawn = copy.deepcopy(head)
    for name, parameter in redrawn.named_parameters():
        _redraw(parameter, generator_of(seed, "head", name))
    return redrawn


def _centred_ranks(score_BN: Tensor) -> Tensor:
    """How many patches score lower, less how many score higher [B, N], float64: twice the rank, mean 0."""
    one_BNN, other_BNN = score_BN[:, :, None], score_BN[:, None, :]
    return ((one_BNN > other_BNN).sum(2) - (one_BNN < other_BNN).sum(2)).double()


def _above(model: nn.Module, sequence: str) -> list[str]:
    """Prefixes of the parameters between the blocks and the embedding: timm's modules stand in order of use."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    of_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    names = [name for name, _ in model.named_children()]
    later = tuple(f"{name}." for name in names[names.index(sequence) + 1 :])
    return [n for n, p in model.named_parameters() if n.startswith(later) and id(p) not in of_heads]


@torch.no_grad()
def _redraw(parameter: nn.Parameter, generator: torch.Generator) -> None:
    mean, deviation = parameter.float().mean(), parameter.float().std(correction=0)
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    parameter.copy_(mean + deviation * noise)
