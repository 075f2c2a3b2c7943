"""The maps of one layer as one would write them down at first: for comparison with the factored form, nothing else.

Every head gets its D x D interaction matrices, moved to the new hidden size as they are; every pair of heads a cosine
of these; every feed-forward part the pseudo-inverse of the whole moved weight; every module the singular values of its
whole update. All by torch's own dense routines. `head_similarity` is the kinder form, in which each old head is moved
once; `pair_loop` moves it for every pair, as a loop over pairs of heads does.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from peft_lorasuite.arch.spec import Heads
from peft_lorasuite.linalg.assignment import assign

Parts = dict[str, Tensor]
"""Part -> weight in PyTorch's orientation, (out, in)."""


def interactions(parts: Parts, heads: Heads, hidden: Tensor | None = None) -> list[Tensor]:
    """Per query head ``[Q^T K; V^T O^T]``, two D x D matrices; moved by ``W_h^T M W_h`` where a map is given."""
    found = []
    for head in range(heads.query):
        group = head // heads.group
        q, k, v = (_rows(parts[part], n, heads.size) for part, n in (("q", head), ("k", group), ("v", group)))
        o = parts["o"][:, head * heads.size : (head + 1) * heads.size]
        pair = [q.T @ k, v.T @ o.T]
        moved = pair if hidden is None else [hidden.T @ matrix @ hidden for matrix in pair]
        found.append(torch.cat([matrix.flatten() for matrix in moved]))
    return found


def _rows(weight: Tensor, head: int, size: int) -> Tensor:
    return weight[head * size : (head + 1) * size]


def head_similarity(old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor) -> Tensor:
    """Cosine of the interaction matrices of every old with every new head, (H_o, H_n)."""
    left, right = interactions(old, heads[0], hidden), interactions(new, heads[1])
    scores = [[torch.nn.functional.cosine_similarity(a, b, dim=0) for b in right] for a in left]
    return torch.tensor([[float(value) for value in row] for row in scores])


def pair_loop(old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor, pairs: int) -> float:
    """Seconds that a loop over all pairs of heads takes, from the first few of them."""
    left, right = interactions(old, heads[0]), interactions(new, heads[1])
    size = old["q"].shape[1]
    start = time.perf_counter()
    for number in range(pairs):
        a, b = left[number % len(left)], right[number % len(right)]
        moved = torch.cat([(hidden.T @ matrix @ hidden).flatten() for matrix in a.reshape(2, size, size)])
        torch.nn.functional.cosine_similarity(moved, b, dim=0)
    return (time.perf_counter() - start) / pairs * len(left) * len(right)


def head_maps(
    old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor, scores: Tensor
) -> dict[str, list[Tensor]]:
    """Per part and pair of heads, matched by their scores, ``T = pinv(Q_a W_h)^T Q_b^T`` in the new hidden basis."""
    pairs = assign(scores).tolist()
    maps: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    for a, b in pairs:
        for part, found in maps.items():
            i, j = (a, b) if part in ("q", "o") else (a // heads[0].group, b // heads[1].group)
            left, right = (w.T if part == "o" else w for w in (old[part], new[part]))
            moved = _rows(left, i, heads[0].size) @ hidden
            found.append(torch.linalg.pinv(moved).T @ _rows(right, j, heads[1].size).T)
    return maps


def unit_maps(old: Parts, new: Parts, hidden: Tensor) -> dict[str, Tensor]:
    """Per feed-forward part the dense map ``(I_o, I_n)`` from the moved old to the new units, by a pseudo-inverse."""
    found = {}
    for part in ("gate", "up", "down"):
        left, right = (w.T if part == "down" else w for w in (old[part], new[part]))
        found[part] = torch.linalg.pinv(left @ hidden).T @ right.T
    return found


def cut(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of a whole update, ``(out, rank)`` and ``(rank, in)``, by a dense SVD."""
    U, s, Vt = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * s[:rank], Vt[:rank]


def hidden_map(old: Tensor, new: Tensor) -> Tensor:
    """``pinv(E_o) E_n`` of the shared tokens' embeddings."""
    return torch.linalg.pinv(old) @ new
