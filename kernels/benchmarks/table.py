"""The README's table of evaluations per second, made from the newest rows of each device, not typed by hand.

python -m benchmarks.table [FILE ...]
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.baselines import LETTERS
from benchmarks.records import RESULTS, ROOT

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
README = ROOT / "README.md"
KEY = ("model", "radius", "dtype", "case")
HEADER = (
    "| model | dtype | coalitions | (a) | (b) | (c) | TVE | over (a) | over (b) | over (c) | MiB | "
    "share of the ceiling: done / nominal |"
)

Cells = Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables of these files into the README.

    Raises:
        FileNotFoundError: no rows at all.
        ValueError: a README without the two markers.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="by default every engine_*.csv in kernels/results")
    parser.add_argument("--readme", type=Path, default=README)
    asked = parser.parse_args(arguments)
    files = asked.files or sorted(RESULTS.glob("engine_*.csv"))
    if not files:
        raise FileNotFoundError(f"{RESULTS}: expected engine_*.csv, got none; run python -m benchmarks.engine")
    tables = [markdown(read(file)) for file in files]
    asked.readme.write_text(replaced(asked.readme.read_text(), "\n\n".join(tables)))
    return 0


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, oldest first."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Sequence[Cells]) -> dict[tuple[str, ...], list[Cells]]:
    """Of each model, radius, dtype and case the rows of its latest run."""
    groups: dict[tuple[str, ...], list[Cells]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return {key: [row for row in group if row["date"] == group[-1]["date"]] for key, group in groups.items()}


def markdown(rows: Sequence[Cells]) -> str:
    """A table with a line for each model, radius, dtype and case, and below it what it was measured with."""
    groups = newest(rows)
    lines = [HEADER, "|---|---|---|" + "---:|" * (HEADER.count("|") - 4)]
    lines += [_line(group) for group in groups.values()]
    runs = dict.fromkeys(_run(row) for group in groups.values() for row in group)
    return "\n".join([*lines, "", *(f"*{run}.*" for run in runs)])


def replaced(text: str, table: str) -> str:
    """A text with the table between its markers.

    Raises:
        ValueError: not exactly one of each marker, in their order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"README: expected one line {BEGIN} and after it one line {END}; put them where the table goes"
        )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _line(group: Sequence[Cells]) -> str:
    by_letter: dict[str, Cells] = {}
    for row in sorted(group, key=lambda row: float(row["per_s_p50"])):  # of the two forms of (c) the faster one stays
        by_letter[next(letter for side, letter in LETTERS.items() if side == row["side"])] = row
    first, ours = group[0], by_letter.get("d", {})
    radius = f", r = {first['radius']}" if first["radius"] else ""
    rates = [_rounded(by_letter[letter]["per_s_p50"]) if letter in by_letter else "" for letter in "abcd"]
    ratios = [f"{float(over):.2f}" if (over := ours.get(f"ratio_over_{letter}")) else "" for letter in "abc"]
    shares = " / ".join(f"{float(ours[name]):.0%}" for name in ("share_done", "share_nominal")) if ours else ""
    memory = _rounded(ours["peak_mib"]) if ours else ""
    return (
        "| "
        + " | ".join([first["model"], first["dtype"], f"{first['case']}{radius}", *rates, *ratios, memory, shares])
        + " |"
    )


def _run(row: Cells) -> str:
    threads = "" if row["backend"] == "triton" or "NVIDIA" in row["machine"] else f", threads: {row['threads']}"
    triton = f", Triton {row['triton']}" if row["triton"] else ""
    return (
        f"Evaluations per second on {row['machine']}{threads}; torch {row['torch']}, timm {row['timm']}{triton}; "
        f"commit {row['commit']}, {row['date'][:10]}"
    )


def _rounded(value: str) -> str:
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"


if __name__ == "__main__":
    sys.exit(main())
