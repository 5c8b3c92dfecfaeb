"""Stage `evaluate_two_networks`: the explainer of the stage `two_networks`, evaluated as every other method is.

    python -m tve_pipeline.evaluate_two_networks BACKBONE DATASET

A stage of its own, since it alone reads what was trained for it.
"""

from pathlib import Path

from tve.baselines.method import Method
from tve.baselines.readings import reading_of_explainer
from tve.digests import file_sha256
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluation import Given, open_subject, run_cell
from tve_pipeline.params import TWO_NETWORKS, active_profile
from tve_pipeline.trained import STATE_FILE, open_trained


def main(argv: list[str]) -> None:
    backbone, dataset = argv
    folder = Path("models", active_profile(), "two_networks", backbone)

    def build(given: Given) -> Method:
        explainer = open_trained(folder, given.backbone).eval()
        return reading_of_explainer(explainer, given.params.output, TWO_NETWORKS)

    settings = {"weights_sha256": file_sha256(folder / STATE_FILE)}
    run_cell(open_subject(backbone), dataset, TWO_NETWORKS, settings, build)


if __name__ == "__main__":
    run_stage("evaluate_two_networks", main, "BACKBONE", "DATASET")
