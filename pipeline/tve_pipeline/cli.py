"""The command `tve`: where a number came from, and whether that still holds.

    tve audit [ARTIFACT ...]        recompute every hash, back to the source pictures
    tve lineage show ARTIFACT       the stages behind an artifact, with commits, seeds and devices
    tve lineage diff A B            what differs between two runs
    tve lineage crate               the runs as a Workflow Run RO-Crate, for platforms
    tve lineage unused              stages that dvc.yaml no longer has, evidence of runs that dvc.lock does not tell of
    tve verify FOLDER               an export by the signed list of files in it, wherever it was copied
    tve keys [trust]                who signs here, and whom this repository trusts

Exit codes of `audit`: 0 all holds; 1 something broke; 2 wrong usage; 3 nothing broke, but not all is proven (absent,
unsigned, signed by an unknown key).
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tve_pipeline.lineage import audit as auditing
from tve_pipeline.lineage import diff as differences
from tve_pipeline.lineage.crate import METADATA_FILE
from tve_pipeline.lineage.crate import crate as run_crate
from tve_pipeline.lineage.evidence import FOLDER, evidence_path
from tve_pipeline.lineage.keys import SHORT, own_key_file, own_signer, trust_own_key, trusted_keys
from tve_pipeline.lineage.lock import DVC_LOCK, active_profile, load_lock, lock_key, of_profile
from tve_pipeline.lineage.manifest import verify_folder

DVC_FILE = "dvc.yaml"
SHOWN = 40  # findings that a terminal gets; --json has all


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.run(asked))
    except (ValueError, OSError) as error:
        print(f"tve: {error}", file=sys.stderr)
        return 2


def audit(asked: argparse.Namespace) -> int:
    report = auditing.audit(asked.root, asked.artifacts, profile=asked.profile)
    if asked.json:
        print(json.dumps(document(report), indent=2))
    else:
        print("\n".join(readable(report)))
    if asked.html:
        from tve_pipeline.lineage.page import page

        asked.html.write_text(page(report))
    return report.exit_code


def document(report: auditing.Report) -> dict[str, object]:
    """A report as JSON has it."""
    return {
        "verdict": report.verdict,
        "first_broken": report.first_broken,
        "num_files": report.num_files,
        "num_bytes": report.num_bytes,
        "findings": [asdict(finding) for finding in report.findings],
        "stages": [
            {
                "stage": stage.name,
                "evidence": stage.evidence,
                "signature": stage.standing,
                "key": stage.key,
                "command": stage.command,
                "commit": stage.commit,
                "with_changes": stage.dirty,
                "seeds": dict(stage.seeds),
                "machine": dict(stage.machine),
                "started": stage.started,
                "finished": stage.finished,
                "run": stage.run,
                "inputs": list(stage.inputs),
                "outputs": list(stage.outputs),
            }
            for stage in report.stages
        ],
    }


def readable(report: auditing.Report) -> list[str]:
    """A report for a terminal: what is wrong first, the verdict last."""
    lines = [f"{each.severity:<9} {each.kind:<11} {each.stage}: {each.message}" for each in report.findings[:SHOWN]]
    if len(report.findings) > SHOWN:
        lines.append(f"… and {len(report.findings) - SHOWN} more; --json has all")
    standings = ", ".join(f"{count} {name}" for name, count in Counter(s.standing for s in report.stages).items())
    lines.append(
        f"{report.verdict}: {len(report.stages)} stages ({standings}), {report.num_files} files, "
        f"{report.num_bytes / 1e6:.1f} MB hashed"
    )
    if report.first_broken:
        lines.append(f"broken since {report.first_broken}")
    return lines


def show(asked: argparse.Namespace) -> int:
    report = auditing.audit(asked.root, [asked.artifact])
    for stage in report.stages:
        seeds = " ".join(f"{name}={seed}" for name, seed in stage.seeds.items())
        device = stage.machine.get("gpu") or stage.machine.get("processor") or "?"
        commit = stage.commit[:SHORT] + ("+" if stage.dirty else "")
        print(f"{stage.name}\n  {stage.command}\n  {stage.finished or '?'}  commit {commit or '?'}  {device}  {seeds}")
        print(f"  {stage.standing} {stage.key}  {stage.evidence}")
        for uri, digest in stage.sources.items():
            print(f"  source {uri.removeprefix('params:')} sha256 {digest}")
    print(report.verdict)
    return report.exit_code


def crate(asked: argparse.Namespace) -> int:
    report = auditing.audit(asked.root, asked.artifacts, profile=asked.profile)
    title = f"TVE, {asked.profile or active_profile(asked.root)}"
    output = asked.output or asked.root / METADATA_FILE  # beside what it describes
    output.write_text(json.dumps(run_crate(report, title, asked.license), indent=2) + "\n")
    print(f"{output}: {report.verdict}")
    return report.exit_code


def unused(asked: argparse.Namespace) -> int:
    locked = load_lock(asked.root)
    past = _stages_of_the_past(asked.root, locked)
    told = {asked.root / evidence_path(name, lock_key(entry)) for name, entry in locked.items() if name not in past}
    evidence = sorted(set((asked.root / FOLDER).rglob("*.json")) - told)
    print(
        *(f"{DVC_LOCK}: {name}" for name in past),
        *(path.relative_to(asked.root).as_posix() for path in evidence),
        sep="\n",
        end="\n" if past or evidence else "",
    )
    if asked.delete:
        _take_out(asked.root, past)
        for path in evidence:
            path.unlink()
    return 0


def _stages_of_the_past(root: Path, locked: Mapping[str, Any]) -> list[str]:
    """Stages of the active profile that dvc.lock tells of and dvc.yaml no longer has: DVC keeps them there.

    Raises:
        ValueError: dvc.yaml is not there, or DVC cannot read it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if not (root / DVC_FILE).is_file():
        raise ValueError(f"{root / DVC_FILE}: expected the stage graph, got no such file; restore it from git")
    try:
        with Repo(str(root)) as repo:
            there = {getattr(stage, "name", None) for stage in repo.index.stages if stage.path_in_repo == DVC_FILE}
    except DvcException as error:
        raise ValueError(f"{root}: expected a DVC project: {error}") from error
    return [name for name in of_profile(locked, active_profile(root)) if name not in there]


