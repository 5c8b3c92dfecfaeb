"""Transfer: a meta-attribution read through any head becomes a heatmap for any class. Nothing is trained.

    u[p, q] = w+ (l(g[p, q]) - l(G(∅)))  +  w- (l(G(x)) - l(h[p, q]))

l is the logit, the probability or the log-probability of a class under the head. G(∅) and G(x) do not change the order
of patches; they fix the zero of u. u belongs to windows; what a patch gets of it is the rule's `per_patch`:

    share   phi whose sums over windows, and one constant, are nearest to u / 2 (ridge regression): a patch's own part
    mean    phi = mean of u over the windows that contain the patch
    window  phi = u of the window around the patch

The mean is the paper's (arXiv 2312.15359, section 4, which writes a sum; a clipped sum has 9 terms in a corner and 25
inside, and its release averages). It blurs twice: u / 2 is already a sum over the window, of Shapley values where no
more than two patches interact (docs/method.md). Shares undo both; what every window has alike is the constant's, so
their zero is a patch that adds nothing to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tve.kernels import choose, transfer_map
from tve.meta_attribution import MetaAttribution

Output = Literal["logit", "probability", "log_probability"]
PerPatch = Literal["share", "mean", "window"]
# Times the number of a window's other patches, the ridge against the squared window sums. Chosen on pictures without
# labels that no test reads, as the least at which shares are as faithful as means or more on photographs, whose windows
# are erratic; on scenes a third to a tenth would be better (docs/experiments.md).
SHARE_RIDGE = 0.4
Head = Callable[[Tensor], Tensor]
# A class for all pictures, or one class per picture [B].
Target = int | np.integer[Any] | Sequence[int] | NDArray[np.integer[Any]] | Tensor


@dataclass(frozen=True, slots=True)
class TransferRule:
    """How a meta-attribution is read."""

    output: Output = "logit"
    per_patch: PerPatch = "share"
    weight_kept: float = 1.0
    weight_removed: float = 1.0

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output: expected one of {list(get_args(Output))}, got {self.output!r}")
        if self.per_patch not in get_args(PerPatch):
            raise ValueError(f"per_patch: expected one of {list(get_args(PerPatch))}, got {self.per_patch!r}")


DEFAULT_RULE = TransferRule()


@torch.no_grad()
def transfer(meta: MetaAttribution, head: Head, rule: TransferRule = DEFAULT_RULE) -> Tensor:
    """Attribution maps phi [B, C, P, P] of all C classes of a head, in the unit of the rule's output.

    Positive: the patch speaks for the class. Maps are neither rescaled nor clipped.

    Args:
        meta: exact or predicted.
        head: embeddings [..., D] to logits [..., C]: linear, or any module in evaluation mode. It is called on rows
            [M, D].
        rule: output, what a patch gets, weights.

    Raises:
        ValueError: no head, one of another width, or one whose dropout or batch norm is in training mode.
    """
    require_head(head, meta.full_BD)
    kept_BNC = rule.weight_kept * (read(head, meta.kept_BND, rule.output) - read(head, meta.empty_D, rule.output))
    full_B1C = read(head, meta.full_BD, rule.output)[:, None]
    removed_BNC = rule.weight_removed * (full_B1C - read(head, meta.removed_BND, rule.output))
    u_BNC = kept_BNC + removed_BNC
    side = round(u_BNC.shape[1] ** 0.5)
    u_BCPP = u_BNC.transpose(1, 2).unflatten(2, (side, side))
    return of_patches(u_BCPP, meta.radius, rule.per_patch)


@torch.no_grad()
def class_maps(meta: MetaAttribution, head: Head, target: Target, rule: TransferRule = DEFAULT_RULE) -> Tensor:
    """Attribution maps [B, P, P] of one class a picture: `transfer`, read at that class.

    Of a linear head only these classes' maps are made; for logits nothing of the others is computed at all.

    Args:
        meta: exact or predicted.
        head: as `transfer` takes it.
        target: one class for all pictures, or one a picture.
        rule: output, what a patch gets, weights.

    Raises:
        ValueError: as `transfer` and `of_class` do.
    """
    # A subclass of nn.Linear may compute anything, and a head in another dtype rounds as it will.
    dtypes = {meta.full_BD.dtype, head.weight.dtype} if type(head) is nn.Linear else set()
    if type(head) is not nn.Linear or len(dtypes) != 1 or torch.float64 in dtypes:
        return of_class(transfer(meta, head, rule), target)
    require_head(head, meta.full_BD)
    target_B = _require_classes(target, len(meta.full_BD), head.out_features).to(meta.full_BD.device)
    maps_B1PP = transfer_map(
        meta.kept_BND,
        meta.removed_BND,
        meta.full_BD,
        meta.empty_D,
        head.weight,
        head.bias,
        target_B[:, None],
        patches_per_side=round(meta.kept_BND.shape[1] ** 0.5),
        radius=meta.radius,
        output=rule.output,
        weight_kept=rule.weight_kept,
        weight_removed=rule.weight_removed,
        window_mean=rule.per_patch == "mean",
        backend=choose("auto", meta.full_BD.device).backend,
    )
    return (shares(maps_B1PP, meta.radius) if rule.per_patch == "share" else maps_B1PP)[:, 0]


def of_patches(u_BCPP: Tensor, radius: int, per_patch: PerPatch) -> Tensor:
    """What each patch gets of u, which belongs to the window around it."""
    if per_patch == "window":
        return u_BCPP
    return shares(u_BCPP, radius) if per_patch == "share" else window_mean(u_BCPP, radius)


def shares(u_BCPP: Tensor, radius: int) -> Tensor:
    """The values of patches whose sums over windows, and a constant, are nearest to u / 2, with a ridge on the values.

        phi, c = argmin |A phi + c - u / 2|^2 + ridge |phi|^2          A: whether a window contains a patch

    A is a product over rows and columns of one band matrix, so that its eigenvectors are too: four small products, and
    no matrix of patches by patches. The constant is a correction of rank one. A window of one patch tells all of it:
    for radius 0 this is u / 2.
    """
    if radius == 0:
        return u_BCPP / 2
    exact = u_BCPP if u_BCPP.dtype in (torch.float32, torch.float64) else u_BCPP.float()
    vectors_PP, gain_PP, flat_PP, weights_PP = (
        torch.as_tensor(part, dtype=exact.dtype, device=exact.device) for part in _share_parts(exact.shape[-1], radius)
    )
    with torch.autocast(exact.device.type, enabled=False):
        half_BCPP = (exact - exact.mean((-2, -1), keepdim=True)) / 2
        phi_BCPP = vectors_PP @ (gain_PP * (vectors_PP.T @ half_BCPP @ vectors_PP)) @ vectors_PP.T
        phi_BCPP = phi_BCPP + flat_PP * (weights_PP * half_BCPP).sum((-2, -1), keepdim=True)
    shares_BCPP: Tensor = phi_BCPP.to(u_BCPP.dtype)
    return shares_BCPP


@lru_cache(maxsize=64)
def _share_parts(side: int, radius: int) -> tuple[NDArray[np.float64], ...]:
    """What `shares` multiplies by, each [P, P].

    With S = (A A + ridge)^-1: eigenvectors of the band matrix; the gain of S A along each pair of them; b = S A 1, what
    shares without a constant give a flat picture; and A b / (1 (1 - A b)), how much of b the constant takes back.
    """
    place_P = np.arange(side)
    values_P, vectors_PP = np.linalg.eigh((np.abs(place_P[:, None] - place_P) <= radius).astype(np.float64))
    windows_PP = np.outer(values_P, values_P)
    ridge = SHARE_RIDGE * ((2 * radius + 1) ** 2 - 1)
    shrunk_PP = windows_PP**2 + ridge
    ones_PP = np.outer(vectors_PP.sum(0), vectors_PP.sum(0))  # the flat picture, along each pair of eigenvectors

    def picture(along_PP: NDArray[np.float64]) -> NDArray[np.float64]:
        drawn_PP: NDArray[np.float64] = vectors_PP @ along_PP @ vectors_PP.T
        return drawn_PP

    flat_PP, summed_PP = picture(windows_PP / shrunk_PP * ones_PP), picture(windows_PP**2 / shrunk_PP * ones_PP)
    missing = float((ridge / shrunk_PP * ones_PP**2).sum())  # N - 1 A b, without cancelling
    return vectors_PP, windows_PP / shrunk_PP, flat_PP, summed_PP / missing


def window_mean(u_BCPP: Tensor, radius: int) -> Tensor:
    """The mean of u over the windows that contain each patch: over N_r(p, q), clipped at the border."""
    return nn.functional.avg_pool2d(u_BCPP, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def read(head: Head, embeddings: Tensor, output: Output = "logit") -> Tensor:
    """A head's output [..., C] on embeddings [..., D], which it is given as rows: some layers take nothing else."""
    logits_MC = head(embeddings.reshape(-1, embeddings.shape[-1]))
    logits = logits_MC.reshape(*embeddings.shape[:-1], logits_MC.shape[-1])
    if output == "logit":
        return logits
    return logits.softmax(-1) if output == "probability" else logits.log_softmax(-1)


