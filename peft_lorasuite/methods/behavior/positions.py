"""What an adapter does to its backbone: the states behind the responses that it writes, read off forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import LoraSuiteError
from ...models.activations import BATCH_TOKENS, SINK_TOKENS, encode_text, pad_batch
from ...models.backbone import Backbone
from ...models.generation import Turn
from ...models.prefix_cache import count_shared_columns, decoder, reuse_shared_prefix, unwrap
from ...progress import Progress, no_progress
from ...text.calibration import built_in_text
from ...text.vocabulary import text_vocabulary
from .targets import Head

SHOWN = 8
"""Prompts that tell whether the old adapted model ends them with other tokens."""
MERGED = 0.1
"""Probability from which on it does."""
PARAGRAPH = 96
"""Tokens of one paragraph of other text at most: more paragraphs tell more than longer ones."""


@dataclass(frozen=True)
class Tokens:
    """One turn in one tokenizer.

    Attributes:
        ids: Prompt, then response.
        ends: Character at which each token ends, counted from the start of the prompt.
        start: Index of the first response token.
        ended: Whether the response closed.
        merges: Whether the prompt's last token is one of those that are predicted.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    start: int
    ended: bool
    merges: bool = False

    @property
    def first(self) -> int:
        """The first predicting position."""
        return max(self.start - 1 - self.merges, 0)

    @property
    def predicting(self) -> range:
        """Positions that predict a response token or, where the response closed, its end."""
        return range(self.first, len(self.ids) if self.ended else len(self.ids) - 1)

    @property
    def reading(self) -> range:
        """Positions that read the prompt, the first few (attention sinks) left out."""
        return range(min(SINK_TOKENS, self.first), self.first)


def tokenize(backbone: Backbone, turn: Turn) -> Tokens:
    """Tokenize a turn; prompt and response are cut apart, as generation cuts them."""
    prompt = backbone.tokenizer(turn.prompt, return_offsets_mapping=True)
    response = backbone.tokenizer(turn.response, return_offsets_mapping=True, add_special_tokens=False)
    start, length = len(prompt["input_ids"]), len(turn.prompt)
    if not start:
        raise LoraSuiteError("a prompt has no tokens", got=repr(turn.prompt[:40]))
    ends = [end for _, end in prompt["offset_mapping"]]
    ends[-1] = length
    ends += [length + end for _, end in response["offset_mapping"]]
    return Tokens((*prompt["input_ids"], *response["input_ids"]), tuple(ends), start, turn.ended, turn.merges)


def sample_text(backbone: Backbone, count: int, seed: int) -> list[Tokens]:
    """Draw paragraphs of the built-in text, until there are so many positions behind their first tokens."""
    texts, rows, found = built_in_text(), [], 0
    for number in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        if found >= count:
            break
        ids = tuple(encode_text(backbone, texts[number])["input_ids"][:PARAGRAPH])
        if len(ids) > 1:  # a tokenizer of another language may make nothing of a text
            rows.append(Tokens(ids, (), len(ids), ended=False))
            found += len(ids) - 1
    return rows


@torch.no_grad()
def merges_prompt_end(model: Any, backbone: Backbone, prompts: Sequence[str]) -> bool:
    """Whether an adapted model would end the prompts with longer tokens than theirs.

    Training reads prompt and response as one text. Where the tokenizer makes one token of the prompt's end and the
    response's beginning (``:⏎`` and ``⏎A`` give ``:⏎⏎``), it teaches that token in place of the prompt's last one, and
    no response that is written after the whole prompt shows it.
    """
    rows = backbone.arch.vocabulary
    texts = {text: number for text, number in text_vocabulary(backbone.tokenizer).items() if number < rows}
    names = {number: text for text, number in texts.items()}
    run, ends, states = decoder(model), [], []
    for prompt in prompts[:SHOWN]:
        *ids, last = backbone.tokenizer(prompt)["input_ids"]
        if ids and last in names:
            ends.append(names[last])
            states.append(run(torch.tensor([ids], device=model.device)).last_hidden_state[0, -1].cpu())
    if not ends:
        return False
    info = Head(unwrap(model), backbone).logits(torch.stack(states), normed=True).softmax(-1)
    longer = {end: [n for text, n in texts.items() if text != end and text.startswith(end)] for end in set(ends)}
    mass = sum(float(chances[longer[end]].sum()) for chances, end in zip(info, ends, strict=True))
    return mass >= MERGED * len(ends)


def shared_prefix(rows: Sequence[Tokens]) -> int:
    """Count the first tokens that all turns share, a template's as a rule; none of them predicts a response."""
    ids = pad_batch([row.ids for row in rows])["input_ids"]
    return count_shared_columns(ids, min(row.first for row in rows))


def forward(
    model: Any, rows: Sequence[Tokens], progress: Progress = no_progress
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Run the decoder over turns of like length, what all of them begin with once a batch.

    Yields:
        The turns' numbers, the states after the final norm, and how many first positions these leave out: at most
        `shared_prefix`.
    """
    run, common = decoder(model), shared_prefix(rows)
    for numbers in progress("reading states", length_batches(rows)):
        inputs = {name: value.to(model.device) for name, value in pad_batch([rows[n].ids for n in numbers]).items()}
        with torch.inference_mode():
            begun, taken = reuse_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], common)
            yield numbers, run(**begun).last_hidden_state, taken


def length_batches(rows: Sequence[Tokens]) -> list[list[int]]:
    """Group turns by length, at most `BATCH_TOKENS` pad_batch tokens a batch."""
    groups: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if groups and len(rows[number].ids) * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


Place = tuple[int, int, int]
"""Turn, position in the old tokens, position in the new tokens: both predict what follows the same character."""


def align(old: Sequence[Tokens], new: Sequence[Tokens]) -> list[Place]:
    """Pair the predicting positions of both tokenizers that stand at the same character of the same turn.

    Tokens that are parts of one character all end where it ends: they are paired where both sides cut it into the same
    tokens, else the last ones alone.
    """
    places = []
    for turn, (left, right) in enumerate(zip(old, new, strict=True)):
        others = _at_ends(right)
        for end, ours in _at_ends(left).items():
            theirs = others.get(end, [])
            if [left.ids[p] for p in ours] != [right.ids[p] for p in theirs]:
                ours, theirs = ours[-1:], theirs[-1:]
            places += [(turn, p, q) for p, q in zip(ours, theirs, strict=False)]
    if len(places) < 4:
        raise LoraSuiteError(
            "the old adapted model's answers give too few common positions", got=len(places), wanted="at least 4",
            do="give more or other prompts",
        )  # fmt: skip
    return places


def _at_ends(row: Tokens) -> dict[int, list[int]]:
    """Predicting positions by the character at which their tokens end."""
    found: dict[int, list[int]] = {}
    for position in row.predicting:
        found.setdefault(row.ends[position], []).append(position)
    return found
