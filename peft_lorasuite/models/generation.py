"""Responses of a model, greedy or sampled, and the hidden states that predicted them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_argument
from ..errors import LoraSuiteError
from ..progress import Progress, no_progress
from ..text.prompt_text import PromptText, encode_prompt
from ..text.vocabulary import check_token_rows, eos_token_id
from .backbone import Backbone
from .devices import answers_at_once
from .forward import model_inputs, unwrap
from .memory import contiguous_head_input
from .prefix_cache import cache_shared_prefix, has_known_cache


@dataclass(frozen=True)
class Turn:
    """A prompt and the response that a model generated.

    Attributes:
        prompt: The prompt.
        response: The response.
        ended: Whether the response ended with an end-of-turn or end-of-sequence token rather than at the length limit.
        merges: Whether the model would end the prompt with a longer token (`behavior.positions.merges_prompt_end`).
        before: How many characters at the start of the response a chat template writes before an answer.
        after: How many characters at its end a chat template writes between an answer and the end-of-turn token.
        end: Id of the token that ended the response, if it is not the tokenizer's end-of-sequence token.
    """

    prompt: str
    response: str
    ended: bool
    merges: bool = False
    before: int = 0
    after: int = 0
    end: int | None = None

    @property
    def content(self) -> str:
        """The response without what a chat template writes around it."""
        return self.response[self.before : len(self.response) - self.after]


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
    return len(encode_prompt(backbone.tokenizer, prompt)["input_ids"]) + length <= backbone.context


def encode_prompts(backbone: Backbone, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Return the token ids of prompts.

    Raises:
        LoraSuiteError: When a prompt and a response of ``length`` tokens do not fit the context, or a token has no row
            in the embedding.
    """
    tokenizer = backbone.tokenizer
    rows = [encode_prompt(tokenizer, prompt)["input_ids"] for prompt in prompts]
    used = {eos_token_id(tokenizer), *(number for row in rows for number in row)}
    check_token_rows(tokenizer, used, backbone.arch.vocabulary, repr(backbone))
    limit = backbone.context
    for number, (prompt, ids) in enumerate(zip(prompts, rows, strict=True), 1):
        number = (isinstance(prompt, PromptText) and prompt.number) or number  # that in the user's file
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
    batch: int | None = None,
    stops: Collection[int] = (),
    progress: Progress = no_progress,
) -> list[Turn]:
    """Answer prompts by greedy decoding, with at most ``length`` tokens each.

    ``batch`` prompts are answered at once, by default as many as the memory of the device allows.
    """
    found = generate_answers(model, backbone, prompts, length=length, batch=batch, stops=stops, progress=progress)
    return [turn for turn, _ in found]


def generate_answers(
    model: Any,
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    length: int,
    batch: int | None = None,
    stops: Collection[int] = (),
    temperature: float = 0.0,
    progress: Progress = no_progress,
) -> list[tuple[Turn, Generated]]:
    """Answer prompts as `answer` does, and return the generated tokens and their states with each turn.

    A response ends with the tokenizer's end-of-sequence token, one of the model's generation config, or one of
    ``stops``, the end-of-turn tokens of a chat template. With a ``temperature`` it is sampled by torch's random state.
    """
    tokenizer, eos = backbone.tokenizer, eos_token_id(backbone.tokenizer)
    ends = _end_ids(model, eos, stops)
    encoded = encode_prompts(backbone, prompts, length)
    answers: dict[int, tuple[Turn, Generated]] = {}
    lengths = list(map(len, encoded))
    batch = batch or answers_at_once(model, max(lengths, default=0) + length)
    for rows in progress("answering", _batches(lengths, batch, padded=has_known_cache(model))):
        responses, states = _generate(model, [encoded[row] for row in rows], ends, length, temperature)
        for row, response, row_states in zip(rows, responses, states, strict=True):
            count = next((n for n, token in enumerate(response) if token in ends), len(response))
            ids, ended = response[:count], count < len(response)
            end = response[count] if ended and response[count] != eos else None
            turn = Turn(prompts[row], _decode_after(tokenizer, encoded[row], ids), ended, end=end)
            answers[row] = turn, Generated(tuple(ids), row_states[: len(ids) + ended].clone())
    return [answers[number] for number in range(len(prompts))]


