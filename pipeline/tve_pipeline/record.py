"""Puts the results of a long run on record: rows, metrics and digests under docs/records/PROFILE/BACKBONE.

    python -m tve_pipeline.record BACKBONE

A cell (backbone, dataset) that took hours is evidence worth committing; `digests.json` ties its files to the weights,
the parameters and the commit that made them.
"""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

from tve.digests import file_sha256
from tve_pipeline.entry import run_stage
from tve_pipeline.outputs import whole_folder, write_json
from tve_pipeline.params import PARAMS_FILE, RunParams, active_profile, load_section


def main(argv: list[str]) -> None:
    (backbone,) = argv
    profile, run = active_profile(), load_section("run", RunParams)
    results = Path("results", profile)
    export = json.loads(Path("models", profile, "export", backbone, "config.json").read_text())
    with whole_folder(Path("docs", "records", profile, backbone)) as folder:
        shutil.copy(results / "pretrain" / backbone / "metrics.json", folder / "pretrain.json")
        shutil.copy(results / "pretrain" / backbone / "training.csv", folder / "training.csv")
        for dataset in run.task_datasets:
            name = f"{backbone}-{dataset}"
            for method in run.methods_of(backbone):
                scores = results / "evaluate" / name / method / "scores.csv"
                if scores.is_file():
                    _pack(scores, folder / f"scores-{dataset}-{method}.csv.gz")
                    shutil.copy(scores.with_name("facts.json"), folder / f"facts-{dataset}-{method}.json")
            if (compared := results / "compare" / name / "metrics.json").is_file():
                _pack(compared, folder / f"metrics-{dataset}.json.gz")
            if (examined := results / "examine" / name / "metrics.json").is_file():
                _pack(examined, folder / f"examine-{dataset}.json.gz")
        document = {
            "files": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
            "backbone_sha256": export["backbone_sha256"],
            "explainer_sha256": export["explainer_sha256"],
            "params_sha256": file_sha256(PARAMS_FILE),
            "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        }
        write_json(folder / "digests.json", document)


def _pack(path: Path, packed: Path) -> None:
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))  # the same rows are the same bytes


if __name__ == "__main__":
    run_stage("record", main, "BACKBONE")
