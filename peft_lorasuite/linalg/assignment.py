"""From similarity scores to pairs of layers, attention heads and feed-forward units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoraSuiteError, unknown_name_error

Pairs = list[tuple[int, int]]
"""(old, new) indices; for layers ascending in both."""
TIE = 1e-4
"""Scores that differ by at most this are tied; the tie breaker then decides."""


def layer_path(scores: Float[Tensor, "old new"], tie: Callable[[int, int], float] | None = None) -> Pairs:
    """Return the strictly increasing layer map with the largest total score (LoRASuite Algorithm 1).

    Args:
        scores: Similarity of every old layer with every new layer, ``(old, new)``.
        tie: Second score of a pair of layers, called only where scores are tied (an identity layer has exactly the
            CKA of the layer before it). If that is tied too, the earlier layer is taken.

    Returns:
        As many pairs as the smaller side has layers.
    """
    if scores.shape[0] > scores.shape[1]:
        flipped = None if tie is None else lambda i, j: tie(j, i)
        return [(old, new) for new, old in layer_path(scores.T, flipped)]
    S = scores.double()
    rows, band = S.shape[0], S.shape[1] - S.shape[0]
    if tie is not None and band:
        S = _break_ties(S, band, tie)
    best = torch.full_like(S, -torch.inf)
    back = torch.full(S.shape, -1, dtype=torch.long)
    best[0, : band + 1] = S[0, : band + 1]
    for i in range(1, rows):
        value = torch.cummax(best[i - 1], dim=0).values
        position = _first_positions(value)
        best[i, i : i + band + 1] = S[i, i : i + band + 1] + value[i - 1 : i + band]
        back[i, i : i + band + 1] = position[i - 1 : i + band]
    j = int(best[-1].argmax())
    path = [(rows - 1, j)]
    for i in range(rows - 1, 0, -1):
        j = int(back[i, j])
        path.append((i - 1, j))
    return path[::-1]


def _first_positions(maxima: Tensor) -> Tensor:
    """Return the first position of each running maximum; those that ``cummax`` returns are the last ones."""
    increases = torch.cat([torch.ones(1, dtype=torch.bool), maxima[1:] > maxima[:-1]])
    return torch.cummax(torch.where(increases, torch.arange(len(maxima)), 0), dim=0).values


def _break_ties(S: Tensor, band: int, tie: Callable[[int, int], float]) -> Tensor:
    """Add ``TIE * tie(old, new)`` to the scores that are tied with another score of their row."""
    S = S.clone()
    for i in range(S.shape[0]):
        row = S[i, i : i + band + 1].clone()
        for offset in range(band + 1):
            others = torch.cat([row[:offset], row[offset + 1 :]])
            if bool((others - row[offset]).abs().min() <= TIE):
                S[i, i + offset] += TIE * tie(i, i + offset)
    return S


def fixed_path(name: str, old: int, new: int) -> Pairs:
    """Return a layer map by position alone: ``first``, ``last``, ``medium`` or ``proportional`` (appendix A.6).

    Args:
        name: Which one.
        old: Number of old layers.
        new: Number of new layers.
    """
    few, many = min(old, new), max(old, new)
    if name not in FIXED_PATHS:
        raise unknown_name_error("layer map", name, LAYER_MAPS)
    pairs = [(i, FIXED_PATHS[name](i, few, many)) for i in range(few)]
    return pairs if old <= new else [(j, i) for i, j in pairs]


FIXED_PATHS: dict[str, Callable[[int, int, int], int]] = {
    "first": lambda i, few, many: i,
    "last": lambda i, few, many: i + many - few,
    "medium": lambda i, few, many: i + (many - few) // 2,
    "proportional": lambda i, few, many: round(i * (many - 1) / (few - 1)) if few > 1 else 0,
}
LAYER_MAPS = ("cka", *FIXED_PATHS)
HEAD_MAPS = ("hungarian", "index")


def assign(scores: Float[Tensor, "old new"]) -> Int[Tensor, "pairs 2"]:
    """Match one to one with the largest total score (Hungarian method); the larger side has unmatched members."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and not needed to apply a map

    if not torch.isfinite(scores).all():
        raise LoraSuiteError(
            "similarities are not finite: the weights of a backbone are out of range", do="train or fetch it again"
        )
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.stack([torch.as_tensor(rows), torch.as_tensor(columns)], dim=1).long()


