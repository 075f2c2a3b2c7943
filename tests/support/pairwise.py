"""Pairwise testing: rows in which every pair of values of two settings occurs at least once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairwise_rows(settings: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows that cover all pairs of values, by a greedy choice among random candidates."""
    draw, names = random.Random(seed), list(settings)
    missing = {
        (one, i, other, j)
        for one, other in combinations(names, 2)
        for i in range(len(settings[one]))
        for j in range(len(settings[other]))
    }
    rows = []
    while missing:
        one, i, other, j = min(missing)
        candidates = []
        for _ in range(60):
            chosen = {name: draw.randrange(len(settings[name])) for name in names} | {one: i, other: j}
            covered = {(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)} & missing
            candidates.append((len(covered), len(candidates), chosen, covered))
        _, _, chosen, covered = max(candidates, key=lambda item: item[:2])
        missing -= covered
        rows.append({name: settings[name][index] for name, index in chosen.items()})
    return rows
