"""How well a map finds a known object: its mass, its peak and its order against the object's patches.

    mass inside        sum of positive attribution on the object / sum of positive attribution
    pointing hit       whether the patch of highest score is on the object          Zhang et al., arXiv 1608.00507
    average precision  mean over the object's patches n of the share of the object among the patches that score at
                       least as high as n                                           as scikit-learn defines it

A model may rightly look elsewhere than at the object; where a picture is made so that only the object tells the class,
these measure the explanation. Of each, a picture whose object has no patch, or all, is NaN: there is nothing to find.
"""

import torch
from torch import Tensor

from tve.fidelity.levels import ranks


def mass_inside(map_BPP: Tensor, object_BPP: Tensor) -> Tensor:
    """The share [B] of positive attribution that lies on the object, 0 to 1; NaN for a map without any, too.

    A factor changes nothing. Unlike the other two, it depends on where zero is: an added constant changes it.

    Args:
        map_BPP: attributions.
        object_BPP: bool, True on the object's patches.

    Raises:
        ValueError: other shapes or dtypes, or attributions that are not finite.
    """
    _require(map_BPP, object_BPP)
    positive_BPP = map_BPP.clamp(min=0)
    share_B = (positive_BPP * object_BPP).sum((1, 2)) / positive_BPP.sum((1, 2))
    return _where_there_is_something_to_find(share_B, object_BPP)


def pointing_hit(map_BPP: Tensor, object_BPP: Tensor) -> Tensor:
    """1 where the patch of highest score is on the object, 0 where it is not [B]; ties as in `nested_levels`.

    The mean over pictures is the pointing game's accuracy. Arguments and errors as of `mass_inside`.
    """
    _require(map_BPP, object_BPP)
    top_BN = ranks(map_BPP.flatten(1)) == 0
    hit_B = (top_BN & object_BPP.flatten(1)).any(1).to(map_BPP.dtype)
    return _where_there_is_something_to_find(hit_B, object_BPP)


def average_precision(map_BPP: Tensor, object_BPP: Tensor) -> Tensor:
    """Average precision [B], 0 to 1, of the map as a detector of the object's patches.

    Equal scores cross a threshold together. A map that knows nothing gets about the object's share of the picture.
    Arguments and errors as of `mass_inside`.
    """
    _require(map_BPP, object_BPP)
    score_BN, object_BN = map_BPP.flatten(1), object_BPP.flatten(1)
    # [b, n, m]: patch m scores at least as high as patch n.
    found_BNN = score_BN[:, None, :] >= score_BN[:, :, None]
    precision_BN = (found_BNN & object_BN[:, None, :]).sum(2) / found_BNN.sum(2)
    mean_B = (precision_BN * object_BN).sum(1) / object_BN.sum(1)
    return _where_there_is_something_to_find(mean_B.to(map_BPP.dtype), object_BPP)


def _require(map_BPP: Tensor, object_BPP: Tensor) -> None:
    expected = f"bool {list(map_BPP.shape)}"
    if map_BPP.ndim != 3 or object_BPP.shape != map_BPP.shape or object_BPP.dtype != torch.bool:
        got = f"{str(object_BPP.dtype).removeprefix('torch.')} {list(object_BPP.shape)}"
        raise ValueError(f"object: expected {expected}, True on its patches, for a map [B, P, P], got {got}")
    if num_bad := int((~map_BPP.isfinite()).sum()):
        raise ValueError(f"map: expected finite attributions, got {num_bad} that are not")


def _where_there_is_something_to_find(value_B: Tensor, object_BPP: Tensor) -> Tensor:
    object_BN = object_BPP.flatten(1)
    return value_B.where(object_BN.any(1) & ~object_BN.all(1), value_B.new_tensor(torch.nan))
