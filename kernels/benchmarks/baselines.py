"""The ways to evaluate coalitions that are compared: two with masked copies, two with gathered tokens, and ours.

(a) `masked_eager`     pixels are masked, copies go through the model, a batch at a time
(b) `masked_compiled`  the same through torch.compile
(c) `grouped_eager`    kept tokens are gathered, grouped by length, and go through the model's blocks in dense batches
    `grouped_compiled` the same through torch.compile; of the two, the faster one counts, case by case
(d) `evaluator`        `tve.CoalitionEvaluator`

(a) and (b) know no removal but `zero`: under `drop` they answer another question at the price that it would have.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import masks
from tve.backbones import Backbone
from tve.coalitions import Coalitions
from tve.evaluator import CoalitionEvaluator
from tve.kernels import Choice, Requested, choose
from tve.plain_vits import obstacle
from tve.precision import Precision
from tve.removal import Removal, zero_pixels

SideName = Literal["masked_eager", "masked_compiled", "grouped_eager", "grouped_compiled", "evaluator"]
SIDES: tuple[SideName, ...] = get_args(SideName)
LETTERS: dict[SideName, str] = {
    "masked_eager": "a",
    "masked_compiled": "b",
    "grouped_eager": "c",
    "grouped_compiled": "c",
    "evaluator": "d",
}

# Per device: copies of (a) and of (b), rows of (c), rows of (c) where every shape is compiled apart, MiB of (d).
# Every candidate of (b) and every length of the last kind is compiled: seconds to a minute each.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "eager copies": (1, 2, 4, 8, 16),
        "compiled copies": (1, 4, 16),
        "eager rows": (256, 1024, 4096, 16384),
        "compiled rows": (256, 1024, 4096),
        "static rows": (1024,),
        "MiB": (512,),  # its passes are smaller than any budget there
    },
    "cuda": {
        "eager copies": (32, 64, 128, 256, 512),
        "compiled copies": (64, 256),
        "eager rows": (16384, 65536, 262144),
        "compiled rows": (16384, 65536, 262144),
        "static rows": (65536,),
        "MiB": (1024, 4096, 16384),
    },
}
# Copies that a masked side evaluates in one round: each costs the same, so a full case would only take longer.
MASKED_AT_MOST = {"cpu": 16, "cuda": 1024}

Embed = Callable[[Tensor, Coalitions], Tensor]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of a side: maps pictures [B, 3, S, S] and coalitions [B, K] to embeddings [B, K, D]."""

    batch: str  # the setting, with its unit
    embed: Embed


@dataclass(frozen=True, slots=True)
class Side:
    """One way to evaluate coalitions, with the settings among which its best is searched."""

    name: SideName
    removal: Removal  # what it computes
    candidates: tuple[Candidate, ...]
    eager: Embed  # the same arithmetic without a compiler or kernels, whose FLOPs can be counted
    at_most: int | None = None  # evaluations a round
    choice: Choice | None = None  # of the evaluator's ops


def sides(
    backbone: Backbone,
    removal: Removal,
    precision: Precision,
    names: tuple[SideName, ...] = SIDES,
    backend: Requested = "auto",
) -> dict[SideName, Side]:
    """Those of the named sides that exist for this backbone and removal.

    Args:
        backbone: with its model on the device and in the dtype of `precision`.
        removal: "zero" or "drop".
        precision: of the passes of every side.
        names: which sides, in any order.
        backend: of the evaluator's ops.
    """
    device = next(backbone.model.parameters()).device
    lists = CANDIDATES[device.type]
    at_most = MASKED_AT_MOST[device.type]
    masked = functools.partial(_masked, backbone)
    made: dict[SideName, Side] = {}
    for name in names:
        if name == "masked_eager":
            forms = tuple(_candidates(lists["eager copies"], "copies", masked(zero_and_embed)))
            made[name] = Side(name, "zero", forms, forms[0].embed, at_most)
        elif name == "masked_compiled":
            program = compiled(zero_and_embed, dynamic=False)
            forms = tuple(_candidates(lists["compiled copies"], "copies", masked(program)))
            made[name] = Side(name, "zero", forms, functools.partial(masked(zero_and_embed), 1), at_most)
        elif name == "evaluator":
            made[name] = _evaluator(backbone, removal, precision, lists["MiB"], backend)
        elif removal == "drop" and groupable(backbone):
            made[name] = _grouped_side(name, backbone, lists)
    return made


def groupable(backbone: Backbone) -> bool:
    """Whether (c) is written for this model: a plain ViT whose embedding is its one class token's."""
    model: Any = backbone.model
    plain = type(model) is VisionTransformer and not obstacle(model, backbone.image_size, backbone.patches_per_side)
    return bool(
        plain
        and model.global_pool == "token"
        and model.num_prefix_tokens == 1
        and model.attn_pool is None
        and int(model.patch_embed.patch_size[0]) * backbone.patches_per_side == backbone.image_size
    )


def compiled(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
    """The function through torch.compile, an error instead of a quiet fall back to eager after many shapes."""
    from torch._dynamo import config

    config.recompile_limit = 1024
    config.accumulated_recompile_limit = 8192
    config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=dynamic)


def forget_compiled() -> None:
    """Drops what was compiled, so that the code of one model is not kept while the next is measured."""
    torch._dynamo.reset()


