"""Packing copies: kernel and dense form equal the definition to the bit, whatever the coalitions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.layout import Ragged
from tve_kernels.pack_tokens import bit_words, pack_masks, pack_windows, reference
from tve_kernels.pack_tokens import op as pack_op
from tve_kernels.pack_tokens.bits import present_patches

BACKENDS: tuple[Backend, ...] = ("triton", "torch")
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Windows:
    """Every window of a picture, kept alone and taken away, of alternating pictures."""

    image_M: Tensor
    centre_M: Tensor
    kept_M: Tensor
    present_MN: Tensor


def windows(side: int, radius: int, num_pictures: int, device: torch.device) -> Windows:
    centre_M = torch.arange(side**2, dtype=torch.int32).repeat(2)
    kept_M = torch.arange(2 * side**2) < side**2
    place = torch.arange(side**2)
    off_MN = torch.maximum(
        (place // side - centre_M[:, None] // side).abs(), (place % side - centre_M[:, None] % side).abs()
    )
    image_M = torch.arange(len(centre_M), dtype=torch.int32) % num_pictures
    present_MN = (off_MN <= radius) == kept_M[:, None]
    return Windows(image_M.to(device), centre_M.to(device), kept_M.to(device), present_MN.to(device))


def tokens(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def coalitions(num_sequences: int, num_patches: int, device: torch.device, density: float = 0.5) -> Tensor:
    return (torch.rand(num_sequences, num_patches, generator=torch.Generator().manual_seed(1)) < density).to(device)


def ragged(present_MN: Tensor, num_prefix: int, absent_NV: Tensor | None) -> Ragged:
    lengths_M = present_MN.sum(1) if absent_NV is None else torch.full(present_MN.shape[:1], present_MN.shape[1])
    return Ragged.of((lengths_M + num_prefix).tolist(), present_MN.device)


def check_masks(
    source_BTV: Tensor, absent_NV: Tensor | None, present_MN: Tensor, num_prefix: int, backend: Backend
) -> Tensor:
    """Packs, expects what the definition says, and returns it."""
    image_M = torch.arange(len(present_MN), dtype=torch.int32, device=source_BTV.device) % len(source_BTV)
    layout = ragged(present_MN, num_prefix, absent_NV)
    words_MG = bit_words(present_MN)
    packed_RV = pack_masks(source_BTV, absent_NV, image_M, words_MG, layout, num_prefix=num_prefix, backend=backend)
    expected_RV = reference.pack_masks(source_BTV, absent_NV, image_M, words_MG, layout, num_prefix=num_prefix)
    assert packed_RV.dtype == source_BTV.dtype
    assert torch.equal(packed_RV, expected_RV)
    return packed_RV


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [False, True], ids=["drop", "zero"])
@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_every_window_of_five_by_five_patches_is_packed_as_defined(
    radius: int, zero: bool, backend: Backend, device: torch.device
) -> None:
    given = windows(5, radius, 3, device)
    source_BTV, absent_NV = tokens(3, 27, 20, device=device), tokens(25, 20, device=device) if zero else None
    layout = ragged(given.present_MN, 2, absent_NV)
    arguments = (source_BTV, absent_NV, given.image_M, given.centre_M, given.kept_M, layout)
    expected_RV = reference.pack_windows(*arguments, patches_per_side=5, radius=radius, num_prefix=2)
    packed_RV = pack_windows(*arguments, patches_per_side=5, radius=radius, num_prefix=2, backend=backend)
    assert torch.equal(packed_RV, expected_RV)
    words_MG = bit_words(given.present_MN)
    masks_RV = pack_masks(source_BTV, absent_NV, given.image_M, words_MG, layout, num_prefix=2, backend=backend)
    assert torch.equal(packed_RV, masks_RV), "the same coalitions as masks"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("side", "radius", "every"), [(7, 1, 9), (14, 2, 61), (37, 2, 1400)])
def test_windows_of_real_grids_are_packed_as_defined(
    side: int, radius: int, every: int, backend: Backend, device: torch.device
) -> None:
    given = windows(side, radius, 2, device)
    picked = slice(every // 2, None, every)
    layout = ragged(given.present_MN[picked], 1, None)
    source_BTV = tokens(2, side**2 + 1, 16, device=device)
    arguments = (source_BTV, None, given.image_M[picked], given.centre_M[picked], given.kept_M[picked], layout)
    expected_RV = reference.pack_windows(*arguments, patches_per_side=side, radius=radius, num_prefix=1)
    packed_RV = pack_windows(*arguments, patches_per_side=side, radius=radius, num_prefix=1, backend=backend)
    assert torch.equal(packed_RV, expected_RV)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [False, True], ids=["drop", "zero"])
@pytest.mark.parametrize(
    ("num_patches", "num_sequences", "num_prefix"),
    [(1, 3, 1), (31, 4, 0), (32, 4, 5), (33, 4, 1), (49, 5, 1), (64, 3, 2), (196, 4, 1), (1369, 1, 1)],
)
def test_masks_over_any_number_of_patches_are_packed_as_defined(
    num_patches: int, num_sequences: int, num_prefix: int, zero: bool, backend: Backend, device: torch.device
) -> None:
    source_BTV = tokens(2, num_prefix + num_patches, 16, device=device)
    absent_NV = tokens(num_patches, 16, device=device) if zero else None
    present_MN = coalitions(num_sequences, num_patches, device)
    check_masks(source_BTV, absent_NV, present_MN, num_prefix, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [False, True], ids=["drop", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_of_each_dtype_are_copied_to_the_bit(
    dtype: torch.dtype, zero: bool, backend: Backend, device: torch.device
) -> None:
    source_BTV = tokens(2, 50, 24, device=device, dtype=dtype)
    absent_NV = tokens(49, 24, device=device, dtype=dtype) if zero else None
    check_masks(source_BTV, absent_NV, coalitions(3, 49, device), 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 7, 192, 1100, 3072])
def test_rows_of_any_width_are_packed_as_defined(width: int, backend: Backend, device: torch.device) -> None:
    source_BTV, absent_NV = tokens(1, 10, width, device=device), tokens(9, width, device=device)
    present_MN = coalitions(2, 9, device)
    check_masks(source_BTV, absent_NV, present_MN, 1, backend)
    check_masks(source_BTV, None, present_MN, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [63, 64, 65])
def test_one_sequence_around_the_edge_of_a_program_is_packed_as_defined(
    num_rows: int, backend: Backend, device: torch.device
) -> None:
    from tve_kernels.pack_tokens.kernel import tile

    assert tile(64) == (64, 64)
    present_MN = torch.arange(80, device=device)[None] < num_rows - 1
    packed_RV = check_masks(tokens(1, 81, 64, device=device), None, present_MN, 1, backend)
    assert len(packed_RV) == num_rows


def _slice_of_wider_rows(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.full_like(rows, torch.nan)], -1)[..., : rows.shape[-1]]


def _every_second_row(rows: Tensor) -> Tensor:
    return rows.repeat_interleave(2, -2)[..., ::2, :]


def _columns_apart(rows: Tensor) -> Tensor:
    return rows.transpose(-1, -2).contiguous().transpose(-1, -2)


def _one_row_for_all(rows: Tensor) -> Tensor:
    return rows[..., :1, :].expand(rows.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [_slice_of_wider_rows, _every_second_row, _columns_apart, _one_row_for_all])
def test_inputs_may_be_strided(stride: Callable[[Tensor], Tensor], backend: Backend, device: torch.device) -> None:
    source_BTV, absent_NV = stride(tokens(2, 37, 24, device=device)), stride(tokens(36, 24, device=device))
    assert not source_BTV.is_contiguous()
    given = windows(6, 1, 2, device)
    picked = slice(3, None, 17)
    present_MN = given.present_MN[picked]
    for absent in (None, absent_NV):
        check_masks(source_BTV, absent, present_MN, 1, backend)
        # Every second entry of the tensors of sequences, too.
        strided_M = tuple(
            each_M[picked].repeat_interleave(2)[::2] for each_M in (given.image_M, given.centre_M, given.kept_M)
        )
        arguments: Any = (source_BTV, absent, *strided_M, ragged(present_MN, 1, absent))
        packed_RV = pack_windows(*arguments, patches_per_side=6, radius=1, num_prefix=1, backend=backend)
        expected_RV = reference.pack_windows(*arguments, patches_per_side=6, radius=1, num_prefix=1)
        assert torch.equal(packed_RV, expected_RV)


@pytest.mark.parametrize("backend", BACKENDS)
def test_complete_coalitions_are_the_tokens_of_their_pictures(backend: Backend, device: torch.device) -> None:
    source_BTV = tokens(3, 40, 16, device=device)
    complete_MN = torch.ones(3, 39, dtype=torch.bool, device=device)
    for absent_NV in (None, tokens(39, 16, device=device)):
        packed_RV = check_masks(source_BTV, absent_NV, complete_MN, 1, backend)
        assert torch.equal(packed_RV, source_BTV.flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_and_its_complement_partition_the_patches(backend: Backend, device: torch.device) -> None:
    given = windows(5, 1, 1, device)
    source_BTV = torch.arange(25.0, device=device)[None, :, None]
    layout = ragged(given.present_MN, 0, None)
    packed_RV = pack_windows(
        source_BTV,
        None,
        given.image_M,
        given.centre_M,
        given.kept_M,
        layout,
        patches_per_side=5,
        radius=1,
        num_prefix=0,
        backend=backend,
    )
    sequences = packed_RV[:, 0].split(layout.offsets_M1.diff().tolist())
    for kept, removed in zip(sequences[:25], sequences[25:], strict=True):
        assert sorted(kept.tolist() + removed.tolist()) == list(range(25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coalitions_may_be_empty_and_sequences_none(backend: Backend, device: torch.device) -> None:
    source_BTV, absent_NV = tokens(2, 34, 16, device=device), tokens(33, 16, device=device)
    empty_MN = torch.zeros(4, 33, dtype=torch.bool, device=device)
    assert torch.equal(check_masks(source_BTV, None, empty_MN, 1, backend), source_BTV[:, 0].repeat(2, 1))
    patches_BNV = source_BTV[:, 1:]
    assert torch.equal(check_masks(patches_BNV, absent_NV, empty_MN, 0, backend), absent_NV.repeat(4, 1))
    one_MN = empty_MN[:2].clone()
    one_MN[[0, 1], [0, 32]] = True
    assert torch.equal(check_masks(patches_BNV, None, one_MN, 0, backend), patches_BNV[[0, 1], [0, 32]])
    for absent in (None, absent_NV):
        assert check_masks(source_BTV, absent, empty_MN[:0], 1, backend).shape == (0, 16)


def test_bit_n_of_the_words_is_patch_n(device: torch.device) -> None:
    present_MN = torch.eye(70, dtype=torch.bool, device=device)
    words_MG = bit_words(present_MN)
    assert words_MG.dtype == torch.int32
    assert [[word % 2**32 for word in words] for words in words_MG.tolist()] == [
        [2 ** (n - 32 * v) if n // 32 == v else 0 for v in range(3)] for n in range(70)
    ]
    assert bit_words(torch.ones(1, 64, dtype=torch.bool, device=device)).tolist() == [[-1, -1]]


def test_words_are_made_without_numbers_from_the_host(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def copied(*_: object, **__: object) -> Tensor:
        raise AssertionError("a copy from the host, for which it waits on a GPU")

    present_MN = coalitions(3, 70, device)
    for maker in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, maker, copied)
    assert torch.equal(present_patches(bit_words(present_MN), 70), present_MN)


def arguments_of_ops(device: torch.device, zero: bool) -> tuple[tuple[object, ...], tuple[object, ...]]:
    given = windows(3, 1, 2, device)
    source_BTV, absent_NV = tokens(2, 10, 8, device=device), tokens(9, 8, device=device) if zero else None
    layout = ragged(given.present_MN, 1, absent_NV)
    ragged_tensors = (layout.offsets_M1, layout.sequence_R)
    start = (source_BTV, absent_NV, given.image_M)
    return (
        (*start, given.centre_M, given.kept_M, *ragged_tensors, 3, 1, 1),
        (*start, bit_words(given.present_MN), *ragged_tensors, 1),
    )


@pytest.mark.parametrize("zero", [False, True], ids=["drop", "zero"])
def test_the_custom_ops_keep_the_rules_of_torch(zero: bool, device: torch.device) -> None:
    of_windows, of_masks = arguments_of_ops(device, zero)
    torch.library.opcheck(pack_op._windows_op, of_windows)
    torch.library.opcheck(pack_op._masks_op, of_masks)


@pytest.mark.parametrize("zero", [False, True], ids=["drop", "zero"])
def test_packing_compiles_without_a_graph_break(zero: bool, device: torch.device) -> None:
    given = windows(4, 1, 2, device)
    source_BTV, absent_NV = tokens(2, 17, 8, device=device), tokens(16, 8, device=device) if zero else None
    layout, words_MG = ragged(given.present_MN, 1, absent_NV), bit_words(given.present_MN)

    def doubled(source_BTV: Tensor) -> tuple[Tensor, Tensor]:
        by_windows_RV = pack_windows(
            source_BTV * 2,
            absent_NV,
            given.image_M,
            given.centre_M,
            given.kept_M,
            layout,
            patches_per_side=4,
            radius=1,
            num_prefix=1,
            backend="triton",
        )
        by_masks_RV = pack_masks(
            source_BTV * 2, absent_NV, given.image_M, words_MG, layout, num_prefix=1, backend="triton"
        )
        return by_windows_RV + 1, by_masks_RV + 1

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(source_BTV), doubled(source_BTV), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blank_rows_that_lie_behind_the_pictures_are_packed_as_any_others(
    backend: Backend, device: torch.device
) -> None:
    every_BTV, present_MN = tokens(4, 10, 8, device=device), coalitions(5, 9, device)
    pictures_BTV, blank_NV = every_BTV[:3], every_BTV[3, 1:]
    packed_RV = check_masks(pictures_BTV, blank_NV, present_MN, 1, backend)
    assert torch.equal(packed_RV, check_masks(pictures_BTV, blank_NV.clone(), present_MN, 1, backend))
    # Before the pictures, or not in step with their rows, they are no part of one matrix.
    assert torch.equal(
        check_masks(every_BTV[1:], every_BTV[0, 1:], present_MN, 1, backend),
        check_masks(every_BTV[1:], every_BTV[0, 1:].clone(), present_MN, 1, backend),
    )


def test_the_columns_of_a_program_divide_the_widths_of_practice() -> None:
    from tve_kernels.pack_tokens.kernel import ELEMENTS, tile

    for width in (64, 192, 384, 768, 1024, 1536, 3072, 4096):
        rows, columns = tile(width)
        assert rows * columns == ELEMENTS
        assert width % columns == 0
    assert tile(20) == (128, 32)
    assert tile(600) == (4, 1024)


def test_lengths_that_are_not_those_of_the_coalitions_are_refused_by_the_definition() -> None:
    source_BTV, image_M = torch.zeros(1, 5, 2), torch.zeros(1, dtype=torch.int32)
    words_MG = bit_words(torch.tensor([[True, True, False, False]]))
    with pytest.raises(ValueError, match="layout: expected a sequence of 3 rows, got 4"):
        reference.pack_masks(source_BTV, None, image_M, words_MG, Ragged.of([4]), num_prefix=1)
    with pytest.raises(ValueError, match="layout: expected 3 rows of these coalitions, got 4"):
        pack_masks(source_BTV, None, image_M, words_MG, Ragged.of([4]), num_prefix=1, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes_that_do_not_agree_are_refused(backend: Backend) -> None:
    source_BTV, image_M, words_MG = (
        torch.zeros(1, 5, 2),
        torch.zeros(1, dtype=torch.int32),
        bit_words(torch.ones(1, 4) > 0),
    )
    layout = Ragged.of([5])

    def masks(
        source: Tensor = source_BTV,
        absent: Tensor | None = None,
        image: Tensor = image_M,
        words: Tensor = words_MG,
        num_prefix: int = 1,
    ) -> None:
        pack_masks(source, absent, image, words, layout, num_prefix=num_prefix, backend=backend)

    with pytest.raises(ValueError, match=r"source: expected floats \[B, T, V\], got torch.int32"):
        masks(source=source_BTV.int())
    with pytest.raises(ValueError, match=r"source: expected floats \[B, T, V\].*\[5, 2\]"):
        masks(source=source_BTV[0])
    with pytest.raises(ValueError, match="num_prefix: expected 0 to 4"):
        masks(num_prefix=5)
    with pytest.raises(ValueError, match=r"absent: expected torch.float32 \[4, 2\], got torch.float32 \[5, 2\]"):
        masks(absent=source_BTV[0])
    with pytest.raises(ValueError, match=r"absent: expected torch.float32 \[4, 2\], got torch.float16 \[4, 2\]"):
        masks(absent=source_BTV[0, 1:].half())
    with pytest.raises(ValueError, match=r"image: expected torch.int32 \[1\], got torch.int64"):
        masks(image=image_M.long())
    with pytest.raises(ValueError, match=r"image: expected torch.int32 \[1\], got torch.int32 \[2\]"):
        masks(image=image_M.repeat(2))
    with pytest.raises(ValueError, match=r"words: expected torch.int32 \[1, 1\], got torch.int32 \[1, 2\]"):
        masks(words=words_MG.repeat(1, 2))
    with pytest.raises(ValueError, match=r"present: expected bool \[M, N\], got torch.int32"):
        bit_words(words_MG)

    def one_window(centre: Tensor = image_M, side: int = 2, radius: int = 1) -> None:
        pack_windows(
            source_BTV,
            None,
            image_M,
            centre,
            image_M.bool(),
            layout,
            patches_per_side=side,
            radius=radius,
            num_prefix=1,
            backend=backend,
        )

    with pytest.raises(ValueError, match="source: expected 1 prefix and 3² patch tokens, got 5"):
        one_window(side=3)
    with pytest.raises(ValueError, match="radius: expected 0 or more, got -1"):
        one_window(radius=-1)
    with pytest.raises(ValueError, match=r"centre: expected torch.int32 \[1\], got torch.bool"):
        one_window(centre=image_M.bool())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", ["absent", "image", "words", "centre", "kept", "layout.offsets", "layout.sequence"])
def test_a_tensor_on_another_device_is_refused(moved: str, backend: Backend) -> None:
    layout = Ragged.of([5])
    given = {
        "absent": torch.zeros(4, 2),
        "image": torch.zeros(1, dtype=torch.int32),
        "words": bit_words(torch.ones(1, 4) > 0),
        "centre": torch.zeros(1, dtype=torch.int32),
        "kept": torch.ones(1, dtype=torch.bool),
        "layout.offsets": layout.offsets_M1,
        "layout.sequence": layout.sequence_R,
    }
    given[moved] = given[moved].to("meta")
    layout = Ragged(given["layout.offsets"], given["layout.sequence"], layout.runs)
    start = (torch.zeros(1, 5, 2), given["absent"], given["image"])
    message = f"^{moved}: expected cpu, as source, got meta; move it$"
    if moved != "words":
        with pytest.raises(ValueError, match=message):
            pack_windows(
                *start,
                given["centre"],
                given["kept"],
                layout,
                patches_per_side=2,
                radius=1,
                num_prefix=1,
                backend=backend,
            )
    if moved not in ("centre", "kept"):
        with pytest.raises(ValueError, match=message):
            pack_masks(*start, given["words"], layout, num_prefix=1, backend=backend)
