"""Stage `evaluate`: one explanation method on every task whose head reads one backbone, picture by picture.

python -m tve_pipeline.evaluate BACKBONE DATASET METHOD
torchrun --standalone --nproc-per-node 2 -m tve_pipeline.evaluate BACKBONE DATASET METHOD
"""

from tve.baselines.method import Method
from tve_pipeline.entry import run_stage
from tve_pipeline.evaluation import Given, open_subject, run_cell
from tve_pipeline.methods import METHODS, method_settings
from tve_pipeline.params import load_entry


def main(argv: list[str]) -> None:
    backbone, dataset, name = argv
    settings = load_entry("methods", name, method_settings(name))

    def build(given: Given) -> Method:
        return METHODS[name].build(given, settings)

    subject = open_subject(backbone)
    obstacle = METHODS[name].obstacle(subject.backbone)
    run_cell(subject, dataset, name, settings.model_dump(mode="json"), build, obstacle=obstacle)


if __name__ == "__main__":
    run_stage("evaluate", main, "BACKBONE", "DATASET", "METHOD")
