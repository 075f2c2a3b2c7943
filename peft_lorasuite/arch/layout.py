"""Where each part's rows lie in a projection, and how key/value heads relate to query heads.

One table of row numbers serves every direction: indexing with it splits, assigning through it joins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoraSuiteError
from .spec import OUTPUT_PROJECTIONS, Architecture, Heads, Site


def head_rows(site: Site, arch: Architecture) -> dict[str, Tensor]:
    """Return the row numbers of each part of a site, in head order; together a permutation of all rows."""
    if site.parts[0] in OUTPUT_PROJECTIONS:
        return {site.parts[0]: torch.arange(arch.hidden)}
    if site.rows == "part head dim":
        return _one_after_the_other(site, arch)
    return _per_group(arch.heads, by_head=site.rows == "head part dim", path=site.path)


def _one_after_the_other(site: Site, arch: Architecture) -> dict[str, Tensor]:
    rows, start = {}, 0
    for part in site.parts:
        width = arch.shape(part)[0]
        rows[part] = torch.arange(start, start + width)
        start += width
    return rows


def _per_group(heads: Heads, *, by_head: bool, path: str) -> dict[str, Tensor]:
    """Rows of ``(group, its query heads then key then value, dim)``; by head is the case of groups of one."""
    if by_head and heads.group != 1:
        raise LoraSuiteError(
            "rows ordered head by head need as many key/value heads as query heads",
            where=path,
            got=f"{heads.query} query and {heads.key_value} key/value heads",
        )
    table = torch.arange(heads.key_value * (heads.group + 2) * heads.size)
    table = table.reshape(heads.key_value, heads.group + 2, heads.size)
    return {"q": table[:, :-2].reshape(-1), "k": table[:, -2].reshape(-1), "v": table[:, -1].reshape(-1)}


def split(rows: Float[Tensor, "out ..."], site: Site, arch: Architecture) -> dict[str, Tensor]:
    """Take a site's weight, bias or LoRA B apart into its parts, along the first dimension."""
    table = head_rows(site, arch)
    total = sum(len(numbers) for numbers in table.values())
    if rows.shape[0] != total:
        raise LoraSuiteError(
            "a tensor does not fit its module", where=site.path, got=tuple(rows.shape), wanted=f"{total} rows"
        )
    return {part: _taken(rows, numbers) for part, numbers in table.items()}


def _taken(rows: Tensor, numbers: Tensor) -> Tensor:
    """Take rows by their numbers: a view where they follow each other, as they do unless heads are interleaved."""
    if bool((numbers.diff() == 1).all()):
        return rows[int(numbers[0]) : int(numbers[-1]) + 1]
    return rows[numbers]


def join(parts: Mapping[str, Tensor], site: Site, arch: Architecture) -> Tensor:
    """Put the parts of a site together; the inverse of `split`."""
    table = head_rows(site, arch)
    missing = [part for part in site.parts if part not in parts]
    if missing:
        raise LoraSuiteError("parts are missing", where=site.path, got=sorted(parts), wanted=site.parts)
    first = parts[site.parts[0]]
    whole = first.new_empty(sum(len(numbers) for numbers in table.values()), *first.shape[1:])
    for part, numbers in table.items():
        whole[numbers] = parts[part]
    return whole


def heads_first(weight: Tensor, part: str, heads: Heads) -> Float[Tensor, "heads size other"]:
    """View an attention part's weight ``(out, in)`` as one ``(d, D)`` block a head; o's columns become rows."""
    rows = weight.T if part == "o" else weight
    return rows.reshape(heads.count(part), heads.size, -1)


def group_of(heads: Heads) -> Tensor:
    """Return the key/value head of every query head, shape (H,)."""
    return torch.arange(heads.query) // heads.group


def place_rows(blocks: Tensor, heads: Tensor, count: int) -> tuple[Tensor, float]:
    """Average the blocks that meet in a head and lay them out; heads without one get zeros.

    Also return the share of the energy that the average keeps: 1 where heads that meet agree.
    """
    total = blocks.new_zeros(count, *blocks.shape[1:]).index_add_(0, heads, blocks)
    met = torch.bincount(heads, minlength=count).clamp(min=1).to(blocks.dtype)
    mean = total / met[:, None, None]
    energy = float((blocks**2).sum())
    kept = float((mean**2).sum(dim=(1, 2)) @ met) / energy if energy else 1.0
    return mean.reshape(-1, blocks.shape[-1]), kept
