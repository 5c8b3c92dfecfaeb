"""Long runs' rows, read back from docs/records, and the table that they make.

    python -m tve_pipeline.recorded PROFILE

prints every map of every cell of a profile, in Markdown. `tve_pipeline.record` puts rows there.
"""

import gzip
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tve.digests import file_sha256
from tve.fidelity.statistics import paired_bootstrap, share_of_way
from tve.method_styles import style_of
from tve_pipeline.compare import CellScores, read_cell
from tve_pipeline.measure_names import FIDELITIES, SIGN_OF_BETTER
from tve_pipeline.params import RunParams, load_section
from tve_pipeline.report_tables import in_table_order, number

RECORDS, PROFILES = Path("docs", "records"), Path("profiles")
REFERENCE, EXACT, RANDOM = "tve", "exact_windows", "random"
NUM_RESAMPLES = 10_000
SCORES_FILE = re.compile(r"scores-([a-z0-9_]+)-([a-z0-9_]+)\.csv\.gz")
NOT_THERE = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """One task of one backbone: the fidelities of every map, under the removal that the explainer was trained for."""

    backbone: str
    task: str
    scores: dict[str, dict[str, NDArray[np.float64]]]  # map -> fidelity -> [N]

    def difference(self, method: str, reference: str = REFERENCE) -> dict[str, tuple[float, float]]:
        """By fidelity, the 95 % interval of the reference's lead over a method; above 0 it is better."""
        leads_NK = np.stack(
            [SIGN_OF_BETTER[f] * (self.scores[reference][f] - self.scores[method][f]) for f in FIDELITIES], axis=1
        )
        intervals = paired_bootstrap(leads_NK, NUM_RESAMPLES, seed=0)
        return {f: (each.low, each.high) for f, each in zip(FIDELITIES, intervals, strict=True)}

    def beats(self, method: str) -> bool:
        """Whether TVE is better in both fidelities, with intervals clear of zero."""
        return all(low > 0 for low, _ in self.difference(method).values())

    def share_of_way(self, fidelity: str) -> float | None:
        """TVE's share of the way from random to exact windows; None where these two do not differ."""
        low, high = self.difference(RANDOM, EXACT)[fidelity]
        if low <= 0 <= high:
            return None
        means = (float(self.scores[name][fidelity].mean()) for name in (REFERENCE, RANDOM, EXACT))
        return share_of_way(*means)

    def marks(self, method: str) -> str:
        """A mark a fidelity: + where TVE is better, − where it is worse, both clear of zero, else ·."""
        return "".join("+" if low > 0 else "−" if high < 0 else "·" for low, high in self.difference(method).values())


def columns_of(backbone: str, cell: CellScores, num_pictures: int | None = None) -> Iterator[Column]:
    """A column a task, of all pictures or of the first ones by their keys."""
    removal = next(iter(cell.facts.values()))["trained_for"]
    for task in cell.tasks:
        maps = {
            name: {f: cell.scores[task, name][f"{removal}_{f}"][:num_pictures] for f in FIDELITIES}
            for name in cell.maps(task)
        }
        yield Column(backbone, task, maps)


def verified_files(folder: Path) -> list[str]:
    """The names of a record's files, each of which was hashed and found to be what was recorded.

    Raises:
        ValueError: one is not.
    """
    files: dict[str, str] = json.loads((folder / "digests.json").read_text())["files"]
    for name, expected in files.items():
        if (actual := file_sha256(folder / name)) != expected:
            raise ValueError(f"{folder / name}: expected sha256 {expected}, got {actual}; restore it from git")
    return list(files)


def recorded_columns(profile: str, records: Path = RECORDS, profiles: Path = PROFILES) -> Iterator[Column]:
    """Every task of every backbone that is on record, in the order of the profile's `run`.

    Raises:
        ValueError: a file is not the one that was recorded, or nothing of the profile is on record.
    """
    run = load_section("run", RunParams, profiles / f"{profile}.yaml")
    folders = [records / profile / backbone for backbone in run.backbones]
    folders = [folder for folder in folders if (folder / "digests.json").is_file()]
    if not folders:
        there = ", ".join(sorted(path.name for path in records.iterdir())) if records.is_dir() else ""
        raise ValueError(f"{records / profile}: expected a profile on record ({there or 'there is none'})")
    for folder in folders:
        files = verified_files(folder)
        methods: dict[str, list[str]] = {}
        with tempfile.TemporaryDirectory() as unpacked:
            for name in files:
                if found := SCORES_FILE.fullmatch(name):
                    dataset, method = found.groups()
                    methods.setdefault(dataset, []).append(method)
                    cell_folder = Path(unpacked, dataset, method)
                    cell_folder.mkdir(parents=True)
                    (cell_folder / "scores.csv").write_bytes(gzip.decompress((folder / name).read_bytes()))
                    shutil.copy(folder / f"facts-{dataset}-{method}.json", cell_folder / "facts.json")
            for dataset in run.task_datasets:
                if (cell := read_cell(Path(unpacked, dataset), methods.get(dataset, ()))) is not None:
                    yield from columns_of(folder.name, cell)


def table(columns: Sequence[Column], maps: Sequence[str] | None = None) -> str:
    """F⁺ / F⁻ of maps in Markdown, a column a cell; after each pair TVE's marks (`Column.marks`).

    Args:
        columns: the cells, those of a backbone together.
        maps: rows, in this order, but for those of no cell; none: every map of any cell.
    """
    there = {name for column in columns for name in column.scores}
    maps = [name for name in maps if name in there] if maps else in_table_order(there)
    heads, last = list[str](), ""
    for column in columns:
        heads.append(column.task if column.backbone == last else f"{_title(column.backbone)} {column.task}")
        last = column.backbone
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in maps:
        label = style_of(name).label
        cells = [_cell(column, name) for column in columns]
        lines.append(f"| {f'**{label}**' if name == REFERENCE else label} | " + " | ".join(cells) + " |")
    if all({REFERENCE, RANDOM, EXACT} <= set(column.scores) for column in columns):
        shares = [" / ".join(number(column.share_of_way(f), 2) for f in FIDELITIES) for column in columns]
        lines.append("| *share of the way from random to exact windows* | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _cell(column: Column, name: str) -> str:
    if name not in column.scores:
        return NOT_THERE
    pair = " / ".join(number(float(column.scores[name][f].mean())) for f in FIDELITIES)
    return pair if name == REFERENCE else f"{pair} {column.marks(name)}"


def _title(backbone: str) -> str:
    """A backbone's name as people write it.

    >>> _title("vit_tiny"), _title("deit_scenes"), _title("convnext")
    ('ViT-Ti', 'DeiT', 'Convnext')
    """
    family, _, rest = backbone.partition("_")
    size = {"tiny": "-Ti", "small": "-S", "base": "-B"}.get(rest, "")
    return {"vit": "ViT", "deit": "DeiT"}.get(family, family.capitalize()) + size


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        sys.exit("recorded: expected one argument, a profile under docs/records")
    print(table(list(recorded_columns(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
