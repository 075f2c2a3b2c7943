"""Which tokens of two vocabularies stand for each other: everywhere, and at single positions of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import LoraSuiteError
from ...models.backbone import Backbone
from ...text.vocabulary import (
    check_token_rows,
    eos_token_id,
    has_space_tokens,
    longest_prefix_tokens,
    shared_start_tokens,
    shared_tokens,
)

FEWEST_SHARED = 100
"""Fewer shared tokens than this give no useful targets."""


class PairedPlace(NamedTuple):
    """How tokens are paired at one position.

    Attributes:
        starts: White space that old and new tokens begin with there (see `Vocabulary.pair`).
        ends: The old and the new token that end an answer.
        following: The old and the new token that follow.
        inside: Whether the position is inside the old token that follows.
    """

    starts: tuple[str, str]
    ends: tuple[int, int]
    following: tuple[int, int]
    inside: bool = False


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Pairs of a new token and the old token whose change of probability it follows; every new token at most once.

    Shared tokens follow themselves, and the end-of-sequence token follows that of the old tokenizer. A token of the new
    tokenizer alone (``://``) follows the longest old token that it begins with (``:``): otherwise it would keep its
    probability while those of similar tokens fall. All others follow the rest of the old vocabulary together.

    Attributes:
        old: Old token ids, (pairs,).
        new: New token ids, (pairs,).
        starts: White space that old and new tokens begin with before the text that is compared; see `pair`.
    """

    old: Int[Tensor, " tokens"]
    new: Int[Tensor, " tokens"]
    starts: tuple[str, str] = ("", "")

    @classmethod
    def pair(
        cls, old: Backbone, new: Backbone, *, starts: tuple[str, str] = ("", ""), ends: tuple[int, int] | None = None
    ) -> Vocabulary:
        """Pair the tokens of two backbones.

        Args:
            old: The old backbone.
            new: The new backbone.
            starts: White space that the old and the new tokens begin with, where chat templates write it before an
                answer: `` yes`` in one model is then ``yes`` in the other.
            ends: The old and the new token that end an answer, by default the end-of-sequence tokens.

        Raises:
            LoraSuiteError: When the vocabularies share too few tokens.
        """
        rows = {"old_rows": old.arch.vocabulary, "new_rows": new.arch.vocabulary}
        if starts[0] == starts[1]:
            left, right = shared_tokens(old.tokenizer, new.tokenizer, **rows)
        else:
            left, right = shared_start_tokens(old.tokenizer, new.tokenizer, starts, **rows)
        if len(left) < min(FEWEST_SHARED, new.arch.vocabulary // 4) and starts[0] == starts[1]:
            raise LoraSuiteError(
                "the tokenizers share too few tokens", where=f"{old!r} and {new!r}", got=len(left),
                wanted=f"at least {FEWEST_SHARED}", do="use a weight-based method, or retrain",
            )  # fmt: skip
        prefixes, longer = longest_prefix_tokens(old.tokenizer, new.tokenizer, starts=starts, **rows)
        left, right = torch.cat([left, prefixes]), torch.cat([right, longer])
        ends = ends or (eos_token_id(old.tokenizer), eos_token_id(new.tokenizer))
        for end, backbone in zip(ends, (old, new), strict=True):
            check_token_rows(backbone.tokenizer, [end], backbone.arch.vocabulary, repr(backbone))
        keep = (left != ends[0]) & (right != ends[1])
        old_ids, new_ids = (
            torch.cat([ids[keep], torch.tensor([end])]) for ids, end in zip((left, right), ends, strict=True)
        )
        return cls(old_ids, new_ids, starts)

    def to(self, device: torch.device) -> Vocabulary:
        """Return the pairs on a device."""
        return self if self.old.device == device else replace(self, old=self.old.to(device), new=self.new.to(device))

    def partners(self, size: int) -> Tensor:
        """Return the old token that each of ``size`` new tokens follows, -1 for none."""
        return self.old.new_full((size,), -1).index_copy_(0, self.new, self.old)


@dataclass(frozen=True, eq=False)
class PlaceVocabularies:
    """The pairs of tokens that hold at each of some positions.

    Attributes:
        vocabularies: The different ones.
        kinds: Index of that of each position, (positions,).
        following: The old and the new token that follow each position in the answer, (positions, 2): they start at
            the same character, so that the new one follows the old one there, however each tokenizer goes on. -1 where
            it is not known.
        inside: Whether a position is inside the old token that follows: only the new token that follows is then
            compared, (positions,).
        further: Log-probabilities, of the adapted and of the plain old model, of the further old tokens in the new
            token that follows, together; 0 where it is one old token or less, (positions, 2).
        afterwards: Log-probabilities, of both models too, of the old tokens after the one that follows, up to the one
            that no longer new token goes on with; nan where they are not known, (positions, 2). See
            `continuations.deciding_positions`.
    """

    vocabularies: Sequence[Vocabulary]
    kinds: Int[Tensor, " positions"]
    following: Int[Tensor, "positions 2"]
    inside: Bool[Tensor, " positions"]
    further: Float[Tensor, "positions 2"]
    afterwards: Float[Tensor, "positions 2"]

    @classmethod
    def pair(cls, old: Backbone, new: Backbone, wanted: Sequence[PairedPlace]) -> PlaceVocabularies:
        """Pair the tokens of two backbones for positions."""
        spaced = [has_space_tokens(one.tokenizer) for one in (old, new)]
        keys = []
        for place in wanted:
            starts = tuple(text if one else "" for text, one in zip(place.starts, spaced, strict=True))
            keys.append((starts if starts[0] != starts[1] else ("", ""), place.ends))
        different = list(dict.fromkeys(keys))
        vocabularies = [Vocabulary.pair(old, new, starts=starts, ends=ends) for starts, ends in different]
        return cls(
            vocabularies, torch.tensor([different.index(key) for key in keys]),
            torch.tensor([place.following for place in wanted]), torch.tensor([place.inside for place in wanted]),
            torch.zeros(len(wanted), 2), torch.full((len(wanted), 2), torch.nan),
        )  # fmt: skip

    @classmethod
    def same(cls, vocabulary: Vocabulary, count: int) -> PlaceVocabularies:
        """Return one vocabulary for ``count`` positions."""
        zeros = torch.zeros(count, dtype=torch.long)
        further, afterwards = torch.zeros(count, 2), torch.full((count, 2), torch.nan)
        return cls([vocabulary], zeros, torch.full((count, 2), -1), zeros.bool(), further, afterwards)

    @property
    def _values(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        return self.kinds, self.following, self.inside, self.further, self.afterwards

    @property
    def shared(self) -> Bool[Tensor, " positions"]:
        """Whether several new tokens follow the old token that follows each position."""
        found = torch.zeros_like(self.inside)
        for kind, vocabulary in enumerate(self.vocabularies):
            at = ((self.kinds == kind) & ~self.inside & (self.following[:, 0] >= 0)).nonzero()[:, 0]
            old = self.following[at, 0]
            found[at] = vocabulary.old.bincount(minlength=int(self.following.max()) + 1)[old] > 1
        return found

    def at(self, rows: Any) -> PlaceVocabularies:
        """Return those of some of the positions."""
        return PlaceVocabularies(self.vocabularies, *(one[rows] for one in self._values))

    def to(self, device: torch.device) -> PlaceVocabularies:
        """Return the pairs on a device."""
        return PlaceVocabularies(
            [one.to(device) for one in self.vocabularies], *(one.to(device) for one in self._values)
        )
