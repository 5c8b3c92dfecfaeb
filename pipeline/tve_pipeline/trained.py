"""The folder in which a trained explainer lies between stages: its weights and configuration, without its backbone."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from tve.backbones import Backbone
from tve.explainer import Explainer, ExplainerConfig
from tve.two_networks import TwoNetworksConfig
from tve_pipeline.outputs import write_json

STATE_FILE = "explainer.safetensors"
CONFIG_FILE = "config.json"


def save_trained(explainer: Explainer, folder: Path) -> None:
    """Writes what training made, and what it takes to build the explainer again."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in explainer.trained_state().items()}
    save_file(state, folder / STATE_FILE)
    config = {"explainer": asdict(explainer.config), "backbone_sha256": explainer.backbone.weights_sha256}
    write_json(folder / CONFIG_FILE, config)


def open_trained(folder: Path, backbone: Backbone) -> Explainer:
    """The explainer, on the backbone's device.

    Raises:
        ValueError: it was trained for another backbone.
    """
    document = json.loads((folder / CONFIG_FILE).read_text())
    if document["backbone_sha256"] != backbone.weights_sha256:
        raise ValueError(
            f"{folder}: expected an explainer of backbone {backbone.weights_sha256}, "
            f"got one of {document['backbone_sha256']}; run `dvc repro`"
        )
    settings = document["explainer"] | {"two_networks": TwoNetworksConfig(**document["explainer"]["two_networks"])}
    explainer = Explainer(backbone, ExplainerConfig(**settings)).to(next(backbone.parameters()).device)
    explainer.load_trained_state(load_file(folder / STATE_FILE))
    return explainer
