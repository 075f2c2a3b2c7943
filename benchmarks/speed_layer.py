"""The maps of one layer, as the package computes them against a naive formulation of the same.

Naive means: every head gets its D x D interaction matrices, moved to the new hidden size as they are; every pair of
heads a cosine of these; every feed-forward part the pseudo-inverse of the whole moved weight; every module the singular
values of its whole update. All by torch's own dense routines. `naive_head_similarity` moves each old head once;
`time_pair_loop` moves it for every pair, as a loop over pairs of heads does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import ATTENTION, fastest
from random_pair import MINICPM_1B, MINICPM_2B, backbone
from torch import Tensor

from peft_lorasuite import Backbone, MapOptions, UpgradeMap
from peft_lorasuite.arch.layout import heads_first
from peft_lorasuite.arch.spec import Heads
from peft_lorasuite.linalg.assignment import assign
from peft_lorasuite.linalg.basis import hidden_map, pseudo_inverse
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.linalg.similarity import head_similarity
from peft_lorasuite.mapping.layers import LayerMatcher
from peft_lorasuite.methods.lorasuite import move

RANK = 16
LOOPED = 32
"""Pairs of heads from which the time of the loop over all pairs is extrapolated."""
VOCABULARY = 8192
WEIGHTS_ONLY = MapOptions(layer_map="proportional")
"""A map without calibration."""
Parts = dict[str, Tensor]
"""Part -> weight in PyTorch's orientation, (out, in)."""


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """Time maps and factors of single layers at the shapes of MiniCPM-1B and 2B: naive against factored."""
    place = Path(args.scratch)
    old = Backbone.open(backbone(place / "1b", layers=args.layers, vocabulary=VOCABULARY, **MINICPM_1B))
    new = Backbone.open(backbone(place / "2b", layers=args.layers, vocabulary=VOCABULARY, seed=1, **MINICPM_2B))
    ids = torch.arange(VOCABULARY)
    E_o, E_n = old.embedding(ids), new.embedding(ids)
    found: dict[str, Any] = {"layers": [], "threads": torch.get_num_threads()}
    found["hidden_map"] = {
        "factored": fastest(lambda: pseudo_inverse(hidden_map(E_o, E_n))),
        "naive": fastest(lambda: torch.linalg.pinv(torch.linalg.pinv(E_o) @ E_n), 1),
    }
    hidden = hidden_map(E_o, E_n)
    built, matcher = UpgradeMap.build(old, new, WEIGHTS_ONLY), LayerMatcher(old, new, hidden, WEIGHTS_ONLY)
    for number, pair in enumerate(built.layers):
        times = {
            "factored": fastest(lambda n=number: matcher.match(n, n)),
            "factored_update": fastest(lambda pair=pair: move_updates(built, pair)),
            **naive_layer(old, new, number, hidden, move_updates(built, pair)),
        }
        ours, rest = times["factored"] + times["factored_update"], times["naive_maps"] + times["naive_update"]
        times["ratio_heads_moved_once"] = rest / ours
        times["ratio"] = (rest - times["naive_head_similarity"] + times["naive_pair_loop"]) / ours
        found["layers"].append({name: round(value, 6) for name, value in times.items()})
        print(found["layers"][-1], flush=True)
    found["ratio"] = round(min(one["ratio"] for one in found["layers"]), 1)
    return found


