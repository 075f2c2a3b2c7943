"""The logits that the upgraded model should give: the new model's, moved by what the adapter did to the old one's.

The difference of two models says by how much a token rose, not how far it has to: a token that the old backbone found
likelier than the new one does arrives too low, and what the new one prefers stays on top. So where the adapter made the
old model sure, its own probabilities are asked for; see `teach`.
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
from ...text.vocabulary import first_pieces, shared_tokens

CHUNK = 32
"""Positions whose logits over the whole vocabulary are held at once: those of 150,000 tokens stay below the 32 MB from
which on glibc asks the system for every tensor anew, which takes as long as the arithmetic."""
CHANGED = 0.1
"""Nats of divergence from which on the adapter counts as having changed a position, for ``share``."""
FEWEST_SHARED = 100
"""Fewer shared tokens than this give no useful teacher."""


class Head:
    """Final norm and language-model head of a loaded model on the CPU, where the states that were read off it are.

    The norm is in float32, the weight as in the checkpoint.
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
        """One row for every token, (tokens, D)."""
        if self._weight is None:
            self._weight = self._read_again()
        return self._weight

    def let_go(self, backbone: Backbone) -> None:
        """Make room: the weight is read from the backbone's checkpoint when it is asked for again."""
        if not backbone.in_memory:
            like = self.weight[:0].clone()
            self._weight, self._read_again = None, lambda: backbone.unembedding().to(like)

    def on(self, ids: Tensor) -> Head:
        """Return the head restricted to some tokens, its weight in float32 for solves."""
        part = copy.copy(self)
        part._weight = self.weight[ids].float()
        part.bias = None if self.bias is None else self.bias[ids]
        return part

    def logits(self, states: Float[Tensor, "positions hidden"], *, normed: bool = False) -> Tensor:
        """Logits of states before (or, ``normed``, after) the final norm, in float32."""
        states = states if normed else self.norm(states.float())
        values = (states.to(self.weight.dtype) @ self.weight.T).float()
        values = (values if self.bias is None else values + self.bias) / self.scaling
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """New tokens, and the old token whose change of probability each takes over; every new token at most once.

    A token that both have takes its own, the end of sequence the other's end of sequence, and a token that only the new
    tokenizer has (``://``) that of the old token which it begins with (``:``): else it would keep its place while all
    the others around it fall.
    """

    old: Int[Tensor, " tokens"]
    new: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, old: Backbone, new: Backbone) -> Vocabulary:
        """Pair two backbones' tokens; refuses vocabularies with next to nothing in common."""
        rows = {"old_rows": old.arch.vocabulary, "new_rows": new.arch.vocabulary}
        left, right = shared_tokens(old.tokenizer, new.tokenizer, **rows)
        if len(left) < min(FEWEST_SHARED, new.arch.vocabulary // 4):
            raise LoraSuiteError(
                "the tokenizers share too few tokens", where=f"{old!r} and {new!r}", got=len(left),
                wanted=f"at least {FEWEST_SHARED}", do="use a weight-based method, or retrain",
            )  # fmt: skip
        pieces, whole = first_pieces(old.tokenizer, new.tokenizer, **rows)
        left, right = torch.cat([left, pieces]), torch.cat([right, whole])
        ends = old.tokenizer.eos_token_id, new.tokenizer.eos_token_id
        keep = (left != ends[0]) & (right != ends[1])
        return cls(torch.cat([left[keep], torch.tensor([ends[0]])]), torch.cat([right[keep], torch.tensor([ends[1]])]))

    def pooled(self, new: Tensor, *, like: Tensor) -> Tensor:
        """Log-probability, shaped ``like`` the old ones, of all new tokens together that one old token speaks for."""
        found = torch.zeros_like(like).index_add_(1, self.old, new.exp()[:, self.new])
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()


@dataclass(frozen=True, eq=False)
class Teacher:
    """Target log-probabilities at some positions over some tokens of the new vocabulary.

    Attributes:
        ids: New ids of the candidate tokens.
        target: ``(positions, candidates)``, normalised over the candidates.
        confidence: Of the old adapted model at each position, from 0 to 1.
    """

    ids: Tensor
    target: Tensor
    confidence: Tensor

    def holding(self, head: Head, states: Tensor) -> Teacher:
        """Also ask a model for what it says by itself, at further states before its final norm."""
        own = head.on(self.ids).logits(states).log_softmax(dim=-1)
        return Teacher(self.ids, torch.cat([self.target, own]), torch.cat([self.confidence, torch.ones(len(states))]))


@torch.no_grad()
def teach(
    old_head: Head, new_head: Head, vocabulary: Vocabulary, adapted: Tensor, plain: Tensor, states: Tensor, *,
    gate: float, trust: float, share: float, top: int, extra: int, seed: int,
) -> Teacher:  # fmt: skip
    """Return ``new + c * (old adapted - ((1 - w) old + w new))`` in log-probabilities, on the tokens that matter.

    Args:
        old_head: Head of the old backbone.
        new_head: Head of the new one.
        vocabulary: Their shared tokens.
        adapted: States of the old adapted model after its final norm, (positions, D_o).
        plain: The same without the adapter.
        states: States of the new model before its final norm, (positions, D_n).
        gate: ``c = clamp(2 (1 - H / gate), 0, 1)``, H the entropy in nats of the old adapted model: no change is asked
            for where it does not know, all of it below half the gate. 0 turns the gate off.
        trust: ``w = clamp(2 (1 - H / trust), 0, 1) * clamp(K / trust, 0, 1)``, K the divergence of the old adapted
            model from the old one in nats: where the adapter made the old model sure, the target is what that says
            itself; where the adapter does nothing, nothing is asked for. 0 leaves the difference of logits alone.
        share: If not 0, ``w = share * clamp(K / CHANGED, 0, 1)`` instead, however sure the old adapted model is.
        top: Candidates from the teacher's and the new model's likeliest tokens at every position.
        extra: Further candidates, drawn at random.
        seed: Of that draw.
    """
    size = len(new_head.weight)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[torch.randint(size, (extra,), generator=torch.Generator().manual_seed(seed))] = True
    confidence = torch.empty(len(states))

    def moved_at(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        after, before = (old_head.logits(x[rows], normed=True).log_softmax(dim=-1) for x in (adapted, plain))
        new = new_head.logits(states[rows]).log_softmax(dim=-1)
        return new, *_moved(new, after, before, vocabulary, gate, trust, share)

    for rows in chunks(len(states)):
        new, moved, sure = moved_at(rows)
        confidence[rows] = sure
        for values in (moved, new):
            seen[values.topk(min(top, size)).indices.flatten()] = True
    ids = seen.nonzero()[:, 0]
    target = torch.empty(len(states), len(ids))  # one piece: small ones between large ones that go would tear the heap
    for rows in chunks(len(states)):
        target[rows] = moved_at(rows)[1][:, ids].log_softmax(dim=-1)
    return Teacher(ids, target, confidence)


def _moved(
    new: Tensor, after: Tensor, before: Tensor, vocabulary: Vocabulary, gate: float, trust: float, share: float
) -> tuple[Tensor, Tensor]:
    """Move the new log-probabilities by the adapter's change; tokens that only the new side has keep theirs.

    Also return how sure the old adapted model is, by the gate, from 0 to 1.
    """
    entropy = -(after.exp() * after).sum(dim=-1)
    reference = before
    if trust or share:
        weight, bound = (share, CHANGED) if share else (_sure(entropy, trust), trust)
        changed = ((after.exp() * (after - before)).sum(dim=-1) / bound).clamp(0, 1)
        reference = torch.lerp(before, vocabulary.pooled(new, like=after), (weight * changed)[:, None])
    sure = _sure(entropy, gate) if gate else torch.ones_like(entropy)
    moved = new.clone()
    moved[:, vocabulary.new] += sure[:, None] * (after - reference)[:, vocabulary.old]
    return moved, sure


def _sure(entropy: Tensor, bound: float) -> Tensor:
    """Fall from one at half the bound to zero at the bound."""
    return (2 * (1 - entropy / bound)).clamp(0, 1)


def chunks(count: int, size: int = CHUNK) -> Sequence[slice]:
    """Return slices of this size that cover so many positions."""
    return [slice(start, start + size) for start in range(0, count, size)]
