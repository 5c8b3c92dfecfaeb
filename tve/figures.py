"""Figures: grids of pictures, fidelity curves, prices, training curves; one style, safe for colour-blind readers.

matplotlib is imported when a figure is drawn.
"""

import html
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tve.heatmaps import overlay
from tve.method_styles import INK, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase

LABEL_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # of a point, the best first


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
