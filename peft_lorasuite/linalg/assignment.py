"""From scores to pairs: the ordered layer map, the head assignment, the unit assignment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import unknown_name_error

Pairs = list[tuple[int, int]]
"""(old, new), ascending in both for layers."""
TIE = 1e-4
"""Scores closer than this are a tie; the weights of the layers then decide."""


def layer_path(scores: Float[Tensor, "old new"], tie: Callable[[int, int], float] | None = None) -> Pairs:
    """Return the strictly increasing, injective layer map of the largest total score (LoRASuite Algorithm 1).

    Args:
        scores: Similarity of every old with every new layer.
        tie: Second opinion on a pair of layers, asked only where scores tie (an identity layer's CKA equals its
            predecessor's exactly); what still ties goes to the earlier layer.
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
        value, at = torch.cummax(best[i - 1], dim=0)
        at = _first_maxima(best[i - 1], value, at)
        best[i, i : i + band + 1] = S[i, i : i + band + 1] + value[i - 1 : i + band]
        back[i, i : i + band + 1] = at[i - 1 : i + band]
    j = int(best[-1].argmax())
    path = [(rows - 1, j)]
    for i in range(rows - 1, 0, -1):
        j = int(back[i, j])
        path.append((i - 1, j))
    return path[::-1]


def _first_maxima(values: Tensor, maxima: Tensor, at: Tensor) -> Tensor:
    """Earliest position of each prefix maximum; cummax gives the latest."""
    new_peak = torch.cat([torch.ones(1, dtype=torch.bool), maxima[1:] > maxima[:-1]])
    positions = torch.arange(len(values))
    return torch.cummax(torch.where(new_peak, positions, torch.zeros_like(at)), dim=0).values


def _break_ties(S: Tensor, band: int, tie: Callable[[int, int], float]) -> Tensor:
    S = S.clone()
    for i in range(S.shape[0]):
        row = S[i, i : i + band + 1].clone()
        for offset in range(band + 1):
            others = torch.cat([row[:offset], row[offset + 1 :]])
            if bool((others - row[offset]).abs().min() <= TIE):
                S[i, i + offset] += TIE * tie(i, i + offset)
    return S


def fixed_path(name: str, old: int, new: int) -> Pairs:
    """Return a layer map that looks at nothing: ``first``, ``last``, ``medium`` or ``proportional`` (appendix A.6)."""
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
    """Match one to one for the largest total score (Hungarian method); the longer side keeps unmatched members."""
    from scipy.optimize import linear_sum_assignment  # a third of a second, which a ready map does not need

    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.stack([torch.as_tensor(rows), torch.as_tensor(columns)], dim=1).long()


def assign_by_index(old: int, new: int) -> Int[Tensor, "pairs 2"]:
    """Match the i-th with the i-th: the ablation without head mapping."""
    numbers = torch.arange(min(old, new))
    return torch.stack([numbers, numbers], dim=1)


CANDIDATES = 16
"""Best new units that an old one asks for before the scores are looked at again."""
SMALL = 256
"""So few units are left to the Hungarian method at once: it costs their number to the third."""
SLOW = 0.02
"""Where one look matches a smaller share than this of what is free, the rest is left to it too (ties, dead units)."""


def assign_units(scores: Float[Tensor, "old new"]) -> Int[Tensor, "pairs 2"]:
    """Match units one to one: the best pair first, then the best among what is free, and so on; the last few optimally.

    Where an exact matching exists it is found; elsewhere the total score stays within about a hundredth of the optimum.
    """
    if scores.shape[0] > scores.shape[1]:
        turned = assign_units(scores.T.contiguous())[:, [1, 0]]
        return turned[turned[:, 0].argsort()]
    free_old, free_new = (torch.arange(count) for count in scores.shape)
    found: list[Tensor] = []
    while True:
        pairs = greedy_pairs(scores)
        found.append(_original_pairs(pairs, free_old, free_new))
        left, open_ = (torch.ones(count, dtype=torch.bool) for count in scores.shape)
        left[pairs[:, 0]], open_[pairs[:, 1]] = False, False
        free_old, free_new, scores = free_old[left], free_new[open_], scores[left][:, open_]
        if len(free_old) <= SMALL or len(pairs) < SLOW * len(left):
            break
    found.append(_original_pairs(assign(scores), free_old, free_new))
    pairs = torch.cat(found)
    return pairs[pairs[:, 0].argsort()]


def greedy_pairs(scores: Float[Tensor, "old new"]) -> Int[Tensor, "pairs 2"]:
    """Match the best pairs first, among the `CANDIDATES` of every old unit; who loses all of these stays free.

    Every old unit asks for its best new one, and for the next where somebody with a better score has it: the outcome of
    taking the best pair again and again, from one look at the scores. Of several that tie the first one wins.
    """
    old, new = scores.shape
    value, best = scores.topk(min(CANDIDATES, new), dim=1)
    held, holder = torch.full((new,), -torch.inf), torch.full((new,), -1)
    turn, asking = torch.zeros(old, dtype=torch.long), torch.arange(old)
    while len(asking):
        wanted, score = best[asking, turn[asking]], value[asking, turn[asking]]
        highest = held.scatter_reduce(0, wanted, score, "amax")
        wins = (score == highest[wanted]) & (score > held[wanted])
        first = torch.full((new,), old).scatter_reduce_(0, wanted[wins], asking[wins], "amin")
        wins &= first[wanted] == asking
        displaced = holder[wanted[wins]]
        holder[wanted[wins]], held = asking[wins], highest
        refused = torch.cat([asking[~wins], displaced[displaced >= 0]])
        turn[refused] += 1
        asking = refused[turn[refused] < value.shape[1]]
    taken = (holder >= 0).nonzero()[:, 0]
    return torch.stack([holder[taken], taken], dim=1)


def _original_pairs(pairs: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return pairs of positions among the free as pairs of units."""
    return torch.stack([old[pairs[:, 0]], new[pairs[:, 1]]], dim=1)
