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
ROWS = 128
"""Old units that are compared at once: their scores with all new units stay in the processor's cache."""
SMALL = 256
"""At most this many unmatched units are left to the Hungarian method, whose cost is cubic."""
SLOW = 0.02
"""If a round matches a smaller fraction of the unmatched units (ties, dead units), the rest is left to it too."""


def assign_units(old: Float[Tensor, "old width"], new: Float[Tensor, "new width"]) -> Int[Tensor, "pairs 2"]:
    """Match units one to one, greedily by the best score in rounds; the last few by the Hungarian method.

    An exact matching is found if there is one; otherwise the total score is within about 1 % of the optimum.

    Args:
        old: One row per old unit.
        new: One row per new unit; the score of a pair is the inner product of its rows.
    """
    if len(old) > len(new):
        flipped = assign_units(new, old)[:, [1, 0]]
        return flipped[flipped[:, 0].argsort()]
    free_old, free_new = torch.arange(len(old)), torch.arange(len(new))
    found: list[Tensor] = []
    while True:
        pairs = greedy_pairs(old[free_old], new[free_new])
        found.append(torch.stack([free_old[pairs[:, 0]], free_new[pairs[:, 1]]], dim=1))
        count, free_old, free_new = len(free_old), _without(free_old, pairs[:, 0]), _without(free_new, pairs[:, 1])
        if len(free_old) <= SMALL or len(pairs) < SLOW * count:
            break
    last = assign(old[free_old] @ new[free_new].T)
    pairs = torch.cat([*found, torch.stack([free_old[last[:, 0]], free_new[last[:, 1]]], dim=1)])
    return pairs[pairs[:, 0].argsort()]


def greedy_pairs(old: Float[Tensor, "old width"], new: Float[Tensor, "new width"]) -> Int[Tensor, "pairs 2"]:
    """Match greedily by the best score, among the `CANDIDATES` best new units of every old unit.

    Old units propose to their candidates in order of score; a new unit keeps its best proposal (deferred acceptance).
    That is the same as taking the best remaining pair again and again. Of equal scores the first old unit wins, and
    old units that lose at all of their candidates stay unmatched.
    """
    few = min(CANDIDATES, len(new))
    value, best = map(torch.cat, zip(*((rows @ new.T).topk(few, dim=1) for rows in old.split(ROWS)), strict=True))
    held, holder = torch.full((len(new),), -torch.inf), torch.full((len(new),), -1)
    attempt, free = torch.zeros(len(old), dtype=torch.long), torch.arange(len(old))
    while len(free):
        target, score = best[free, attempt[free]], value[free, attempt[free]]
        highest = held.scatter_reduce(0, target, score, "amax")
        wins = (score == highest[target]) & (score > held[target])
        first = torch.full((len(new),), len(old)).scatter_reduce_(0, target[wins], free[wins], "amin")
        wins &= first[target] == free
        displaced = holder[target[wins]]
        holder[target[wins]], held = free[wins], highest
        rejected = torch.cat([free[~wins], displaced[displaced >= 0]])
        attempt[rejected] += 1
        free = rejected[attempt[rejected] < few]
    matched = (holder >= 0).nonzero()[:, 0]
    return torch.stack([holder[matched], matched], dim=1)


def _without(values: Tensor, positions: Tensor) -> Tensor:
    """Return the values that are not at one of the positions."""
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[positions] = False
    return values[kept]
