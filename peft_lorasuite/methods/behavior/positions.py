"""Tokenized turns, and which of their positions predict a response in both tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import LoraSuiteError
from ...models.activations import SINK_TOKENS, encode_text, length_batches, pad_batch
from ...models.backbone import Backbone
from ...models.forward import final_states, unwrap
from ...models.generation import Turn
from ...models.prefix_cache import count_shared_columns, reuse_shared_prefix
from ...progress import Progress, no_progress
from ...text.calibration import built_in_text
from ...text.prompt_text import PromptText, encode_prompt
from ...text.vocabulary import check_token_rows, eos_token_id, text_vocabulary
from .targets import Head
from .token_pairs import PairedPlace

EXAMPLES = 8
"""Prompts on which `merges_prompt_end` decides."""
MERGE_PROBABILITY = 0.1
"""Mean probability of longer tokens from which on it says yes."""
PARAGRAPH_TOKENS = 96
"""Tokens used of one paragraph of the built-in text: many short paragraphs are more diverse than a few long ones."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one turn in one tokenizer.

    Attributes:
        ids: Token ids of the prompt, then of the response.
        ends: Character at which each token ends, counted from the start of the answer: the response without what a
            chat template writes around it. Prompt tokens end at 0 or before.
        start: Index of the first response token.
        ended: Whether the response ended with an end-of-turn or end-of-sequence token.
        merges: Whether the prompt's last token, the prompt/response boundary token, is predicted as well.
        end: Id of the token that ended the response, or would.
        length: Characters of the answer.
        before: What the template writes before the answer.
        rendered: Whether a chat template wrote the prompt.
        answering: Prompt positions that predict a token of an earlier answer.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    start: int
    ended: bool
    merges: bool = False
    end: int = -1
    length: int = 0
    before: str = ""
    rendered: bool = False
    answering: frozenset[int] = frozenset()

    @property
    def first(self) -> int:
        """The first predicting position, see `predicting`."""
        return max(self.start - 1 - self.merges, 0)

    @property
    def predicting(self) -> range:
        """Positions that predict a response token or, where the response ended, the end of sequence."""
        return range(self.first, len(self.ids) if self.ended else len(self.ids) - 1)

    @property
    def reading(self) -> list[int]:
        """Prompt positions that predict no token of an answer, without the first few (attention sinks)."""
        return [at for at in range(min(SINK_TOKENS, self.first), self.first) if at not in self.answering]

    def predicted(self, position: int) -> int:
        """Return the token that follows a position."""
        return self.ids[position + 1] if position + 1 < len(self.ids) else self.end


def tokenize(backbone: Backbone, turn: Turn) -> Tokens:
    """Tokenize a turn as generation does: the tokens of the prompt, then those of the response after it.

    Raises:
        LoraSuiteError: For a prompt without tokens.
    """
    tokenizer = backbone.tokenizer
    prompt = encode_prompt(tokenizer, turn.prompt)["input_ids"]
    start, length = len(prompt), len(turn.prompt)
    if not start:
        raise LoraSuiteError("a prompt has no tokens", got=repr(turn.prompt[:40]))
    both = encode_prompt(tokenizer, turn.prompt, turn.response, return_offsets_mapping=True)
    ids, offsets = both["input_ids"], both["offset_mapping"]
    check_token_rows(tokenizer, ids, backbone.arch.vocabulary, repr(backbone))
    if (
        ids[:start] != prompt or offsets[start - 1][1] > length
    ):  # a token would span the boundary: response tokens on their own
        response = tokenizer(turn.response, return_offsets_mapping=True, add_special_tokens=False)
        alone = encode_prompt(tokenizer, turn.prompt, return_offsets_mapping=True)
        ids = [*prompt, *response["input_ids"]]
        apart = [(length + left, length + right) for left, right in response["offset_mapping"]]
        offsets = [*alone["offset_mapping"], *apart]
    ends = [end for _, end in offsets]
    ends[start - 1] = length
    origin, end = length + turn.before, eos_token_id(tokenizer) if turn.end is None else turn.end
    known = turn.prompt if isinstance(turn.prompt, PromptText) else PromptText(turn.prompt)
    answering = {
        at - 1 for at, (left, right) in enumerate(offsets[:start])
        if any(left < last and right > first for first, last in known.answers)
    }  # fmt: skip
    return Tokens(
        tuple(ids), tuple(one - origin for one in ends), start, turn.ended, turn.merges, end, len(turn.content),
        turn.response[: turn.before], known.rendered, frozenset(answering),
    )  # fmt: skip


