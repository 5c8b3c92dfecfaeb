"""Figures: overlays keep the picture and the place; panels draw what they are given."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tve.figures import (
    Curves,
    Panel,
    Price,
    Training,
    fidelity_curves,
    inline_svg,
    picture_grid,
    price_against_fidelity,
    save_png,
    training_curves,
)
from tve.heatmaps import AGAINST_RGB, FOR_RGB, MAX_OPACITY, enlarged, overlay
from tve.method_styles import METHOD_STYLES

PATCHES, SIZE = 4, 32
PATCH_PIXELS = SIZE // PATCHES


def noise_picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def one_patch(row: int, column: int, value: float) -> np.ndarray:
    phi_PP = np.zeros((PATCHES, PATCHES), dtype=np.float32)
    phi_PP[row, column] = value
    return phi_PP


def coloured_patches(image: np.ndarray) -> list[tuple[int, int]]:
    tiles = (image.max(2) - image.min(2)).reshape(PATCHES, PATCH_PIXELS, PATCHES, PATCH_PIXELS)
    return [(int(row), int(column)) for row, column in np.argwhere(tiles.max((1, 3)) > 0)]


def test_a_patch_is_coloured_at_its_own_row_and_column() -> None:
    for row, column in [(0, 1), (3, 0), (2, 1)]:
        assert coloured_patches(overlay(noise_picture(), one_patch(row, column, 1.0), size=SIZE)) == [(row, column)]


def test_a_map_of_zeros_leaves_a_grey_picture_with_all_its_contrast() -> None:
    image = overlay(noise_picture(), np.zeros((PATCHES, PATCHES), dtype=np.float32), size=SIZE)
    assert coloured_patches(image) == []
    assert np.ptp(image) > 120


def test_red_speaks_for_the_class_and_blue_against_it_with_equal_strength() -> None:
    phi_PP = one_patch(0, 0, 2.0) + one_patch(3, 3, -2.0)
    grey = np.full((SIZE, SIZE, 3), 128, dtype=np.uint8)
    image = overlay(grey, phi_PP, size=SIZE).astype(float)
    background = image[0, -1]
    for pixel, colour in (((0, 0), FOR_RGB), ((-1, -1), AGAINST_RGB)):
        expected = background + MAX_OPACITY * (np.array(colour) - background)
        np.testing.assert_allclose(image[pixel], expected, atol=1)


def test_the_strongest_attribution_still_shows_the_picture_below() -> None:
    image = overlay(noise_picture(), np.ones((PATCHES, PATCHES), dtype=np.float32), size=SIZE)
    assert image.std(axis=(0, 1)).min() > 8


def test_a_map_that_is_scaled_looks_the_same() -> None:
    phi_PP = np.random.default_rng(1).normal(size=(PATCHES, PATCHES)).astype(np.float32)
    np.testing.assert_array_equal(overlay(noise_picture(), phi_PP), overlay(noise_picture(), phi_PP * 8))


def test_a_given_limit_makes_maps_comparable() -> None:
    weak, strong = (overlay(noise_picture(), one_patch(1, 1, value), limit=4.0, size=SIZE) for value in (1.0, 4.0))
    spread = [int((image.max(2).astype(int) - image.min(2)).max()) for image in (weak, strong)]
    assert 0 < 3 * spread[0] < spread[1]


def test_an_overlay_grows_to_a_multiple_of_the_grid() -> None:
    assert overlay(noise_picture(), np.zeros((7, 7), dtype=np.float32), size=100).shape == (105, 105, 3)


@pytest.mark.parametrize(
    ("picture", "phi_PP", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), np.zeros((2, 2), np.float32), r"uint8 \[S, S, 3\], got float32"),
        (np.zeros((8, 4, 3), np.uint8), np.zeros((2, 2), np.float32), r"square .* got uint8 \[8, 4, 3\]; .*pixels"),
        (Image.new("RGB", (8, 4)), np.zeros((2, 2), np.float32), r"got uint8 \[4, 8, 3\]; backbone.pixels\(image\)"),
        (torch.zeros(3, 8, 8), np.zeros((2, 2), np.float32), r"got float32 \[3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), torch.zeros(1, 2, 2), r"expected \[P, P\], got \[1, 2, 2\]; one map"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 3), np.float32), r"expected \[P, P\], got \[2, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), np.full((2, 2), np.nan, np.float32), "expected finite .* got 4"),
    ],
)
def test_what_is_no_picture_or_no_map_is_refused(picture: Any, phi_PP: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(picture, phi_PP)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_pil_image_looks_like_its_pixels(mode: str) -> None:
    image = Image.fromarray(noise_picture()).convert(mode)
    phi_PP = one_patch(1, 2, 1.0)
    np.testing.assert_array_equal(overlay(image, phi_PP), overlay(np.asarray(image.convert("RGB")), phi_PP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_looks_like_the_same_array_even_with_a_gradient(dtype: torch.dtype) -> None:
    phi_PP = one_patch(1, 2, 1.0) - one_patch(0, 0, 0.5)  # exact in bfloat16
    tensor = torch.from_numpy(phi_PP).to(dtype).requires_grad_()
    np.testing.assert_array_equal(overlay(noise_picture(), tensor), overlay(noise_picture(), phi_PP))


def test_no_two_methods_look_alike() -> None:
    looks = [(style.colour, style.dash) for style in METHOD_STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_curves_hold_the_values_that_they_are_given() -> None:
    values = {"tve": [0.2, 0.5], "random": [0.1, 0.3]}
    figure = fidelity_curves([Curves("digit", "higher is better", [0.1, 0.9], values)], num_columns=2)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines == {"TVE": [0.2, 0.5], "Random": [0.1, 0.3]}


def test_a_training_curve_shows_the_trivial_answers_that_are_known() -> None:
    panel = Training("vit", [0, 10], {"kept": [-3.0, 0.4], "removed": [0.0, 0.7]}, {"kept": -0.1, "removed": None})
    axes = training_curves([panel]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["ĝ", "trivial ĝ", "ĥ"]
    assert axes.get_ylim()[0] > -1, "an untrained explainer's R² must not flatten the rest"


def test_a_figure_on_a_page_takes_the_pages_font_and_ink_and_links_to_nothing() -> None:
    svg = inline_svg(fidelity_curves([Curves("a", "b", [0.1, 0.9], {"exact_windows": [0, 1]})], 1), 'R² of "ĝ"')
    assert svg.startswith("<svg viewBox=")
    assert "currentColor" in svg
    assert 'aria-label="R² of &quot;ĝ&quot;"' in svg
    assert not re.search(r"https?:|font-family|DejaVu", svg)
    assert set(re.findall(r"[#(]#?([a-z0-9]{11})\b", svg)) <= set(re.findall(r'id="([^"]+)"', svg))


def test_a_grid_of_pictures_has_one_axes_a_picture_and_is_the_same_bytes_twice(tmp_path: object) -> None:
    panel = Panel(enlarged(noise_picture(), 16), "four")
    written = []
    for _ in range(2):
        figure = picture_grid([[panel, panel], [None, panel]], ["picture", "digit"], ["TVE", "exact"])
        assert sum(not axes.axison for axes in figure.axes) == 3
        path = tmp_path / "grid.png"  # type: ignore[operator]
        save_png(figure, path, 60)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_a_grid_without_row_titles_has_no_margin_for_them_and_one_with_them_room_for_the_longest() -> None:
    panel = Panel(enlarged(noise_picture(), 16))
    for titles in (["", ""], ["TVE", "deit_tiny, Exact windows"]):
        figure = picture_grid([[panel], [panel]], ["picture"], titles)
        figure.canvas.draw()
        left = figure.axes[0].get_window_extent().x0
        written = [text.get_window_extent() for text in figure.texts if text.get_text()]
        labels = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
        assert min(box.x0 for box in (*written, *labels)) >= 0
        assert max(box.x1 for box in (*written, *labels)) <= figure.bbox.width
        assert (left < 0.1 * figure.dpi) == (titles == ["", ""])


def test_labels_of_prices_that_lie_close_cover_neither_each_other_nor_a_point() -> None:
    prices = [
        Price("attn_lrp", 0.0030, 0.747, -0.032),
        Price("tve", 0.0022, 0.717, -0.003),
        Price("exact_windows", 0.0490, 0.737, -0.0235),
        Price("gradient_shap", 0.0528, 0.731, -0.0245),
        Price("kernel_shap_200", 0.264, 0.701, -0.047),
        Price("integrated_gradients", 0.133, 0.709, -0.022),
    ]
    figure = price_against_fidelity(prices)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) == len(prices)
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        points = [axes.transData.transform(line.get_xydata())[-1] for line in axes.lines]  # type: ignore[index]
        assert not [point for point in points for box in boxes if box.contains(*point)]
