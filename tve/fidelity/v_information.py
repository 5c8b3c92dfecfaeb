"""How a map relates to information and to Shapley values, on grids small enough to enumerate every coalition.

    v(S) = log p(y | x_S)                                       what the coalition S says about the class
    u[W] = (v(W) - v(∅)) + (v(Z) - v(Z∖W))                      a window: alone, and given all the rest
    sum over patches along an order = v(Z) - v(∅)               the chain rule: each patch given those before it
    Shapley value of i = the mean of i's term over all orders   so these sum to v(Z) - v(∅), too
    m(T) = sum over S in T of (-1)^(|T| - |S|) v(S)             dividends: v(S) = sum of m(T) over T in S

Where no more than two patches interact (m(T) = 0 for |T| > 2), u[W] / 2 is the sum of the Shapley values of the patches
of W, exactly; for one patch i its error is the sum over T with i, |T| > 2, of (1/2 - 1/|T|) m(T). Proofs are in
docs/method.md.

The terms are pointwise V-information (Xu et al., arXiv 2002.10689; pointwise: Ethayarajh et al., arXiv 2110.08420) with
one fixed predictor, the head on the backbone, in place of the best of a family. Dividends: Harsanyi 1963; Shapley 1953.

A table of a game holds v of each of its 2^N coalitions, [2^N, ...]: bit n of an index says whether player n is in.
"""

from math import factorial

import torch
from torch import Tensor

from tve.coalitions import require_whole
from tve.evaluator import CoalitionEvaluator
from tve.transfer_rule import Head, Output, Target, of_class, read

MAX_PLAYERS = 12


@torch.no_grad()
def coalition_values(
    evaluator: CoalitionEvaluator,
    images_B3SS: Tensor,
    head: Head,
    target: Target,
    output: Output = "log_probability",
) -> Tensor:
    """v of every coalition of each picture's patches: a table [2^N, B], float64, in nats for the log-probability.

    Args:
        evaluator: backbone, with at most 3 patches a side, and removal operator.
        images_B3SS: normalised pictures.
        head: embeddings [M, D] to logits [M, C].
        target: one class for all pictures, or one a picture.
        output: what v is.

    Raises:
        ValueError: a larger grid, a target that is no class, or what the evaluator raises.
    """
    present_KPP = all_coalitions(evaluator.backbone.patches_per_side, images_B3SS.device)
    some_BKPP = present_KPP[1:].expand(len(images_B3SS), -1, -1, -1)
    # The evaluator knows what stands for ∅ where `drop` leaves nothing to embed.
    empty_B1D = evaluator.empty().expand(len(images_B3SS), 1, -1)
    embeddings_BKD = torch.cat([empty_B1D, evaluator(images_B3SS, some_BKPP)], dim=1)
    values_BCK1 = read(head, embeddings_BKD, output).double().transpose(1, 2)[..., None]
    return of_class(values_BCK1, target)[..., 0].T


def all_coalitions(patches_per_side: int, device: torch.device | str = "cpu") -> Tensor:
    """Every coalition of a grid, bool [2^N, P, P], in the order of a table; patch (p, q) is player p * P + q.

    >>> all_coalitions(2)[0b0110].int().tolist()
    [[0, 1], [1, 0]]

    Raises:
        ValueError: a grid of more than 12 patches, or of none.
    """
    require_whole("patches_per_side", patches_per_side)
    num_patches = patches_per_side**2
    if not (patches_per_side >= 1 and num_patches <= MAX_PLAYERS):
        raise ValueError(
            f"patches_per_side: expected 1 to {int(MAX_PLAYERS**0.5)}, got {patches_per_side}: all coalitions are "
            f"enumerated for at most {MAX_PLAYERS} patches"
        )
    return _members(num_patches, device).reshape(-1, patches_per_side, patches_per_side)


def coalition_index(present_KPP: Tensor) -> Tensor:
    """The places [K] of coalitions, bool [K, P, P], in a table."""
    present_KN = present_KPP.flatten(1)
    bit_N = 1 << torch.arange(present_KN.shape[1], device=present_KPP.device)
    return (present_KN * bit_N).sum(1)


