"""Stage `export`: one folder per backbone that holds its explainer whole, with a model card and a signed list of files.

python -m tve_pipeline.export BACKBONE
"""

import json
from pathlib import Path

from tve.backbones import open_backbone
from tve.export import CONFIG_FILE, load_explainer, save_explainer
from tve_pipeline.entry import run_stage
from tve_pipeline.lineage.keys import own_signer
from tve_pipeline.lineage.manifest import sign_folder
from tve_pipeline.outputs import whole_folder
from tve_pipeline.params import RunParams, active_profile, load_section
from tve_pipeline.trained import open_trained

FACTS = ("r2_kept", "r2_removed", "trivial_mean_r2_kept", "trivial_full_r2_removed", "num_steps", "initialisation")


def main(argv: list[str]) -> None:
    (name,) = argv
    profile = active_profile()
    backbone = open_backbone(Path("models", profile, "backbone", name))
    explainer = open_trained(Path("models", profile, "pretrain", name), backbone)
    metrics = json.loads(Path("results", profile, "pretrain", name, "metrics.json").read_text())
    facts = {key: metrics[key] for key in FACTS} | {"pictures": load_section("run", RunParams).pretrain_dataset}
    with whole_folder(Path("models", profile, "export", name)) as folder:
        save_explainer(explainer, folder, facts)
        load_explainer(folder)  # an export that does not open is not published
        sign_folder(folder, json.loads((folder / CONFIG_FILE).read_text()), own_signer())


if __name__ == "__main__":
    run_stage("export", main, "BACKBONE")
