"""Greedy responses of a model, and the hidden states that predicted them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..progress import Progress, no_progress
from ..text.vocabulary import eos_token_id
from .backbone import Backbone
from .memory import contiguous_head_input
from .prefix_cache import cache_shared_prefix, decoder, unwrap


@dataclass(frozen=True)
class Turn:
    """A prompt and the response that a model generated.

    Attributes:
        prompt: The prompt.
        response: The response.
        ended: Whether the response ended with an end-of-sequence token rather than at the length limit.
        merges: Whether the model would end the prompt with a longer token (`behavior.positions.merges_prompt_end`).
    """

    prompt: str
    response: str
    ended: bool
    merges: bool = False


@dataclass(frozen=True, eq=False)
class Generated:
    """The generated tokens of a response, and the states behind them.

    Attributes:
        ids: Token ids as generated, without the end-of-sequence token.
        states: States after the final norm that predicted these tokens and, if the response ended, the
            end-of-sequence token, (tokens, D).
    """

    ids: tuple[int, ...]
    states: Tensor


def fits_context(backbone: Backbone, prompt: str, length: int) -> bool:
    """Return whether a prompt and a response of ``length`` tokens fit the context."""
    return len(backbone.tokenizer(prompt)["input_ids"]) + length <= backbone.context


def encode_prompts(backbone: Backbone, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Return the token ids of prompts.

    Raises:
        LoraSuiteError: When a prompt and a response of ``length`` tokens do not fit the context.
    """
    rows = [backbone.tokenizer(prompt)["input_ids"] for prompt in prompts]
    limit = backbone.context
    for number, ids in enumerate(rows, 1):
        if len(ids) + length > limit:
            raise LoraSuiteError(
                f"prompt {number} is too long for the context", where=repr(backbone), do="shorten it",
                got=f"{len(ids)} tokens and {length} for the answer", wanted=f"at most {limit}",
            )  # fmt: skip
    return rows


def answer(
    model: Any,
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    length: int,
    batch: int = 64,
    progress: Progress = no_progress,
) -> list[Turn]:
    """Answer prompts by greedy decoding, with at most ``length`` tokens each."""
    found = generate_answers(model, backbone, prompts, length=length, batch=batch, progress=progress)
    return [turn for turn, _ in found]


def generate_answers(
    model: Any,
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    length: int,
    batch: int = 64,
    progress: Progress = no_progress,
) -> list[tuple[Turn, Generated]]:
    """Answer prompts as `answer` does, and return the generated tokens and their states with each turn."""
    tokenizer, end = backbone.tokenizer, eos_token_id(backbone.tokenizer)
    encoded = encode_prompts(backbone, prompts, length)
    answers: dict[int, tuple[Turn, Generated]] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    for first in progress("answering", range(0, len(order), batch)):
        rows = order[first : first + batch]
        responses, states = _generate(model, [encoded[row] for row in rows], end, length)
        for row, response, row_states in zip(rows, responses, states, strict=True):
            ended = end in response
            ids = response[: response.index(end)] if ended else response
            turn = Turn(prompts[row], tokenizer.decode(ids, skip_special_tokens=False), ended)
            answers[row] = turn, Generated(tuple(ids), row_states[: len(ids) + ended].clone())
    return [answers[number] for number in range(len(prompts))]


@torch.inference_mode()
def _generate(model: Any, prompts: Sequence[list[int]], end: int, length: int) -> tuple[list[list[int]], Tensor]:
    """Return greedy responses, and the final states (rows, steps, D) that predicted their tokens.

    The prefix that all prompts share is computed once. The padding follows it, hidden by the mask.
    """
    width, (common, cache) = max(map(len, prompts)), cache_shared_prefix(model, prompts)
    ids = torch.tensor([row[:common] + [end] * (width - len(row)) + row[common:] for row in prompts]).to(model.device)
    mask = torch.tensor([[1] * common + [0] * (width - len(row)) + [1] * (len(row) - common) for row in prompts])
    cached = {"cache": cache} if common else {}
    with _greedy_decoding(model, end), contiguous_head_input(model), _record_final_states(model) as states:
        output = model.generate(input_ids=ids, attention_mask=mask.to(model.device), max_new_tokens=length, **cached)
    return output[:, width:].tolist(), torch.stack(states, dim=1)


@contextmanager
def _greedy_decoding(model: Any, end: int) -> Iterator[None]:
    """Decode greedily, whatever the checkpoint's generation config asks for: penalties, sampling, beams, no cache."""
    from transformers import GenerationConfig

    inner = unwrap(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=end, eos_token_id=end)
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _record_final_states(model: Any) -> Iterator[list[Tensor]]:
    """Record the final state of the last position, (rows, D), at every pass of the decoder."""
    states: list[Tensor] = []
    hook = decoder(model).register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state[:, -1].cpu().clone())
    )
    try:
        yield states
    finally:
        hook.remove()
