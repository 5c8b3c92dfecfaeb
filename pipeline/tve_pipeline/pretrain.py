"""Stage `pretrain`: an explainer for one backbone, from unlabelled pictures.

python -m tve_pipeline.pretrain BACKBONE
"""

from tve_pipeline.entry import run_stage
from tve_pipeline.params import load_section
from tve_pipeline.pretraining import PretrainParams, train_explainer


def main(argv: list[str]) -> None:
    (name,) = argv
    train_explainer(name, load_section("pretrain", PretrainParams), stage="pretrain", section="pretrain")


if __name__ == "__main__":
    run_stage("pretrain", main, "BACKBONE")
