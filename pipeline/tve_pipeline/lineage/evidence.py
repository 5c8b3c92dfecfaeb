"""The evidence that a stage leaves: what went in, what came out, and with what it was made, signed.

An in-toto statement (https://in-toto.io/Statement/v1) with a SLSA provenance predicate (https://slsa.dev/provenance/v1)
in a DSSE envelope, which git holds: `evidence/STAGE/KEY.json`, where the key is a digest of what dvc.lock says of the
run. So evidence of earlier runs stays, whose outputs DVC's run cache, another branch or an experiment brings back. It
is written in the process that does the work, around it: inputs are hashed before and must be unchanged after.
"""

import base64
import contextlib
import hashlib
import os
import platform
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tve_pipeline.lineage.files import FileRecord, dvc_md5, listed, records, state_of
from tve_pipeline.lineage.git import git
from tve_pipeline.lineage.keys import STATEMENT_TYPE, own_signer, seal
from tve_pipeline.lineage.lock import lock_key
from tve_pipeline.outputs import write_whole

FOLDER = "evidence"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:tve:dvc-stage:1"
BUILDER = "urn:tve:pipeline"
LOCK_FILE = "requirements.lock"
FLOW_RUN = "TVE_FLOW_RUN"
WHOLE_DIFF_BYTES = 2**18  # a longer diff is named by its hash alone
# What a run itself writes is no change of the code that it ran.
NOT_IN_DIFF = (f":(exclude){FOLDER}", ":(exclude)dvc.lock")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as DVC resolves it."""

    name: str  # DVC's address of it, as heads@scenes-vit_scenes-scenes
    command: str
    params: Mapping[str, Any]
    inputs: Sequence[str]
    outputs: Sequence[str]


@contextlib.contextmanager
def leaving_evidence() -> Iterator[None]:
    """Around a stage's work: leaves its evidence where DVC's stages are at hand and one of them is what runs.

    Raises:
        ValueError: the signing key cannot be used (before the work), or an input changed under it (after).
    """
    plan = stage_of_this_process() if os.environ.get("RANK", "0") == "0" else None
    if plan is None:
        yield
        return
    signer = own_signer()
    inputs = records([file for path in plan.inputs for file in listed(Path(path))], md5=True)
    start = datetime.now(UTC)
    yield
    _require_unchanged(plan, inputs)
    outputs = records([file for path in plan.outputs for file in listed(Path(path))], md5=True)
    statement = statement_of(plan, inputs, outputs, start, datetime.now(UTC))
    # An experiment of DVC's may run in a copy of the repository that is thrown away; DVC_ROOT is the repository's own.
    path = Path(os.environ.get("DVC_ROOT", "."), evidence_path(plan.name, run_key(plan, inputs, outputs)))
    write_whole(path, seal(statement, signer))


def stage_of_this_process() -> StagePlan | None:
    """The stage that this process is: the one that DVC started, else the one whose command it was called with."""
    if not Path(".dvc").is_dir():
        return None
    try:
        from dvc.dependency import ParamsDependency
        from dvc.repo import Repo
    except ImportError:
        return None
    with Repo(".") as repo:
        name = os.environ.get("DVC_STAGE")
        stages = repo.stage.collect(name) if name else repo.index.stages
        command = own_command()
        for stage in stages:
            if stage.cmd != command and not name:
                continue
            params: dict[str, Any] = {}
            for dependency in stage.deps:
                if isinstance(dependency, ParamsDependency):
                    params |= dependency.read_params()
            return StagePlan(
                name=stage.addressing,
                command=str(stage.cmd),
                params=params,
                inputs=[each.def_path for each in stage.deps if not isinstance(each, ParamsDependency)],
                outputs=[out.def_path for out in stage.outs],
            )
    return None


def evidence_path(stage: str, key: str) -> Path:
    """Where evidence of a run of a stage lies, in the repository."""
    return Path(FOLDER, re.sub(r"[/:]", "_", stage), f"{key}.json")


def run_key(plan: StagePlan, inputs: Mapping[str, FileRecord], outputs: Mapping[str, FileRecord]) -> str:
    """`lock_key` of the entry that DVC is about to write."""

    def entries(paths: Sequence[str], known: Mapping[str, FileRecord]) -> list[dict[str, str | None]]:
        md5_of = {path: each.md5 for path, each in known.items()}
        return [{"path": path, "md5": dvc_md5(path, md5_of)} for path in paths]

    return lock_key(
        {
            "cmd": plan.command,
            "params": {"": plan.params},
            "deps": entries(plan.inputs, inputs),
            "outs": entries(plan.outputs, outputs),
        }
    )


def own_command() -> str:
    """The command line of this process as dvc.yaml writes it: python -m MODULE ARGUMENTS."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python", "-m", spec.name if spec else "", *sys.argv[1:]])


