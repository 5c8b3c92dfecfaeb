"""The audit: every hash recomputed from bytes, every claim held against evidence, from a file back to its pictures.

What is compared, for each stage that an artifact rests on: the signature of its evidence with the keys that the
repository trusts; command, parameters and md5 in dvc.lock with the evidence; parameters with the profile;
inputs and outputs on the disk with the evidence, by sha256; folders with their lists; the packages with the lock file;
the commit with the history; what a stage read with what the stage before it says that it wrote.

Imports neither torch nor DVC, and needs no network.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tve_pipeline.lineage.evidence import LOCK_FILE, evidence_path
from tve_pipeline.lineage.files import FileRecord, dvc_md5, listed, records
from tve_pipeline.lineage.git import git
from tve_pipeline.lineage.keys import SHORT, own_signer, trusted_keys, unseal
from tve_pipeline.lineage.lock import (
    DVC_LOCK,
    active_profile,
    behind,
    in_order,
    load_lock,
    load_yaml,
    lock_key,
    of_profile,
    overlap,
    paths,
    profile_of,
)
from tve_pipeline.lineage.statements import StageEvidence, fill, newest_evidence

Severity = Literal["broken", "unproven", "note"]
GENERATED = ("data", "models", "results")  # where stages write; all else that they read is source
PARAMS = "params.yaml"
EXIT_CODES: Mapping[str, int] = {"OK": 0, "BROKEN": 1, "UNPROVEN": 3}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as the evidence says, or that no evidence says."""

    severity: Severity
    kind: str  # file, list, link, evidence, signature, lock, params, code, environment, chain, commit, absent
    stage: str
    path: str
    message: str


@dataclass(slots=True)
class Report:
    """What an audit found, stages in the order in which they ran."""

    stages: list[StageEvidence]
    findings: list[Finding]
    num_files: int
    num_bytes: int

    @property
    def verdict(self) -> str:
        severities = {finding.severity for finding in self.findings}
        return "BROKEN" if "broken" in severities else "UNPROVEN" if "unproven" in severities else "OK"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def first_broken(self) -> str:
        """The earliest stage with something broken, "" where nothing is."""
        broken = {finding.stage for finding in self.findings if finding.severity == "broken"}
        return next((stage.name for stage in self.stages if stage.name in broken), "")


def is_generated(path: str) -> bool:
    """Whether a stage wrote what lies at a path of the repository."""
    return path.split("/")[0] in GENERATED


def audit(root: Path, artifacts: Sequence[str] = (), *, profile: str | None = None) -> Report:
    """Audits files and folders, or everything that a profile made, back to the sources.

    Args:
        root: of the repository.
        artifacts: paths below it; none: every stage of the profile that dvc.lock lists.
        profile: whose stages; by default the one that params.yaml has.

    Raises:
        ValueError: no dvc.lock, or an artifact that no stage in it made.
    """
    try:
        locked = load_lock(root)
        _require_entries(locked)
    except (yaml.YAMLError, TypeError, AttributeError, RecursionError) as error:
        return _without_stages("broken", "lock", DVC_LOCK, f"{DVC_LOCK} cannot be read: {' '.join(str(error).split())}")
    try:
        profile = profile or active_profile(root)
    except (yaml.YAMLError, AttributeError, RecursionError) as error:
        return _without_stages("broken", "params", PARAMS, f"{PARAMS} cannot be read: {' '.join(str(error).split())}")
    chosen = of_profile(locked, profile) if not artifacts else behind(locked, root, artifacts)
    stages = [
        StageEvidence(name, locked[name], evidence_path(name, lock_key(locked[name])).as_posix())
        for name in in_order({name: locked[name] for name in chosen})
    ]
    if not stages:
        return _without_stages(
            "unproven", "lock", DVC_LOCK, f"no stage of the profile {profile!r} is in dvc.lock: nothing is proven"
        )
    auditor = _Auditor(root, stages)
    auditor.run()
    return Report(stages, auditor.findings, len(auditor.on_disk), sum(each.size for each in auditor.on_disk.values()))


