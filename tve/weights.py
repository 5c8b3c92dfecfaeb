"""Weights as named tensors: read from files, fitted to a model, and the digest that says which they are."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tve.digests import file_sha256


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How many tensors of a state differ in name or shape from what is expected, and which first; "" if none."""

    def shape(state: Mapping[str, Tensor], name: str) -> str:
        return str(list(state[name].shape)) if name in state else "none"

    names = [*expected, *(name for name in given if name not in expected)]
    differing = [name for name in names if shape(expected, name) != shape(given, name)]
    if not differing:
        return ""
    first = differing[0]
    count = f"{len(differing)} tensors differ" if len(differing) > 1 else "1 tensor differs"
    return f"{count}, first {first} {shape(given, first)} instead of {shape(expected, first)}"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, independent of file format and order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, path: Path, sha256: str | None, architecture: str) -> None:
    """Loads a .safetensors or .pth file into a model; positions of another picture size are interpolated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another digest than `sha256`, no weights, or weights that do not fit.
    """
    if not path.is_file():
        got = "which is a folder" if path.is_dir() else "which does not exist"
        raise FileNotFoundError(f"weights of {architecture}: expected a .safetensors or .pth file, got {path}, {got}")
    if sha256 is not None and (actual := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {actual}; the file is not the one that was pinned")
    state = _read_weights(path)
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is not None and given is not None and own.shape != given.shape and own.shape[-1] == given.shape[-1]:
        # Another picture size than the weights were trained at: timm's own loading filter interpolates positions.
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = checkpoint_filter_fn(state, model)  # type: ignore[arg-type]
    load_state(model, state, path, architecture)


def _read_weights(path: Path) -> dict[str, Tensor]:
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, Mapping):
                state = state.get("state_dict", state.get("model", state))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: expected a .safetensors or .pth file of weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: expected named tensors, at the top or under state_dict or model, got "
            f"{list(state)[:5] if isinstance(state, Mapping) else type(state).__name__}; save model.state_dict()"
        )
    return dict(state)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    """Loads a state that was read from `path` into a model of its very names and shapes.

    Raises:
        ValueError: naming what does not fit.
    """
    if differences := misfits(model.state_dict(), state):
        raise ValueError(f"{path}: does not fit {architecture}: {differences}; check architecture and timm_args")
    model.load_state_dict(state, strict=True)
