"""The audit as a page, with the graph of stages: from a number to its pictures by clicks. No network, no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, select_autoescape

from tve_pipeline.lineage.audit import Finding, Report, Severity, is_generated
from tve_pipeline.lineage.files import FileRecord
from tve_pipeline.lineage.lock import overlap, paths
from tve_pipeline.lineage.statements import StageEvidence

COLUMN, ROW, WIDTH, HEIGHT = 134, 42, 114, 34  # of the graph, px: eight columns fit the page
LETTERS = 18  # of a line in a box; its first line is bold and has two less
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the gravest first
FILES_SHOWN = 12  # of one input or output; the rest is counted


@dataclass(frozen=True, slots=True)
class Box:
    """A stage in the graph, px."""

    name: str
    x: int
    y: int

    @property
    def lines(self) -> tuple[str, str]:
        """What the box says: the stage, and of what it is, without the profile."""
        stage, _, of = self.name.partition("@")
        return _shortened(stage, LETTERS - 2), _shortened(of.partition("-")[2], LETTERS)


@dataclass(frozen=True, slots=True)
class Line:
    """From a stage to one that reads what it made: a cubic curve, as SVG writes it."""

    path: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An input or output of a stage."""

    path: str
    maker: str  # the stage that made it, "" for sources
    files: Sequence[tuple[str, FileRecord]]
    more: int
    num_bytes: int


def page(report: Report) -> str:
    """A whole HTML document."""
    made = {out: stage.name for stage in report.stages for out in paths(stage.locked, "outs")}
    before = {stage.name: _before(stage, made) for stage in report.stages}
    boxes, lines, size = _layout(before)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    severity: dict[str, str] = {}
    for finding in sorted(report.findings, key=lambda each: SEVERITIES.index(each.severity)):
        severity.setdefault(finding.stage, finding.severity)
    return environment.get_template("page.html.j2").render(
        report=report,
        told=_told(report.findings),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        boxes=boxes,
        lines=lines,
        width=size[0],
        height=size[1],
        box=(WIDTH, HEIGHT),
        severity=severity,
        inputs={
            stage.name: [_entry(path, stage.read, made) for path in _generated(stage.inputs)] for stage in report.stages
        },
        code={stage.name: [path for path in stage.inputs if not is_generated(path)] for stage in report.stages},
        outputs={stage.name: [_entry(path, stage.made, {}) for path in stage.outputs] for stage in report.stages},
        findings={s.name: [each for each in report.findings if each.stage == s.name] for s in report.stages},
        results=[(path, s.name) for s in reversed(report.stages) for path in _results(s)],
    )


def _results(stage: StageEvidence) -> list[str]:
    """Where a stage's numbers are: an output below results/, or the metrics.json in it."""
    found = [path for path in stage.outputs if path.startswith("results/")]
    return [metrics if (metrics := f"{path}/metrics.json") in stage.made else path for path in found]


def _told(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """The gravest first; what is said alike of several stages once, with how many more there are."""
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for each in sorted(findings, key=lambda each: SEVERITIES.index(each.severity)):
        alike.setdefault((each.severity, each.kind, each.message), []).append(each)
    return [(each[0], len(each) - 1) for each in alike.values()]


def _before(stage: StageEvidence, made: Mapping[str, str]) -> list[str]:
    """The stages whose outputs a stage reads."""
    found = {maker for dep in paths(stage.locked, "deps") for out, maker in made.items() if overlap(dep, out)}
    return sorted(found - {stage.name})


def _layout(before: Mapping[str, Sequence[str]]) -> tuple[list[Box], list[Line], tuple[int, int]]:
    """Stages in columns, each right of those that it reads; and the size of all, px."""
    column: dict[str, int] = {}
    for name, earlier in before.items():  # in the order of running
        column[name] = 1 + max((column.get(each, -1) for each in earlier), default=-1)
    boxes: dict[str, Box] = {}
    filled: dict[int, int] = {}
    for name, number in column.items():
        boxes[name] = Box(name, 8 + number * COLUMN, 8 + filled.get(number, 0) * ROW)
        filled[number] = filled.get(number, 0) + 1
    lines = []
    for name, earlier in before.items():
        for each in earlier:
            if column[name] - column[each] > 1 and any(each in before[other] for other in earlier if other != each):
                continue  # said by the way through the stage between
            start, end = boxes[each], boxes[name]
            x1, y1, x2, y2 = start.x + WIDTH, start.y + HEIGHT // 2, end.x, end.y + HEIGHT // 2
            bend = (x2 - x1) // 2
            lines.append(Line(f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"))
    width = 16 + max((box.x for box in boxes.values()), default=0) + WIDTH
    return list(boxes.values()), lines, (width, 16 + max((box.y for box in boxes.values()), default=0) + HEIGHT)


def _shortened(text: str, letters: int) -> str:
    """The end of a name, which tells it from its neighbours."""
    return text if len(text) <= letters else "…" + text[1 - letters :]


def _entry(path: str, known: Mapping[str, FileRecord], made: Mapping[str, str]) -> Entry:
    files = [(name, each) for name, each in known.items() if overlap(name, path)]
    maker = next((name for out, name in made.items() if overlap(out, path)), "")
    total = sum(each.size for _, each in files)
    return Entry(path, maker, files[:FILES_SHOWN], max(0, len(files) - FILES_SHOWN), total)


def _generated(inputs: Sequence[str]) -> list[str]:
    return [path for path in inputs if is_generated(path)]
