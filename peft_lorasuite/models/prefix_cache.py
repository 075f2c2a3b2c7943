"""The beginning that all rows of a batch share, a prompt template's as a rule, is read once instead of once a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MIN_PREFIX = 8
"""Shared tokens from which on a pass of their own is worth it."""


def decoder(model: Any) -> Any:
    """Return a model's decoder, without its head; adapters of PEFT stay on it."""
    return unwrap(model).base_model


def unwrap(model: Any) -> Any:
    """Return the transformers model in a PEFT model, or a plain one; adapters stay on its modules."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_shared_columns(ids: Tensor, first: int) -> int:
    """Count the leading columns of ``(rows, length)`` ids in which all rows agree, at most ``first``."""
    same = (ids == ids[:1]).all(dim=0).long().cumprod(dim=0)
    return min(int(same.sum()), first)


def cache_shared_prefix(model: Any, rows: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """Read what rows of any length begin with, for padding that stands behind it.

    Returns:
        The count of tokens, the last of every row left out, and their cache for every row. 0 and None where it is not
        worth a pass, or where a layer's window would count the padding too.
    """
    from transformers import DynamicCache

    if any(DynamicCache(config=decoder(model).config).is_sliding):
        return 0, None
    shortest = min(map(len, rows))
    return _cache_prefix(model, torch.tensor([row[:shortest] for row in rows], device=model.device), shortest - 1)


def _cache_prefix(model: Any, ids: Tensor, first: int) -> tuple[int, Any]:
    """Read the first columns in which all rows agree, at most ``first``: their count and cache; 0 and None for few."""
    count = count_shared_columns(ids, first)
    if len(ids) < 2 or count < MIN_PREFIX:
        return 0, None
    cache = decoder(model)(input_ids=ids[:1, :count], use_cache=True).cache
    cache.batch_repeat_interleave(len(ids))
    return count, cache


def reuse_shared_prefix(model: Any, ids: Tensor, mask: Tensor, first: int) -> tuple[dict[str, Any], int]:
    """Read what all rows begin with once; gradients flow through it.

    Args:
        model: Plain or PEFT, not wrapped for several processes.
        ids: Token ids, (rows, length), padded on the right.
        mask: Attention mask of the same shape.
        first: First position whose output is wanted.

    Returns:
        Inputs for the rest of every row, and how many positions were taken off; 0 where it is not worth a pass.
    """
    count, cache = _cache_prefix(model, ids, first)
    if not count:
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, 0
    return {"input_ids": ids[:, count:], "attention_mask": mask, "cache": cache, "use_cache": True}, count
