"""The export: a folder that holds an explainer whole, its backbone included, and says what it is.

explainer.safetensors   what pre-training made
config.json             the explainer's configuration and digests
backbone/               the frozen backbone (model.safetensors, backbone.json)
README.md               the model card
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tve.backbones import Backbone, damage_named, open_backbone, save_backbone
from tve.explainer import Explainer, ExplainerConfig
from tve.two_networks import TwoNetworksConfig
from tve.weights import state_digest

STATE_FILE = "explainer.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FORMAT = 1


def save_explainer(explainer: Explainer, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes the export; the same explainer gives the same bytes.

    Args:
        explainer: trained.
        folder: made if absent.
        facts: what else the model card should state, such as R² and the pictures; JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in explainer.trained_state().items()}
    save_file(state, folder / STATE_FILE)
    document = {
        "format": FORMAT,
        "explainer": asdict(explainer.config),
        "explainer_sha256": state_digest(state),
        "backbone_sha256": explainer.backbone.weights_sha256,
        "facts": dict(facts or {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    save_backbone(explainer.backbone, folder / "backbone")
    (folder / CARD_FILE).write_text(model_card(explainer, document))


def load_explainer(folder: str | Path, backbone: Backbone | None = None) -> Explainer:
    """The explainer of an export, ready to explain.

    Args:
        folder: what `save_explainer` wrote.
        backbone: a backbone that is at hand already; by default the export's own.

    Raises:
        FileNotFoundError: no export there.
        ValueError: another format, a backbone with other weights, or damaged or altered files.
    """
    folder = Path(folder)
    config_file, state_file = folder / CONFIG_FILE, folder / STATE_FILE
    if not config_file.is_file():
        raise FileNotFoundError(
            f"expected an exported explainer with {CONFIG_FILE}, got {folder}; tve.save_explainer writes one"
        )
    with damage_named(config_file):
        document = json.loads(config_file.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"{folder}: expected export format {FORMAT}, got {document['format']}; export again")
        backbone_sha256, explainer_sha256 = document["backbone_sha256"], document["explainer_sha256"]
        settings = dict(document["explainer"])
        settings["two_networks"] = TwoNetworksConfig(**settings["two_networks"])
        config = ExplainerConfig(**settings)
    backbone = backbone or open_backbone(folder / "backbone")
    if backbone.weights_sha256 != backbone_sha256:
        raise ValueError(
            f"{folder}: expected the backbone {backbone_sha256}, got {backbone.weights_sha256}; an explainer "
            "serves the backbone that it was pre-trained for"
        )
    with damage_named(state_file):
        state = load_file(state_file)
    if (actual := state_digest(state)) != explainer_sha256:
        raise ValueError(f"{state_file}: expected {explainer_sha256}, got {actual}; export again")
    explainer = Explainer(backbone, config)
    explainer.load_trained_state(state)
    return explainer.eval()


def model_card(explainer: Explainer, document: Mapping[str, Any]) -> str:
    """The model card, Markdown, made from the configuration alone."""
    config, backbone = explainer.config, explainer.backbone.config
    facts = document["facts"]
    rows = "\n".join(f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in sorted(facts.items()))
    return f"""# TVE explainer for {backbone.name}

Predicts, for every {backbone.patches_per_side} x {backbone.patches_per_side} patch of a picture, the embedding if only
the window of radius {config.radius} around it were kept and if it were taken away, in one forward pass. Any head on
the embedding of this backbone can be read over it: nothing is trained for a task.

| what | value |
|---|---|
| backbone | {backbone.name} ({backbone.architecture}), {backbone.preprocessing.image_size} px |
| backbone weights, sha256 | {document["backbone_sha256"]} |
| explainer weights, sha256 | {document["explainer_sha256"]} |
| removal operator | {config.removal} |
| form | {_form(explainer)} |
{rows}

```python
from PIL import Image
import tve

explainer = tve.load_explainer("{_folder_hint(backbone.name)}")
image = explainer.backbone.preprocess(Image.open("picture.jpg"))[None]
heatmap = explainer.explain(image, head)  # head: embeddings [..., {explainer.backbone.embed_dim}] to logits
```

Limits: attributions are relative to the removal operator named above and to this backbone's weights; R² says how much
of the exact windows the explainer has learned on held-out pictures. No label was read in pre-training.
"""


def _form(explainer: Explainer) -> str:
    config = explainer.config
    if config.form != "shared":
        return config.form
    end = "" if config.trained_blocks is None else f" (last {config.trained_blocks} blocks)"
    return f"shared, trunk {config.trunk}{end}, blocks reread: {explainer.reread_blocks}"


def _folder_hint(name: str) -> str:
    return f"path/to/{name}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