def statement_of(
    plan: StagePlan,
    inputs: Mapping[str, FileRecord],
    outputs: Mapping[str, FileRecord],
    start: datetime,
    end: datetime,
) -> dict[str, Any]:
    """The in-toto statement of a run."""
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ".", *NOT_IN_DIFF)
    materials = [_descriptor(path, each) for path, each in sorted(inputs.items())]
    materials += [{"uri": f"params:{key}", "digest": {"sha256": digest}} for key, digest in pinned_sources(plan.params)]
    if commit is not None:
        materials.append({"uri": "git:HEAD", "digest": {"gitCommit": commit.decode().strip()}})
    if Path(LOCK_FILE).is_file():
        materials += [_descriptor(path, each) for path, each in records([Path(LOCK_FILE)], md5=True).items()]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_descriptor(path, each) for path, each in sorted(outputs.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "stage": plan.name,
                    "command": plan.command,
                    "params": plan.params,
                    "inputs": list(plan.inputs),
                    "outputs": list(plan.outputs),
                },
                "internalParameters": {
                    "environment": environment(),
                    "machine": machine(),
                    "seeds": dict(seeds(plan.params)),
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {
                    "invocationId": os.environ.get(FLOW_RUN) or str(uuid.uuid4()),
                    "startedOn": _time(start),
                    "finishedOn": _time(end),
                },
                "byproducts": _diff_descriptors(diff),
            },
        },
    }


def environment() -> dict[str, Any]:
    """Python and every installed package."""
    packages = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in distributions()}
    return {"python": platform.python_version(), "packages": dict(sorted(packages.items()))}


def machine() -> dict[str, Any]:
    """What it ran on; no name or address of the machine."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": None,
    }
    torch = sys.modules.get("torch")  # a stage that computes has it; one that does not, had no device
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
            found["cuda"] = torch.version.cuda
    return found


def seeds(params: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every parameter that is called seed, by its dotted name."""
    if isinstance(params, Mapping):
        for key, value in params.items():
            if key == "seed" and isinstance(value, int):
                yield f"{prefix}{key}", value
            yield from seeds(value, f"{prefix}{key}.")


def pinned_sources(params: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """What params pin by sha256 outside the repository (pictures, weights): where, and the hash that was checked."""
    if isinstance(params, Mapping):
        if isinstance(digest := params.get("sha256"), str):
            yield prefix.rstrip("."), digest
        for key, value in params.items():
            yield from pinned_sources(value, f"{prefix}{key}.")


def _require_unchanged(plan: StagePlan, inputs: Mapping[str, FileRecord]) -> None:
    """Raises ValueError unless the inputs are the files, every one and no other, that were hashed before the work."""
    now = {file.as_posix(): file for path in plan.inputs for file in listed(Path(path))}
    for name in sorted({*inputs, *now}):
        if name not in now:
            what = "that was deleted"
        elif name not in inputs or state_of(now[name].stat()) != inputs[name].state:
            what = "that was written"
        else:
            continue
        raise ValueError(
            f"{name}: expected an input that nothing changes while the stage runs, got one {what} meanwhile; what came "
            "out is of no certain origin, run the stage again"
        )


def _descriptor(path: str, each: FileRecord) -> dict[str, Any]:
    return {
        "name": path,
        "digest": {"sha256": each.sha256, "md5": each.md5},
        "annotations": {"size": each.size},
    }


def _diff_descriptors(diff: bytes | None) -> list[dict[str, Any]]:
    if not diff:
        return []
    descriptor: dict[str, Any] = {"name": "git diff HEAD", "digest": {"sha256": hashlib.sha256(diff).hexdigest()}}
    if len(diff) <= WHOLE_DIFF_BYTES:
        descriptor["content"] = base64.b64encode(diff).decode()
    return [descriptor]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
