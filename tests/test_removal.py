import pytest
import torch

from tve.removal import parse_removal, zero_pixels


def test_pixels_of_absent_patches_are_zero_and_the_others_untouched() -> None:
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    present = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = zero_pixels(images, present)
    for b in range(3):
        for row in range(12):
            for column in range(12):
                expected = images[b, :, row, column] if present[b, row // 3, column // 3] else torch.zeros(3)
                assert torch.equal(masked[b, :, row, column], expected)


def test_a_patch_that_is_not_finite_leaves_no_trace_once_removed() -> None:
    images = torch.ones(1, 3, 4, 4)
    images[..., :2, :2] = float("nan")
    present = torch.tensor([[[False, True], [True, True]]])
    assert bool(zero_pixels(images, present).isfinite().all())


def test_the_picture_itself_is_not_changed() -> None:
    images = torch.ones(1, 3, 4, 4)
    zero_pixels(images, torch.zeros(1, 2, 2, dtype=torch.bool))
    assert bool((images == 1).all())


def test_the_precision_is_kept() -> None:
    masked = zero_pixels(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert masked.dtype == torch.bfloat16


def test_a_grid_that_does_not_divide_the_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a divisor of the picture's 16 pixels, got 5 patches"):
        zero_pixels(torch.ones(1, 3, 16, 16), torch.ones(1, 5, 5, dtype=torch.bool))


def test_operators_are_known_by_name_and_nothing_else() -> None:
    assert [parse_removal(name) for name in ("zero", "drop")] == ["zero", "drop"]
    with pytest.raises(ValueError, match=r"removal: expected one of \['zero', 'drop'\], got 'blur'"):
        parse_removal("blur")