def _without_stages(severity: Severity, kind: str, path: str, message: str) -> Report:
    return Report([], [Finding(severity, kind, "", path, message)], 0, 0)


def _require_entries(locked: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises TypeError for an entry of dvc.lock that DVC did not write."""
    for name, entry in locked.items():
        for kind in ("deps", "outs"):
            if not all(
                isinstance(each, Mapping) and isinstance(each.get("path"), str) for each in entry.get(kind) or ()
            ):
                raise TypeError(f"{name}: expected a path in each of its {kind}")
        params = entry.get("params") or {}
        if not (isinstance(params, Mapping) and all(isinstance(each, Mapping) for each in params.values())):
            raise TypeError(f"{name}: expected parameters by file")


class _Auditor:
    def __init__(self, root: Path, stages: Sequence[StageEvidence]) -> None:
        self.root, self.stages = root, stages
        self.findings: list[Finding] = []
        self.on_disk: dict[str, FileRecord] = {}
        self.trusted = {}
        try:
            self.trusted = trusted_keys(root)
        except ValueError as error:  # whoever can write there decides whom to trust: nobody, then
            self.findings.append(Finding("unproven", "signature", "", "keys", f"nobody is trusted: {error}"))
        signer = own_signer(make=False)
        self.own = signer.public_key if signer else None
        self.has_evidence = any((root / stage.evidence).is_file() for stage in stages)

    def run(self) -> None:
        for stage in self.stages:
            self._open(stage)
        self._hash()
        for stage in self.stages:
            if stage.standing == "missing":
                continue
            self._against_lock(stage)
            self._against_params(stage)
            self._files(stage, stage.outputs, stage.made, "output")
            self._files(stage, stage.inputs, stage.read, "input")
            self._environment(stage)
            self._chain(stage)
        self._commits()

    def say(self, severity: Severity, kind: str, stage: StageEvidence, path: str, message: str) -> None:
        finding = Finding(severity, kind, stage.name, path, message)
        if finding not in self.findings:
            self.findings.append(finding)

    def _open(self, stage: StageEvidence) -> None:
        """Reads a stage's evidence, and judges its signature."""
        path = self.root / stage.evidence
        if path.is_symlink():
            self.say("broken", "link", stage, stage.evidence, f"{stage.evidence} is a link")
            return
        if not path.is_file():
            if (other := newest_evidence(self.root, stage.name)) is None:
                severity: Severity = "broken" if self.has_evidence else "unproven"
                message = "there is no evidence of this stage: it was deleted, or the stage never ran with it"
                self.say(severity, "evidence", stage, stage.evidence, message)
                return
            message = f"no evidence is of the run that dvc.lock tells of; compared with the newest, {other.name}"
            self.say("broken", "evidence", stage, stage.evidence, message)
            path = other
            stage.evidence = other.relative_to(self.root).as_posix()
        try:
            opened = unseal(path.read_bytes(), self.trusted, self.own)
            fill(stage, opened.statement)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.say("broken", "evidence", stage, stage.evidence, f"the evidence cannot be read: {error}")
            return
        stage.standing, stage.key = opened.standing, opened.key
        if opened.standing == "altered":
            self.say(
                "broken", "signature", stage, stage.evidence, f"key {opened.key} did not sign this: it was altered"
            )
        elif opened.standing == "untrusted":
            message = (
                f"signed by key {opened.key}, which neither keys/ nor this user has; `tve keys` lists who is trusted"
            )
            self.say("unproven", "signature", stage, stage.evidence, message)
        elif opened.standing == "unsigned":
            self.say("unproven", "signature", stage, stage.evidence, "the evidence is not signed")
        named = opened.statement["predicate"]["buildDefinition"]["externalParameters"]["stage"]
        if named != stage.name:
            self.say("broken", "evidence", stage, stage.evidence, f"this is evidence of another stage, {named}")

    def _hash(self) -> None:
        """Every file that evidence names and that is here, once."""
        named = {path for stage in self.stages for path in (*stage.read, *stage.made)}
        wanted = [path for path in named if (self.root / path).is_file()]
        lock = [LOCK_FILE] if (self.root / LOCK_FILE).is_file() else []
        found = records([self.root / path for path in sorted({*wanted, *lock})], md5=False)
        self.on_disk = {Path(path).relative_to(self.root).as_posix(): each for path, each in found.items()}

    def _against_lock(self, stage: StageEvidence) -> None:
        if stage.locked.get("cmd") != stage.command:
            self.say("broken", "lock", stage, DVC_LOCK, f"dvc.lock says that `{stage.locked.get('cmd')}` ran, evidence "
                     f"`{stage.command}`")  # fmt: skip
        for kind, known, listed_paths in (("deps", stage.read, stage.inputs), ("outs", stage.made, stage.outputs)):
            md5_of = {path: each.md5 for path, each in known.items()}
            locked = {str(each["path"]): each for each in stage.locked.get(kind) or ()}
            for path in sorted(set(listed_paths) ^ set(locked)):
                where = "dvc.lock" if path in locked else "the evidence"
                self.say("broken", "lock", stage, path, f"{path} is among the stage's {kind} in {where} alone")
            for path in sorted(set(listed_paths) & set(locked)):
                if (md5 := dvc_md5(path, md5_of)) is not None and md5 != locked[path].get("md5"):
                    self.say(
                        "broken", "lock", stage, path, f"dvc.lock pins md5 {locked[path].get('md5')}, evidence {md5}"
                    )
        locked_params = {
            key: value for each in (stage.locked.get("params") or {}).values() for key, value in each.items()
        }
        for key in differing(stage.params, locked_params):
            self.say(
                "broken", "lock", stage, DVC_LOCK, f"parameter {key} is not the same in dvc.lock and in the evidence"
            )

    def _against_params(self, stage: StageEvidence) -> None:
        name = profile_of(stage.name)
        file = next((f for f in (f"profiles/{name}.yaml", PARAMS) if name and (self.root / f).is_file()), PARAMS)
        if not (self.root / file).is_file():
            return
        try:
            document = load_yaml((self.root / file).read_bytes())
        except (yaml.YAMLError, RecursionError) as error:
            self.say("broken", "params", stage, file, f"{file} cannot be read: {' '.join(str(error).split())}")
            return
        for key, value in stage.params.items():
            for changed in differing({key: value}, {key: _at(document, key)}):
                self.say("broken", "params", stage, file, f"{changed} in {file} is not what the stage ran with")

    def _files(self, stage: StageEvidence, asked: Sequence[str], known: Mapping[str, FileRecord], role: str) -> None:
        for path in asked:
            here = self.root / path
            below = {name: each for name, each in known.items() if overlap(name, path)}
            if not os.path.lexists(here):
                if is_generated(path):
                    self.say(
                        "unproven",
                        "absent",
                        stage,
                        path,
                        f"{path} is not on this disk; `dvc pull` or `dvc checkout` it",
                    )
                else:
                    self.say("broken", "code", stage, path, f"{path}, which the stage read, is gone")
                continue
            self._listing(stage, path, below, role)
            for name, each in below.items():
                found = self.on_disk.get(name)
                if found is None or (found.size, found.sha256) == (each.size, each.sha256):
                    continue
                if is_generated(path):
                    then = f"{each.sha256[:SHORT]}… when the stage {_verb(role)} it"
                    what = f"its sha256 is {found.sha256[:SHORT]}…, and was {then}"
                    self.say("broken", "file", stage, name, f"{name} was altered: {what}")
                else:
                    self.say("broken", "code", stage, name, f"{name} changed since the stage ran")

    def _listing(self, stage: StageEvidence, path: str, known: Collection[str], role: str) -> None:
        """What lies in a folder must be what was there, and no link but those that DVC makes into its cache."""
        present = {file.relative_to(self.root).as_posix() for file in listed(self.root / path)}
        for name in sorted(present - set(known)):
            what = "link" if (self.root / name).is_symlink() else "file"
            self.say(
                "broken", "link" if what == "link" else "list", stage, name, f"{name}: a {what} that no stage made"
            )
        for name in sorted(set(known) - present):
            self.say("broken", "list", stage, name, f"{name}, which the stage {_verb(role)}, is gone")
        for name in sorted(present & set(known)):
            here = self.root / name
            if here.is_symlink() and not _in_dvc_cache(here.resolve()):
                self.say("broken", "link", stage, name, f"{name} is a link to somewhere else")
            elif here.is_symlink() and not here.exists():
                message = (
                    f"{name} is a link into a cache of DVC's that does not have it; `dvc pull` or `dvc checkout` it"
                )
                self.say("unproven", "absent", stage, name, message)
            elif not here.is_file():
                self.say("broken", "file", stage, name, f"{name} is no file that can be read and hashed")

    def _environment(self, stage: StageEvidence) -> None:
        recorded, lock = stage.read_lock, self.on_disk.get(LOCK_FILE)
        if recorded and lock is None:
            self.say("broken", "environment", stage, LOCK_FILE, f"{LOCK_FILE}, of the stage's environment, is gone")
        elif recorded and lock and recorded != lock.sha256:
            self.say("broken", "environment", stage, LOCK_FILE, f"{LOCK_FILE} changed since the stage ran")
        if lock is None:
            return
        packages = stage.environment.get("packages") or {}
        other = {
            n: v for n, v in locked_versions(self.root / LOCK_FILE).items() if n in packages and packages[n] not in v
        }
        for name, versions in sorted(other.items()):
            self.say(
                "broken", "environment", stage, name,
                f"the stage ran with {name} {packages[name]}, and {LOCK_FILE} has {' or '.join(sorted(versions))}",
            )  # fmt: skip

    def _chain(self, stage: StageEvidence) -> None:
        """What a stage read must be what the stage before it says that it wrote."""
        for name, each in stage.read.items():
            if not is_generated(name):
                continue
            maker = next(
                (
                    s
                    for s in self.stages
                    if s is not stage and any(overlap(name, out) for out in paths(s.locked, "outs"))
                ),
                None,
            )
            if maker is None:
                self.say("unproven", "chain", stage, name, f"{name}: no stage in dvc.lock made it")
            elif maker.standing != "missing" and name in maker.made and maker.made[name].sha256 != each.sha256:
                message = f"{stage.name} read other bytes of {name} than {maker.name} says that it wrote"
                self.say("broken", "chain", stage, name, message)
            elif maker.standing != "missing" and name not in maker.made:
                self.say("broken", "chain", stage, name, f"{stage.name} read {name}, which {maker.name} did not write")

    def _commits(self) -> None:
        """Commits must be in the history; what was not committed is said."""
        known: dict[str, bool] = {}
        for stage in self.stages:
            if not stage.commit:
                continue
            if stage.commit not in known:
                known[stage.commit] = _has_commit(self.root, stage.commit)
            if not known[stage.commit]:
                self.say(
                    "note", "commit", stage, "", f"commit {stage.commit[:SHORT]} is not in this repository's history"
                )
            if stage.dirty:
                self.say(
                    "note",
                    "commit",
                    stage,
                    "",
                    f"ran on commit {stage.commit[:SHORT]} with changes; the evidence holds them",
                )


def differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of values that are not equal, as deep as both have them."""
    found = []
    for key in sorted({*one, *other}, key=str):
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing(a, b, f"{name}.")
        elif a != b or (key in one) != (key in other):
            found.append(name)
    return found


def locked_versions(path: Path) -> dict[str, set[str]]:
    """The versions of each package that a lock file allows: some differ by platform."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE):
        found.setdefault(name.lower().replace("_", "-"), set()).add(version)
    return found


def _at(document: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(document, Mapping) or part not in document:
            return None
        document = document[part]
    return document


def _in_dvc_cache(path: Path) -> bool:
    *_, kind, algorithm, start, rest = ("", "", "", "", *path.parts)
    return (kind, algorithm) == ("files", "md5") and bool(re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{30}", f"{start}/{rest}"))


def _has_commit(root: Path, commit: str) -> bool:
    """Whether HEAD descends from it, as far as git can say."""
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return False
    return git("merge-base", "--is-ancestor", commit, "HEAD", root=root) is not None


def _verb(role: str) -> str:
    return "wrote" if role == "output" else "read"