def _batches(lengths: Sequence[int], batch: int, *, padded: bool) -> list[list[int]]:
    """Group rows by length into batches of at most ``batch``; unless ``padded``, of equal length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if padded else [list(group) for _, group in groupby(order, lengths.__getitem__)]
    return [group[first : first + batch] for group in groups for first in range(0, len(group), batch)]


def _end_ids(model: Any, eos: int, stops: Collection[int]) -> list[int]:
    """Return the ids that end a response, the tokenizer's end-of-sequence token first."""
    own = getattr(unwrap(model).generation_config, "eos_token_id", None)
    own = [own] if isinstance(own, int) else own or []
    return list(dict.fromkeys([eos, *own, *stops]))


def _decode_after(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """Decode a response with the white space that it starts with: at the start of a text decoders drop it."""
    last = tokenizer.decode(prompt[-1:], skip_special_tokens=False)
    text = tokenizer.decode([*prompt[-1:], *ids], skip_special_tokens=False)
    return text[len(last) :] if text.startswith(last) else tokenizer.decode(ids, skip_special_tokens=False)


@torch.inference_mode()
def _generate(
    model: Any, prompts: Sequence[list[int]], ends: list[int], length: int, temperature: float
) -> tuple[list[list[int]], Tensor]:
    """Return responses, and the final states (rows, steps, D) that predicted their tokens.

    The prefix that all prompts share is computed once. The padding follows it, hidden by the mask.
    """
    width, (common, cache) = max(map(len, prompts)), cache_shared_prefix(model, prompts)
    ids = torch.tensor([row[:common] + [ends[0]] * (width - len(row)) + row[common:] for row in prompts]).to(
        model.device
    )
    mask = torch.tensor([[1] * common + [0] * (width - len(row)) + [1] * (len(row) - common) for row in prompts])
    cached = cache_argument(cache) if common else {}
    inputs = {"input_ids": ids, "attention_mask": mask.to(model.device), "max_new_tokens": length, **cached}
    with _decoding(model, ends, temperature), contiguous_head_input(model):
        try:
            with _record_final_states(model) as states:
                output = model.generate(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # families raise exceptions of any type
            if has_known_cache(model):
                raise
            return _generate_without_cache(model, ids, ends, length, temperature)
    return output[:, width:].tolist(), _stack(states)


def _generate_without_cache(
    model: Any, ids: Tensor, ends: list[int], length: int, temperature: float
) -> tuple[list[list[int]], Tensor]:
    """Generate as `_generate` does, with a pass over the whole text per token, where ``generate`` does not work."""
    width, states = ids.shape[1], []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(length):
        with _record_final_states(model) as found:
            logits = model(**model_inputs(model, input_ids=ids, use_cache=False)).logits[:, -1]
        chosen = logits.argmax(dim=-1)
        if temperature:
            chosen = torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1)[:, 0]
        token = torch.where(done, ends[0], chosen)
        done |= torch.isin(token, torch.tensor(ends, device=token.device))
        ids = torch.cat([ids, token[:, None]], dim=1)
        states.append(found[-1])
        if bool(done.all()):
            break
    return ids[:, width:].tolist(), _stack(states)


@contextmanager
def _decoding(model: Any, ends: list[int], temperature: float) -> Iterator[None]:
    """Decode greedily or sample, whatever the checkpoint's generation config asks for: penalties, beams, no cache."""
    from transformers import GenerationConfig

    inner = unwrap(model)
    own = inner.generation_config
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    inner.generation_config = GenerationConfig(use_cache=True, pad_token_id=ends[0], eos_token_id=ends, **sampling)
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _record_final_states(model: Any) -> Iterator[list[Tensor]]:
    """Record what the head reads at the last position, (rows, D), at every pass."""
    states: list[Tensor] = []
    hook = (
        unwrap(model)
        .get_output_embeddings()
        .register_forward_pre_hook(lambda module, args: states.append(args[0][:, -1].clone()))
    )
    try:
        yield states
    finally:
        hook.remove()


def _stack(states: Sequence[Tensor]) -> Tensor:
    """Stack what the head read at each step, (rows, D), to (rows, steps, D)."""
    if states[0].ndim != 2:
        raise LoraSuiteError(
            "the model's head reads more than one state for a token", got=tuple(states[0].shape), wanted="(rows, D)",
            do="choose another backbone",
        )  # fmt: skip
    return torch.stack(list(states), dim=1)
