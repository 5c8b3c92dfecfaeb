"""Which explainers are in service, which were turned down, and why: `registry/` in git, and GTO's tags.

    registry/PROFILE/BACKBONE.json   every verdict, oldest first
    registry/dvc.yaml                an artifact of DVC's for each explainer in service
    tag registry=PROFILE-BACKBONE@v0.0.2

So `dvc artifacts get URL registry:scenes-vit-scenes` fetches the newest explainer in service, `gto show` lists
versions.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gto.api
import yaml

from tve_pipeline.lineage.git import git
from tve_pipeline.outputs import json_text, write_whole

FOLDER = Path("registry")
ARTIFACTS = FOLDER / "dvc.yaml"
NOBODY = ("-c", "user.name=TVE", "-c", "user.email=tve@localhost")  # where git knows no author


@dataclass(frozen=True, slots=True)
class Figures:
    """What a gate looks at."""

    r2_kept: float
    r2_removed: float
    trivial_r2_kept: float  # of the mean of g
    trivial_r2_removed: float  # of G(x)
    fidelity_plus: float | None  # means over pictures, then over tasks; None where `tve` is not evaluated
    fidelity_minus: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one explainer."""

    explainer_sha256: str
    backbone_sha256: str
    source_sha256: str | None  # of the weights file that the backbone was read from; None: trained here, or timm's
    figures: Figures
    passed: bool
    reasons: tuple[str, ...]  # why it was turned down; empty where it passed
    date: str
    flow_run: str


def verdicts(profile: str, backbone: str) -> list[Verdict]:
    """All of them, oldest first."""
    path = FOLDER / profile / f"{backbone}.json"
    if not path.is_file():
        return []
    return [
        Verdict(**each | {"figures": Figures(**each["figures"]), "reasons": tuple(each["reasons"])})
        for each in json.loads(path.read_text())
    ]


def exported(profile: str, backbone: str) -> dict[str, Any]:
    """The configuration of the explainer that lies here now; empty where there is none."""
    config = Path("models", profile, "export", backbone, "config.json")
    return dict(json.loads(config.read_text())) if config.is_file() else {}


def note_source(profile: str, backbone: str, verdict: Verdict, source_sha256: str | None) -> None:
    """Of an explainer that was judged before: the weights file that it came of this time."""
    judged = verdicts(profile, backbone)
    changed = [replace(each, source_sha256=source_sha256) if each == verdict else each for each in judged]
    _write_verdicts(FOLDER / profile / f"{backbone}.json", changed)


def in_service(profile: str, backbone: str) -> Verdict | None:
    """The newest that passed."""
    return next((each for each in reversed(verdicts(profile, backbone)) if each.passed), None)


def record(profile: str, backbone: str, verdict: Verdict) -> None:
    """Writes a verdict down, in one step; one that passed becomes an artifact of DVC's."""
    path = FOLDER / profile / f"{backbone}.json"
    known = verdicts(profile, backbone)
    if verdict.passed:
        _write_artifact(artifact_name(profile, backbone), Path("models", profile, "export", backbone), verdict)
    _write_verdicts(path, (*known, verdict))


def publish(profile: str, backbone: str) -> str | None:
    """Commits what is recorded of a backbone and gives what is in service its version of GTO's; returns a new version.

    What is committed or has its version already is left alone, so that a run cut short is made whole by the next. The
    commit holds what the explainer consists of for git (dvc.lock, evidence, the registry) and nothing else of the tree.

    Raises:
        RuntimeError: git refuses the commit.
    """
    known = verdicts(profile, backbone)
    if not known or git("rev-parse", "--git-dir") is None:
        return None
    path, last = FOLDER / profile / f"{backbone}.json", known[-1]
    if git("status", "--porcelain", "--", path.as_posix()):
        word = "in service" if last.passed else f"turned down: {'; '.join(last.reasons)}"
        _commit([path, ARTIFACTS, Path("dvc.lock"), Path("evidence")], f"{backbone} ({profile}): {word}")
    name = artifact_name(profile, backbone)
    tags = (git("tag", "--list", f"{FOLDER.name}={name}@v*") or b"").split()
    if not last.passed or len(tags) >= sum(each.passed for each in known):
        return None
    if exported(profile, backbone).get("explainer_sha256") != last.explainer_sha256:
        return None  # what lies here now was never judged
    author, email = (("TVE", "tve@localhost"), (None, None))[bool(git("config", "user.email"))]
    message = summary(last.figures)
    tag = gto.api.register(".", f"{FOLDER.name}:{name}", ref="HEAD", message=message, author=author, author_email=email)
    return str(tag.version)


def artifact_name(profile: str, backbone: str) -> str:
    """GTO's names are of lower-case letters, digits and dashes."""
    return f"{profile}-{backbone}".lower().replace("_", "-")


def summary(figures: Figures) -> str:
    """The figures in one line."""
    text = f"R² {figures.r2_kept:.3f} / {figures.r2_removed:.3f}"
    if figures.fidelity_plus is not None and figures.fidelity_minus is not None:
        text += f", fidelity {figures.fidelity_plus:.3f} / {figures.fidelity_minus:.3f}"
    return text


def _write_artifact(name: str, path: Path, verdict: Verdict) -> None:
    document = yaml.safe_load(ARTIFACTS.read_text()) if ARTIFACTS.is_file() else {}
    artifacts = (document or {}).get("artifacts") or {}
    artifacts[name] = {"path": f"../{path.as_posix()}", "type": "model", "desc": summary(verdict.figures)}
    ARTIFACTS.parent.mkdir(exist_ok=True)
    ARTIFACTS.write_text(
        yaml.safe_dump({"artifacts": dict(sorted(artifacts.items()))}, sort_keys=False, allow_unicode=True)
    )


def _write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    write_whole(path, json_text([asdict(each) for each in verdicts]))


def _commit(paths: Sequence[Path], message: str) -> None:
    there = [path.as_posix() for path in paths if path.exists()]
    author = () if git("config", "user.email") else NOBODY
    for command in (["add", "--", *there], ["commit", "--quiet", "-m", message, "--only", "--", *there]):
        finished = subprocess.run(["git", *author, *command], capture_output=True, text=True)
        if finished.returncode != 0:
            raise RuntimeError(f"git {command[0]}: {finished.stderr.strip() or finished.stdout.strip()}")
