"""The adapter's change of the old model's probabilities, carried over to the tokens of the new one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .options import BehaviorOptions
from .token_pairs import PlaceVocabularies, Vocabulary

SMALLEST = 1e-6
"""Smallest probability of all tokens without a partner together, and smallest share of a probability."""
CONFIDENT = 0.5
"""Entropy, in nats, from which on the confidence is 0."""
LIKELY = 0.5
"""Probability of an old token from which on the new tokens inside it are taught."""


def shift_log_probs(
    new: Float[Tensor, "positions new_tokens"], after: Float[Tensor, "positions old_tokens"],
    before: Float[Tensor, "positions old_tokens"], pairs: PlaceVocabularies, options: BehaviorOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shift the log-probabilities of the new model by the change from ``before`` to ``after``.

    Returns:
        The shifted log-probabilities, not normalized, (positions, new tokens), and the confidence, (positions,).
    """
    groups = torch.where(pairs.inside, -1, pairs.kinds)
    none = groups.new_empty(0)
    shifted, sure = torch.empty_like(new), new.new_empty(len(new))
    for group in groups.unique().tolist():
        at = (groups == group).nonzero()[:, 0]
        vocabulary = pairs.vocabularies[group] if group >= 0 else Vocabulary(none, none)
        parts = (new, after, before) if len(at) == len(new) else (new[at], after[at], before[at])
        shifted[at], sure[at] = _shift(*parts, vocabulary, pairs.at(at), options, inside=group < 0)
    return shifted, sure