def move_updates(built: UpgradeMap, pair: Any) -> dict[str, LowRank]:
    """Transfer a random update of every module of a layer and truncate it to its rank."""
    found = {}
    for number, part in enumerate(built.old.arch.parts):
        rows, columns = built.old.arch.shape(part)
        generator = torch.Generator().manual_seed(number)
        update = LowRank(torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        found[part] = move(built, pair, part, update, match_size=True)[0].truncated(RANK)[0]
    return found


def naive_layer(
    old: Backbone, new: Backbone, number: int, hidden: Tensor, updates: dict[str, LowRank]
) -> dict[str, float]:
    """Time the naive form of one layer; also return how far its similarities are from the package's."""
    left, right = (
        {part: side.part(number, part) for part in (*ATTENTION, "gate", "up", "down")} for side in (old, new)
    )
    heads = old.arch.heads, new.arch.heads
    start = time.perf_counter()
    scores = naive_head_similarity(left, right, heads, hidden)
    compared = time.perf_counter()
    looped = time_pair_loop(left, right, heads, hidden, LOOPED)
    ours = head_similarity(
        {p: heads_first(left[p] if p == "o" else left[p] @ hidden, p, heads[0]) for p in ("q", "k", "v")}
        | {"o": heads_first(hidden.T @ left["o"], "o", heads[0])},
        {p: heads_first(right[p], p, heads[1]) for p in ATTENTION}, *heads,
    )  # fmt: skip
    begun = time.perf_counter()
    naive_head_maps(left, right, heads, hidden, scores)
    naive_unit_maps(left, right, hidden)
    mapped = time.perf_counter()
    for update in updates.values():
        naive_truncation(update.delta_weight(), RANK)
    return {
        "naive_head_similarity": compared - start, "naive_maps": compared - start + mapped - begun,
        "naive_update": time.perf_counter() - mapped, "naive_pair_loop": looped,
        "largest_difference": float((scores - ours).abs().max()),
    }  # fmt: skip


def interactions(parts: Parts, heads: Heads, hidden: Tensor | None = None) -> list[Tensor]:
    """Return ``[Q^T K; V^T O^T]`` of every query head, two D x D matrices; each ``W_h^T M W_h`` if a map is given."""
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


def naive_head_similarity(old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor) -> Tensor:
    """Return the cosine of the interaction matrices of every old with every new head, (H_o, H_n)."""
    left, right = interactions(old, heads[0], hidden), interactions(new, heads[1])
    scores = [[torch.nn.functional.cosine_similarity(a, b, dim=0) for b in right] for a in left]
    return torch.tensor([[float(value) for value in row] for row in scores])


def time_pair_loop(old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor, pairs: int) -> float:
    """Return the seconds that a loop over all pairs of heads takes, from the first few of them."""
    left, right = interactions(old, heads[0]), interactions(new, heads[1])
    size = old["q"].shape[1]
    start = time.perf_counter()
    for number in range(pairs):
        a, b = left[number % len(left)], right[number % len(right)]
        moved = torch.cat([(hidden.T @ matrix @ hidden).flatten() for matrix in a.reshape(2, size, size)])
        torch.nn.functional.cosine_similarity(moved, b, dim=0)
    return (time.perf_counter() - start) / pairs * len(left) * len(right)


def naive_head_maps(
    old: Parts, new: Parts, heads: tuple[Heads, Heads], hidden: Tensor, scores: Tensor
) -> dict[str, list[Tensor]]:
    """Return ``T = pinv(Q_a W_h)^T Q_b^T`` in the new hidden basis, by part and pair of heads matched by ``scores``."""
    maps: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    for a, b in assign(scores).tolist():
        for part, found in maps.items():
            i, j = (a, b) if part in ("q", "o") else (a // heads[0].group, b // heads[1].group)
            left, right = (w.T if part == "o" else w for w in (old[part], new[part]))
            moved = _rows(left, i, heads[0].size) @ hidden
            found.append(torch.linalg.pinv(moved).T @ _rows(right, j, heads[1].size).T)
    return maps


def naive_unit_maps(old: Parts, new: Parts, hidden: Tensor) -> dict[str, Tensor]:
    """Return the dense map ``(I_o, I_n)`` from the moved old to the new units, by feed-forward part."""
    found = {}
    for part in ("gate", "up", "down"):
        left, right = (w.T if part == "down" else w for w in (old[part], new[part]))
        found[part] = torch.linalg.pinv(left @ hidden).T @ right.T
    return found


def naive_truncation(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors of a whole update, ``(out, rank)`` and ``(rank, in)``, by a dense SVD."""
    U, s, Vt = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * s[:rank], Vt[:rank]