def assign_by_index(old: int, new: int) -> Int[Tensor, "pairs 2"]:
    """Match equal indices: the ablation without head mapping.

    Args:
        old: Number of old heads.
        new: Number of new heads.
    """
    numbers = torch.arange(min(old, new))
    return torch.stack([numbers, numbers], dim=1)


CANDIDATES = 16
"""Candidates per old unit in one greedy round."""
SMALL = 256
"""At most this many unmatched units are left to the Hungarian method, whose cost is cubic."""
SLOW = 0.02
"""If a round matches a smaller fraction of the unmatched units (ties, dead units), the rest is left to it too."""


def assign_units(scores: Float[Tensor, "old new"]) -> Int[Tensor, "pairs 2"]:
    """Match units one to one, greedily by the best score in rounds; the last few by the Hungarian method.

    An exact matching is found if there is one; otherwise the total score is within about 1 % of the optimum.
    """
    if scores.shape[0] > scores.shape[1]:
        flipped = assign_units(scores.T.contiguous())[:, [1, 0]]
        return flipped[flipped[:, 0].argsort()]
    free_old, free_new = (torch.arange(count) for count in scores.shape)
    found: list[Tensor] = []
    while True:
        pairs = greedy_pairs(scores)
        found.append(_original_pairs(pairs, free_old, free_new))
        keep_old, keep_new = (torch.ones(count, dtype=torch.bool) for count in scores.shape)
        keep_old[pairs[:, 0]], keep_new[pairs[:, 1]] = False, False
        free_old, free_new, scores = free_old[keep_old], free_new[keep_new], scores[keep_old][:, keep_new]
        if len(free_old) <= SMALL or len(pairs) < SLOW * len(keep_old):
            break
    found.append(_original_pairs(assign(scores), free_old, free_new))
    pairs = torch.cat(found)
    return pairs[pairs[:, 0].argsort()]


def greedy_pairs(scores: Float[Tensor, "old new"]) -> Int[Tensor, "pairs 2"]:
    """Match greedily by the best score, among the `CANDIDATES` best new units of every old unit.

    Old units propose to their candidates in order of score; a new unit keeps its best proposal (deferred acceptance).
    That is the same as taking the best remaining pair again and again. Of equal scores the first old unit wins, and
    old units that lose at all of their candidates stay unmatched.
    """
    old, new = scores.shape
    value, best = scores.topk(min(CANDIDATES, new), dim=1)
    held, holder = torch.full((new,), -torch.inf), torch.full((new,), -1)
    attempt, free = torch.zeros(old, dtype=torch.long), torch.arange(old)
    while len(free):
        target, score = best[free, attempt[free]], value[free, attempt[free]]
        highest = held.scatter_reduce(0, target, score, "amax")
        wins = (score == highest[target]) & (score > held[target])
        first = torch.full((new,), old).scatter_reduce_(0, target[wins], free[wins], "amin")
        wins &= first[target] == free
        displaced = holder[target[wins]]
        holder[target[wins]], held = free[wins], highest
        rejected = torch.cat([free[~wins], displaced[displaced >= 0]])
        attempt[rejected] += 1
        free = rejected[attempt[rejected] < value.shape[1]]
    matched = (holder >= 0).nonzero()[:, 0]
    return torch.stack([holder[matched], matched], dim=1)


def _original_pairs(pairs: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return pairs of positions among the unmatched units as pairs of unit numbers."""
    return torch.stack([old[pairs[:, 0]], new[pairs[:, 1]]], dim=1)
