"""Target logits of the upgraded model: those of the new model, shifted by the adapter's effect on the old model.

The difference of two models tells by how much a token's logit must rise, but not to what value: a token that the old
base model finds likelier than the new one does ends up too low, and what the new model prefers stays on top. So where
the adapter changed the prediction, the old adapted model's own probabilities are the target; see `build_targets`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.backbone import Backbone
from ...models.devices import rows_at_once, solving_device
from ...models.head_probe import FoundHead, find_head
from .options import BehaviorOptions
from .shifts import shift_log_probs
from .token_pairs import PlaceVocabularies, Vocabulary


class Head:
    """Final norm and language-model head of a loaded model, on the device that solves; the norm in float32.

    Args:
        model: The loaded model.
        backbone: Its backbone.

    Attributes:
        device: Where logits are computed: that of the head, if it has float64.
    """

    def __init__(self, model: Any, backbone: Backbone) -> None:
        out = model.get_output_embeddings()
        self.device = solving_device(out.weight.device)
        self._weight: Tensor | None = out.weight.detach().to(self.device)
        self._read_again: Callable[[], Tensor]
        own = getattr(out, "bias", None)
        self.bias = None if own is None else own.detach().to(self.device).float()
        self.norm_path: str | None = backbone.arch.final_norm
        self.norm_factor = 1.0
        config = model.config
        self.scaling = float(getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1))
        self.cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        if not backbone.arch.has_converter:
            self._read_found(find_head(model, backbone))
        norm = torch.nn.Identity() if self.norm_path is None else copy.deepcopy(model.get_submodule(self.norm_path))
        self.norm = norm.to(self.device).float().requires_grad_(False)

    def _read_found(self, found: FoundHead) -> None:
        """Take over what a forward pass has shown of a head."""
        self.norm_path, self.norm_factor = found.norm, found.norm_factor
        self.scaling, self.cap = found.scaling, found.cap
        self._weight = self.weight[: found.tokens]
        biases = [bias[: found.tokens].to(self.device) for bias in (self.bias, found.bias) if bias is not None]
        self.bias = torch.stack(biases).sum(dim=0) if biases else None

    @property
    def weight(self) -> Tensor:
        """Weight of the head, (tokens, D), in the checkpoint's dtype."""
        if self._weight is None:
            self._weight = self._read_again()
        return self._weight

    def release(self, backbone: Backbone) -> None:
        """Free the weight until it is needed again, when it is read from the backbone's checkpoint."""
        if not backbone.in_memory and backbone.arch.has_converter:
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
        states = states.to(self.device)
        states = states if normed else self.norm(states.float()) * self.norm_factor
        values = (states.to(self.weight.dtype) @ self.weight.T).float()
        values = (values if self.bias is None else values + self.bias) / self.scaling
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)


@dataclass(frozen=True, eq=False)
class Targets:
    """Target log-probabilities at some positions over some tokens of the new vocabulary.

    Attributes:
        ids: New token ids of the candidates, (candidates,).
        log_probs: Target log-probabilities, normalized over the candidates, (positions, candidates).
        confidence: Confidence of the old adapted model at each position, from 0 to 1, (positions,); see
            `confidence_of`.
    """

    ids: Tensor
    log_probs: Tensor
    confidence: Tensor

    def with_anchors(self, head: Head, states: Tensor) -> Targets:
        """Append the model's own probabilities at the states of anchors, (anchors, D), before the final norm."""
        own = head.restrict(self.ids).logits(states).log_softmax(dim=-1)
        sure = self.confidence.new_ones(len(states))
        return Targets(self.ids, torch.cat([self.log_probs, own]), torch.cat([self.confidence, sure]))


@torch.no_grad()
def build_targets(
    old_head: Head, new_head: Head, vocabulary: Vocabulary | PlaceVocabularies, adapted: Tensor, plain: Tensor,
    states: Tensor, options: BehaviorOptions, *, seed: int, sure_only: bool = False,
) -> Targets:  # fmt: skip
    """Return ``new + old adapted - ((1 - w) old + w new)`` in log-probabilities, on the candidate tokens.

    ``w = teacher_weight * clamp(K / change_threshold, 0, 1)``, where K is the KL divergence of the old adapted model
    from the old one, in nats: where the adapter changed the prediction, its own probabilities are the target, and where
    it did not, those of the new model are. The candidates are the ``top`` likeliest tokens of target and new model at
    every position, and ``extra`` tokens drawn at random.

    Args:
        old_head: Head of the old backbone.
        new_head: Head of the new one.
        vocabulary: Their paired tokens, the same at all positions or those of each.
        adapted: States of the old adapted model after its final norm, (positions, D_o).
        plain: States of the old model after its final norm, (positions, D_o).
        states: States of the new model before its final norm, (positions, D_n).
        options: Resolved options: ``teacher_weight``, ``change_threshold``, ``top``, ``extra``.
        seed: Seed of the random candidates.
        sure_only: Multiply the change by the confidence, for prompts that may have nothing to do with the adapter.
    """
    size, device = len(new_head.weight), new_head.device
    pairs = PlaceVocabularies.same(vocabulary, len(states)) if isinstance(vocabulary, Vocabulary) else vocabulary
    pairs = pairs.to(device)
    drawn = torch.randint(size, (options.extra,), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(size, dtype=torch.bool).index_fill_(0, drawn, True).to(device)
    confidence = torch.empty(len(states), device=device)
    parts = chunks(len(states), rows_at_once(device, size + len(old_head.weight)))

    def target_at(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        after, before = (old_head.logits(x[rows], normed=True).log_softmax(dim=-1).to(device) for x in (adapted, plain))
        new = new_head.logits(states[rows]).log_softmax(dim=-1)
        shifted, sure = shift_log_probs(new, after, before, pairs.at(rows), options)
        return new, torch.lerp(new, shifted, sure[:, None]) if sure_only else shifted, sure

    for rows in parts:
        new, shifted, sure = target_at(rows)
        confidence[rows] = sure
        for values in (shifted, new):
            seen[values.topk(min(options.top or 1, size)).indices.flatten()] = True
    ids = seen.nonzero()[:, 0]
    # at once: small tensors between large ones fragment the heap
    log_probs = torch.empty(len(states), len(ids), device=device)
    for rows in parts:
        log_probs[rows] = target_at(rows)[1][:, ids].log_softmax(dim=-1)
    return Targets(ids, log_probs, confidence)


@torch.no_grad()
def token_log_probs(head: Head, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of one token, (positions,), at each of some final states, (positions, D)."""
    found = torch.empty(len(states))
    for rows in chunks(len(states), rows_at_once(head.device, len(head.weight))):
        log_probs = head.logits(states[rows], normed=True).log_softmax(dim=-1)
        found[rows] = log_probs.gather(1, tokens[rows, None].to(log_probs.device))[:, 0].cpu()
    return found


def chunks(count: int, size: int) -> Sequence[slice]:
    """Return slices of at most ``size`` positions that cover ``count``."""
    return [slice(start, start + size) for start in range(0, count, size)]
