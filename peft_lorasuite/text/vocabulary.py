"""Tokens that two tokenizers share, and positions in a text where tokens of both end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError

BYTE_LEVEL, SENTENCE_PIECE, WORD_PIECE = "Ġ", "▁", "##"
"""How the kinds of vocabularies mark tokens: the first two a word's start, WordPiece its continuation."""


def shared_tokens(old: Any, new: Any, *, old_rows: int, new_rows: int) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that stand for the same text in both vocabularies.

    Word starts are compared across byte-level BPE, SentencePiece and WordPiece.

    Args:
        old: The old tokenizer.
        new: The new tokenizer.
        old_rows: Rows of the old embedding; ids from there on are left out.
        new_rows: Rows of the new embedding.

    Returns:
        Old ids and new ids, both ``(tokens,)``, ascending by old id.
    """
    left, right = old.get_vocab(), new.get_vocab()
    if _word_marker(left) != _word_marker(right):  # with the same marker, tokens compare as they are
        left, right = plain_vocabulary(old), plain_vocabulary(new)
    pairs = [(left[text], right[text]) for text in left if text in right]
    pairs = sorted((a, b) for a, b in pairs if a < old_rows and b < new_rows)
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def plain_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Map the text that each token stands for to the token's id; word starts have a leading space.

    If several tokens stand for the same text, the lowest id is kept: the order of ``get_vocab`` differs between runs.
    """
    vocabulary = tokenizer.get_vocab()
    special, marker = _special_tokens(tokenizer), _word_marker(vocabulary)
    ordered = sorted(vocabulary.items(), key=itemgetter(1), reverse=True)
    return {token if token in special else _decode(token, marker): number for token, number in ordered}


def has_space_tokens(tokenizer: Any) -> bool:
    """Return whether tokens contain the space before a word, as in byte-level BPE and SentencePiece."""
    return _word_marker(tokenizer.get_vocab()) in (BYTE_LEVEL, SENTENCE_PIECE)


def shared_start_tokens(
    old: Any, new: Any, starts: tuple[str, str], *, old_rows: int, new_rows: int
) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that stand for the same text after other leading white space, as `shared_tokens`.

    Args:
        old: The old tokenizer.
        new: The new tokenizer.
        starts: What old and new tokens begin with.
        old_rows: Rows of the old embedding; ids from there on are left out.
        new_rows: Rows of the new embedding.
    """
    left = _text_after(old, starts[0], old_rows)
    right = _text_after(new, starts[1], new_rows)
    table = torch.tensor(sorted((left[text], right[text]) for text in left if text in right), dtype=torch.long)
    table = table.reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _text_after(tokenizer: Any, start: str, rows: int) -> dict[str, int]:
    """Map the text after ``start`` of the tokens that begin with it to their ids."""
    return {
        text[len(start) :]: number
        for text, number in text_vocabulary(tokenizer).items()
        if number < rows and text.startswith(start) and len(text) > len(start)
    }


def longest_prefix_tokens(
    old: Any, new: Any, *, old_rows: int, new_rows: int, starts: tuple[str, str] = ("", "")
) -> tuple[Tensor, Tensor]:
    """For every new token that the old vocabulary lacks, find the longest old token that its text starts with.

    That is the token which the old model would predict first for the same text. Special tokens are left out.

    Args:
        old: The old tokenizer.
        new: The new tokenizer.
        old_rows: Rows of the old embedding; ids from there on are left out.
        new_rows: Rows of the new embedding.
        starts: What the compared tokens of each begin with, apart from the text.

    Returns:
        Ids of the old tokens and of the new tokens, both ``(tokens,)``.
    """
    left = _text_after(old, starts[0], old_rows)
    longest = max(map(len, left), default=0)
    pairs = []
    for text, number in _text_after(new, starts[1], new_rows).items():
        if text not in left:
            prefixes = (text[:size] for size in range(min(len(text) - 1, longest), 0, -1))
            match = next((left[prefix] for prefix in prefixes if prefix in left), None)
            if match is not None:
                pairs.append((match, number))
    table = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _special_tokens(tokenizer: Any) -> set[str]:
    return set(tokenizer.all_special_tokens) | set(getattr(tokenizer, "added_tokens_encoder", {}))


def text_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Map text to token ids as `plain_vocabulary` does, without special tokens."""
    special = _special_tokens(tokenizer)
    return {text: number for text, number in plain_vocabulary(tokenizer).items() if text and text not in special}


