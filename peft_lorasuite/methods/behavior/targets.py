"""Target logits of the upgraded model: those of the new model, shifted by the adapter's effect on the old model.

The difference of two models tells by how much a token's logit must rise, but not to what value: a token that the old
base model finds likelier than the new one does ends up too low, and what the new model prefers stays on top. So where
the adapter made the old model certain, the old adapted model's own probabilities are the target; see `build_targets`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
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
from .options import BehaviorOptions

CHUNK = 32
"""Positions whose logits over the whole vocabulary are computed at once. With 150,000 tokens they stay below 32 MB,
above which glibc requests every tensor from the system, which takes as long as the arithmetic."""
CHANGED = 0.1
"""KL divergence, in nats, at which the adapter counts as having changed a position, for ``teacher_weight``."""
FEWEST_SHARED = 100
"""Fewer shared tokens than this give no useful targets."""


class Head:
    """Final norm and language-model head of a loaded model, copied to the CPU; the norm in float32.

    Args:
        model: The loaded model.
        backbone: Its backbone.
    """

    def __init__(self, model: Any, backbone: Backbone) -> None:
        out = model.get_output_embeddings()
        self.norm = copy.deepcopy(model.get_submodule(backbone.arch.final_norm)).cpu().float().requires_grad_(False)
        self._weight: Tensor | None = out.weight.detach().cpu()
        self._read_again: Callable[[], Tensor]
        self.bias = None if out.bias is None else out.bias.detach().cpu().float()
        self.scaling = float(getattr(model.config, "logits_scaling", None) or 1.0)
        self.cap = getattr(model.config, "final_logit_softcapping", None)

    @property
    def weight(self) -> Tensor:
        """Weight of the head, (tokens, D), in the checkpoint's dtype."""
        if self._weight is None:
            self._weight = self._read_again()
        return self._weight

    def release(self, backbone: Backbone) -> None:
        """Free the weight until it is needed again, when it is read from the backbone's checkpoint."""
        if not backbone.in_memory:
            like = self.weight[:0].clone()
            self._weight, self._read_again = None, lambda: backbone.unembedding().to(like)

    def restrict(self, ids: Tensor) -> Head:
        """Return the head restricted to some tokens, with the weight in float32 for solves."""
        part = copy.copy(self)
        part._weight = self.weight[ids].float()
        part.bias = None if self.bias is None else self.bias[ids]
        return part

    def logits(self, states: Float[Tensor, "positions hidden"], *, normed: bool = False) -> Tensor:
        """Return the logits, (positions, tokens), of states before or (``normed``) after the final norm, in float32."""
        states = states if normed else self.norm(states.float())
        values = (states.to(self.weight.dtype) @ self.weight.T).float()
        values = (values if self.bias is None else values + self.bias) / self.scaling
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Pairs of a new token and the old token whose change of probability it follows; every new token at most once.

    Shared tokens follow themselves, and the end-of-sequence token follows that of the old tokenizer. A token of the new
    tokenizer alone (``://``) follows the longest old token that it begins with (``:``): otherwise it would keep its
    probability while those of similar tokens fall.

    Attributes:
        old: Old token ids, (pairs,).
        new: New token ids, (pairs,).
    """

    old: Int[Tensor, " tokens"]
    new: Int[Tensor, " tokens"]

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
        return cls(torch.cat([left[keep], torch.tensor([ends[0]])]), torch.cat([right[keep], torch.tensor([ends[1]])]))

    def to_old_tokens(self, new: Tensor, *, like: Tensor) -> Tensor:
        """Return log-probabilities over the old tokens, shaped ``like`` given ones.

        The probability of an old token is the sum over the new tokens that follow it; ``new`` are log-probabilities.
        """
        summed = torch.zeros_like(like).index_add_(1, self.old, new.exp()[:, self.new])
        return summed.clamp_min(torch.finfo(summed.dtype).tiny).log()


@dataclass(frozen=True, eq=False)
class PlaceVocabularies:
    """The pairs of tokens that hold at each of some positions.

    Attributes:
        vocabularies: The different ones.
        kinds: Index of that of each position, (positions,).
    """

    vocabularies: Sequence[Vocabulary]
    kinds: Int[Tensor, " positions"]

    @classmethod
    def pair(cls, old: Backbone, new: Backbone, wanted: Sequence[Any]) -> PlaceVocabularies:
        """Pair the tokens of two backbones for positions; ``wanted`` has ``starts`` and ``ends`` of each."""
        spaced = [has_space_tokens(one.tokenizer) for one in (old, new)]
        wanted = [
            (tuple(text if one else "" for text, one in zip(starts, spaced, strict=True)), ends)
            for starts, ends in wanted
        ]
        different = list(dict.fromkeys(wanted))
        vocabularies = [Vocabulary.pair(old, new, starts=starts, ends=ends) for starts, ends in different]
        return cls(vocabularies, torch.tensor([different.index(one) for one in wanted]))

    def at(self, rows: Any) -> PlaceVocabularies:
        """Return those of some of the positions."""
        return PlaceVocabularies(self.vocabularies, self.kinds[rows])


@dataclass(frozen=True, eq=False)
class Targets:
    """Target log-probabilities at some positions over some tokens of the new vocabulary.

    Attributes:
        ids: New token ids of the candidates, (candidates,).
        log_probs: Target log-probabilities, normalized over the candidates, (positions, candidates).
        confidence: Value of the entropy gate at each position, from 0 to 1, (positions,).
    """

    ids: Tensor
    log_probs: Tensor
    confidence: Tensor

    def with_anchors(self, head: Head, states: Tensor) -> Targets:
        """Append the model's own probabilities at the states of anchors, (anchors, D), before the final norm."""
        own = head.restrict(self.ids).logits(states).log_softmax(dim=-1)
        return Targets(
            self.ids, torch.cat([self.log_probs, own]), torch.cat([self.confidence, torch.ones(len(states))])
        )


@torch.no_grad()
def build_targets(
    old_head: Head, new_head: Head, vocabulary: Vocabulary | PlaceVocabularies, adapted: Tensor, plain: Tensor,
    states: Tensor, options: BehaviorOptions, *, seed: int,
) -> Targets:  # fmt: skip
    """Return ``new + c * (old adapted - ((1 - w) old + w new))`` in log-probabilities, on the candidate tokens.

    With H the entropy of the old adapted model and K its KL divergence from the old model, both in nats,
    ``c = clamp(2 (1 - H / entropy_gate), 0, 1)`` asks for no change where the old adapted model is uncertain (1 without
    a gate), and ``w = clamp(2 (1 - H / confidence_entropy), 0, 1) * clamp(K / confidence_entropy, 0, 1)`` makes its own
    probabilities the target where the adapter made it certain. With a ``teacher_weight``,
    ``w = teacher_weight * clamp(K / CHANGED, 0, 1)`` instead. The candidates are the ``top`` likeliest tokens of target
    and new model at every position, and ``extra`` tokens drawn at random.

    Args:
        old_head: Head of the old backbone.
        new_head: Head of the new one.
        vocabulary: Their paired tokens, the same at all positions or those of each.
        adapted: States of the old adapted model after its final norm, (positions, D_o).
        plain: States of the old model after its final norm, (positions, D_o).
        states: States of the new model before its final norm, (positions, D_n).
        options: Resolved options: ``entropy_gate``, ``confidence_entropy``, ``teacher_weight``, ``top``, ``extra``.
        seed: Seed of the random candidates.
    """
    size = len(new_head.weight)
    if isinstance(vocabulary, Vocabulary):
        vocabulary = PlaceVocabularies([vocabulary], torch.zeros(len(states), dtype=torch.long))
    pairs = vocabulary
    seen = torch.zeros(size, dtype=torch.bool)
    seen[torch.randint(size, (options.extra,), generator=torch.Generator().manual_seed(seed))] = True
    confidence = torch.empty(len(states))

    def target_at(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        after, before = (old_head.logits(x[rows], normed=True).log_softmax(dim=-1) for x in (adapted, plain))
        new = new_head.logits(states[rows]).log_softmax(dim=-1)
        if len(pairs.vocabularies) == 1:
            return new, *_shift_logits(new, after, before, pairs.vocabularies[0], options)
        kinds, shifted, sure = pairs.kinds[rows], torch.empty_like(new), torch.empty(len(new))
        for kind in kinds.unique().tolist():
            at = kinds == kind
            shifted[at], sure[at] = _shift_logits(new[at], after[at], before[at], pairs.vocabularies[kind], options)
        return new, shifted, sure

    for rows in chunks(len(states)):
        new, shifted, sure = target_at(rows)
        confidence[rows] = sure
        for values in (shifted, new):
            seen[values.topk(min(options.top or 1, size)).indices.flatten()] = True
    ids = seen.nonzero()[:, 0]
    log_probs = torch.empty(len(states), len(ids))  # at once: small tensors between large ones fragment the heap
    for rows in chunks(len(states)):
        log_probs[rows] = target_at(rows)[1][:, ids].log_softmax(dim=-1)
    return Targets(ids, log_probs, confidence)


def _shift_logits(
    new: Tensor, after: Tensor, before: Tensor, vocabulary: Vocabulary, options: BehaviorOptions
) -> tuple[Tensor, Tensor]:
    """Shift the new log-probabilities by the adapter's change; also return the value of the entropy gate.

    New tokens that follow no old token keep their log-probability.
    """
    entropy = -(after.exp() * after).sum(dim=-1)
    reference = before
    if options.teacher_weight or options.confidence_entropy:
        bound = CHANGED if options.teacher_weight else options.confidence_entropy
        weight = options.teacher_weight or _confidence(entropy, bound)
        changed = ((after.exp() * (after - before)).sum(dim=-1) / bound).clamp(0, 1)
        reference = torch.lerp(before, vocabulary.to_old_tokens(new, like=after), (weight * changed)[:, None])
    gate = options.entropy_gate
    sure = _confidence(entropy, gate) if gate else torch.ones_like(entropy)
    shifted = new.clone()
    shifted[:, vocabulary.new] += sure[:, None] * (after - reference)[:, vocabulary.old]
    return shifted, sure


def _confidence(entropy: Tensor, bound: float) -> Tensor:
    """Return 1 up to an entropy of half the bound, falling linearly to 0 at the bound."""
    return (2 * (1 - entropy / bound)).clamp(0, 1)


def chunks(count: int, size: int = CHUNK) -> Sequence[slice]:
    """Return slices of at most ``size`` positions that cover ``count``."""
    return [slice(start, start + size) for start in range(0, count, size)]
