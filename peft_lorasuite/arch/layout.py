"""Rows of each part in a projection, and the key/value head of each query head.

`head_rows` is the only description of a layout: `split` indexes with its row numbers, `join` assigns to them. In the
rows of a part, dimensions i and i + rotary_size / 2 of a head rotate together, whatever the order in the module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LoraSuiteError
from .spec import OUTPUT_PROJECTIONS, Architecture, Heads, Site


def head_rows(site: Site, arch: Architecture) -> dict[str, Tensor]:
    """Return the row numbers of each part of a site, in the order of its heads; together a permutation of all rows.

    Args:
        site: The site.
        arch: The architecture with the sizes of the layer (`Architecture.in_layer`); also for `split` and `join`.
    """
    if site.parts[0] in OUTPUT_PROJECTIONS:
        return {site.parts[0]: torch.arange(arch.hidden)}
    rows = _rows_of_parts(site, arch)
    if arch.rotary_interleaved or arch.rotary_across:
        rows |= {part: _halves(rows[part], arch) for part in ("q", "k") if part in rows}
    return rows


def _halves(rows: Tensor, arch: Architecture) -> Tensor:
    """Reorder the rows of rotary pairs: the first dimensions of all pairs, the second ones, then what does not turn."""
    heads, size = rows.reshape(-1, arch.heads.size), arch.rotary_size
    if arch.rotary_across:
        first, second = heads.chunk(2, dim=1)
        pairs, rest = size // 2, slice(size // 2, None)
        ordered = [first[:, :pairs], second[:, :pairs], first[:, rest], second[:, rest]]
    else:
        ordered = [heads[:, 0:size:2], heads[:, 1:size:2], heads[:, size:]]
    return torch.cat(ordered, dim=1).reshape(-1)


def _rows_of_parts(site: Site, arch: Architecture) -> dict[str, Tensor]:
    if site.rows == "part head dim":
        return _rows_by_part(site, arch)
    if site.rows == "head part dim" and "k" in site.parts and arch.heads.group != 1:
        raise LoraSuiteError(
            "rows ordered head by head need as many key/value heads as query heads",
            where=site.path,
            got=f"{arch.heads.query} query and {arch.heads.key_value} key/value heads",
        )
    return _rows_by_group(arch.heads) if site.rows == "group part dim" else _rows_by_head(site, arch.heads)


def _rows_by_head(site: Site, heads: Heads) -> dict[str, Tensor]:
    table = torch.arange(heads.query * len(site.parts) * heads.size).reshape(heads.query, len(site.parts), heads.size)
    return {part: table[:, number].reshape(-1) for number, part in enumerate(site.parts)}


def _rows_by_part(site: Site, arch: Architecture) -> dict[str, Tensor]:
    rows, start = {}, 0
    for part in site.parts:
        width = arch.shape(part)[0]
        rows[part] = torch.arange(start, start + width)
        start += width
    return rows


def _rows_by_group(heads: Heads) -> dict[str, Tensor]:
    """Return the rows of ``(group, query heads then key and value, dim)``."""
    table = torch.arange(heads.key_value * (heads.group + 2) * heads.size)
    table = table.reshape(heads.key_value, heads.group + 2, heads.size)
    return {"q": table[:, :-2].reshape(-1), "k": table[:, -2].reshape(-1), "v": table[:, -1].reshape(-1)}


def split(rows: Float[Tensor, "out ..."], site: Site, arch: Architecture) -> dict[str, Tensor]:
    """Split the weight, bias or LoRA B of a site into its parts, along the first dimension."""
    table = head_rows(site, arch)
    total = sum(len(numbers) for numbers in table.values())
    if rows.shape[0] != total:
        raise LoraSuiteError(
            "wrong number of rows in a tensor", where=site.path, got=tuple(rows.shape), wanted=f"{total} rows"
        )
    return {part: _take_rows(rows, numbers) for part, numbers in table.items()}


def _take_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """Select rows by their numbers; consecutive rows are returned as a view, which avoids a copy of the weight."""
    if bool((numbers.diff() == 1).all()):
        return rows[int(numbers[0]) : int(numbers[-1]) + 1]
    return rows[numbers]


def join(parts: Mapping[str, Tensor], site: Site, arch: Architecture) -> Tensor:
    """Join the parts of a site; the inverse of `split`."""
    table = head_rows(site, arch)
    missing = [part for part in site.parts if part not in parts]
    if missing:
        raise LoraSuiteError("missing parts", where=site.path, got=sorted(parts), wanted=site.parts)
    first = parts[site.parts[0]]
    whole = first.new_empty(sum(len(numbers) for numbers in table.values()), *first.shape[1:])
    for part, numbers in table.items():
        whole[numbers] = parts[part]
    return whole


def heads_first(weight: Tensor, part: str, heads: Heads) -> Float[Tensor, "heads size other"]:
    """View an attention part's weight ``(out, in)`` as one block per head; the columns of ``o`` become rows."""
    rows = weight.T if part == "o" else weight
    return rows.reshape(heads.count(part), heads.size, -1)


def group_of(heads: Heads) -> Tensor:
    """Return the index of the key/value head of every query head, shape (H,)."""
    return torch.arange(heads.query) // heads.group


def place_rows(blocks: Tensor, heads: Tensor, count: int) -> tuple[Tensor, float]:
    """Write each block to the rows of its head: the mean where a head has several blocks, zeros where it has none.

    Args:
        blocks: One block per entry of ``heads``, shape (n, d, r).
        heads: Index of the head of each block, shape (n,).
        count: Number of heads.

    Returns:
        The rows of all heads, shape (count * d, r), and the fraction of the squared norm of ``blocks`` that the means
        keep: 1 if the blocks of each head are equal.
    """
    total = blocks.new_zeros(count, *blocks.shape[1:]).index_add_(0, heads, blocks)
    number = torch.bincount(heads, minlength=count).clamp(min=1).to(blocks.dtype)
    mean = total / number[:, None, None]
    energy = float((blocks**2).sum())
    kept = float((mean**2).sum(dim=(1, 2)) @ number) / energy if energy else 1.0
    return mean.reshape(-1, blocks.shape[-1]), kept