def token_texts(tokenizer: Any) -> dict[int, str]:
    """Map token ids to the text that each stands for, without special tokens."""
    return {number: text for text, number in text_vocabulary(tokenizer).items()}


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary, token strings and ids, as hexadecimal digits."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def align_token_ends(
    old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]], *, skip: int = 0
) -> list[tuple[int, int]]:
    """Pair the tokens of one text that end at the same character.

    Where several tokens make up one character, the last one is taken.

    Args:
        old: Character span ``(start, end)`` of every token of the old tokenizer; empty spans (special tokens) are
            left out.
        new: The same for the new tokenizer.
        skip: Leave out the first positions of both (attention sinks).

    Returns:
        Pairs of positions (old, new).
    """
    left, right = ({end: n for n, (start, end) in enumerate(spans) if end > start} for spans in (old, new))
    pairs = [(position, right[end]) for end, position in left.items() if end in right]
    return [(a, b) for a, b in pairs if a >= skip and b >= skip]


def _word_marker(vocabulary: dict[str, int]) -> str | None:
    """Return the most frequent marker; None if it is on at most 2 % of the tokens."""
    counts = {
        mark: sum(token.startswith(mark) for token in vocabulary) for mark in (BYTE_LEVEL, SENTENCE_PIECE, WORD_PIECE)
    }
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] > len(vocabulary) // 50 else None


def _decode(token: str, marker: str | None) -> str:
    """Return the text that a token stands for; the token itself where it is not valid UTF-8."""
    if marker == BYTE_LEVEL:
        plain = token.replace(BYTE_LEVEL, " ")
        if plain.isascii():
            return plain  # most tokens: printable ASCII characters stand for themselves
        table = _byte_values()
        codes = [table.get(character) for character in token]
        text = bytes(code for code in codes if code is not None).decode("utf-8", errors="replace")
        return token if None in codes or "�" in text else text
    if marker == SENTENCE_PIECE:
        return token.replace(SENTENCE_PIECE, " ")
    if marker == WORD_PIECE:
        return token[2:] if token.startswith(WORD_PIECE) else f" {token}"
    return token


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """Map characters to bytes: byte-level BPE writes printable bytes as they are, others as characters from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def eos_token_id(tokenizer: Any) -> int:
    """Return the id of the end-of-sequence token; raise `LoraSuiteError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise LoraSuiteError("the tokenizer has no end-of-sequence token", where=tokenizer.name_or_path)
    return tokenizer.eos_token_id


def pad_token_id(tokenizer: Any, rows: int | None = None) -> int:
    """Return the id of the padding token, else of the end-of-sequence token: padded positions are masked anyway.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the embedding; a padding token without a row, as after ``add_special_tokens`` alone, is not used.
    """
    pad = tokenizer.pad_token_id
    return eos_token_id(tokenizer) if pad is None or (rows is not None and pad >= rows) else pad


def check_token_rows(tokenizer: Any, ids: Iterable[int], rows: int, where: object) -> None:
    """Raise `LoraSuiteError` for a token without a row in the embedding.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids.
        rows: Rows of the embedding.
        where: The model, for the error message.
    """
    last = max(ids, default=0)
    if last >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        raise LoraSuiteError(
            f"the token {token!r} has no row in the embedding", where=where, got=f"id {last}", wanted=f"below {rows}",
            do="resize the model with resize_token_embeddings(len(tokenizer)) and save it, or leave the token out",
        )  # fmt: skip
