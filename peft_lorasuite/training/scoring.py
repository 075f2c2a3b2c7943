"""Likelihood and accuracy of the reference responses, by teacher forcing: nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..models.forward import logits_at
from ..models.prefix_cache import reuse_shared_prefix
from ..models.restore import restore_model
from ..progress import Progress, no_progress
from ..text.examples import Example, format_example
from ..text.vocabulary import pad_token_id
from .encoding import IGNORE_INDEX, Encoded, batch, encode, encode_examples

AnswerOptions = Sequence[str] | Callable[[Example], Sequence[str]]


@dataclass(frozen=True)
class Score:
    """Score of a model on some examples.

    Attributes:
        nll: Negative log-likelihood of the responses with their end of sequence, in nats per token.
        accuracy: Share of correct answers, from 0 to 1.
        exact: Share of responses whose every token is the most likely one, as greedy decoding would generate them.
        n: Number of examples.
        right: Per example, whether its answer was correct; for paired comparisons.
    """

    nll: float
    accuracy: float
    exact: float
    n: int
    right: tuple[bool, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """The token at which the answer options of an example differ.

    Attributes:
        position: Its position.
        tokens: The token of each option there.
        answer: Index of the correct option.
    """

    position: int
    tokens: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class _RowScore:
    """Summed loss and number of the response tokens, whether all were the most likely, whether the answer was correct.

    ``correct`` is None without answer options.
    """

    loss: float
    tokens: int
    exact: bool
    correct: bool | None


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    template: str | None = None,
    options: AnswerOptions | None = None,
    *,
    batch_size: int = 16,
    progress: Progress = no_progress,
) -> Score:
    """Score a model on examples, with one forward pass each.

    Args:
        model: A loaded model, plain or PEFT; its training mode is restored.
        tokenizer: Its tokenizer.
        examples: At least one, with ``output`` and, for ``options``, ``answer``.
        template: Prompt template; by default that of LLM-Adapters.
        options: The possible answers, for all examples or as a function of the example. The model's answer is the
            option whose first distinguishing token is the most likely after the beginning of the response. Without
            options an answer is correct if every response token and the end of sequence are the most likely ones.
        batch_size: Examples per forward pass.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: If there is no example, or the answer of one is not an option or not in its response.
    """
    if not examples:
        raise LoraSuiteError("no examples to score")
    size = model.config.get_text_config().vocab_size
    rows = encode_examples(tokenizer, examples, template, rows=size)
    choices = _find_choices(tokenizer, examples, template, options) if options is not None else [None] * len(rows)
    scores: dict[int, _RowScore] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    with restore_model(model):
        model.eval()
        for start in progress("scoring", range(0, len(rows), batch_size)):
            chosen = order[start : start + batch_size]
            found = _score_batch(
                model, [rows[i] for i in chosen], [choices[i] for i in chosen], pad_token_id(tokenizer, size)
            )
            scores |= zip(chosen, found, strict=True)
    nll = sum(scores[i].loss for i in order) / sum(scores[i].tokens for i in order)
    exact = [scores[i].exact for i in range(len(rows))]
    right = tuple(exact[i] if (correct := scores[i].correct) is None else correct for i in range(len(rows)))
    return Score(nll, sum(right) / len(right), sum(exact) / len(exact), len(rows), right)


@torch.no_grad()
def _score_batch(
    model: Any, rows: Sequence[Encoded], choices: Sequence[_Choice | None], padding_id: int
) -> list[_RowScore]:
    """Score a batch. Logits are computed from its first response token on: they are most of the memory."""
    inputs = {name: values.to(model.device) for name, values in batch(rows, padding=padding_id).items()}
    first = min(row.start for row in rows) - 1
    labels = inputs.pop("labels")[:, first + 1 :]
    inputs, offset = reuse_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], first)
    keep = torch.arange(first - offset, inputs["input_ids"].shape[1], device=model.device)
    logits = logits_at(model, inputs, keep)[1].float()
    scores = []
    for row_logits, row_labels, choice in zip(logits, labels, choices, strict=True):
        response = row_labels != IGNORE_INDEX
        values, truth = row_logits[:-1][response], row_labels[response]
        loss = torch.nn.functional.cross_entropy(values, truth, reduction="sum")
        exact = bool((values.argmax(dim=-1) == truth).all())
        correct = None
        if choice is not None:
            of_options = row_logits[choice.position - 1 - first, list(choice.tokens)]
            correct = int(of_options.argmax()) == choice.answer
        scores.append(_RowScore(float(loss), int(response.sum()), exact, correct))
    return scores


def _find_choices(
    tokenizer: Any, examples: Sequence[Example], template: str | None, options: AnswerOptions
) -> list[_Choice]:
    return [_find_choice(tokenizer, number, example, template, options) for number, example in enumerate(examples, 1)]


def _find_choice(
    tokenizer: Any, number: int, example: Example, template: str | None, options: AnswerOptions
) -> _Choice:
    """Find the first token at which the options differ when they replace the answer in the response."""
    names = list(options(example) if callable(options) else options)
    before, found, after = example.output.rpartition(example.answer)
    if not example.answer or not found or example.answer not in names:
        raise LoraSuiteError(
            "the answer is not an option, or not in the response", where=f"example {number}",
            got=repr(example.answer), wanted=", ".join(names),
        )  # fmt: skip
    prompt = format_example(example, template)
    rows = [encode(tokenizer, prompt, before + name + after).ids for name in names]
    position = next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), None)
    if len(names) == 1:
        position = len(rows[0]) - 1  # a single option is always the most likely
    if position is None:
        raise LoraSuiteError("the options have the same tokens", where=f"example {number}", got=", ".join(names))
    return _Choice(position, tuple(row[position] for row in rows), names.index(example.answer))