def sample_text(backbone: Backbone, count: int, seed: int) -> list[Tokens]:
    """Draw paragraphs of the built-in text with ``count`` tokens in total, not counting the first token of each."""
    texts, rows, found = built_in_text(), [], 0
    for number in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        if found >= count:
            break
        ids = tuple(encode_text(backbone, texts[number])["input_ids"][:PARAGRAPH_TOKENS])
        if len(ids) > 1:  # the vocabulary of another language may have no tokens for a text
            rows.append(Tokens(ids, (), len(ids), ended=False))
            found += len(ids) - 1
    return rows


@torch.no_grad()
def merges_prompt_end(model: Any, backbone: Backbone, prompts: Sequence[str]) -> bool:
    """Return whether an adapted model would end the prompts with longer tokens than theirs.

    In training, prompt and response are one text. Where the tokenizer merges the prompt's end and the response's start
    into one prompt/response boundary token (``:⏎`` and ``⏎A`` give ``:⏎⏎``), the model learns to predict that token in
    place of the prompt's last one. A response generated after the whole prompt never contains it.
    """
    rows = backbone.arch.vocabulary
    ids_of = {text: number for text, number in text_vocabulary(backbone.tokenizer).items() if number < rows}
    text_of = {number: text for text, number in ids_of.items()}
    ends, states = [], []
    for prompt in prompts[:EXAMPLES]:
        *ids, last = encode_prompt(backbone.tokenizer, prompt)["input_ids"]
        if ids and last in text_of:
            ends.append(text_of[last])
            inputs = {"input_ids": torch.tensor([ids], device=model.device)}
            states.append(final_states(model, inputs)[0, -1].cpu())
    if not ends:
        return False
    probabilities = Head(unwrap(model), backbone).logits(torch.stack(states), normed=True).softmax(-1)
    longer = {end: [n for text, n in ids_of.items() if text != end and text.startswith(end)] for end in set(ends)}
    mass = sum(float(row[longer[end]].sum()) for row, end in zip(probabilities, ends, strict=True))
    return mass >= MERGE_PROBABILITY * len(ends)


def shared_prefix(rows: Sequence[Tokens]) -> int:
    """Count the leading tokens that all turns share, usually a template's; none of them predicts a response."""
    ids = pad_batch([row.ids for row in rows])["input_ids"]
    return count_shared_columns(ids, min(row.first for row in rows))


