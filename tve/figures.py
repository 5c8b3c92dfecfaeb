"""Figures: heatmaps over pictures, fidelity curves, a training curve; one style, safe for colour-blind readers.

An overlay never hides its picture: the picture turns grey, and colour covers a patch in proportion to |phi| alone.
Red speaks for the class, blue against it, and a patch of attribution 0 stays as it was. matplotlib is imported when a
figure is drawn, so that `overlay` works without it.
"""

import html
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase
    from torch import Tensor

FOR_RGB = (203, 24, 29)
AGAINST_RGB = (33, 102, 172)
MAX_OPACITY = 0.72
LABEL_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # of a point, the best first


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a method looks in every figure and legend."""

    label: str
    colour: str
    dash: tuple[float, ...] = ()  # on, off, … in widths of the line; solid where empty
    width: float = 1.3

    @property
    def scaled_dash(self) -> tuple[float, ...]:
        """The dash as a plot draws it: in multiples of the line's width."""
        return tuple(round(length * self.width, 2) for length in self.dash)


# Okabe and Ito's palette for what is compared; greys, told apart by their dashes, for the controls. The exact windows
# are the ink of the page, which a dark page inverts.
INK = "#1a1c20"
METHOD_STYLES: dict[str, LineStyle] = {
    "tve": LineStyle("TVE", "#0072B2", width=2.4),
    "tve_mean": LineStyle("TVE, window mean", "#56B4E9", (4, 1.5)),
    "tve_u": LineStyle("TVE, windows", "#56B4E9", (1, 1.4)),
    "tve_hg": LineStyle("TVE-Hg", "#CC79A7", width=1.7),
    "tve_untrained": LineStyle("Untrained TVE", "#8fb8d6", (1, 1.4)),
    "tve_untrained_mean": LineStyle("Untrained, window mean", "#8fb8d6", (4, 1.5)),
    "tve_untrained_u": LineStyle("Untrained, windows", "#8fb8d6", (6, 1.5, 1, 1.5)),
    "tve_two_networks": LineStyle("TVE, two networks", "#004b75", (6, 1.5, 1, 1.5)),
    "tve_two_networks_mean": LineStyle("Two networks, window mean", "#004b75", (4, 1.5)),
    "tve_two_networks_u": LineStyle("Two networks, windows", "#004b75", (1, 1.4)),
    "vit_shapley": LineStyle("ViT-Shapley", "#D55E00", width=1.7),
    "integrated_gradients": LineStyle("Integrated Gradients", "#b59f00", (6, 1.5, 1, 1.5)),
    "deep_lift": LineStyle("DeepLift", "#b59f00", (1, 1.4)),
    "gradient_shap": LineStyle("GradSHAP", "#b59f00", (4, 1.5)),
    "grad_cam": LineStyle("Grad-CAM", "#7a6a00"),
    "rollout": LineStyle("Attention rollout", "#7a6a00", (4, 1.5)),
    "attn_lrp": LineStyle("AttnLRP", "#009E73", width=1.7),
    "occlusion": LineStyle("Occlusion", "#8d5a97"),
    "rise": LineStyle("RISE", "#CC79A7", (6, 1.5, 1, 1.5), 1.5),
    "kernel_shap": LineStyle("Kernel SHAP", "#8d5a97", (4, 1.5), 1.5),
    "lime": LineStyle("LIME", "#8d5a97", (1, 1.4), 1.5),
    "exact_windows": LineStyle("Exact windows", INK, (5, 1.8), 1.7),
    "exact_windows_mean": LineStyle("Exact, window mean", "#5b6168", (4, 1.5)),
    "exact_windows_u": LineStyle("Exact, windows", "#5b6168", (2, 1.5)),
    "random": LineStyle("Random", "#8c9199"),
    "random_blurred": LineStyle("Random, blurred", "#8c9199", (1, 1.4), 1.6),
    "centre": LineStyle("Centre", "#E69F00", (6, 1.5, 1, 1.5)),
}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#8c9199",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "tve",
}


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def style_of(method: str) -> LineStyle:
    """The look of a method; a method that is not known gets its own name and a plain green line.

    A number at the end of a name is a budget of evaluations.

    >>> style_of("rise_200").label
    'RISE, 200'
    """
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    base, _, budget = method.rpartition("_")
    if base in METHOD_STYLES and budget.isdigit():
        return replace(METHOD_STYLES[base], label=f"{METHOD_STYLES[base].label}, {budget}")
    return LineStyle(method, "#009E73")


