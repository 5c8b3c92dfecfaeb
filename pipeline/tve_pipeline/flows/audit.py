"""The audit as a flow: on a schedule, a broken lineage is a failed run with the findings as its artifact."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from tve_pipeline.flows.ownership import sole_writer
from tve_pipeline.flows.reproduce import begin, run_name
from tve_pipeline.lineage import audit as lineage


@flow(name="audit", flow_run_name=run_name, log_prints=True, persist_result=True, result_serializer="json")
def audit(profile: str | None = None) -> str:
    """Audits every stage of a profile, by default of the active one; returns the verdict, OK or UNPROVEN.

    Raises:
        RuntimeError: something broke.
    """
    begin()
    with sole_writer(flow_run.name, shared=True):  # files that are being written are not judged
        report = lineage.audit(Path("."), profile=profile)
    lines = [
        f"**{report.verdict}**: {len(report.stages)} stages, {report.num_files} files, {report.num_bytes:,} bytes.",
        "",
    ]
    if report.findings:
        lines += ["| | stage | what |", "|---|---|---|"]
        lines += [f"| {each.severity} | `{each.stage}` | {_cell(each.message)} |" for each in report.findings]
    create_markdown_artifact("\n".join(lines), key="audit", description="What the audit found")
    if report.verdict == "BROKEN":
        raise RuntimeError(f"lineage: broken since {report.first_broken}; the artifact `audit` names each finding")
    return report.verdict


def _cell(text: str) -> str:
    """Text that ends no cell and starts no markup of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