def of_class(maps_BCPP: Tensor, target: Target) -> Tensor:
    """Each picture's map [B, P, P] of its own class, or of the one class for all.

    Raises:
        ValueError: a target that is no class index, a class that the head does not have, or not one class per picture.
    """
    batch_size, num_classes = maps_BCPP.shape[:2]
    target_B = _require_classes(target, batch_size, num_classes).to(maps_BCPP.device)
    return maps_BCPP[torch.arange(batch_size, device=maps_BCPP.device), target_B]


def _require_classes(target: Target, batch_size: int, num_classes: int) -> Tensor:
    target_B = class_of_each(target, batch_size)
    if len(target_B) and not bool(((target_B >= 0) & (target_B < num_classes)).all()):
        raise ValueError(f"class: expected 0 to {num_classes - 1}, got {target_B.tolist()}")
    return target_B


def class_of_each(target: Target, batch_size: int) -> Tensor:
    """Class indices int64 [B] of a target: one class for all pictures, or one per picture.

    Raises:
        ValueError: another type than integers (True is none), or another number than one or B.
    """
    expected = f"class: expected an int, or one per picture, [{batch_size}]"
    try:
        given = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises on words, ragged lists and objects
        raise ValueError(f"{expected}, got {target!r}") from error
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise ValueError(f"{expected}, got {str(given.dtype).removeprefix('torch.')} {list(given.shape)}: {target!r}")
    if given.ndim == 0:
        return given.long().expand(batch_size)
    if tuple(given.shape) != (batch_size,):
        raise ValueError(f"{expected}, got {list(given.shape)}")
    return given.long()


