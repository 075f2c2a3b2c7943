"""How well a model gives the reference responses: likelihood and accuracy by teacher forcing, nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..models.prefix_cache import after_shared_prefix
from ..models.restore import as_it_was
from ..progress import Progress, silent
from ..text.examples import Example, fill
from ..text.vocabulary import padding
from .encoding import IGNORED, Encoded, batch, encode, encode_examples

Options = Sequence[str] | Callable[[Example], Sequence[str]]


@dataclass(frozen=True)
class Score:
    """What a model made of some examples.

    Attributes:
        nll: Negative log-likelihood of the responses with their end of sequence, in nats per token.
        accuracy: Share of right answers, from 0 to 1.
        exact: Share of responses whose every token is the most likely one: what greedy decoding would give.
        n: Number of examples.
        right: Per example, whether it was answered right; for paired comparisons.
    """

    nll: float
    accuracy: float
    exact: float
    n: int
    right: tuple[bool, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """Where a response decides between the options: the position, each option's next token, and the right one."""

    position: int
    tokens: tuple[int, ...]
    truth: int


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    template: str | None = None,
    options: Options | None = None,
    *,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Score:
    """Score a model on examples, one forward pass each.

    Args:
        model: A loaded model, plain or PEFT; it is left in the mode that it was in.
        tokenizer: Its tokenizer.
        examples: At least one, with ``output`` and, for ``options``, ``answer``.
        template: Prompt template; by default the one of LLM-Adapters.
        options: The possible answers, for all examples or as a function of the example. The model's answer is the
            option whose first distinguishing token is the most likely after the words of the response before it.
            Without options an answer is right when every token of the response and its end is the most likely one.
        batch_size: Rows of one forward pass.
        progress: Shows how far it is.

    Raises:
        LoraSuiteError: When there is no example, or one whose answer is not an option or not in its response.
    """
    if not examples:
        raise LoraSuiteError("there is no example to score")
    rows = encode_examples(tokenizer, examples, template)
    choices = _choices(tokenizer, examples, template, options) if options is not None else [None] * len(rows)
    losses, tokens, exact, right = 0.0, 0, [False] * len(rows), [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    with as_it_was(model):
        model.eval()
        for start in progress("scoring", range(0, len(rows), batch_size)):
            chosen = order[start : start + batch_size]
            info = _judge(model, [rows[n] for n in chosen], [choices[n] for n in chosen], padding(tokenizer))
            for number, (loss, count, every, best) in zip(chosen, info, strict=True):
                losses, tokens = losses + loss, tokens + count
                exact[number], right[number] = every, every if best is None else best
    return Score(losses / tokens, sum(right) / len(right), sum(exact) / len(exact), len(rows), tuple(right))


@torch.no_grad()
def _judge(
    model: Any, rows: Sequence[Encoded], choices: Sequence[_Choice | None], filler: int
) -> list[tuple[float, int, bool, bool | None]]:
    """Per row: summed loss, response tokens, whether each was the likeliest, whether the right option was.

    Logits are taken from the first response of the batch on: over a large vocabulary they are most of the memory.
    """
    inputs = {name: values.to(model.device) for name, values in batch(rows, padding=filler).items()}
    first = min(row.start for row in rows) - 1
    wanted = inputs.pop("labels")[:, first + 1 :]
    begun, taken = after_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], first)
    keep = torch.arange(first - taken, begun["input_ids"].shape[1], device=model.device)
    logits = model(**begun, logits_to_keep=keep).logits.float()
    info = []
    for line, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        inside = wanted[line] != IGNORED
        values, truth = logits[line, :-1][inside], wanted[line][inside]
        loss = torch.nn.functional.cross_entropy(values, truth, reduction="sum")
        every = bool((values.argmax(dim=-1) == truth).all())
        best = None
        if choice is not None:
            offered = logits[line, choice.position - 1 - first, list(choice.tokens)]
            best = int(offered.argmax()) == choice.truth
        info.append((float(loss), len(row.ids) - row.start, every, best))
    return info


def _choices(tokenizer: Any, examples: Sequence[Example], template: str | None, options: Options) -> list[_Choice]:
    return [_choice(tokenizer, n, example, template, options) for n, example in enumerate(examples, 1)]


def _choice(tokenizer: Any, number: int, example: Example, template: str | None, options: Options) -> _Choice:
    """Find the first token at which the options, put in the answer's place, part."""
    offered = list(options(example) if callable(options) else options)
    before, found, after = example.output.rpartition(example.answer)
    if not example.answer or not found or example.answer not in offered:
        raise LoraSuiteError(
            "an answer is no option, or not in its response", where=f"example {number}", got=repr(example.answer),
            wanted=", ".join(offered),
        )  # fmt: skip
    prompt = fill(example, template)
    rows = [encode(tokenizer, prompt, before + option + after).ids for option in offered]
    position = next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), None)
    if len(offered) == 1:
        position = len(rows[0]) - 1  # a single option is always the likeliest
    if position is None:
        raise LoraSuiteError("the options cannot be told apart", where=f"example {number}", got=", ".join(offered))
    return _Choice(position, tuple(row[position] for row in rows), offered.index(example.answer))
