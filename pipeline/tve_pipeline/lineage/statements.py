"""A stage's evidence as it is read: its statement's fields by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tve_pipeline.lineage.evidence import BUILD_TYPE, LOCK_FILE, PREDICATE_TYPE, evidence_path
from tve_pipeline.lineage.files import FileRecord
from tve_pipeline.lineage.keys import STATEMENT_TYPE, Standing, unseal
from tve_pipeline.lineage.lock import overlap


@dataclass(slots=True)
class StageEvidence:
    """A stage in dvc.lock and what its evidence says."""

    name: str
    locked: Mapping[str, Any]
    evidence: str  # where the evidence of the run that dvc.lock tells of lies, or else of another run
    standing: Standing | Literal["missing"] = "missing"
    key: str = ""
    command: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    read: dict[str, FileRecord] = field(default_factory=dict)
    made: dict[str, FileRecord] = field(default_factory=dict)
    commit: str = ""
    dirty: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    read_lock: str = ""  # sha256 of the lock file
    started: str = ""
    finished: str = ""
    run: str = ""


def newest_evidence(root: Path, stage: str) -> Path | None:
    """The evidence of a stage's latest run, whoever signed it; None where there is none that can be read."""
    found = []
    for path in sorted((root / evidence_path(stage, "")).parent.glob("*.json")):
        try:
            found.append((read_evidence(path.read_bytes()).finished, path))
        except (ValueError, OSError, RecursionError):
            continue
    return max(found)[1] if found else None


def read_evidence(text: bytes) -> StageEvidence:
    """A stage as its evidence alone tells it, whoever signed.

    Raises:
        ValueError: it is no evidence of a stage.
    """
    opened = unseal(text, {})
    stage = StageEvidence("", {}, "", opened.standing, opened.key)
    try:
        fill(stage, opened.statement)
        stage.name = opened.statement["predicate"]["buildDefinition"]["externalParameters"]["stage"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected evidence of a stage, got a statement without {error}") from error
    return stage


def fill(stage: StageEvidence, statement: Mapping[str, Any]) -> None:
    """Fills a stage from its statement.

    Raises:
        ValueError, KeyError, TypeError: it is none of ours.
    """
    for key, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement[key] != expected:
            raise ValueError(f"{key}: expected {expected}, got {statement[key]!r}")
    predicate = statement["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    if definition["buildType"] != BUILD_TYPE:
        raise ValueError(f"buildType: expected {BUILD_TYPE}, got {definition['buildType']!r}")
    external, internal = definition["externalParameters"], definition["internalParameters"]
    stage.command, stage.params = external["command"], external["params"]
    stage.inputs, stage.outputs = list(external["inputs"]), list(external["outputs"])
    stage.made = dict(_records(statement["subject"]))
    materials = definition["resolvedDependencies"]
    read = dict(_records(each for each in materials if "name" in each))
    stage.read = {name: each for name, each in read.items() if any(overlap(name, path) for path in stage.inputs)}
    stage.read_lock = read[LOCK_FILE].sha256 if LOCK_FILE in read else ""
    stage.commit = next((each["digest"]["gitCommit"] for each in materials if "gitCommit" in each["digest"]), "")
    stage.sources = {e["uri"]: e["digest"]["sha256"] for e in materials if str(e.get("uri", "")).startswith("params:")}
    stage.dirty = bool(details.get("byproducts"))
    stage.environment, stage.machine, stage.seeds = internal["environment"], internal["machine"], internal["seeds"]
    metadata = details["metadata"]
    stage.started, stage.finished, stage.run = metadata["startedOn"], metadata["finishedOn"], metadata["invocationId"]


def _records(descriptors: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, FileRecord]]:
    for each in descriptors:
        digest, path = each["digest"], PurePosixPath(each["name"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"expected names of files in this project, got {each['name']!r}")
        yield each["name"], FileRecord(each["annotations"]["size"], digest["sha256"], digest["md5"])
