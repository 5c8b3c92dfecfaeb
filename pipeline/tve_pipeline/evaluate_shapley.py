"""Stage `evaluate_shapley`: the ViT-Shapley of the stage `shapley`, evaluated as every other method is.

    python -m tve_pipeline.evaluate_shapley BACKBONE DATASET

A stage of its own, since it alone reads what was trained for it.
"""

import json
from pathlib import Path

from tve.baselines.method import Method
from tve.baselines.vit_shapley import CONFIG_FILE, VitShapley, load_vit_shapley
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluation import Given, open_subject, run_cell
from tve_pipeline.params import VIT_SHAPLEY, active_profile


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    folder = Path("models", active_profile(), "shapley", backbone)

    subject = open_subject(backbone)

    def build(given: Given) -> Method:
        return VitShapley(load_vit_shapley(folder, given.backbone))

    trained = json.loads((folder / CONFIG_FILE).read_text())
    reason = trained.get("not_defined", "")
    named = () if reason else ("vit_shapley_sha256", "surrogate_sha256", "facts")
    run_cell(subject, dataset, VIT_SHAPLEY, {name: trained[name] for name in named}, build, obstacle=reason)


if __name__ == "__main__":
    run_stage("evaluate_shapley", main, "BACKBONE", "DATASET")