def zero_and_embed(backbone: Backbone, images_M3SS: Tensor, present_MPP: Tensor) -> Tensor:
    """Embeddings [M, D] of pictures whose absent patches are 0."""
    features = backbone.model.forward_features(zero_pixels(images_M3SS, present_MPP))  # type: ignore[operator]
    return backbone.pool(features)


def _masked(backbone: Backbone, program: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def embed(size: int, images_B3SS: Tensor, coalitions: Coalitions) -> Tensor:
        present_BKPP = masks(coalitions)
        num_coalitions = present_BKPP.shape[1]
        present_MPP = present_BKPP.flatten(0, 1)
        images_B3SS = images_B3SS.to(next(backbone.model.parameters()).dtype)
        parts = [
            program(backbone, images_B3SS[rows // num_coalitions], present_MPP[rows])
            for rows in torch.arange(len(present_MPP), device=images_B3SS.device).split(size)
        ]
        return torch.cat(parts).reshape(len(images_B3SS), num_coalitions, -1)

    return embed


def blocks_and_pool(model: Any, x_nTD: Tensor) -> Tensor:
    """Embeddings [n, D] of sequences [n, T, D], by the model's own blocks."""
    embedding: Tensor = model.forward_head(model.norm(model.blocks(x_nTD)), pre_logits=True)
    return embedding


def _block_by_block() -> Callable[..., Tensor]:
    """`blocks_and_pool` compiled for every shape, one block at a time: a twelfth of the code of the whole."""
    program = compiled(lambda block, x_nTD: block(x_nTD), dynamic=False)

    def run(model: Any, x_nTD: Tensor) -> Tensor:
        for block in model.blocks:
            x_nTD = program(block, x_nTD)
        embedding: Tensor = model.forward_head(model.norm(x_nTD), pre_logits=True)
        return embedding

    return run


def _grouped_side(name: SideName, backbone: Backbone, lists: dict[str, tuple[int, ...]]) -> Side:
    grouped = functools.partial(_grouped, backbone)
    eager = functools.partial(grouped(blocks_and_pool), max(lists["eager rows"]))
    if name == "grouped_eager":
        return Side(name, "drop", tuple(_candidates(lists["eager rows"], "rows", grouped(blocks_and_pool))), eager)
    any_shape = grouped(compiled(blocks_and_pool, dynamic=True))
    each_shape = grouped(_block_by_block())
    forms = (
        *_candidates(lists["compiled rows"], "rows", any_shape),
        *_candidates(lists["static rows"], "rows (a program a shape)", each_shape),
    )
    return Side(name, "drop", forms, eager)


def _grouped(backbone: Backbone, program: Callable[..., Tensor]) -> Callable[..., Tensor]:
    model: Any = backbone.model

    def embed(row_budget: int, images_B3SS: Tensor, coalitions: Coalitions) -> Tensor:
        tokens_BTD = model._pos_embed(model.patch_embed(images_B3SS.to(next(model.parameters()).dtype)))
        tokens_BTD = model.norm_pre(tokens_BTD)
        device, num_coalitions = tokens_BTD.device, coalitions.shape[1]
        present_MT = functional.pad(masks(coalitions).flatten(-2).flatten(0, 1), (1, 0), value=True)
        token_R = present_MT.nonzero()[:, 1]  # the kept tokens of all coalitions, one after the other
        length_M = present_MT.sum(1)
        first_M = length_M.cumsum(0) - length_M
        lengths = length_M.cpu()
        embeddings_MD = tokens_BTD.new_empty(len(lengths), backbone.embed_dim)
        for length in lengths.unique().tolist():
            group_m = (lengths == length).nonzero()[:, 0].to(device)
            num_parts = min(-(-len(group_m) * length // row_budget), len(group_m))
            for part_m in group_m.tensor_split(num_parts):
                token_mL = token_R[first_M[part_m, None] + torch.arange(length, device=device)]
                embeddings_MD[part_m] = program(model, tokens_BTD[part_m[:, None] // num_coalitions, token_mL])
        embeddings_BKD: Tensor = embeddings_MD.unflatten(0, (-1, num_coalitions))
        return embeddings_BKD

    return embed


def _evaluator(
    backbone: Backbone, removal: Removal, precision: Precision, budgets_mib: tuple[int, ...], backend: Requested
) -> Side:
    device = next(backbone.model.parameters()).device
    settings = [(mib, False) for mib in budgets_mib]
    if device.type == "cuda" and choose(backend, device).backend == "triton":
        settings.append((budgets_mib[-1], True))
    made = [
        CoalitionEvaluator(
            backbone, removal, memory_mib=mib, precision=precision, backend=backend, compiled=is_compiled
        )
        for mib, is_compiled in settings
    ]
    forms = tuple(
        Candidate(f"{mib} MiB{', compiled' if is_compiled else ''}", evaluator)
        for (mib, is_compiled), evaluator in zip(settings, made, strict=True)
    )
    plain = CoalitionEvaluator(backbone, removal, memory_mib=budgets_mib[0], precision=precision, backend="torch")
    return Side("evaluator", removal, forms, plain, choice=made[0].choice)


def _candidates(sizes: tuple[int, ...], unit: str, embed: Callable[..., Tensor]) -> Iterator[Candidate]:
    for size in sizes:
        yield Candidate(f"{size} {unit}", functools.partial(embed, size))
