"""The prefix that all rows of a batch share, usually that of a prompt template: computed once, not once per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arch.registry import has_converter
from ..compat import body, cache_argument, model_type, output_cache
from .forward import model_inputs, unwrap

MIN_PREFIX = 8
"""Length in tokens below which a shared prefix is not worth a pass of its own."""


def has_known_cache(model: Any) -> bool:
    """Return whether the cache of a model can hold a prefix and padding, which is known of types with a converter.

    Others may be recurrent or hybrid, as Qwen3.5 is: a state has no positions that a mask could hide, or that could be
    left out.
    """
    config = unwrap(model).config
    hybrid = "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())
    return has_converter(model_type(config)) and not hybrid


def decoder(model: Any) -> Any:
    """Return the decoder of a model, without the head; PEFT adapters stay attached."""
    return body(unwrap(model))


def count_shared_columns(ids: Tensor, first: int) -> int:
    """Count the leading columns of ids, (rows, length), in which all rows agree, at most ``first``."""
    same = (ids == ids[:1]).all(dim=0).long().cumprod(dim=0)
    return min(int(same.sum()), first)


def cache_shared_prefix(model: Any, rows: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """Compute the key/value cache of the prefix that rows of any length share, so that padding can follow it.

    Returns:
        The length of the prefix, which leaves out the last token of every row, and its cache, repeated for all rows.
        0 and None where the prefix is short, or where a sliding window would count the padding too.
    """
    from transformers import DynamicCache

    if not has_known_cache(model):
        return 0, None
    if any(DynamicCache(config=decoder(model).config).is_sliding):
        return 0, None
    shortest = min(map(len, rows))
    return _cache_prefix(model, torch.tensor([row[:shortest] for row in rows], device=model.device), shortest - 1)


def _cache_prefix(model: Any, ids: Tensor, first: int) -> tuple[int, Any]:
    """Return the length of the shared prefix, at most ``first``, and its cache; 0 and None if it is short."""
    count = count_shared_columns(ids, first)
    if len(ids) < 2 or count < MIN_PREFIX or not has_known_cache(model):
        return 0, None
    cache = output_cache(decoder(model)(input_ids=ids[:1, :count], use_cache=True))
    cache.batch_repeat_interleave(len(ids))
    return count, cache


def reuse_shared_prefix(model: Any, ids: Tensor, mask: Tensor, first: int) -> tuple[dict[str, Any], int]:
    """Compute the prefix that all rows share once; gradients flow through it.

    Args:
        model: A plain or PEFT model, not wrapped for several processes.
        ids: Token ids, (rows, length), padded on the right.
        mask: Attention mask of the same shape.
        first: First position whose output is needed.

    Returns:
        The model's inputs for the rest of every row, and the length of the prefix; 0 where it is short.
    """
    count, cache = _cache_prefix(model, ids, first)
    if not count:
        return model_inputs(model, input_ids=ids, attention_mask=mask, use_cache=False), 0
    rest = {"input_ids": ids[:, count:], "attention_mask": mask, "use_cache": True}
    return {**rest, **cache_argument(cache)}, count
