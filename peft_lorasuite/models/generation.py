"""The answers that a model writes by itself, and the states that it had while it wrote them."""

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
    """A prompt and the response that the old adapted model wrote.

    Attributes:
        prompt: The prompt.
        response: The response.
        ended: Whether the model closed it itself.
        merges: Whether the model would end the prompt with a longer token, see `behavior.merging`.
    """

    prompt: str
    response: str
    ended: bool
    merges: bool = False


@dataclass(frozen=True, eq=False)
class Generated:
    """How a response came about.

    Attributes:
        ids: Its tokens, as they were chosen, without the end.
        states: State after the final norm that predicted each of them and, where the response closed, its end.
    """

    ids: tuple[int, ...]
    states: Tensor


def fits_context(backbone: Backbone, prompt: str, length: int) -> bool:
    """Whether a prompt and a response of ``length`` tokens fit the context."""
    return len(backbone.tokenizer(prompt)["input_ids"]) + length <= backbone.context


def encode_prompts(backbone: Backbone, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Return the prompts' ids; refuses, by its number, one that leaves no room for ``length`` tokens of a response."""
    rows = [backbone.tokenizer(prompt)["input_ids"] for prompt in prompts]
    limit = backbone.context
    for number, ids in enumerate(rows, 1):
        if len(ids) + length > limit:
            raise LoraSuiteError(
                f"prompt {number} is too long for the context", where=repr(backbone), do="shorten it",
                got=f"{len(ids)} tokens and {length} to answer", wanted=f"{limit} together",
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
    """Let a model answer prompts greedily, at most ``length`` tokens each."""
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
    """Let a model answer as `answer` does; return with every turn what the model had in mind."""
    tokenizer, end = backbone.tokenizer, eos_token_id(backbone.tokenizer)
    asked = encode_prompts(backbone, prompts, length)
    found: dict[int, tuple[Turn, Generated]] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(asked[number]))
    for first in progress("answering", range(0, len(order), batch)):
        rows = order[first : first + batch]
        written, states = _generate(model, [asked[row] for row in rows], end, length)
        for row, reply, seen in zip(rows, written, states, strict=True):
            closed = end in reply
            ids = reply[: reply.index(end)] if closed else reply
            turn = Turn(prompts[row], tokenizer.decode(ids, skip_special_tokens=False), closed)
            found[row] = turn, Generated(tuple(ids), seen[: len(ids) + closed].clone())
    return [found[number] for number in range(len(prompts))]


@torch.inference_mode()
def _generate(model: Any, asked: Sequence[list[int]], end: int, length: int) -> tuple[list[list[int]], Tensor]:
    """Return greedy replies, and the final states (rows, steps, D) that predicted them.

    What all prompts begin with is read once; the padding stands behind it, where the mask hides it from the rest.
    """
    width, (common, cache) = max(map(len, asked)), cache_shared_prefix(model, asked)
    ids = torch.tensor([row[:common] + [end] * (width - len(row)) + row[common:] for row in asked]).to(model.device)
    mask = torch.tensor([[1] * common + [0] * (width - len(row)) + [1] * (len(row) - common) for row in asked])
    begun = {"cache": cache} if common else {}
    with _greedy(model, end), contiguous_head_input(model), _heard(model) as states:
        written = model.generate(input_ids=ids, attention_mask=mask.to(model.device), max_new_tokens=length, **begun)
    return written[:, width:].tolist(), torch.stack(states, dim=1)


@contextmanager
def _greedy(model: Any, end: int) -> Iterator[None]:
    """Let the likeliest token follow, whatever the checkpoint asks for: penalties, samples, beams, no cache."""
    from transformers import GenerationConfig

    inner = unwrap(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=end, eos_token_id=end)
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _heard(model: Any) -> Iterator[list[Tensor]]:
    """Keep the last position's final state, (rows, D), of every pass of the decoder."""
    states: list[Tensor] = []
    hook = decoder(model).register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state[:, -1].cpu().clone())
    )
    try:
        yield states
    finally:
        hook.remove()
