"""The same pictures side by side, over tasks and over backbones: the boards of heatmaps that the report shows.

A dataset with several tasks has a column per task, and a row per backbone and map for each picture: one explainer, one
picture, different heads. A dataset with one task has a column per backbone and map instead.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tve import figures
from tve.heatmaps import enlarged, overlay
from tve.method_styles import style_of
from tve_pipeline.report_results import Heatmaps, Results, in_order
from tve_pipeline.report_tables import in_table_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_METHODS = ("tve", "exact_windows")


@dataclass(frozen=True, slots=True)
class Cell:
    """One heatmap."""

    image: NDArray[np.uint8]  # [size, size, 3]
    predicted: str
    label: str

    @property
    def right(self) -> bool:
        return self.predicted == self.label

    @property
    def correction(self) -> str:
        """The right class, where the prediction is wrong."""
        return "" if self.right else f"(is {self.label})"

    @property
    def caption(self) -> str:
        return f"{self.predicted} {self.correction}".strip()


@dataclass(frozen=True, slots=True)
class BoardPicture:
    """One picture and its heatmaps."""

    key: str
    image: NDArray[np.uint8]
    rows: list[tuple[str, list[Cell | None]]]  # label, one cell per column


@dataclass(frozen=True, slots=True)
class HeatmapBoard:
    """The pictures of one dataset."""

    dataset: str
    columns: list[str]
    pictures: list[BoardPicture]

    @property
    def labelled(self) -> bool:
        """Whether the rows of a picture are told apart by labels."""
        return any(label for picture in self.pictures for label, _ in picture.rows)


def heatmap_boards(results: Results, num_pictures: int) -> list[HeatmapBoard]:
    """A board for each dataset that has heatmaps, of its first `num_pictures` pictures."""
    boards = []
    for dataset in results.datasets:
        found = {
            backbone: evaluation.heatmaps
            for backbone in results.backbones
            if (evaluation := results.evaluations.get((backbone, dataset))) and evaluation.heatmaps
        }
        if found:
            boards.append(_board(dataset, found, num_pictures))
    return boards


def galleries(results: Results, num_pictures: int) -> list[HeatmapBoard]:
    """Maps of all methods: a board for each backbone and dataset, a row a method, a column a task."""
    boards = []
    for (backbone, dataset), evaluation in results.evaluations.items():
        if (heatmaps := evaluation.heatmaps) is None:
            continue
        tasks = in_order({task for task, _ in heatmaps.maps})
        methods = in_table_order({method for _, method in heatmaps.maps})
        pictures = []
        for index, key in enumerate(heatmaps.keys[:num_pictures]):
            rows = [(style_of(m).label, [_cell(heatmaps, key, task, m) for task in tasks]) for m in methods]
            pictures.append(BoardPicture(key, enlarged(heatmaps.images[index]), rows))
        boards.append(HeatmapBoard(f"{backbone}, {dataset}", tasks, pictures))
    return boards


def board_figure(boards: list[HeatmapBoard]) -> "Figure":
    """The boards as one figure: those whose columns are those of the first."""
    columns = boards[0].columns
    rows: list[list[figures.Panel | None]] = []
    titles = []
    for board in boards:
        for picture in board.pictures if board.columns == columns else ():
            for index, (label, cells) in enumerate(picture.rows):
                first = figures.Panel(picture.image) if index == 0 else None
                rows.append([first, *(figures.Panel(cell.image, cell.caption) if cell else None for cell in cells)])
                titles.append(label or board.dataset)
    return figures.picture_grid(rows, ["picture", *columns], titles)


def _board(dataset: str, found: dict[str, Heatmaps], num_pictures: int) -> HeatmapBoard:
    tasks = in_order({task for heatmaps in found.values() for task, _ in heatmaps.maps})
    views = [(backbone, method) for backbone in found for method in SHOWN_METHODS if _has(found[backbone], method)]
    names = [style_of(m).label if len(found) == 1 else f"{b}, {style_of(m).label}" for b, m in views]
    reference = next(iter(found.values()))
    pictures = []
    for index, key in enumerate(reference.keys[:num_pictures]):
        cells = [[_cell(found[backbone], key, task, method) for task in tasks] for backbone, method in views]
        by_view = list(zip(names, cells, strict=True))
        rows = by_view if len(tasks) > 1 else [("", [row[0] for row in cells])]
        pictures.append(BoardPicture(key, enlarged(reference.images[index]), rows))
    return HeatmapBoard(dataset, tasks if len(tasks) > 1 else names, pictures)


def _has(heatmaps: Heatmaps, method: str) -> bool:
    return any(found == method for _, found in heatmaps.maps)


def _cell(heatmaps: Heatmaps, key: str, task: str, method: str) -> Cell | None:
    if (task, method) not in heatmaps.maps or key not in heatmaps.keys:
        return None
    index = heatmaps.keys.index(key)
    image = overlay(heatmaps.images[index], heatmaps.maps[task, method][index])
    return Cell(image, heatmaps.predicted[task][index], heatmaps.labels[task][index])
