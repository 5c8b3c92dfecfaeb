"""How timm's transformer blocks are read: as steps on packed rows, between which stands only the attention.

All but the attention of a block works on one token at a time, so tokens of many coalitions lie in one matrix [R, D]
whatever their lengths. `PreNormBlock` takes a block apart that far. `WholeBlock` runs any other block as it is, on
the sequences of each length together.
"""

from typing import Any, Literal, NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tve.kernels import Backend, Ragged, ragged_attention, residual_norm


class HeadRows(NamedTuple):
    """Queries, keys and values of packed rows."""

    q_RHW: Tensor
    k_RHW: Tensor
    v_RHW: Tensor


class PreNormBlock:
    """x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)): timm's Block and EvaBlock.

    Head norms, rotary positions, gates, norms of the attention's output and grouped keys are the block's own.
    """

    def __init__(self, block: nn.Module) -> None:
        parts: Any = block
        self.norm1: nn.Module = parts.norm1
        self.norm2: nn.Module = parts.norm2
        self.mlp: nn.Module = parts.mlp
        self.scale1_D = _layer_scale(block, 1)
        self.scale2_D = _layer_scale(block, 2)
        self.attention: Any = parts.attn
        self.num_heads = int(self.attention.num_heads)
        self.num_key_heads = int(getattr(self.attention, "num_kv_heads", self.num_heads))
        self.head_width = int(self.attention.head_dim)
        self.scale = float(self.attention.scale)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block can be read here as it is: of known parts, and without hooks, which may do anything."""
        return PreNormBlock.of_known_parts(block) and not PreNormBlock.hooked(block)

    @staticmethod
    def of_known_parts(block: nn.Module) -> bool:
        """Whether the block is one of those read here: subclasses and replaced layers may do anything."""
        attention: Any = getattr(block, "attn", None)
        if type(block) not in (Block, EvaBlock) or type(attention) not in (Attention, AttentionRope, EvaAttention):
            return False
        scales = (getattr(block, name, None) for name in ("ls1", "ls2"))
        return (attention.qkv is None or type(attention.qkv) is nn.Linear) and all(
            scale is None or type(scale) in (LayerScale, nn.Identity) for scale in scales
        )

    @staticmethod
    def hooked(block: nn.Module) -> bool:
        """Whether anything in the block has hooks, which reading it part by part would pass by."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())

    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        keys = self.num_key_heads * self.head_width
        return self.num_heads * self.head_width, keys, keys

    def query_key_value(self, normed_RD: Tensor, rope_RHW: Tensor | None) -> HeadRows:
        """Queries, keys and values [R, H, W] of normed rows, with head norms and rotary positions applied."""
        q_RHW, k_RHW, v_RHW = self._projected(normed_RD, 0, 3)
        attention = self.attention
        return HeadRows(
            self._rotated(attention.q_norm(q_RHW), rope_RHW), self._rotated(attention.k_norm(k_RHW), rope_RHW), v_RHW
        )

    def query(self, normed_RD: Tensor) -> Tensor:
        """Queries [R, H, W] of rows that have no rotary position: class tokens."""
        (q_RHW,) = self._projected(normed_RD, 0, 1)
        queries: Tensor = self.attention.q_norm(q_RHW)
        return queries

    def key_value(self, normed_RD: Tensor, rope_RHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, W]."""
        k_RHW, v_RHW = self._projected(normed_RD, 1, 3)
        return self._rotated(self.attention.k_norm(k_RHW), rope_RHW), v_RHW

    def attend(self, rows: HeadRows, layout: Ragged, backend: Backend) -> Tensor:
        """What each row gathers from its own sequence, [R, H, W]."""
        q, k, v = rows
        backend = layout.attention_backend(backend)
        return ragged_attention(q, *self.expand(k, v), layout, scale=self.scale, backend=backend)

    def expand(self, k_RHW: Tensor, v_RHW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values for every query head, where several share one."""
        groups = self.num_heads // self.num_key_heads
        if groups == 1:
            return k_RHW, v_RHW
        return k_RHW.repeat_interleave(groups, 1), v_RHW.repeat_interleave(groups, 1)

    def attended(self, gathered_RHW: Tensor, normed_RD: Tensor) -> Tensor:
        """The attention's branch [R, D], from what was gathered and, for gates, the rows that asked."""
        attention = self.attention
        rows = gathered_RHW.flatten(1)
        if (norm := getattr(attention, "norm", None)) is not None:
            rows = norm(rows)
        if (gate := getattr(attention, "gate", None)) is not None:
            rows = rows * gate(normed_RD).sigmoid()
        branch: Tensor = attention.proj(rows)
        return branch

    def _projected(self, normed_RD: Tensor, first: int, last: int) -> list[Tensor]:
        """Of q, k and v those from `first` to before `last`, [R, H, W] each."""
        attention = self.attention
        if attention.qkv is None:
            rows = [
                project(normed_RD) for project in (attention.q_proj, attention.k_proj, attention.v_proj)[first:last]
            ]
        else:
            before, widths, bias = sum(self.widths()[:first]), self.widths()[first:last], self._bias()
            columns = slice(before, before + sum(widths))
            weight = attention.qkv.weight[columns]
            rows = F.linear(normed_RD, weight, None if bias is None else bias[columns]).split(widths, -1)
        return [self._heads(part) for part in rows]

    def _bias(self) -> Tensor | None:
        attention = self.attention
        if isinstance(attention, EvaAttention):
            biases: Any = (attention.q_bias, attention.k_bias, attention.v_bias)
            return None if biases[0] is None else torch.cat(biases)
        bias: Tensor | None = attention.qkv.bias
        return bias

    def _heads(self, rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(-1, (-1, self.head_width))
        return heads

    def _rotated(self, rows_RHW: Tensor, rope_RHW: Tensor | None) -> Tensor:
        if rope_RHW is None:
            return rows_RHW
        half = bool(getattr(self.attention, "rotate_half", False))
        rotated: Tensor = apply_rot_embed_cat(rows_RHW, rope_RHW, half=half)
        return rotated


class WholeBlock:
    """Any block of a plain transformer that maps [sequences, length, D] to the same."""

    def __init__(self, block: nn.Module, num_prefix: int) -> None:
        self.block = block
        self.num_prefix = num_prefix

    def __call__(self, x_RD: Tensor, rope_RHW: Tensor | None, layout: Ragged) -> Tensor:
        result_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        tensors = (x_RD, result_RD) if rope_RHW is None else (x_RD, result_RD, rope_RHW)
        for _, _, (sequences, results, *rope) in layout.dense(*tensors):
            # timm's rotary blocks leave the prefix alone and want the table as [sequences, heads, patches, 2 W].
            given = {"rope": rope[0][:, self.num_prefix :].transpose(1, 2)} if rope else {}
            results.copy_(self.block(sequences, **given))
        return result_RD


def read_blocks(blocks: nn.Module, num_prefix: int) -> list[PreNormBlock | WholeBlock]:
    """The steps of each block of a plain vision transformer."""
    return [
        PreNormBlock(block) if PreNormBlock.fits(block) else WholeBlock(block, num_prefix)
        for block in blocks  # type: ignore[attr-defined]
    ]


def add_and_norm(
    x_RD: Tensor, branch_RD: Tensor | None, scale_D: Tensor | None, norm: nn.Module, backend: Backend
) -> tuple[Tensor, Tensor]:
    """x + scale * branch, and its norm. Kernels know LayerNorm and RmsNorm; any other norm is called as it is."""
    if backend == "triton" and type(norm) in (LayerNorm, RmsNorm, nn.LayerNorm):
        kind: Literal["rms", "layer"] = "rms" if type(norm) is RmsNorm else "layer"
        weight, bias = norm.weight, getattr(norm, "bias", None)
        return residual_norm(
            x_RD,
            branch_RD,
            scale_D,
            weight,  # type: ignore[arg-type]
            bias,
            eps=float(norm.eps),  # type: ignore[arg-type]
            kind=kind,
            backend=backend,
        )
    x_RD = added(x_RD, branch_RD, scale_D)
    return x_RD, norm(x_RD)


def added(x_RD: Tensor, branch_RD: Tensor | None, scale_D: Tensor | None) -> Tensor:
    """x + scale * branch."""
    if branch_RD is None:
        return x_RD
    return x_RD + branch_RD if scale_D is None else torch.addcmul(x_RD, branch_RD, scale_D)


def _layer_scale(block: nn.Module, number: int) -> Tensor | None:
    gamma = getattr(block, f"gamma_{number}", None)
    if gamma is None:
        gamma = getattr(getattr(block, f"ls{number}", None), "gamma", None)
    return gamma