def forward_batches(
    model: Any, rows: Sequence[Tokens], progress: Progress = no_progress
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Run the decoder on batches of turns of similar length, computing the shared prefix once per batch.

    Yields:
        The indices of the turns, the states after the final norm, (turns, length - skipped, D), and how many leading
        positions are skipped: at most `shared_prefix`.
    """
    common = shared_prefix(rows)
    for numbers in progress("reading states", length_batches(rows)):
        inputs = {name: value.to(model.device) for name, value in pad_batch([rows[n].ids for n in numbers]).items()}
        with torch.inference_mode():
            rest, skipped = reuse_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], common)
            yield numbers, final_states(model, rest), skipped


Place = tuple[int, int, int]
"""Turn, position in the old tokens and position in the new tokens; both predict what follows the same character."""


def align(old: Sequence[Tokens], new: Sequence[Tokens]) -> list[Place]:
    """Pair the predicting positions of both tokenizers whose tokens end at the same character of the same answer.

    Several tokens may make up one character. They are paired one by one where both tokenizers split it into the same
    tokens, otherwise only the last ones are. The prompts before the answers may differ altogether.

    Raises:
        LoraSuiteError: When there are fewer than four pairs.
    """
    places = []
    for turn, (left, right) in enumerate(zip(old, new, strict=True)):
        apart = left.rendered or right.rendered
        new_positions = _positions_by_end(right, apart)
        for end, before in _positions_by_end(left, apart).items():
            after = new_positions.get(end, [])
            if [left.ids[p] for p in before] != [right.ids[p] for p in after]:
                before, after = before[-1:], after[-1:]
            places += [(turn, p, q) for p, q in zip(before, after, strict=False)]
        places += [(turn, p, q) for p, q in (*_inside_tokens(left, right, apart), *_after_answer(left, right))]
    if len(places) < 4:
        raise LoraSuiteError(
            "the old adapted model's answers have too few positions that are common to both tokenizers",
            got=len(places), wanted="at least 4", do="pass more or other prompts",
        )  # fmt: skip
    return places


def _positions_by_end(row: Tokens, apart: bool) -> dict[int, list[int]]:
    """Return the predicting positions by the character at which their tokens end, up to the end of the answer.

    Args:
        row: The tokens of a turn.
        apart: Whether the prompts differ: only the position that predicts the start of the answer is then one before
            it, and counts as its end at 0.
    """
    found: dict[int, list[int]] = {}
    for position in row.predicting:
        end = row.ends[position]
        if apart and end <= 0:
            found[0] = [position]
        elif not (row.ended and row.length and end > row.length):
            found.setdefault(end, []).append(position)
    return found


def _after_answer(left: Tokens, right: Tokens) -> list[tuple[int, int]]:
    """Pair positions after the answer, where the new template writes more than one token."""
    old, new = (
        [position for position in row.predicting if row.ended and row.length and row.ends[position] > row.length]
        for row in (left, right)
    )
    if not left.predicting:  # the old model has not answered
        return []
    last = left.predicting[-1]
    return [(old[number] if number < len(old) else last, position) for number, position in enumerate(new)]


def _inside_tokens(left: Tokens, right: Tokens, apart: bool) -> list[tuple[int, int]]:
    """Pair the new positions inside an old token of the answer with the old position that predicts this token."""
    pairs = []
    old = [(left.ends[p], p) for p in left.predicting if p + 1 < len(left.ids)]
    starts = {max(end, 0) if apart else end: p for end, p in old}
    for q in right.predicting:
        if q + 1 >= len(right.ids) or right.ends[q] <= 0 or right.ends[q] in starts:
            continue
        p = max((p for start, p in starts.items() if 0 <= start < right.ends[q]), default=None)
        if p is not None and right.ends[q] < left.ends[p + 1]:
            pairs.append((p, q))
    return pairs


def covered_positions(
    old: Sequence[Tokens], new: Sequence[Tokens], places: Sequence[Place]
) -> list[list[tuple[int, int]]]:
    """Return, for every place, the turn and old positions of further old tokens in the new token that follows.

    A new token can be several old ones (``_draft`` is ``_`` and ``draft``), and can end inside the last of them. Of one
    that reaches beyond the answer into what the template writes, the part in the answer counts.
    """
    found = []
    for turn, p, q in places:
        left, right = old[turn], new[turn]
        ends = right.ends[q + 1 : q + 3]
        end = min(ends[0], right.length or ends[0]) if ends else 0
        whole = len(ends) < 2 or ends[1] > end  # the last token of its character, which can be several old ones
        at = p + 1
        while at < len(left.ids) - 1 and (left.ends[at] < end or (whole and left.ends[at] == left.ends[at + 1] == end)):
            at += 1  # the ends never fall
        found.append([(turn, one) for one in range(p + 1, at)])
    return found


def pair_places(old: Sequence[Tokens], new: Sequence[Tokens], places: Sequence[Place]) -> list[PairedPlace]:
    """Return how tokens are paired at every place."""
    found = []
    for turn, p, q in places:
        left, right = old[turn], new[turn]
        starts = [row.before[row.ends[at] :] if row.ends[at] < 0 else "" for row, at in ((left, p), (right, q))]
        inside = max(left.ends[p], 0) < right.ends[q] <= right.length and left.ends[p] != right.ends[q]
        found.append(
            PairedPlace(
                (starts[0], starts[1]), (left.end, right.end), (left.predicted(p), right.predicted(q)),
                inside and p + 1 < len(left.ids),
            )
        )  # fmt: skip
    return found
