"""What differs between two runs: data, code, params, environment, seeds, device, in that order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tve_pipeline.lineage.audit import differing, is_generated
from tve_pipeline.lineage.evidence import FOLDER, evidence_path
from tve_pipeline.lineage.files import FileRecord
from tve_pipeline.lineage.git import git
from tve_pipeline.lineage.lock import DVC_LOCK, load_yaml, lock_key
from tve_pipeline.lineage.statements import StageEvidence, read_evidence

KINDS = ("data", "code", "params", "environment", "seed", "device", "result")


@dataclass(frozen=True, slots=True)
class Difference:
    kind: str
    stage: str
    name: str
    one: str
    other: str


def runs(root: Path, named: str) -> dict[str, StageEvidence]:
    """The runs behind a name, by stage: an evidence file, a revision of git or an experiment of DVC.

    Of a revision it is the runs that its dvc.lock tells of, by the evidence that lies in the working tree.

    Raises:
        ValueError: it is none of these, or there is no evidence of any of its runs.
    """
    if Path(named).is_file():
        stage = read_evidence(Path(named).read_bytes())
        return {stage.name: stage}
    lock = git("show", "--end-of-options", f"{_experiment(root, named) or named}:{DVC_LOCK}", root=root)
    if lock is None:
        raise ValueError(f"{named}: expected an evidence file, a git revision or a DVC experiment, got none of these")
    entries = ((load_yaml(lock) or {}).get("stages") or {}).items()
    files = {name: root / evidence_path(name, lock_key(entry)) for name, entry in entries}
    found = {name: read_evidence(file.read_bytes()) for name, file in files.items() if file.is_file()}
    if not found:
        raise ValueError(f"{named}: expected evidence of its runs in {FOLDER}/, got none; `git pull` or run them again")
    return found


def difference(one: Mapping[str, StageEvidence], other: Mapping[str, StageEvidence]) -> list[Difference]:
    """What differs, the most important first; of two single runs also where their stages are not the same."""
    if len(one) == len(other) == 1:
        pairs = [(next(iter(one.values())), next(iter(other.values())))]
    else:
        pairs = [(one[name], other[name]) for name in one if name in other]
    found = [each for a, b in pairs for each in _between(a, b)]
    found += [
        Difference("result", name, "stage", "ran", "did not run") for name in one if len(one) > 1 and name not in other
    ]
    found += [
        Difference("result", name, "stage", "did not run", "ran")
        for name in other
        if len(other) > 1 and name not in one
    ]
    return sorted(found, key=lambda each: KINDS.index(each.kind))


def _between(a: StageEvidence, b: StageEvidence) -> Iterator[Difference]:
    def generated(files: Mapping[str, FileRecord], wanted: bool) -> dict[str, str]:
        return {name: each.sha256[:12] for name, each in files.items() if is_generated(name) == wanted}

    compared = (
        ("data", generated(a.read, True) | dict(a.sources), generated(b.read, True) | dict(b.sources)),
        (
            "code",
            generated(a.read, False) | {"commit": a.commit[:12]},
            generated(b.read, False) | {"commit": b.commit[:12]},
        ),
        ("params", a.params, b.params),
        ("environment", a.environment, b.environment),
        ("seed", a.seeds, b.seeds),
        ("device", a.machine, b.machine),
        ("result", generated(a.made, True), generated(b.made, True)),
    )
    for kind, one, other in compared:
        for name in differing(one, other):
            if kind == "params" and name.rpartition(".")[2] == "seed":
                continue  # said as a seed
            yield Difference(kind, a.name, name, _value(one, name), _value(other, name))


def _value(values: Mapping[str, object], dotted: str) -> str:
    """What a dotted name stands for: keys may hold dots themselves."""
    if dotted in values:
        return str(values[dotted])
    for key, value in values.items():
        if dotted.startswith(f"{key}.") and isinstance(value, Mapping):
            return _value(value, dotted.removeprefix(f"{key}."))
    return "-"


def _experiment(root: Path, named: str) -> str:
    """The reference of the newest experiment of this name, "" where there is none."""
    listing = git("for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/exps", root=root) or b""
    return next((ref for ref in listing.decode().splitlines() if ref.rpartition("/")[2] == named), "")
