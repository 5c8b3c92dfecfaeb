"""Runs as a Workflow Run RO-Crate (https://w3id.org/ro/wfrun/workflow/0.5): the metadata that research platforms read.

One file, `ro-crate-metadata.json`, beside the data that it describes: the workflow is dvc.yaml, each stage's run an
action with its inputs, outputs, times and tool. What is signed is the evidence; the crate names it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tve_pipeline.lineage.audit import Report
from tve_pipeline.lineage.files import FileRecord
from tve_pipeline.lineage.statements import StageEvidence

METADATA_FILE = "ro-crate-metadata.json"
SPECIFICATION = "https://w3id.org/ro/crate/1.1"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
LICENCES = "https://spdx.org/licenses"
WORKFLOW = "dvc.yaml"
LANGUAGE = {"@id": "#dvc", "@type": "ComputerLanguage", "name": "DVC", "url": {"@id": "https://dvc.org"}}


def crate(report: Report, name: str, licence: str) -> dict[str, Any]:
    """The metadata of the stages that have evidence, as JSON-LD.

    Args:
        report: of an audit.
        name: of the crate, as a reader sees it.
        licence: of what is in it, an SPDX identifier (https://spdx.org/licenses/).

    Raises:
        ValueError: no stage has evidence.
    """
    stages = [stage for stage in report.stages if stage.finished]
    if not stages:
        raise ValueError("crate: expected stages with evidence, got none; run `dvc repro`")
    files = {name: each for stage in stages for known in (stage.read, stage.made) for name, each in known.items()}
    actions = [_action(stage) for stage in stages]
    tools = [_tool(stage) for stage in stages]
    run = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"Run of {WORKFLOW}",
        "instrument": {"@id": WORKFLOW},
        "object": _ids(sorted({path for stage in stages for path in stage.read})),
        "result": _ids(sorted({path for stage in stages for path in stage.made})),
        "startTime": min(stage.started for stage in stages),
        "endTime": max(stage.finished for stage in stages),
        "actionStatus": {"@id": "http://schema.org/CompletedActionStatus"},
    }
    evidence = [stage.evidence for stage in stages]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": name,
        "description": f"Runs of {len(stages)} stages; an audit of them said {report.verdict}.",
        "datePublished": max(stage.finished for stage in stages),
        "license": {"@id": f"{LICENCES}/{licence}"},
        "conformsTo": _ids(PROFILES),
        "mainEntity": {"@id": WORKFLOW},
        "hasPart": _ids([WORKFLOW, *sorted(files), *evidence]),
        "mentions": _ids(["#run", *(action["@id"] for action in actions)]),
    }
    workflow = {
        "@id": WORKFLOW,
        "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
        "name": WORKFLOW,
        "programmingLanguage": {"@id": LANGUAGE["@id"]},
        "hasPart": _ids(tool["@id"] for tool in tools),
    }
    if commit := stages[-1].commit:
        workflow["version"] = commit
    return {
        "@context": [f"{SPECIFICATION}/context", "https://w3id.org/ro/terms/workflow-run/context"],
        "@graph": [
            {
                "@id": METADATA_FILE,
                "@type": "CreativeWork",
                "conformsTo": _ids([SPECIFICATION, "https://w3id.org/workflowhub/workflow-ro-crate/1.0"]),
                "about": {"@id": "./"},
            },
            root,
            workflow,
            LANGUAGE,
            {"@id": f"{LICENCES}/{licence}", "@type": "CreativeWork", "name": licence},
            *(
                {"@id": uri, "@type": "CreativeWork", "name": title, "version": version}
                for uri, (title, version) in PROFILES.items()
            ),
            run,
            *actions,
            *tools,
            *(_file(path, each) for path, each in sorted(files.items())),
            *(
                {"@id": path, "@type": "File", "name": path, "encodingFormat": "application/json"}
                for path in dict.fromkeys(evidence)
            ),
        ],
    }


def _action(stage: StageEvidence) -> dict[str, Any]:
    device = stage.machine.get("gpu") or stage.machine.get("processor") or "an unknown device"
    return {
        "@id": f"#run-{stage.name}",
        "@type": "CreateAction",
        "name": f"Run of stage {stage.name}",
        "description": f"{stage.command}, on {device}; evidence {stage.evidence}, {stage.standing}",
        "instrument": {"@id": f"#stage-{stage.name}"},
        "object": _ids(sorted(stage.read)),
        "result": _ids(sorted(stage.made)),
        "startTime": stage.started,
        "endTime": stage.finished,
        "actionStatus": {"@id": "http://schema.org/CompletedActionStatus"},
    }


def _tool(stage: StageEvidence) -> dict[str, Any]:
    return {
        "@id": f"#stage-{stage.name}",
        "@type": "SoftwareApplication",
        "name": stage.command,
        "softwareRequirements": f"Python {stage.environment.get('python', '')}".strip(),
    }


def _file(path: str, each: FileRecord) -> Mapping[str, Any]:
    return {"@id": path, "@type": "File", "name": path, "contentSize": str(each.size), "sha256": each.sha256}


def _ids(names: Iterable[str]) -> list[dict[str, str]]:
    return [{"@id": name} for name in names]