def _take_out(root: Path, stages: Sequence[str]) -> None:
    """Takes entries out of dvc.lock, as DVC itself writes it, while no stage runs."""
    from dvc.repo import Repo
    from dvc.utils.serialize import modify_yaml

    if stages:
        with Repo(str(root)) as repo, repo.lock, modify_yaml(str(root / DVC_LOCK)) as document:
            for name in stages:
                del document["stages"][name]


def diff(asked: argparse.Namespace) -> int:
    found = differences.difference(differences.runs(asked.root, asked.one), differences.runs(asked.root, asked.other))
    if asked.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        for each in found:
            print(f"{each.kind:<11} {each.stage}: {each.name}: {each.one} | {each.other}")
        print(f"{len(found)} differences" if found else "no difference")
    return 0


def verify(asked: argparse.Namespace) -> int:
    signer = own_signer(make=False)
    trusted = trusted_keys(asked.root)
    if not asked.folder.is_dir():
        raise ValueError(f"{asked.folder}: expected the folder of an export, got none")
    try:
        found = verify_folder(asked.folder, trusted, signer.public_key if signer else None)
    except ValueError as error:  # a manifest that was deleted or cannot be read proves nothing
        print(f"BROKEN: {asked.folder}: {error}")
        return auditing.EXIT_CODES["BROKEN"]
    print(*found.problems, sep="\n", end="\n" if found.problems else "")
    proven = found.opened.standing in ("trusted", "own")
    verdict = "BROKEN" if found.problems else "OK" if proven else "UNPROVEN"
    print(f"{verdict}: {found.num_files} files, {found.opened.standing} {found.opened.key}".rstrip())
    return auditing.EXIT_CODES[verdict]


def keys(asked: argparse.Namespace) -> int:
    if asked.action == "trust":
        print(f"{trust_own_key(asked.root)}: commit it, and this repository trusts what you sign")
        return 0
    trusted, signer = trusted_keys(asked.root), own_signer(make=False)
    own = signer.public_key.keyid if signer else ""
    for keyid in trusted:
        print(f"trusted {keyid[:SHORT]}{' (yours)' if keyid == own else ''}")
    if own and own not in trusted:
        print(f"yours   {own[:SHORT]}, which others do not trust until `tve keys trust` is committed")
    if not own:
        made = own_key_file()
        print(
            f"no key of yours yet; the first stage that runs makes {made}"
            if made
            else "nothing is signed here: TVE_SIGNING_KEY=none"
        )
    return 0


def _spdx(text: str) -> str:
    """An identifier as https://spdx.org/licenses/ has them."""
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", text):
        raise argparse.ArgumentTypeError(f"expected an SPDX identifier such as MIT or CC-BY-4.0, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="of the repository")
    commands = parser.add_subparsers(required=True, metavar="audit | lineage | verify | keys")
    each = commands.add_parser("audit", help="recompute every hash, back to the source pictures")
    each.add_argument("artifacts", nargs="*", metavar="ARTIFACT", help="files or folders; none: all of the profile")
    each.add_argument("--profile", help="whose stages; by default that of params.yaml")
    each.add_argument("--json", action="store_true", help="everything, for programs")
    each.add_argument("--html", type=Path, metavar="FILE", help="write a page with the graph")
    each.set_defaults(run=audit)
    lineage = commands.add_parser("lineage", help="what is behind an artifact, and what differs").add_subparsers(
        required=True
    )
    each = lineage.add_parser("show", help="the stages behind an artifact")
    each.add_argument("artifact", metavar="ARTIFACT")
    each.set_defaults(run=show)
    each = lineage.add_parser("crate", help="the runs as a Workflow Run RO-Crate")
    each.add_argument("artifacts", nargs="*", metavar="ARTIFACT", help="files or folders; none: all of the profile")
    each.add_argument("--profile", help="whose stages; by default that of params.yaml")
    each.add_argument(
        "--license", type=_spdx, default="MIT", metavar="SPDX", help="of what is in the crate; by default MIT"
    )
    each.add_argument("--output", type=Path, metavar="FILE", help=f"by default {METADATA_FILE} in the root")
    each.set_defaults(run=crate)
    each = lineage.add_parser(
        "unused", help="stages that dvc.yaml no longer has, and evidence of runs that dvc.lock does not tell of"
    )
    each.add_argument(
        "--delete",
        action="store_true",
        help="delete the evidence, and take the stages out of dvc.lock; git still has both",
    )
    each.set_defaults(run=unused)
    each = lineage.add_parser("diff", help="what differs between two runs")
    each.add_argument("one", metavar="A", help="an evidence file, a git revision or a DVC experiment")
    each.add_argument("other", metavar="B")
    each.add_argument("--json", action="store_true")
    each.set_defaults(run=diff)
    each = commands.add_parser("verify", help="an export by the signed list of files in it")
    each.add_argument("folder", type=Path, metavar="FOLDER")
    each.set_defaults(run=verify)
    each = commands.add_parser("keys", help="who signs here, and whom this repository trusts")
    each.add_argument("action", nargs="?", choices=["trust"], help="write the own public key into keys/")
    each.set_defaults(run=keys)
    return parser


if __name__ == "__main__":
    sys.exit(main())