def shapley_values(values: Tensor) -> Tensor:
    """Shapley values [N, ...], float64, of the players of a table [2^N, ...]; they sum to v(Z) - v(∅).

        sum over S without i of |S|! (N - |S| - 1)! / N! (v(S with i) - v(S))

    Raises:
        ValueError: no table, or one of more than 12 players.
    """
    member_KN = _members(num_players(values), values.device)
    size_K, num = member_KN.sum(1), member_KN.shape[1]
    # Of a coalition with i, |S| is one less than its size; of one without i, its size. Neither exists at both ends.
    weights = [factorial(size) * factorial(num - size - 1) / factorial(num) for size in range(num)]
    weight_S = torch.tensor(weights, dtype=torch.float64, device=values.device)
    with_i_K1, without_i_K1 = weight_S[size_K.clamp(min=1) - 1, None], weight_S[size_K.clamp(max=num - 1), None]
    weight_KN = torch.where(member_KN, with_i_K1, -without_i_K1)
    shares: Tensor = torch.tensordot(weight_KN.T, values.double(), dims=1)
    return shares


def chain_terms(values: Tensor, orders_LN: Tensor) -> Tensor:
    """What each player adds to those before it, [L, N, ...] by player, along L orders of a table [2^N, ...].

    For v = log p: the pointwise information of each patch given the patches before it.

    Args:
        values: the table.
        orders_LN: int64, permutations of the players; the first comes first.

    Raises:
        ValueError: no table, or rows that are not permutations of its players.
    """
    num = num_players(values)
    player_N = torch.arange(num, device=orders_LN.device)
    if orders_LN.ndim != 2 or not torch.equal(orders_LN.sort(1).values, player_N.expand(len(orders_LN), -1)):
        raise ValueError(f"orders: expected permutations of 0 to {num - 1}, [L, {num}], got {list(orders_LN.shape)}")
    after_LN = (1 << orders_LN).cumsum(1)
    before_LN = after_LN - (1 << orders_LN)
    added = values[after_LN] - values[before_LN]
    row_L1 = torch.arange(len(orders_LN), device=orders_LN.device)[:, None]
    return added[row_L1, orders_LN.argsort(1)]


def end_terms(values: Tensor) -> Tensor:
    """The mean [N, ...] of what each player adds to nobody and to all others: u / 2 of windows of one patch.

    The first and the last of the N sizes that the Shapley value averages over.

    Raises:
        ValueError: no table, or one of more than 12 players.
    """
    alone_N = 1 << torch.arange(num_players(values), device=values.device)
    return (values[alone_N] - values[0] + values[-1] - values[len(values) - 1 - alone_N]) / 2


def dividends(values: Tensor) -> Tensor:
    """The interactions m [2^N, ...] of a table: v(S) is the sum of m(T) over all T in S, and m(∅) = v(∅).

    Raises:
        ValueError: no table, or one of more than 12 players.
    """
    num = num_players(values)
    cube = values.reshape(*[2] * num, *values.shape[1:])
    for axis in range(num):
        without, with_it = cube.unbind(axis)
        cube = torch.stack([without, with_it - without], axis)
    return cube.reshape(values.shape)


def num_players(values: Tensor) -> int:
    """N of a table [2^N, ...].

    Raises:
        ValueError: no table, or one of more than 12 players.
    """
    rows = len(values) if values.ndim else 0
    num = rows.bit_length() - 1
    if not (1 <= num <= MAX_PLAYERS and rows == 2**num and values.is_floating_point()):
        raise ValueError(
            f"values: expected floating [2^N, ...], one of each coalition of 1 to {MAX_PLAYERS} players, got "
            f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        )
    return num


def _members(num: int, device: torch.device | str) -> Tensor:
    """Bool [2^N, N]: who is in each coalition."""
    index_K1 = torch.arange(2**num, device=device)[:, None]
    return (index_K1 >> torch.arange(num, device=device)) & 1 == 1
