"""Coalitions of a plain vision transformer, without masked copies of the picture.

Once per picture: patches, positions, and the first block's norm, queries, keys and values (its token bank). Once per
coalition: the bank's rows of the tokens that are there, packed with those of other coalitions into one matrix [R, D];
then the blocks, of which the last computes only what the pooling reads.

`drop`  a sequence holds the prefix and the patches that are present.
`zero`  a sequence holds all tokens, with a blank patch's row where one is absent: what the stem makes of zero pixels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tve.coalitions import Coalitions, WindowCoalitions, on_finer_grid
from tve.kernels import Backend, Ragged, bit_words, pack_masks, pack_windows, pooled_attention
from tve.memory import MemoryNeed, even_bounds, need_of, peak_bytes
from tve.plain_vits import pooled_tokens, pools_prefix
from tve.removal import Removal
from tve.vit_blocks import HeadRows, PreNormBlock, WholeBlock, add_and_norm, added, read_blocks

# Live bytes of one pass and of the token bank on a CPU: larger ones are no faster (measured, docs/experiments.md), and
# no tensor of theirs reaches the size from which the C library hands freed pages back.
CPU_PASS_BYTES = 32 * 2**20
CPU_PASS_SHARE = 0.25  # of a memory budget: the process grows by up to three times a pass's live bytes (allocator)
CPU_BANK_BYTES = 16 * 2**20
BANK_SHARE = 0.25  # of a memory budget, which the token bank may take while it is made
PROBE_ROWS = 16384  # packed rows by which a pass's memory is measured, on tensors without memory
MASKS_AT_ONCE = 4096  # whose patches are counted together


@dataclass(frozen=True, slots=True)
class TokenBank:
    """Rows of every token of some pictures, on which passes draw."""

    rows_BTV: Tensor  # the token, and where the first block is read apart its q, k, v (and norm, for a gate)
    absent_NV: Tensor | None  # the same for a blank patch, under `zero`
    rope: tuple[Tensor, ...]  # rotary tables [T, heads or 1, 2 W]: none, one, or one a block


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes that a model alone does not tell."""

    image_size: int  # pixels
    patches_per_side: int  # of the coalitions
    embed_dim: int


