"""Stage `evaluate_shapley`: the ViT-Shapley of the stage `shapley`, evaluated as every other method is.

    python -m tve_pipeline.evaluate_shapley BACKBONE DATASET

A stage of its own, since it alone reads what was trained for it.
"""

import json
from pathlib import Path

from tve.baselines.method import Method
from tve.baselines.vit_shapley import CONFIG_FILE, VitShapley, load_vit_shapley
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluation import Given, run_cell
from tve_pipeline.params import VIT_SHAPLEY, active_profile


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    folder = Path("models", active_profile(), "shapley", backbone)

    def build(given: Given) -> Method:
        return VitShapley(load_vit_shapley(folder, given.explainer.backbone))

    trained = json.loads((folder / CONFIG_FILE).read_text())
    if reason := trained.get("not_defined"):
        run_cell(backbone, dataset, VIT_SHAPLEY, {}, build, lambda _: reason)
        return
    settings = {name: trained[name] for name in ("vit_shapley_sha256", "surrogate_sha256", "facts")}
    run_cell(backbone, dataset, VIT_SHAPLEY, settings, build)


if __name__ == "__main__":
    run_stage("evaluate_shapley", main, "BACKBONE", "DATASET")