@dataclass(frozen=True, eq=False)
class _Following:
    """The new token that follows in the answer, at the positions where its probability is known by itself.

    Attributes:
        rows: The positions, (rows,).
        old: The old token that follows there, (rows,).
        new: The new token, (rows,).
        usual: Whether the new token follows this old one everywhere, (rows,).
        several: Whether the new token is several old ones, (rows,).
        part: Part of the old token's probability that the new token has, of the adapted and of the plain model,
            (rows, 2).
    """

    rows: Int[Tensor, " rows"]
    old: Tensor
    new: Tensor
    usual: Tensor
    several: Tensor
    part: Tensor

    @classmethod
    def find(cls, new_p: Tensor, summed: Tensor, vocabulary: Vocabulary, pairs: PlaceVocabularies) -> _Following:
        """Find the tokens, and their parts.

        A new token that is several old ones (``_draft``) has the probability of all of them. One that is the old token
        (``_``) has, in the old model, the probability that the text goes on as it does in the answer, which keeps it
        apart from longer tokens; of what else may come next it has its share in the new model.

        Args:
            new_p: Probabilities of the new model, (positions, new tokens).
            summed: Their sums over the tokens that follow each old one, (positions, old tokens).
            vocabulary: The pairs of tokens.
            pairs: The tokens that follow.
        """
        (old, new), several = pairs.following.T, pairs.further[:, 0] < 0
        usual = vocabulary.partners(new_p.shape[1])[new] == old
        rows = ((new >= 0) & (~usual | several | ~pairs.afterwards[:, 0].isnan())).nonzero()[:, 0]
        old, new, usual, several = old[rows], new[rows], usual[rows], several[rows]
        own = (new_p[rows, new] / summed[rows, old].clamp_min(torch.finfo(summed.dtype).tiny))[:, None].clamp_max(1)
        alone = torch.lerp(pairs.afterwards[rows].exp(), torch.ones_like(own), own)
        part = torch.where((usual & ~several)[:, None], alone, pairs.further[rows].exp())
        return cls(rows, old, new, usual, several, part)

    def split(self, log_p: Tensor, p: Tensor, side: int, *, followed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the probabilities of one old model into those of its tokens, of the new ones here, and of the rest.

        Args:
            log_p: Log-probabilities, (positions, old tokens).
            p: The probabilities.
            side: 0 for the adapted model, 1 for the plain one.
            followed: Which old tokens other new tokens follow, (positions, old tokens).

        Returns:
            Log-probabilities without the part of the new tokens here, (positions, old tokens), those of the new tokens,
            (rows,), and the probability that is left, (positions,).
        """
        at, part = (self.rows, self.old), self.part[:, side]
        rest = 1 - (p.index_put(at, p[at] * (1 - part)) * followed).sum(dim=-1).index_add(0, self.rows, p[at] * part)
        others = log_p.index_put(at, log_p[at] + (1 - part).clamp_min(SMALLEST).log())
        return others, log_p[at] + part.clamp_min(torch.finfo(part.dtype).tiny).log(), rest


def _shift(
    new: Tensor, after: Tensor, before: Tensor, vocabulary: Vocabulary, pairs: PlaceVocabularies,
    options: BehaviorOptions, *, inside: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shift the new log-probabilities by the adapter's change; also return the confidence.

    All new tokens that follow no old token share the change of the probability of all old tokens that none follows.
    What the new token that follows leaves of the old one's probability goes to the other tokens that follow the old
    one, or to the rest where there are none. Where the text goes on with tokens that are no pair elsewhere, no other
    new token follows the old one there.
    """
    after_p, before_p, new_p = after.exp(), before.exp(), new.exp()
    entropy, changed = -(after_p * after).sum(dim=-1), (after_p * (after - before)).sum(dim=-1)
    summed = torch.zeros_like(after).index_add_(1, vocabulary.old, new_p[:, vocabulary.new])
    known = _Following.find(new_p, summed, vocabulary, pairs)
    rows, a, b = known.rows, known.old, known.new
    rest = _rest(new, vocabulary, known)
    follows = ~rest
    follows[rows, b] = False  # it has a probability of its own
    summed = torch.zeros_like(after).index_add_(1, vocabulary.old, (new_p * follows)[:, vocabulary.new])
    sides, wholes, others = zip(
        *(known.split(*one, followed=summed > 0) for one in ((after, after_p, 0), (before, before_p, 1))), strict=True
    )
    unsure, against = (_cross_entropy(known.part[:, 0], part) for part in known.part.T)
    entropy = entropy.index_add(0, rows, after_p[rows, a] * known.several * unsure)  # chain rule
    changed = changed.index_add(0, rows, after_p[rows, a] * (against - unsure))
    share = (options.teacher_weight or 0.0) * (changed / (options.change_threshold or 1.0)).clamp(0, 1)
    confidence, taught = confidence_of(entropy), torch.ones_like(entropy)
    if inside:  # what the old model says of the token as a whole says little of its parts if it is not sure of it
        taught = (after_p.gather(1, pairs.following[:, :1])[:, 0] * known.part[:, 0] >= LIKELY).to(entropy)
        confidence = confidence * taught
    reference = torch.lerp(sides[1], summed.clamp_min(torch.finfo(summed.dtype).tiny).log(), share[:, None])
    change = taught[:, None] * (sides[0] - reference)
    shifted = new.clone()
    shifted[:, vocabulary.new] += change[:, vocabulary.old]
    other_after, other_before, other_new = (
        one.clamp_min(SMALLEST).log() for one in (*others, (new_p * rest).sum(dim=-1))
    )
    other = taught * (other_after - torch.lerp(other_before, other_new, share))
    shifted = torch.where(rest, new + other[:, None], shifted)
    whole_reference = torch.lerp(wholes[1], new[rows, b], share[rows])
    shifted[rows, b] = new[rows, b] + taught[rows] * (wholes[0] - whole_reference)
    return shifted, confidence


def _rest(new: Tensor, vocabulary: Vocabulary, known: _Following) -> Tensor:
    """Return which new tokens follow no old token, (positions, new tokens)."""
    rest = torch.ones_like(new, dtype=torch.bool)
    rest[:, vocabulary.new] = False
    unusual = (~known.usual).nonzero()[:, 0]
    replaced, off = (vocabulary.old == known.old[unusual, None]).nonzero(as_tuple=True)
    rest[known.rows[unusual[replaced]], vocabulary.new[off]] = True
    rest[known.rows, known.new] = False
    return rest


def _cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Return the cross entropy of two outcomes with probabilities p and 1 - p, in nats."""
    p, q = (one.clamp(SMALLEST, 1 - SMALLEST) for one in (p, q))
    return -(p * q.log() + (1 - p) * (1 - q).log())


def confidence_of(entropy: Tensor) -> Tensor:
    """Return 1 up to an entropy of half of `CONFIDENT`, falling linearly to 0 there."""
    return (2 * (1 - entropy / CONFIDENT)).clamp(0, 1)