class TokenEngine:
    """Evaluates coalitions of one model under one removal operator, on packed tokens.

    Args:
        model: a plain vision transformer, in evaluation mode, in the dtype of the passes.
        removal: "zero" or "drop".
        geometry: of the pictures and coalitions.
        memory_bytes: for the live tensors of an evaluation; pictures given and embeddings returned are not counted.
        backend: who runs the ops.
        compiled: whether torch.compile makes one program of the blocks, around the kernels.

    Raises:
        ValueError: `compiled` where a block is not read apart, or with PyTorch's ops, which loop over lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        removal: Removal,
        geometry: Geometry,
        memory_bytes: int,
        backend: Backend,
        *,
        compiled: bool = False,
    ) -> None:
        assert isinstance(model, VisionTransformer | Eva)
        self.model: Any = model
        self.removal = removal
        self.geometry = geometry
        self.backend = backend
        self.memory_bytes = memory_bytes
        self.num_prefix = int(model.num_prefix_tokens)
        self.grid = geometry.image_size // int(model.patch_embed.patch_size[0])
        self.num_patches = self.grid**2
        self.cells = self.grid // geometry.patches_per_side  # tokens per side of one patch of a coalition
        self.blocks = read_blocks(model.blocks, self.num_prefix)
        self.num_pooled = pooled_tokens(model)
        self._pass_need: MemoryNeed | None = None
        self._bank_need: MemoryNeed | None = None
        self._run = self._blocks
        if compiled:
            self._require_compilable()
            self._program = torch.compile(self._blocks, dynamic=True, fullgraph=True)
            self._run = self._run_compiled

    def _require_compilable(self) -> None:
        whole = next((block.block for block in self.blocks if isinstance(block, WholeBlock)), None)
        if self.backend != "triton" or whole is not None:
            got = f"the backend {self.backend!r}" if whole is None else f"blocks of {type(whole).__name__}"
            raise ValueError(
                f"compiled: expected Triton's kernels and blocks that are read apart, got {got}; leave compiled False"
            )

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = next(self.model.parameters())
        return parameter

    def evaluate(self, images_B3SS: Tensor, image_M: Tensor, coalitions: Coalitions) -> Tensor:
        """Embeddings [M, D], float32, of coalition m of picture image_M[m].

        Raises:
            ValueError: a memory budget too small for one coalition, or an empty coalition without a token to pool.
        """
        device = images_B3SS.device
        lengths_M, picture_M = self._lengths(coalitions), image_M.cpu()
        embeddings_MD = torch.empty(len(image_M), self.geometry.embed_dim, dtype=torch.float32, device=device)
        pictures_X, picture_of_M, counts_X = picture_M.unique(return_inverse=True, return_counts=True)
        by_picture_M = picture_of_M.argsort(stable=True)
        ends = [0, *counts_X.cumsum(0).tolist()]
        together = self._pictures_together() if len(pictures_X) else 1
        for first in range(0, len(pictures_X), together):
            last = min(first + together, len(pictures_X))
            bank = self._bank(images_B3SS[pictures_X[first:last].to(device)])
            mine = by_picture_M[ends[first] : ends[last]]
            mine = mine[lengths_M[mine].argsort(stable=True)]
            lengths = lengths_M[mine].tolist()
            place_M, mine = (picture_of_M[mine] - first).int().to(device), mine.to(device)  # not in every pass anew
            for start, end in pairwise(self._pass_bounds(lengths, bank)):
                chosen = mine[start:end]
                layout = Ragged.of(lengths[start:end], device)
                embeddings_MD[chosen] = self._pass(bank, place_M[start:end], coalitions[chosen], layout)
            del bank  # before the next one is made
        return embeddings_MD

    def _bank(self, images_B3SS: Tensor) -> TokenBank:
        images_B3SS = images_B3SS.to(self._parameter.dtype)
        if self.removal == "zero":  # behind the pictures a blank one, whose patches stand for absent ones
            images_B3SS = torch.cat([images_B3SS, torch.zeros_like(images_B3SS[:1])])
        tokens_BTD, tables = self._embedded(images_B3SS)
        first_rope = tables[0] if tables else None
        rows_BTV = self._first_rows(tokens_BTD, first_rope)
        if self.removal == "drop":
            return TokenBank(rows_BTV, None, tables)
        return TokenBank(rows_BTV[:-1], rows_BTV[-1, self.num_prefix :], tables)

    def _embedded(self, images_B3SS: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens [B, T, D] as they enter the first block, and rotary tables by token: none, one, or one a block."""
        model = self.model
        embedded = model._pos_embed(model.patch_embed(images_B3SS))
        tokens_BTD, table = embedded if isinstance(embedded, tuple) else (embedded, None)
        if table is None:
            return model.norm_pre(tokens_BTD), ()
        tables = table if getattr(model, "rope_mixed", False) else (table,)
        # timm's are of patches: [N, 2 W], or with an axis of heads [H, N, 2 W].
        by_patch = (each[:, None] if each.ndim == 2 else each.transpose(0, 1) for each in tables)
        return model.norm_pre(tokens_BTD), tuple(_with_prefix(each, self.num_prefix) for each in by_patch)

    def _first_rows(self, tokens_BTD: Tensor, rope_THW: Tensor | None) -> Tensor:
        first = self.blocks[0]
        if isinstance(first, WholeBlock):
            return tokens_BTD
        batch, num_tokens, _ = tokens_BTD.shape
        rows_RD = tokens_BTD.flatten(0, 1)
        normed_RD = first.norm1(rows_RD)
        rope_RHW = None if rope_THW is None else rope_THW.repeat(batch, 1, 1)
        heads = first.query_key_value(normed_RD, rope_RHW)
        columns = [rows_RD, *(part.flatten(1) for part in heads)]
        if getattr(first.attention, "gate", None) is not None:
            columns.append(normed_RD)
        return torch.cat(columns, -1).reshape(batch, num_tokens, -1)

    def _pass(self, bank: TokenBank, image_M: Tensor, coalitions: Coalitions, layout: Ragged) -> Tensor:
        coalitions = self._on_own_grid(coalitions)

        def packed(rows_BTV: Tensor, absent_NV: Tensor | None, image: Tensor) -> Tensor:
            if isinstance(coalitions, WindowCoalitions):
                return pack_windows(
                    rows_BTV,
                    absent_NV,
                    image,
                    coalitions.centre.int(),
                    coalitions.kept,
                    layout,
                    num_prefix=self.num_prefix,
                    patches_per_side=coalitions.windows.patches_per_side,
                    radius=coalitions.windows.radius,
                    backend=self.backend,
                )
            words = bit_words(coalitions.flatten(1))
            return pack_masks(
                rows_BTV, absent_NV, image, words, layout, num_prefix=self.num_prefix, backend=self.backend
            )

        ropes = []
        for table in bank.rope:
            # A token keeps its own position: the table is packed as the tokens are, as of one picture.
            flat_1TV = table.flatten(1)[None]
            absent = None if bank.absent_NV is None else flat_1TV[0, self.num_prefix :]
            ropes.append(packed(flat_1TV, absent, torch.zeros_like(image_M)).unflatten(1, table.shape[1:]))
        return self._pooled(self._run(packed(bank.rows_BTV, bank.absent_NV, image_M), ropes, layout), layout)

    def _run_compiled(self, rows_RV: Tensor, ropes: Sequence[Tensor], layout: Ragged) -> Tensor:
        # Without the runs, which are Python's and would make a new program for every set of lengths.
        return self._program(rows_RV, ropes, Ragged(layout.offsets_M1, layout.sequence_R, ()))

    def _blocks(self, rows_RV: Tensor, ropes: Sequence[Tensor], layout: Ragged) -> Tensor:
        """Normed features of the tokens that are pooled, from the packed rows of the first block."""
        x, ready = self._split(rows_RV)
        del rows_RV
        branch: Tensor | None = None
        scale: Tensor | None = None
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            rope = (ropes[number] if len(ropes) > 1 else ropes[0]) if ropes else None
            if isinstance(block, WholeBlock):
                x = added(x, branch, scale)
                branch = scale = None
                x = block(x, rope, layout)
                continue
            if number == last and self.num_pooled:
                x, branch = self._last_block(block, x, branch, scale, ready, rope, layout)
                scale = block.scale2_D
                break
            if ready is None:
                x, normed = add_and_norm(x, branch, scale, block.norm1, self.backend)
                heads = block.query_key_value(normed, rope)
            else:
                heads, normed = ready
                ready = None
            gathered = block.attend(heads, layout, self.backend)
            del heads
            branch = None  # what is not needed any more does not wait in memory for the widest moment
            attended = block.attended(gathered, normed)
            del gathered
            x, normed = add_and_norm(x, attended, block.scale1_D, block.norm2, self.backend)
            del attended
            branch, scale = block.mlp(normed), block.scale2_D
            del normed
        return add_and_norm(x, branch, scale, self.model.norm, self.backend)[1]

    def _split(self, rows_RV: Tensor) -> tuple[Tensor, tuple[HeadRows, Tensor] | None]:
        """The tokens, and what the bank holds of the first block."""
        first = self.blocks[0]
        if isinstance(first, WholeBlock):
            return rows_RV, None
        width = int(self.model.embed_dim)
        sizes = [width, *first.widths()]
        x, q, k, v, *normed = rows_RV.split([*sizes, rows_RV.shape[1] - sum(sizes)], -1)
        heads = HeadRows(*(part.unflatten(-1, (-1, first.head_width)) for part in (q, k, v)))
        return x, (heads, normed[0] if normed else x)

    def _last_block(
        self,
        block: PreNormBlock,
        x_RD: Tensor,
        branch_RD: Tensor | None,
        scale_D: Tensor | None,
        ready: tuple[HeadRows, Tensor] | None,
        rope: Tensor | None,
        layout: Ragged,
    ) -> tuple[Tensor, Tensor]:
        """The pooled tokens [M * Q, D] before and in the last branch: keys and values of all, queries of these."""
        pooled_MQ = (layout.offsets_M1[:-1, None] + torch.arange(self.num_pooled, device=x_RD.device)).flatten()
        if ready is None:
            x_RD, normed_RD = add_and_norm(x_RD, branch_RD, scale_D, block.norm1, self.backend)
            keys, values = block.key_value(normed_RD, rope)
            x, normed = x_RD[pooled_MQ], normed_RD[pooled_MQ]
            queries = block.query(normed)
        else:
            (queries_RHW, keys, values), normed_RD = ready
            x, normed, queries = x_RD[pooled_MQ], normed_RD[pooled_MQ], queries_RHW[pooled_MQ]
        queries_MQHW = queries.unflatten(0, (-1, self.num_pooled))
        backend = layout.attention_backend(self.backend)
        gathered_MQHW = pooled_attention(
            queries_MQHW, *block.expand(keys, values), layout, scale=block.scale, backend=backend
        )
        attended = block.attended(gathered_MQHW.flatten(0, 1), normed)
        x, normed = add_and_norm(x, attended, block.scale1_D, block.norm2, self.backend)
        return x, block.mlp(normed)

    def _pooled(self, normed: Tensor, layout: Ragged) -> Tensor:
        model = self.model
        if self.num_pooled and isinstance(self.blocks[-1], PreNormBlock):
            groups = [normed.unflatten(0, (-1, self.num_pooled))]
        else:
            groups = [features for _, _, (features,) in layout.dense(normed)]
        return torch.cat([model.forward_head(features, pre_logits=True) for features in groups]).float()

    def _lengths(self, coalitions: Coalitions) -> Tensor:
        """Tokens of each coalition's sequence, int64 [M], on the CPU."""
        if self.removal == "zero":
            return torch.full(coalitions.shape[:1], self.num_prefix + self.num_patches)
        if isinstance(coalitions, WindowCoalitions):
            sizes_M = coalitions.sizes()
        else:  # a sum of bools makes integers of them first
            sizes_M = torch.cat([part.flatten(1).sum(1) for part in coalitions.split(MASKS_AT_ONCE)])
        if not pools_prefix(self.model) and bool((sizes_M == 0).any()):
            raise ValueError(
                "coalitions: expected at least one patch, since the model pools patch tokens; got an empty "
                "coalition; use removal 'zero'"
            )
        return (sizes_M * self.cells**2 + self.num_prefix).cpu()

    def _on_own_grid(self, coalitions: Coalitions) -> Coalitions:
        """The coalitions of a pass, on the model's own grid."""
        if self.cells == 1:
            return coalitions
        present = coalitions.present() if isinstance(coalitions, WindowCoalitions) else coalitions
        return on_finer_grid(present, self.cells)

    def _pictures_together(self) -> int:
        """Of how many pictures the token bank is made at once."""
        need = self.bank_need
        if need.fixed_bytes + need.per_unit_bytes > self.memory_bytes:
            raise self._too_small(need.fixed_bytes + need.per_unit_bytes, "the tokens of one picture")
        share = int(self.memory_bytes * BANK_SHARE)
        if self._parameter.device.type == "cpu":
            share = min(share, CPU_BANK_BYTES)
        return max(1, need.units_within(share))

    def _pass_bounds(self, lengths: list[int], bank: TokenBank) -> list[int]:
        """Where passes begin and end in sequences of these lengths, ascending."""
        parts = (bank.rows_BTV, bank.absent_NV, *bank.rope)
        bank_bytes = sum(part.nbytes for part in parts if part is not None)
        need, longest = self.pass_need, lengths[-1]
        limit = need.units_within(self.memory_bytes - bank_bytes)
        if limit < longest:
            needed = bank_bytes + need.fixed_bytes + longest * need.per_unit_bytes
            raise self._too_small(needed, f"one coalition of {longest} tokens")
        if self._parameter.device.type == "cpu":
            live_bytes = min(CPU_PASS_BYTES, int(self.memory_bytes * CPU_PASS_SHARE))
            limit = min(limit, max(live_bytes // need.per_unit_bytes, longest))
        return even_bounds(lengths, limit)

    def _too_small(self, needed_bytes: int, what: str) -> ValueError:
        return ValueError(
            f"memory_mib: expected at least {-(-needed_bytes // 2**20)} for {what}, got {self.memory_bytes / 2**20:g}"
        )

    @property
    def pass_need(self) -> MemoryNeed:
        """Memory of a pass by its packed rows, by the first and the last block.

        What rows hold grows with them; what attention needs besides (on a CPU, the scores of some sequences at a time)
        only up to a bound, which is taken of the length that needs most.
        """
        if self._pass_need is None:
            full, bank = self.num_prefix + self.num_patches, self._bank(self._pictures(1))
            few, many = (_rounded(PROBE_ROWS * factor, full) for factor in (1, 2))
            per_row = max(
                1, -(-(self._pass_bytes(bank, many, full) - self._pass_bytes(bank, few, full)) // (many - few))
            )
            lengths = {full} | {length for length in (8, 16, 32, 64, 128) if length < full}
            rows = {length: _rounded(PROBE_ROWS, length) for length in lengths}
            fixed = max(self._pass_bytes(bank, rows[length], length) - per_row * rows[length] for length in lengths)
            self._pass_need = MemoryNeed(max(0, fixed), per_row)
        return self._pass_need

    def _pass_bytes(self, bank: TokenBank, num_rows: int, length: int) -> int:
        """Peak bytes of a pass of sequences of one length, from its packed rows on."""
        device, dtype = self._parameter.device, self._parameter.dtype
        ends = copy.copy(self)
        ends.blocks = [self.blocks[0], self.blocks[-1]]
        layout = Ragged.of([length] * (num_rows // length), device)

        def passed() -> Tensor:
            ropes = [torch.empty((num_rows, *table.shape[1:]), dtype=table.dtype, device=device) for table in bank.rope]
            size = (num_rows, bank.rows_BTV.shape[2])
            normed = ends._blocks(torch.empty(size, dtype=dtype, device=device), ropes, layout)
            return ends._pooled(normed, layout)

        return peak_bytes(passed, fake=True)

    @property
    def bank_need(self) -> MemoryNeed:
        """Memory of making the token bank, by pictures."""
        if self._bank_need is None:
            self._bank_need = need_of(lambda count: self._bank(self._pictures(count)))
        return self._bank_need

    def _pictures(self, count: int) -> Tensor:
        size = self.geometry.image_size
        return torch.zeros(count, 3, size, size, device=self._parameter.device)


def _with_prefix(table_NHW: Tensor, num_prefix: int) -> Tensor:
    """A rotary table with rows for the prefix, which is not turned: sine 0, cosine 1."""
    still = torch.zeros_like(table_NHW[:1]).expand(num_prefix, -1, -1).clone()
    still[..., still.shape[-1] // 2 :] = 1
    return torch.cat([still, table_NHW])


def _rounded(num_rows: int, length: int) -> int:
    """As many rows as make whole sequences of a length, one at least."""
    return max(1, num_rows // length) * length