def overlay(
    picture: "Image.Image | NDArray[np.uint8]",
    phi_PP: "NDArray[np.floating[Any]] | Tensor",
    limit: float | None = None,
    size: int = 256,
) -> NDArray[np.uint8]:
    """A heatmap over its picture, uint8 [size, size, 3]; patch (p, q) is row p, column q.

    Args:
        picture: as the model saw it, square: a PIL image, or uint8 [S, S, 3] such as `backbone.pixels(image)`.
        phi_PP: attributions in any unit, an array or a tensor on any device; the scale is diverging and centred at
            zero.
        limit: the |phi| that takes full colour; the map's own largest where None.
        size: pixels of a side, enlarged to a multiple of P.

    Raises:
        ValueError: wrong shapes, or attributions that are not finite.
    """
    pixels, phi_PP = _square_picture(picture), _finite_map(phi_PP)
    patches = phi_PP.shape[0]
    size = patches * -(-size // patches)
    # Half luminance, half the brightest channel: a coloured object of the background's luminance stays visible.
    brightness = (np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) + pixels.max(axis=2)) / 2
    grey = np.asarray(Image.fromarray(brightness).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
    # Lifted to the upper half of the scale: colour of one opacity then looks alike on dark and on light parts.
    canvas = np.repeat((70 + grey * np.float32(185 / 255))[..., None], 3, axis=2)

    largest = float(np.abs(phi_PP).max()) if limit is None else limit
    strength_PP = np.clip(phi_PP / largest, -1, 1) if largest > 0 else np.zeros_like(phi_PP)
    strength = strength_PP.repeat(size // patches, axis=0).repeat(size // patches, axis=1)[..., None]
    colour = np.where(strength > 0, np.array(FOR_RGB, np.float32), np.array(AGAINST_RGB, np.float32))
    opacity = MAX_OPACITY * np.abs(strength)
    return np.asarray(np.rint(canvas + opacity * (colour - canvas)).clip(0, 255), dtype=np.uint8)


def enlarged(picture: NDArray[np.uint8], size: int = 256) -> NDArray[np.uint8]:
    """The picture in colour at an overlay's size, uint8 [size, size, 3]."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a grid and what is written about it."""

    image: NDArray[np.uint8]  # [height, width, 3]
    caption: str = ""  # below it


@_styled()
def picture_grid(
    rows: Sequence[Sequence[Panel | None]], column_titles: Sequence[str], row_titles: Sequence[str]
) -> "Figure":
    """Pictures in rows and columns with titles on top and at the left; None leaves a cell empty.

    The left margin is as wide as the longest row title needs, and none where all are empty.
    """
    num_rows, num_columns = len(rows), len(column_titles)
    row_titles = [title.replace(", ", ",\n") for title in row_titles]
    longest = max((len(line) for title in row_titles for line in title.split("\n")), default=0)
    cell, left, top = 1.15, 0.05 + (0.1 + 0.078 * longest if longest else 0.0), 0.45
    figure = _figure(left + num_columns * cell, top + num_rows * cell * 1.13 + 0.45)
    width, height = figure.get_size_inches()
    for row_index, row in enumerate(rows):
        bottom = height - top - (row_index + 1) * cell * 1.13 + 0.13
        for column_index, panel in enumerate(row):
            x = left + column_index * cell
            if row_index == 0:
                figure.text(
                    (x + cell * 0.48) / width,
                    (height - 0.34) / height,
                    column_titles[column_index].replace(", ", ",\n"),
                    ha="center",
                    weight="bold",
                )
            if panel is None:
                continue
            axes = figure.add_axes((x / width, bottom / height, cell * 0.96 / width, cell * 0.96 / height))
            axes.imshow(panel.image, interpolation="nearest")
            axes.set_axis_off()
            if panel.caption:
                axes.text(0.5, -0.03, panel.caption, transform=axes.transAxes, ha="center", va="top", fontsize=6.5)
        figure.text(
            (left - 0.08) / width, (bottom + cell * 0.48) / height, row_titles[row_index], ha="right", va="center"
        )
    _colour_scale(figure, (left / width, 0.08 / height, min(2.4, width - left - 0.2) / width, 0.09 / height))
    return figure


@dataclass(frozen=True, slots=True)
class Curves:
    """Fidelity over the fraction of patches, one line per method."""

    title: str
    direction: str  # what to wish for: "higher is better"
    fractions: Sequence[float]
    values_of_method: Mapping[str, Sequence[float]]


@_styled()
def fidelity_curves(
    panels: Sequence[Curves],
    num_columns: int,
    legend: bool = True,
    panel_inches: tuple[float, float] = (3.1, 2.3),
) -> "Figure":
    """Panels of curves, `panel_inches` wide and high, in rows of `num_columns`, with one legend below them."""
    num_rows = -(-len(panels) // num_columns)
    height = panel_inches[1] * num_rows + (0.75 if legend else 0.0)
    figure = _figure(panel_inches[0] * num_columns, height)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(panels):
            _draw_curves(axes, panels[index])
        else:
            axes.set_axis_off()
    if legend:
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="lower center",
            ncols=min(len(handles), 1 + num_columns),
            handlelength=3,
        )
    figure.tight_layout(rect=(0, 0.7 / height if legend else 0, 1, 1))
    return figure


@dataclass(frozen=True, slots=True)
class Price:
    """A map's price and worth; maps of one method that differ in their budget are joined by a line."""

    method: str
    seconds: float  # of a picture's map
    fidelity_plus: float  # means over tasks
    fidelity_minus: float


@_styled()
def price_against_fidelity(prices: Sequence[Price]) -> "Figure":
    """Two panels: each fidelity against the seconds of a map, on a logarithmic scale; exact windows are a star."""
    figure = _figure(7.6, 3.1)
    panels = (("fidelity_plus", "F⁺, higher is better"), ("fidelity_minus", "F⁻, lower is better"))
    lines: dict[str, list[Price]] = {}
    for price in sorted(prices, key=lambda price: price.seconds):
        base, _, budget = price.method.rpartition("_")
        lines.setdefault(base if budget.isdigit() else price.method, []).append(price)
    drawn = []
    for axes, (name, title) in zip(figure.subplots(1, 2).flat, panels, strict=True):
        labels = []
        for method, points in lines.items():
            marker, size = ("*", 9) if method.startswith("exact") else ("o", 4.5)
            seconds = [1000 * point.seconds for point in points]
            values = [getattr(point, name) for point in points]
            axes.plot(seconds, values, color=style_of(method).colour, marker=marker, markersize=size, linewidth=0.9)
            labels.append((seconds[-1], values[-1], style_of(points[-1].method).label))
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds a map")
        axes.set_title(title)
        axes.margins(x=0.2, y=0.12)
        drawn.append((axes, labels))
    figure.tight_layout()
    for axes, labels in drawn:
        _label_points(axes, labels)
    return figure


def _label_points(axes: "Axes", labels: Sequence[tuple[float, float, str]], fontsize: float = 6.5) -> None:
    """Writes each label beside its point (x, y), where it covers no other label and no point, if it can."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    pixels = figure.dpi / 72  # of a point
    inside, half = axes.get_window_extent(renderer), 3.5 * pixels
    taken: list[BboxBase] = []
    for x, y, _ in labels:
        at_x, at_y = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(at_x - half, at_y - half, at_x + half, at_y + half))
    for x, y, text in sorted(labels, reverse=True):  # from the right, where labels have least room
        best: tuple[float, Annotation, BboxBase] | None = None
        for (dx, dy), far in itertools.product(LABEL_SIDES, (5, 10, 17)):
            label = axes.annotate(
                text,
                (x, y),
                xytext=(dx * far, dy * far),
                textcoords="offset points",
                ha=("right", "center", "left")[dx + 1],
                va=("top", "center", "bottom")[dy + 1],
                fontsize=fontsize,
            )
            box = label.get_window_extent(renderer)
            covered = sum(_shared_area(box, other) for other in taken)
            outside = box.width * box.height - _shared_area(box, inside)
            cost = covered + 3 * outside + pixels * far
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, label, box)
            else:
                label.remove()
        assert best is not None
        taken.append(best[2])


def _shared_area(one: "BboxBase", other: "BboxBase") -> float:
    from matplotlib.transforms import Bbox

    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


@dataclass(frozen=True, slots=True)
class Training:
    """R² within a picture during pre-training, for "kept" (ĝ) and "removed" (ĥ)."""

    title: str
    step: Sequence[float]  # of each evaluation
    r2: Mapping[str, Sequence[float]]
    trivial: Mapping[str, float | None]  # R² of the answers that know nothing of the place


@_styled()
def training_curves(panels: Sequence[Training]) -> "Figure":
    """One panel for each pre-training, side by side."""
    figure = _figure(4.4 * len(panels), 2.7)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw_training(axes, panel)
    figure.tight_layout()
    return figure


@_styled()
def note(text: str) -> "Figure":
    """A figure that says why there is none."""
    figure = _figure(4.6, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


@_styled()
def save_png(figure: "Figure", path: Path, dots_per_inch: int = 160) -> None:
    """Writes a figure on white; the same figure gives the same bytes."""
    figure.savefig(path, dpi=dots_per_inch, facecolor="white", metadata={"Software": None})


@_styled()
def inline_svg(figure: "Figure", label: str) -> str:
    """A figure as an `<svg>` element of a page, in the page's own font and text colour.

    Args:
        figure: drawn in this module's style.
        label: what it shows, for readers who do not see it.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    (view_box,) = re.findall(r'<svg [^>]*?viewBox="([^"]+)"', text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    # Groups are numbered from 1 in each figure; on one page only the ids that are referred to may stay.
    text = re.sub(r' id="[a-zA-Z]+[a-zA-Z0-9.]*_\d+"', "", text)
    body = text[text.index(">", text.index("<svg")) + 1 :].replace(INK, "currentColor").strip()
    return f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}">{body}'


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _draw_curves(axes: "Axes", panel: Curves) -> None:
    for method, values in panel.values_of_method.items():
        look = style_of(method)
        (line,) = axes.plot(panel.fractions, values, color=look.colour, linewidth=look.width, label=look.label)
        if look.dash:
            line.set_dashes(look.dash)
        line.set_zorder(3 if method == "tve" else 2)
    axes.set_title(panel.title, pad=16)
    axes.text(0, 1.03, panel.direction, transform=axes.transAxes, fontsize=7.5)
    axes.set_xlabel("fraction of patches in S*")
    axes.set_xlim(min(panel.fractions), max(panel.fractions))
    axes.set_xticks([tick for tick in (0.1, 0.3, 0.5, 0.7, 0.9) if tick in [round(f, 6) for f in panel.fractions]])


def _draw_training(axes: "Axes", panel: Training) -> None:
    lowest = 0.0
    for name, colour, symbol in (("kept", "#0072B2", "ĝ"), ("removed", "#D55E00", "ĥ")):
        values, trivial = panel.r2[name], panel.trivial.get(name)
        axes.plot(panel.step, values, color=colour, linewidth=2, marker="o", markersize=3, label=symbol)
        if trivial is not None:
            axes.axhline(trivial, color=colour, linewidth=1.4, linestyle=(0, (1, 1.6)), label=f"trivial {symbol}")
        lowest = min([lowest, *values, *([] if trivial is None else [trivial])])
    # An untrained explainer can lie far below zero; what is learned is above.
    axes.set_ylim(max(lowest, -0.6) - 0.05, 1)
    axes.set_xlabel("training step")
    axes.set_ylabel("R² within a picture")
    axes.set_title(panel.title, pad=22)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, handlelength=2.2, columnspacing=1.2)


def _colour_scale(figure: "Figure", box: tuple[float, float, float, float]) -> None:
    """The key of the overlays: blue against the class, nothing at zero, red for it."""
    white = np.full((8, 8, 3), 160, dtype=np.uint8)
    ramp = np.concatenate(
        [overlay(white, np.full((1, 1), value, dtype=np.float32), 1.0, 1) for value in np.linspace(-1, 1, 201)], axis=1
    )
    axes = figure.add_axes(box)
    axes.imshow(ramp, aspect="auto")
    axes.set_xticks([0, 100, 200], ["against", "0", "for the class"])
    axes.set_yticks([])
    axes.xaxis.set_ticks_position("top")
    first, *_, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")  # centred, these would hang over the ends of the bar
    last.set_horizontalalignment("right")
    axes.tick_params(length=0, pad=1, labelsize=6.5)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _square_picture(picture: "Image.Image | NDArray[np.uint8]") -> NDArray[np.uint8]:
    pixels = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else _array(picture)
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise ValueError(
            "picture: expected a square picture as the model saw it, uint8 [S, S, 3], got "
            f"{pixels.dtype} {list(shape)}; backbone.pixels(image) gives it"
        )
    return pixels


def _finite_map(phi_PP: "NDArray[np.floating[Any]] | Tensor") -> NDArray[np.float32]:
    values_PP = np.asarray(_array(phi_PP), dtype=np.float32)
    shape = list(values_PP.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        hint = "; one map at a time, such as heatmap[0]" if len(shape) > 2 else ""
        raise ValueError(f"heatmap: expected [P, P], got {shape}{hint}")
    if not np.isfinite(values_PP).all():
        num_wrong = int((~np.isfinite(values_PP)).sum())
        raise ValueError(f"heatmap: expected finite attributions, got {num_wrong} that are not")
    return values_PP


def _array(values: Any) -> NDArray[Any]:
    """An array as it is, or a tensor's values; torch is not imported for it."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)  # NumPy has no bfloat16
