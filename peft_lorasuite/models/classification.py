"""Texts in tokens, and what a classifier or a decoder puts out at the tokens that are classified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..progress import Progress, no_progress
from ..text.prompt_text import encode_prompt
from ..text.texts import Text
from ..text.vocabulary import pad_token_id
from .activations import length_batches
from .backbone import Backbone
from .task import padding_token


@dataclass(frozen=True)
class Row:
    """A text in the tokens of one tokenizer.

    Attributes:
        ids: Token ids.
        spans: Character span of each token without leading spaces; empty for special tokens.
        places: Positions whose output counts: the last token that is not padding, or every token with characters.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    places: tuple[int, ...]


def padding_of(backbone: Backbone) -> int:
    """Return the padding token of a backbone's classifiers: that of its config, else of its tokenizer."""
    own = padding_token(backbone.config)
    return pad_token_id(backbone.tokenizer, backbone.arch.vocabulary) if own is None else own


def padding_of_model(model: Any, tokenizer: Any) -> int:
    """Return the padding token of a loaded classifier, as `padding_of` does."""
    own = padding_token(model.config)
    return pad_token_id(tokenizer, model.config.get_text_config().vocab_size) if own is None else own


def encode_for(backbone: Backbone, texts: Sequence[Text], *, per_token: bool) -> list[Row]:
    """Tokenize texts for a backbone; see `encode_texts`."""
    padding, limit = padding_of(backbone), backbone.context
    return encode_texts(
        backbone.tokenizer, texts, per_token=per_token, padding=padding, limit=limit, where=repr(backbone)
    )


def encode_texts(
    tokenizer: Any, texts: Sequence[Text], *, per_token: bool, padding: int | None, limit: int, where: str
) -> list[Row]:
    """Tokenize texts and pairs of texts as transformers does for a classifier.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        per_token: Whether every token is classified.
        padding: Padding token of the model, after which a text is not classified.
        limit: Tokens at most; the rest is cut off.
        where: The model, for messages.

    Raises:
        LoraSuiteError: For a text without tokens, and for a pair whose tokens are classified.
    """
    rows = []
    for number, text in enumerate(texts, 1):
        if per_token and text.pair is not None:
            raise LoraSuiteError("token classification reads single texts", where=f"text {number}", got="a pair")
        pair = {} if text.pair is None else {"text_pair": text.pair}
        encoded = encode_prompt(tokenizer, text.text, return_offsets_mapping=True, **pair)
        ids = tuple(encoded["input_ids"][:limit])
        spans = tuple(_trimmed(text.text, *span) for span in encoded["offset_mapping"][:limit])
        if per_token:
            places = [position for position, (start, end) in enumerate(spans) if end > start]
        else:
            places = [position for position, token in enumerate(ids) if token != padding][-1:] or [0] * bool(ids)
        if not places:
            raise LoraSuiteError(f"text {number} has no tokens", where=where, got=repr(text.text[:40]))
        rows.append(Row(ids, spans, tuple(places)))
    return rows


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a span without leading spaces, which tokenizers put into the token of the word or before it."""
    return end - len(text[start:end].lstrip()), end


def pad_rows(rows: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Pad rows of token ids on the right with the padding token; return ids and mask, (rows, length)."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def forward_rows(
    run: Any, rows: Sequence[Row], padding: int, progress: Progress = no_progress
) -> Iterator[tuple[list[int], Any]]:
    """Run a model on batches of rows of similar length; yield the indices of the rows, and the output."""
    for numbers in progress("reading texts", length_batches(rows)):
        inputs = pad_rows([rows[number].ids for number in numbers], padding)
        with torch.inference_mode():
            yield numbers, run(**{name: values.to(run.device) for name, values in inputs.items()}, use_cache=False)


def class_logits(model: Any, rows: Sequence[Row], padding: int, progress: Progress = no_progress) -> list[Tensor]:
    """Return a classifier's logits at the places of every row, (places, labels), in float32."""
    found: dict[int, Tensor] = {}
    for numbers, output in forward_rows(model, rows, padding, progress):
        logits = output.logits.float().cpu()
        for line, number in enumerate(numbers):
            values = logits[line]
            found[number] = (values[None] if logits.ndim == 2 else values[list(rows[number].places)]).clone()
    return [found[number] for number in range(len(rows))]


def covering_places(old: Row, new: Row) -> list[int]:
    """Return, for each place of a new row, the old place whose token has its first character; -1 where none does.

    Both rows are the same text.
    """
    owner: dict[int, int] = {}
    for index, place in enumerate(old.places):
        for character in range(*old.spans[place]):
            owner.setdefault(character, index)
    return [owner.get(new.spans[place][0], -1) for place in new.places]