def require_head(head: Head, embeddings_MD: Tensor) -> None:
    """Raises ValueError unless the head, in evaluation mode, makes logits [..., C] of such embeddings, M > 0."""
    embed_dim = embeddings_MD.shape[-1]
    if not callable(head):
        hint = "this backbone may have no single linear classifier: pass a head" if head is None else "pass a module"
        got = "None" if head is None else type(head).__name__
        raise ValueError(
            f"head: expected a callable from embeddings [..., {embed_dim}] to logits [..., C], got {got}; {hint}"
        )
    if changing := sorted({type(module).__name__ for module in _changing(head)}):
        raise ValueError(
            f"head: expected evaluation mode, got {', '.join(changing)} in training mode; call head.eval()"
        )
    try:
        logits = head(embeddings_MD[:1])
    except RuntimeError as error:
        raise ValueError(
            f"head: expected a head on embeddings of width {embed_dim}, got one that fails on them ({error}); "
            "heads read the backbone's pooled, pre-logits embedding"
        ) from error
    expected = f"head: expected logits [{len(embeddings_MD[:1])}, C], floating, of one embedding"
    if not isinstance(logits, Tensor):
        raise ValueError(f"{expected}, got {type(logits).__name__}; return one tensor")
    if not logits.is_floating_point() or logits.ndim != 2 or len(logits) != len(embeddings_MD[:1]):
        raise ValueError(f"{expected}, got {logits.dtype} {list(logits.shape)}; return a row per embedding")


def _changing(head: Head) -> list[nn.Module]:
    """The modules of a head that make its output depend on chance or on the batch."""
    modules = head.modules() if isinstance(head, nn.Module) else ()
    return [
        module
        for module in modules
        if module.training and (isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0))
    ]
