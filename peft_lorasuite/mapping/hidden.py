"""The hidden map between the hidden spaces of two backbones, fitted on the embeddings of shared tokens."""

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
"""Shared tokens that the hidden map is fitted on, or eight times the hidden size if that is more. The lowest ids are
used: in byte-pair vocabularies these are the most frequent tokens, with the best trained embeddings."""


def fit_hidden_map(old: Backbone, new: Backbone, options: MapOptions) -> tuple[Tensor, dict[str, Any]]:
    """Fit the hidden map on the shared tokens, and measure how well it fits.

    Returns:
        The map ``W_h``, (D_o, D_n), and measurements for the report.

    Raises:
        LoraSuiteError: When the tokenizers share no token.
    """
    left, right = _shared_tokens(old, new)
    count = max(FIT_TOKENS, 8 * old.arch.hidden)
    left, right = left[:count], right[:count]
    E_o, E_n = old.embedding(left), new.embedding(right)
    for backbone, rows in ((old, E_o), (new, E_n)):
        if not rows.any():
            raise LoraSuiteError("the embedding is zero", where=repr(backbone), do="train or fetch the backbone again")
    hidden = hidden_map(E_o, E_n, options.hidden_map)
    mapped = E_o @ hidden
    quality: dict[str, float | None] = {"error": relative_error(mapped, E_n), "agreement": agreement(mapped, E_n)}
    quality["held_out"] = held_out_agreement(E_o, E_n, options.hidden_map)
    if E_o.shape == E_n.shape:
        quality["distance"] = relative_error(E_o, E_n)
    return hidden, {"shared_tokens": len(left), "hidden": quality}


def count_shared_tokens(old: Backbone, new: Backbone) -> int:
    """Count the tokens that both tokenizers have.

    Raises:
        LoraSuiteError: When there is none.
    """
    return len(_shared_tokens(old, new)[0])


def _shared_tokens(old: Backbone, new: Backbone) -> tuple[Tensor, Tensor]:
    left, right = shared_tokens(
        old.tokenizer, new.tokenizer, old_rows=old.arch.vocabulary, new_rows=new.arch.vocabulary
    )
    if not len(left):
        raise LoraSuiteError(
            "the tokenizers share no token",
            where=f"{old!r} and {new!r}",
            do="retrain the adapter: this pair of backbones cannot be mapped",
        )
    return left, right


def relative_error(mapped: Tensor, target: Tensor) -> float:
    """Return ``||mapped - target||_F / ||target||_F``."""
    target = target.double()  # the squares of tiny embeddings are zero in float32
    return round(float((mapped.double() - target).norm() / target.norm()), 6)


def agreement(mapped: Tensor, target: Tensor, sample: int = 512) -> float:
    """Return the share of sampled tokens whose mapped embedding is nearest, by cosine, to its own new embedding."""
    rows = torch.linspace(0, len(mapped) - 1, min(sample, len(mapped))).long()
    normalize = torch.nn.functional.normalize
    nearest = (normalize(mapped[rows]) @ normalize(target).T).argmax(dim=1)
    return round(float((nearest == rows).float().mean()), 4)


def held_out_agreement(old: Tensor, new: Tensor, kind: str) -> float | None:
    """Return the agreement on every other token of a map fitted on the remaining tokens; None if these are too few.

    With few tokens relative to the hidden size, a fit recovers its own tokens between any two backbones.
    """
    try:
        fitted = hidden_map(old[::2], new[::2], kind)
    except LoraSuiteError:
        return None
    return agreement(old[1::2] @ fitted, new[1::2])
