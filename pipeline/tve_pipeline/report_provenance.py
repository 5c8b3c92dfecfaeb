"""What a report was made from: digests that name the weights and the parameters, and the version of torch.

No date and no machine: the same inputs give the same page, byte for byte.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Origin:
    """One thing that the report was made from."""

    name: str
    value: str  # as the page shows it
    whole: str = ""  # the digest of which `value` is the beginning


def provenance(exports: Path, backbones: Sequence[str], sections: Mapping[str, Any]) -> list[Origin]:
    """The explainers under `exports` (models/P/export) with their backbones, all of params.yaml, and torch.

    An explainer that was not exported is said to be missing.
    """
    origins = []
    for name in backbones:
        path = exports / name / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        labels = {"backbone": f"backbone {name}", "explainer": f"explainer of {name}"}
        origins += [_origin(label, config.get(f"{part}_sha256")) for part, label in labels.items()]
    digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
    return [*origins, _origin("params.yaml", digest), Origin("torch", version("torch"))]


def _origin(name: str, digest: str | None) -> Origin:
    return Origin(name, digest[:12], digest) if digest else Origin(name, "missing")
