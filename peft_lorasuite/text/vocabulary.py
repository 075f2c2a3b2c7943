"""The tokens that two tokenizers share, and the positions at which they cut a text alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError

BYTE_LEVEL, SENTENCE_PIECE, WORD_PIECE = "Ġ", "▁", "##"


def shared_tokens(old: Any, new: Any, *, old_rows: int, new_rows: int) -> tuple[Tensor, Tensor]:
    """Return the ids, old and new, of the tokens that stand for the same text in both vocabularies.

    Word starts are compared whatever their marker: byte-level BPE's, SentencePiece's or WordPiece's. Ids beyond the
    embedding's rows are left out.
    """
    left, right = old.get_vocab(), new.get_vocab()
    if _marker(left) != _marker(right):  # else the tokens can be compared as they are
        left, right = plain_vocabulary(old), plain_vocabulary(new)
    pairs = [(left[text], right[text]) for text in left if text in right]
    pairs = sorted((a, b) for a, b in pairs if a < old_rows and b < new_rows)
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def plain_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Map the text that a token stands for to its id; a word start is a leading space.

    Of several tokens for one text the lowest id counts: tokenizers list their vocabulary in another order every run.
    """
    vocabulary = tokenizer.get_vocab()
    special, marker = _special(tokenizer), _marker(vocabulary)
    ordered = sorted(vocabulary.items(), key=itemgetter(1), reverse=True)
    return {token if token in special else _plain(token, marker): number for token, number in ordered}


def longest_prefix_tokens(old: Any, new: Any, *, old_rows: int, new_rows: int) -> tuple[Tensor, Tensor]:
    """Return the ids of new tokens that the old vocabulary lacks, and of the old token that each begins with.

    That is the longest old token which is a beginning of the new one's text: what the old model would say first to say
    the same. Special tokens stand for no text and have no pieces.
    """
    left = {text: number for text, number in text_vocabulary(old).items() if number < old_rows}
    longest = max(map(len, left), default=0)
    pairs = []
    for text, number in text_vocabulary(new).items():
        if number < new_rows and text not in left:
            beginnings = (text[:size] for size in range(min(len(text) - 1, longest), 0, -1))
            piece = next((left[beginning] for beginning in beginnings if beginning in left), None)
            if piece is not None:
                pairs.append((piece, number))
    table = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _special(tokenizer: Any) -> set[str]:
    return set(tokenizer.all_special_tokens) | set(getattr(tokenizer, "added_tokens_encoder", {}))


def text_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Map text to token ids as `plain_vocabulary`, without special tokens."""
    special = _special(tokenizer)
    return {text: number for text, number in plain_vocabulary(tokenizer).items() if text and text not in special}


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary: token strings and ids."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def align_token_ends(
    old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]], *, skip: int = 0
) -> list[tuple[int, int]]:
    """Pair the tokens of one text that end at the same character; of several parts of a character the last ones.

    Args:
        old: Character span of every token of the old tokenizer; empty spans (special tokens) pair with nothing.
        new: The same for the new tokenizer.
        skip: Leave out this many first positions on either side (attention sinks).
    """
    left, right = ({end: n for n, (start, end) in enumerate(spans) if end > start} for spans in (old, new))
    pairs = [(position, right[end]) for end, position in left.items() if end in right]
    return [(a, b) for a, b in pairs if a >= skip and b >= skip]


def _marker(vocabulary: dict[str, int]) -> str | None:
    counts = {
        mark: sum(token.startswith(mark) for token in vocabulary) for mark in (BYTE_LEVEL, SENTENCE_PIECE, WORD_PIECE)
    }
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] > len(vocabulary) // 50 else None


def _plain(token: str, marker: str | None) -> str:
    if marker == BYTE_LEVEL:
        plain = token.replace(BYTE_LEVEL, " ")
        if plain.isascii():
            return plain  # nearly all; printable ASCII stands for itself
        table = _byte_of()
        codes = [table.get(character) for character in token]
        text = bytes(code for code in codes if code is not None).decode("utf-8", errors="replace")
        return token if None in codes or "�" in text else text
    if marker == SENTENCE_PIECE:
        return token.replace(SENTENCE_PIECE, " ")
    if marker == WORD_PIECE:
        return token[2:] if token.startswith(WORD_PIECE) else f" {token}"
    return token


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the other bytes as characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def eos_token_id(tokenizer: Any) -> int:
    """Return the id that ends a response."""
    if tokenizer.eos_token_id is None:
        raise LoraSuiteError("the tokenizer has no end-of-sequence token", where=tokenizer.name_or_path)
    return tokenizer.eos_token_id


def pad_token_id(tokenizer: Any) -> int:
    """Return the id to pad with; it is masked, so any will do."""
    return eos_token_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
