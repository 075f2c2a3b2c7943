"""Which format of prompts an adapter was trained on: the one in which it is surest of how an answer starts.

In the format of its training an adapter changes the old model's predictions of the first tokens of an answer, and is
sure of its own. In others it changes them less, or is less sure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LoraSuiteError
from ...models.backbone import Backbone
from ...models.forward import final_states, unwrap
from ...models.generation import encode_prompts, generate_answers
from ...text.chat_pair import ChatPair
from ...text.conversations import Conversation, user_turn
from ...text.examples import Prompt
from ...text.formats import ALPACA, CHAT, TEMPLATES, Format
from ...text.records import Example, Record
from .targets import Head

PROMPTS = 8
"""Prompts that are read in every format."""
STEPS = 4
"""Tokens of an answer that are read."""
CHANGED = 1.0
"""Change, in nats, that counts in full. More says little: a base model may know the adapter's format, and no other."""
SMALLEST_ENTROPY = 0.1
"""Entropies below this, in nats, count alike."""
CLEAR = 1.25
"""A format wins clearly if its score is this many times that of the other."""
GIVEN = "given"
"""Name of the format of given prompts that are strings."""


class FormatScore(NamedTuple):
    """How an adapter reads one format: means over the prompts, at the first tokens of an answer.

    Attributes:
        change: KL divergence of the old adapted model from the old model, in nats.
        entropy: Entropy of the old adapted model, in nats.
    """

    change: float
    entropy: float

    @property
    def value(self) -> float:
        """How sure the adapter is where it changes anything: higher is better."""
        return min(self.change / CHANGED, 1.0) / (self.entropy + SMALLEST_ENTROPY)


@dataclass(eq=False)
class FormatTrial:
    """Prompts in several formats, and how both old models answer them.

    Attributes:
        texts: Format -> prompts as the old model reads them.
        answers: Format -> token ids of prompt and answer, and log-probabilities of the old adapted model at the answer,
            once they are read.
        scores: Format -> its score, once both models have read it.
    """

    texts: Mapping[str, Sequence[str]]
    answers: dict[str, list[tuple[list[int], Tensor]]] = field(default_factory=dict)
    scores: dict[str, FormatScore] = field(default_factory=dict)

    @classmethod
    def of_records(cls, records: Sequence[Record], chat: ChatPair) -> FormatTrial:
        """Return a trial of the built-in prompts."""
        chosen = records[:: max(len(records) // PROMPTS, 1)][:PROMPTS]
        texts = {name: [str(Format.read(name).write(one)) for one in chosen] for name in TEMPLATES}
        if chat.old.has_template:
            with suppress(LoraSuiteError):  # a template that does not render them is no candidate
                texts[CHAT] = [chat.old.write(Format(CHAT).write(one)) for one in chosen]
        return cls(texts)

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], chat: ChatPair) -> FormatTrial | None:
        """Return a trial of given prompts, in their own format and in others; None where there is no other."""
        chosen = prompts[:: max(len(prompts) // PROMPTS, 1)][:PROMPTS]
        talks = [prompt for prompt in chosen if isinstance(prompt, Conversation)]
        own = [chat.old.write(prompt) for prompt in chosen]
        if talks:
            questions = [Example(prompt.question) for prompt in talks]
            others = {name: [str(Format.read(name).write(one)) for one in questions] for name in TEMPLATES}
            return cls({CHAT: own} | others)
        try:
            asked = [chat.old.write(user_turn(prompt)) for prompt in chosen if isinstance(prompt, str)]
        except LoraSuiteError:  # a template that does not render them is no candidate
            return None
        return cls({GIVEN: own, CHAT: asked}) if chat.old.has_template else None

    def read_adapted(self, model: Any, backbone: Backbone) -> None:
        """Let the old adapted model begin an answer to every prompt."""
        head = Head(unwrap(model), backbone)
        for name, texts in self.texts.items():
            found = generate_answers(model, backbone, texts, length=STEPS)
            prompts = encode_prompts(backbone, texts, STEPS)
            self.answers[name] = [
                ([*prompt, *written.ids], head.logits(written.states, normed=True).log_softmax(-1).half())
                for prompt, (_, written) in zip(prompts, found, strict=True)
            ]

    @torch.inference_mode()
    def read_plain(self, model: Any, backbone: Backbone) -> None:
        """Read prompts and answers with the old model, and score every format."""
        head = Head(unwrap(model), backbone)
        for name, answers in self.answers.items():
            changes, entropies = [], []
            for ids, half in answers:
                after, tokens = half.float(), torch.tensor([ids], device=model.device)
                states = final_states(model, {"input_ids": tokens})[0, -len(after) :].cpu()
                before = head.logits(states, normed=True).log_softmax(-1)
                changes.append(float((after.exp() * (after - before)).sum(-1).mean()))
                entropies.append(float(-(after.exp() * after).sum(-1).mean()))
            self.scores[name] = FormatScore(sum(changes) / len(changes), sum(entropies) / len(entropies))

    def facts(self, used: str | None) -> dict[str, Any]:
        """Return entries of the report; ``used`` is the format of the built-in prompts, None for given prompts."""
        found = {
            name: {"change": round(one.change, 3), "entropy": round(one.entropy, 3)}
            for name, one in self.scores.items()
        }
        warning = self.warning() if used is None else None
        entry = {"used": used or next(iter(found)), "scores": found}
        return {"format": entry} | ({"warnings": [warning]} if warning else {})

    def choose(self) -> str:
        """Return the format that wins clearly over that of LLM-Adapters, else this one."""
        best = max(self.scores, key=lambda name: self.scores[name].value)
        return best if self.scores[best].value >= CLEAR * self.scores[ALPACA].value else ALPACA

    def warning(self) -> str | None:
        """Return a warning where the format of given prompts loses clearly against another."""
        (_, score), *others = self.scores.items()
        best = max(others, key=lambda one: one[1].value, default=None)
        if best is None or best[1].value < CLEAR * max(score.value, 1e-3):
            return None
        return (
            f"the adapter was probably trained on prompts in the format {best[0]!r}: there it changes the start "
            f"of an answer by {best[1].change:.2f} nats a token (entropy {best[1].entropy:.2f}), in the given prompts "
            f"by {score.change:.2f} (entropy {score.entropy:.2f}); pass --format {best[0]}, or other prompts"
        )
