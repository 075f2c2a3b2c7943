"""The map between both hidden sizes, fitted on the embeddings of shared tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..linalg.basis import hidden_map
from ..models.backbone import Backbone
from ..text.vocabulary import shared_tokens
from .options import MapOptions

FIT_TOKENS = 16384
"""Shared tokens that the hidden map is fitted on, or eight times the hidden size if that is more. They are taken from
the low ids: in byte-pair vocabularies the frequent tokens, whose embeddings are trained best."""


def fit_hidden_map(old: Backbone, new: Backbone, options: MapOptions) -> tuple[Tensor, dict[str, Any]]:
    """Fit the hidden map on the shared tokens and measure how well it tells them apart."""
    left, right = shared_tokens(
        old.tokenizer, new.tokenizer, old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    if not len(left):
        raise LoraSuiteError(
            "the tokenizers share no token",
            where=f"{old!r} and {new!r}",
            do="this pair of backbones cannot be mapped: retrain the adapter",
        )
    count = max(FIT_TOKENS, 8 * old.arch.hidden)
    left, right = left[:count], right[:count]
    E_o, E_n = old.embedding(left), new.embedding(right)
    hidden = hidden_map(E_o, E_n, options.hidden_map)
    info: dict[str, float | None] = {"error": fit_error(E_o @ hidden, E_n)}
    info["agreement"] = agreement(E_o @ hidden, E_n)
    info["held_out"] = held_out_agreement(E_o, E_n, options.hidden_map)
    if E_o.shape == E_n.shape:
        info["distance"] = fit_error(E_o, E_n)
    facts = {"shared_tokens": len(left), "hidden": info}
    return hidden, facts


def fit_error(moved: Tensor, target: Tensor) -> float:
    """Relative error of the hidden map on the shared embeddings."""
    return round(float((moved - target).norm() / target.norm()), 6)


def agreement(moved: Tensor, target: Tensor, sample: int = 512) -> float:
    """Share of sampled tokens whose moved embedding is nearest, by cosine, to its own new embedding."""
    rows = torch.linspace(0, len(moved) - 1, min(sample, len(moved))).long()
    normalize = torch.nn.functional.normalize
    nearest = (normalize(moved[rows]) @ normalize(target).T).argmax(dim=1)
    return round(float((nearest == rows).float().mean()), 4)


def held_out_agreement(old: Tensor, new: Tensor, kind: str) -> float | None:
    """Agreement on every other token of a map that was fitted on the rest; None where the rest is too little.

    Where the tokens are few against the hidden size, a fit finds its own tokens again between any two backbones.
    """
    try:
        fitted = hidden_map(old[::2], new[::2], kind)
    except LoraSuiteError:
        return None
    return agreement(old[1::2] @ fitted, new[1::2])
