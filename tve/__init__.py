"""TVE, the Transferable Vision Explainer: any classifier, any task, one forward pass."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tve.backbones import Backbone as Backbone
    from tve.backbones import load_backbone as load_backbone
    from tve.coalitions import Windows as Windows
    from tve.evaluator import CoalitionEvaluator as CoalitionEvaluator
    from tve.explainer import Explainer as Explainer
    from tve.explainer import ExplainerConfig as ExplainerConfig
    from tve.export import load_explainer as load_explainer
    from tve.export import save_explainer as save_explainer
    from tve.heads import load_head as load_head
    from tve.heatmaps import overlay as overlay
    from tve.meta_attribution import MetaAttribution as MetaAttribution
    from tve.meta_attribution import exact_windows as exact_windows
    from tve.transfer_rule import TransferRule as TransferRule
    from tve.transfer_rule import transfer as transfer

    __version__: str

_DISTRIBUTION = "transferable-vision-explainer"
# Names are imported on first use: a stage that reads shards does not wait for timm, nor depend on the explainer.
# No public name is a module's: importing the module would put it in the name's place.
_HOME = {
    "Backbone": "backbones",
    "load_backbone": "backbones",
    "Windows": "coalitions",
    "CoalitionEvaluator": "evaluator",
    "Explainer": "explainer",
    "ExplainerConfig": "explainer",
    "load_explainer": "export",
    "save_explainer": "export",
    "overlay": "heatmaps",
    "load_head": "heads",
    "MetaAttribution": "meta_attribution",
    "exact_windows": "meta_attribution",
    "TransferRule": "transfer_rule",
    "transfer": "transfer_rule",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'tve' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"tve.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError as error:
        raise AttributeError(f"tve.__version__: expected {_DISTRIBUTION} to be installed; pip install it") from error
