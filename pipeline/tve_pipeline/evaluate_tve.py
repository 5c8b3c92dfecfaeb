"""Stage `evaluate_tve`: one reading of the explainer, evaluated as every other method is.

    python -m tve_pipeline.evaluate_tve BACKBONE DATASET METHOD

A stage of its own, so that another explainer does not have the methods evaluated again that do not read it.
"""

import json
from pathlib import Path

from tve.baselines.method import Method
from tve.export import CONFIG_FILE, load_explainer
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluation import Given, Subject, own_device, run_cell
from tve_pipeline.params import active_profile, load_entry
from tve_pipeline.readings import READINGS, reading_settings


def main(argv: list[str]) -> None:
    name, dataset, reading = argv
    settings = load_entry("methods", reading, reading_settings(reading))
    folder = Path("models", active_profile(), "export", name)
    explainer = load_explainer(folder).to(own_device())

    def build(given: Given) -> Method:
        return READINGS[reading].build(explainer, given.params, settings)

    run_cell(
        Subject(name, explainer.backbone, explainer.config.removal, explainer.family),
        dataset,
        reading,
        settings.model_dump(mode="json"),
        build,
        obstacle=READINGS[reading].obstacle(explainer.backbone),
        origins={"explainer_sha256": json.loads((folder / CONFIG_FILE).read_text())["explainer_sha256"]},
    )


if __name__ == "__main__":
    run_stage("evaluate_tve", main, "BACKBONE", "DATASET", "METHOD")
