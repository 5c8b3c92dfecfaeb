"""Finds backbones that have no valid explainer, makes one for each, and takes into service what is good enough.

On a schedule, by hand, or by an event whose payload nobody reads. DVC says what is stale, so nothing is trained twice
and a run that was cut short goes on from its last checkpoint; the registry says what was judged, so nothing is judged
twice.
"""

import csv
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, Field

from tve.digests import file_sha256
from tve_pipeline.flows import registry
from tve_pipeline.flows.ownership import sole_writer
from tve_pipeline.flows.registry import Figures, Verdict
from tve_pipeline.flows.reproduce import (
    begin,
    push_where_there_is_a_remote,
    require_space,
    run_name,
    show_outcome,
    stages_of_lock,
    surroundings,
)
from tve_pipeline.flows.stages import MOST_AT_ONCE, run_stages, stage_graph, stale_stages, with_ancestors, with_later
from tve_pipeline.params import RunParams, active_profile, existing_path, load_backbone_params, load_section

METHOD = "tve"
NOTHING = "nothing to do"
NOT_FILES = ("train", "timm", "random")


class Gate(BaseModel):
    """What an explainer must reach to be in service; where none is, the trivial answers are what it must beat."""

    model_config = ConfigDict(extra="forbid")

    tolerance: float = Field(default=0.02, ge=0)  # by how much it may fall behind the one in service, in any figure
    least_r2_kept: float | None = None
    least_r2_removed: float | None = None
    least_gap: float = 0.0  # of fidelity plus over fidelity minus


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backbone of the active profile, and what is to be done for it."""

    backbone: str
    why: str  # "" where its explainer is valid and judged
    stale: tuple[str, ...]  # stages to run
    force: tuple[str, ...] = ()  # of these, those that DVC calls up to date


@flow(
    name="retrain",
    flow_run_name=run_name,
    log_prints=True,
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_AT_ONCE),  # type: ignore[arg-type]
    persist_result=True,
    result_serializer="json",
)
def retrain(gate: Gate | None = None, pattern: str | None = None, publish: bool = True) -> dict[str, str]:
    """Makes an explainer for every backbone of the active profile that has no valid one, one after the other.

    Args:
        gate: what an explainer must reach.
        pattern: of timm's names, as `vit_*_patch16_224.augreg*`; those that match and are no architecture of the
            profile's are listed in the plan: which removal an explainer is for, and the rest, is nobody's guess.
        publish: whether verdicts are committed, and explainers in service tagged.

    Returns:
        What became of each backbone.

    Raises:
        RuntimeError: an explainer could not be made; the others were.
    """
    begin()
    gate = gate or Gate()
    became: dict[str, str] = {}
    with sole_writer(flow_run.name) as lock:
        require_space()
        before = stages_of_lock()
        profile, run = active_profile(), load_section("run", RunParams)
        if publish:
            for name in run.backbones:  # of a run that was cut short
                registry.publish(profile, name)
        graph = stage_graph()
        plan: list[Candidate] = []
        for name in run.backbones:
            try:
                plan.append(candidate(profile, name, run, graph))
            except (OSError, ValueError) as error:  # one backbone's weights file is gone: the others go on
                became[name] = f"failed: {error}"
        new = new_in_timm(pattern, [load_backbone_params(name).architecture for name in run.backbones])
        create_markdown_artifact(
            plan_text(plan, new), key="retrain-plan", description="Which explainers are made, and why"
        )
        for each in plan:
            if not each.why:
                became[each.backbone] = NOTHING
                continue
            print(f"{each.backbone}: {each.why}; {len(each.stale)} stages")
            if failed := run_stages(graph, each.stale, force=each.force, keep_open=[lock]):
                became[each.backbone] = f"failed: {failed[0]}"
                continue
            try:
                verdict = judge(profile, each.backbone, run, gate)
            except (OSError, ValueError, KeyError) as error:
                became[each.backbone] = f"failed: it cannot be judged: {error!r}"
                continue
            if known := verdict_on(profile, each.backbone, verdict.explainer_sha256):
                registry.note_source(profile, each.backbone, known, verdict.source_sha256)
                became[each.backbone] = (
                    f"the same explainer as before, {'in service' if known.passed else 'turned down'}"
                )
                continue
            registry.record(profile, each.backbone, verdict)
            version = registry.publish(profile, each.backbone) if publish else None
            word = f"in service{f' as {version}' if version else ''}" if verdict.passed else "turned down"
            became[each.backbone] = "; ".join([f"{word}: {registry.summary(verdict.figures)}", *verdict.reasons])
        if any(word != NOTHING for word in became.values()):
            show_outcome(before)
            lines = ["| backbone | what became of it |", "|---|---|", *(f"| `{n}` | {w} |" for n, w in became.items())]
            create_markdown_artifact("\n".join(lines), key="retrain", description="What became of each backbone")
            push_where_there_is_a_remote()
    for name, word in became.items():
        print(f"{name}: {word}")
    if failures := [name for name, word in became.items() if word.startswith("failed")]:
        raise RuntimeError(f"{', '.join(failures)}: no explainer could be made; the log has each stage's last lines")
    return became


def candidate(profile: str, backbone: str, run: RunParams, graph: Mapping[str, Sequence[str]]) -> Candidate:
    """Whether a backbone needs an explainer, or its explainer a verdict, and why."""
    wanted = with_ancestors(graph, targets(profile, backbone, run))
    of_backbone = {name: graph[name] for name in wanted}
    stale = stale_stages(of_backbone)
    locked = stages_of_lock()
    known = registry.verdicts(profile, backbone)
    source = source_sha256(backbone)
    if f"export@{profile}-{backbone}" not in locked:
        return Candidate(backbone, "no explainer was made for it", tuple(stale))
    if known and source is not None and known[-1].source_sha256 not in (None, source):
        first = f"backbone@{profile}-{backbone}"
        return Candidate(
            backbone, "its weights file changed", tuple(with_later(of_backbone, {first, *stale})), (first,)
        )
    if stale:
        return Candidate(backbone, f"what its explainer was made from changed, first {stale[0]}", tuple(stale))
    if not verdict_on(profile, backbone, str(registry.exported(profile, backbone).get("explainer_sha256"))):
        return Candidate(backbone, "its explainer was never judged", ())
    return Candidate(backbone, "", ())


def targets(profile: str, backbone: str, run: RunParams) -> list[str]:
    """Stages that an explainer and its verdict need."""
    named = [f"export@{profile}-{backbone}"]
    if METHOD in run.readings:
        named += [f"evaluate_tve@{profile}-{backbone}-{dataset}-{METHOD}" for dataset in run.task_datasets]
    return named


def source_sha256(backbone: str) -> str | None:
    """Of the weights file that a backbone is read from; None where it is no file."""
    weights = load_backbone_params(backbone).weights
    return None if weights in NOT_FILES else file_sha256(existing_path(weights, f"backbones.{backbone}.weights"))


def judge(profile: str, backbone: str, run: RunParams, gate: Gate) -> Verdict:
    """Holds an explainer that was made against the gate and the one in service."""
    figures = figures_of(profile, backbone, run)
    config = registry.exported(profile, backbone)
    served = registry.in_service(profile, backbone)
    reasons = shortcomings(figures, served.figures if served else None, gate)
    return Verdict(
        explainer_sha256=config["explainer_sha256"],
        backbone_sha256=config["backbone_sha256"],
        source_sha256=source_sha256(backbone),
        figures=figures,
        passed=not reasons,
        reasons=tuple(reasons),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        flow_run=str(flow_run.id),
    )


def verdict_on(profile: str, backbone: str, explainer_sha256: str) -> Verdict | None:
    """The last on this explainer."""
    known = reversed(registry.verdicts(profile, backbone))
    return next((each for each in known if each.explainer_sha256 == explainer_sha256), None)


def figures_of(profile: str, backbone: str, run: RunParams) -> Figures:
    """R² on held-out pictures, and the fidelities of `tve` under the removal that the explainer is for."""
    metrics = json.loads(Path("results", profile, "pretrain", backbone, "metrics.json").read_text())
    removal = load_backbone_params(backbone).removal
    plus: list[float] = []
    minus: list[float] = []
    if METHOD in run.readings:
        for dataset in run.task_datasets:
            rows: dict[str, list[Mapping[str, str]]] = {}
            scores = Path("results", profile, "evaluate", f"{backbone}-{dataset}", METHOD, "scores.csv")
            with scores.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row["map"] == METHOD:
                        rows.setdefault(row["task"], []).append(row)
            for of_task in rows.values():
                plus.append(fmean(float(row[f"{removal}_fidelity_plus"]) for row in of_task))
                minus.append(fmean(float(row[f"{removal}_fidelity_minus"]) for row in of_task))
    return Figures(
        r2_kept=metrics["r2_kept"],
        r2_removed=metrics["r2_removed"],
        trivial_r2_kept=metrics["trivial_mean_r2_kept"],
        trivial_r2_removed=metrics["trivial_full_r2_removed"],
        fidelity_plus=fmean(plus) if plus else None,
        fidelity_minus=fmean(minus) if minus else None,
    )


def shortcomings(figures: Figures, served: Figures | None, gate: Gate) -> list[str]:
    """Why an explainer may not be in service; nothing where it may."""
    found: list[str] = []

    def require(what: str, value: float, bar: float, of: str) -> None:
        if not value >= bar:  # NaN is no figure either
            found.append(f"{what}: expected at least {bar:.3f} ({of}), got {value:.3f}")

    require("R² of ĝ", figures.r2_kept, figures.trivial_r2_kept, "the mean of g")
    require("R² of ĥ", figures.r2_removed, figures.trivial_r2_removed, "G(x)")
    for what, value, bar in (
        ("R² of ĝ", figures.r2_kept, gate.least_r2_kept),
        ("R² of ĥ", figures.r2_removed, gate.least_r2_removed),
    ):
        if bar is not None:
            require(what, value, bar, "the gate's least")
    gap = _gap(figures)
    if gap is not None:
        require("F⁺ − F⁻", gap, gate.least_gap, "the gate's least")
    if served is not None:
        allowed = f"the one in service less {gate.tolerance:g}"
        require("R² of ĝ", figures.r2_kept, served.r2_kept - gate.tolerance, allowed)
        require("R² of ĥ", figures.r2_removed, served.r2_removed - gate.tolerance, allowed)
        before = _gap(served)
        if gap is not None and before is not None:
            require("F⁺ − F⁻", gap, before - gate.tolerance, allowed)
    return found


def new_in_timm(pattern: str | None, architectures: Sequence[str]) -> list[str]:
    """Names of timm's registry, with pretrained weights, that match and that no backbone of the profile has."""
    if pattern is None:
        return []
    import timm  # here alone: it takes seconds to import

    names = fnmatch.filter(timm.list_models(pretrained=True), pattern)
    return [name for name in names if name not in architectures]


def plan_text(plan: Sequence[Candidate], new: Sequence[str]) -> str:
    """What is made, and why; what timm has that nobody asked for."""
    due = [each for each in plan if each.why]
    lines = [f"{len(due)} of {len(plan)} backbones need an explainer or a verdict.", *surroundings(), ""]
    lines += ["| backbone | why | stages |", "|---|---|---|"] if plan else []
    lines += [
        f"| `{each.backbone}` | {each.why or 'valid'} | {', '.join(f'`{s}`' for s in each.stale)} |" for each in plan
    ]
    if new:
        lines += ["", "New in timm; add an entry to the profile's `backbones` and `run.backbones` for any of them:", ""]
        lines += [f"- `{name}`" for name in new]
    return "\n".join(lines)


def _gap(figures: Figures) -> float | None:
    if figures.fidelity_plus is None or figures.fidelity_minus is None:
        return None
    return figures.fidelity_plus - figures.fidelity_minus
