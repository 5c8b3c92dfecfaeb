"""Packed rows as gathers: a program works out where its rows come from, in registers, and copies them.

A program has BLOCK_R consecutive packed rows, of whatever sequences, and BLOCK_V of their columns: work is even however
uneven the sequences are, and nothing is loaded that is not stored.
"""

import triton
import triton.language as tl
from torch import Tensor

from tve_kernels.compile_cases import CompileCase
from tve_kernels.launch import on_device_of_first

ELEMENTS = 4096  # of a program: 32 a thread, eight loads of 16 bytes in float32, four in 16-bit types
MAX_COLUMNS = 1024


@triton.jit
def windows_kernel(
    packed_RV,
    source_BTV,
    absent_NV,
    image_M,
    centre_M,
    kept_M,
    offsets_M1,
    sequence_R,
    num_rows,
    width,
    source_stride_b,
    source_stride_t,
    absent_stride_n,
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < num_rows
    sequence = tl.load(sequence_R + rows, mask=valid, other=0)
    image = tl.load(image_M + sequence, mask=valid, other=0)
    centre = tl.load(centre_M + sequence, mask=valid, other=0)
    kept = tl.load(kept_M + sequence, mask=valid, other=0) != 0
    token = rows - tl.load(offsets_M1 + sequence, mask=valid, other=0)
    patch = token - NUM_PREFIX

    p = centre // SIDE
    q = centre % SIDE
    top = tl.maximum(p - RADIUS, 0)
    left = tl.maximum(q - RADIUS, 0)
    height = tl.minimum(p + RADIUS, SIDE - 1) - top + 1
    window_width = tl.minimum(q + RADIUS, SIDE - 1) - left + 1
    if ZERO:
        row_off = patch // SIDE - top
        column_off = patch % SIDE - left
        inside = (row_off >= 0) & (row_off < height) & (column_off >= 0) & (column_off < window_width)
        present = (token < NUM_PREFIX) | (inside == kept)
    else:
        # Between two of its lines, a window leaves `gap` patches. Of those kept, each line passed adds a gap; of those
        # removed, each line passed adds a line, and a window as wide as the picture is passed as a whole. One division
        # for both: whole-number divisions are most of the arithmetic of a row.
        before = top * SIDE + left
        gap = SIDE - window_width
        past = patch - before
        steps = tl.where(kept, patch, past) // tl.where(kept, window_width, tl.maximum(gap, 1))
        kept_patch = before + patch + steps * gap
        lines = tl.where(gap > 0, tl.minimum(steps + 1, height), height)
        removed_patch = patch + tl.where(past >= 0, lines * window_width, 0)
        patch = tl.where(kept, kept_patch, removed_patch)
        token = tl.where(token < NUM_PREFIX, token, NUM_PREFIX + patch)
        present = valid
    _copy(
        packed_RV, source_BTV, absent_NV, rows, image, token, present, num_rows, width,
        source_stride_b, source_stride_t, absent_stride_n, NUM_PREFIX, ZERO, BLOCK_V,
    )  # fmt: skip


@triton.jit
def masks_kernel(
    packed_RV,
    source_BTV,
    absent_NV,
    image_M,
    words_MG,
    offsets_M1,
    sequence_R,
    num_rows,
    width,
    source_stride_b,
    source_stride_t,
    absent_stride_n,
    NUM_WORDS: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < num_rows
    sequence = tl.load(sequence_R + rows, mask=valid, other=0)
    image = tl.load(image_M + sequence, mask=valid, other=0)
    token = rows - tl.load(offsets_M1 + sequence, mask=valid, other=0)
    patch = token - NUM_PREFIX
    words = words_MG + sequence.to(tl.int64) * NUM_WORDS
    if ZERO:
        word = tl.load(words + patch // 32, mask=valid & (patch >= 0), other=0)
        present = (token < NUM_PREFIX) | (((word >> (patch % 32)) & 1) != 0)
    else:
        # The patch is the bit that has as many bits before it as the row has patches before it: first its word, then
        # its half, quarter, ... of the word.
        columns = tl.arange(0, BLOCK_G)[None, :]
        words_RG = tl.load(words[:, None] + columns, mask=valid[:, None] & (columns < NUM_WORDS), other=0)
        counts_RG = _num_bits(words_RG.to(tl.uint32, bitcast=True))
        upto_RG = tl.cumsum(counts_RG, axis=1)
        passed_RG = upto_RG <= patch[:, None]
        index = tl.sum(passed_RG.to(tl.int32), axis=1)
        before = tl.sum(tl.where(passed_RG, counts_RG, 0), axis=1)
        found = valid & (patch >= 0) & (index < NUM_WORDS)
        word = tl.load(words + index, mask=found, other=0).to(tl.uint32, bitcast=True)
        left = patch - before
        bit = tl.zeros_like(patch)
        for level in tl.static_range(5):
            low = _num_bits(word & ((1 << (16 >> level)) - 1))
            high = left >= low
            word = tl.where(high, word >> (16 >> level), word)
            left -= tl.where(high, low, 0)
            bit += tl.where(high, 16 >> level, 0)
        token = tl.where(token < NUM_PREFIX, token, NUM_PREFIX + index * 32 + bit)
        present = valid
    _copy(
        packed_RV, source_BTV, absent_NV, rows, image, token, present, num_rows, width,
        source_stride_b, source_stride_t, absent_stride_n, NUM_PREFIX, ZERO, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _copy(
    packed_RV, source_BTV, absent_NV, rows, image, token, present, num_rows, width,
    source_stride_b, source_stride_t, absent_stride_n, NUM_PREFIX: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns of packed rows, from the picture's token where it is present, else from the blank patch."""
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_RV = (rows < num_rows)[:, None] & (columns < width)[None, :]
    from_source = image.to(tl.int64) * source_stride_b + token.to(tl.int64) * source_stride_t
    values_RV = tl.load(
        source_BTV + from_source[:, None] + columns[None, :], mask=inside_RV & present[:, None], other=0.0
    )
    if ZERO:  # two loads of which one is masked off: what is not read costs no memory traffic
        from_absent = (token - NUM_PREFIX).to(tl.int64) * absent_stride_n
        absent_RV = tl.load(
            absent_NV + from_absent[:, None] + columns[None, :], mask=inside_RV & ~present[:, None], other=0.0
        )
        values_RV = tl.where(present[:, None], values_RV, absent_RV)
    tl.store(packed_RV + rows.to(tl.int64)[:, None] * width + columns[None, :], values_RV, mask=inside_RV)


@triton.jit
def _num_bits(words):
    """How many bits of each uint32 are set, as int32: sums of pairs, of fours, of bytes, of all."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return ((words + (words >> 16)) & 0x3F).to(tl.int32)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program, powers of two.

    Columns divide the width where 64 or more do, so that no lane idles: 192 is three times 64, 768 three times 256.
    """
    divisor = width & -width
    columns = min(divisor if divisor >= 64 else triton.next_power_of_2(width), MAX_COLUMNS)
    return ELEMENTS // columns, columns


def block_of_words(num_words: int) -> int:
    """Words of a row that a program loads, a power of two.

    Never fewer than eight: Triton 3.6 compiles no scan of 4 or 8 rows over an axis of one, two or four.
    """
    return max(8, int(triton.next_power_of_2(num_words)))


@on_device_of_first
def pack_windows(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    centre_M: Tensor,
    kept_M: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    patches_per_side: int,
    radius: int,
    num_prefix: int,
) -> Tensor:
    source_BTV, absent_NV, packed_RV = _prepared(source_BTV, absent_NV, sequence_R)
    if packed_RV.numel():
        num_rows, width = packed_RV.shape
        block_r, block_v = tile(width)
        windows_kernel[(triton.cdiv(num_rows, block_r), triton.cdiv(width, block_v))](
            packed_RV,
            source_BTV,
            absent_NV,
            image_M.contiguous(),
            centre_M.contiguous(),
            kept_M.contiguous(),
            offsets_M1,
            sequence_R,
            num_rows,
            width,
            source_BTV.stride(0),
            source_BTV.stride(1),
            0 if absent_NV is None else absent_NV.stride(0),
            SIDE=patches_per_side,
            RADIUS=radius,
            NUM_PREFIX=num_prefix,
            ZERO=absent_NV is not None,
            BLOCK_R=block_r,
            BLOCK_V=block_v,
        )
    return packed_RV


@on_device_of_first
def pack_masks(
    source_BTV: Tensor,
    absent_NV: Tensor | None,
    image_M: Tensor,
    words_MG: Tensor,
    offsets_M1: Tensor,
    sequence_R: Tensor,
    num_prefix: int,
) -> Tensor:
    source_BTV, absent_NV, packed_RV = _prepared(source_BTV, absent_NV, sequence_R)
    if packed_RV.numel():
        num_rows, width = packed_RV.shape
        num_words = words_MG.shape[1]
        block_r, block_v = tile(width)
        masks_kernel[(triton.cdiv(num_rows, block_r), triton.cdiv(width, block_v))](
            packed_RV,
            source_BTV,
            absent_NV,
            image_M.contiguous(),
            words_MG.contiguous(),
            offsets_M1,
            sequence_R,
            num_rows,
            width,
            source_BTV.stride(0),
            source_BTV.stride(1),
            0 if absent_NV is None else absent_NV.stride(0),
            NUM_WORDS=num_words,
            NUM_PREFIX=num_prefix,
            ZERO=absent_NV is not None,
            BLOCK_R=block_r,
            BLOCK_G=block_of_words(num_words),
            BLOCK_V=block_v,
        )
    return packed_RV


def _prepared(source_BTV: Tensor, absent_NV: Tensor | None, sequence_R: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Inputs whose columns lie side by side, and memory for the packed rows."""
    if source_BTV.stride(2) != 1:
        source_BTV = source_BTV.contiguous()
    if absent_NV is not None and absent_NV.stride(1) != 1:
        absent_NV = absent_NV.contiguous()
    return source_BTV, absent_NV, source_BTV.new_empty(sequence_R.shape[0], source_BTV.shape[2])


def _case(dtype: str, num_patches: int, width: int, *, windows: bool, zero: bool) -> CompileCase:
    block_r, block_v = tile(width)
    num_words = -(-num_patches // 32)
    signature = {
        "packed_RV": f"*{dtype}",
        "source_BTV": f"*{dtype}",
        "image_M": "*i32",
        "offsets_M1": "*i32",
        "sequence_R": "*i32",
        "num_rows": "i32",
        "width": "i32",
        "source_stride_b": "i32",
        "source_stride_t": "i32",
    }
    constexprs: dict[str, int | None] = {"NUM_PREFIX": 1, "ZERO": zero, "BLOCK_R": block_r, "BLOCK_V": block_v}
    if windows:
        signature |= {"centre_M": "*i32", "kept_M": "*i1"}
        constexprs |= {"SIDE": round(num_patches**0.5), "RADIUS": 2}
    else:
        signature |= {"words_MG": "*i32"}
        constexprs |= {"NUM_WORDS": num_words, "BLOCK_G": block_of_words(num_words)}
    if zero:
        signature |= {"absent_NV": f"*{dtype}", "absent_stride_n": "i32"}
    else:
        constexprs |= {"absent_NV": None, "absent_stride_n": 0}
    name = f"{dtype} {'windows' if windows else 'masks'} {'zero' if zero else 'drop'} N={num_patches} V={width}"
    program = windows_kernel if windows else masks_kernel
    return CompileCase(name, program, signature, constexprs, frozenset(signature) - {"num_rows"})


# Rows of D = 192, 384 and 768, and of residual, q, k and v at once: 4 * 768.
CASES = tuple(
    _case(dtype, num_patches, width, windows=windows, zero=zero)
    for dtype, num_patches, width, zero in (
        ("bf16", 196, 192, False),
        ("bf16", 196, 384, True),
        ("fp32", 196, 768, False),
        ("bf16", 196, 768, False),
        ("fp16", 196, 768, False),
        ("fp32", 196, 768, True),
        ("bf16", 196, 3072, False),
        ("bf16", 1369, 3072, False),
        ("bf16", 1369, 3072, True),
        # Small pictures: a mask of one word, of two and of four, with few rows in a program and with many.
        ("bf16", 36, 512, False),
        ("bf16", 36, 128, True),
        ("bf16", 100, 3072, False),
        ("fp32", 16, 512, False),
        ("bf16", 49, 768, False),
        ("bf16", 64, 128, True),
        ("fp32", 100, 192, False),
    )
    for windows in (True, False)
)
