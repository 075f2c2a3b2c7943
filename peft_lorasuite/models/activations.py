"""Calibration runs: the output of every layer of two backbones at the same tokens of the same text."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..compat import body
from ..errors import LoraSuiteError
from ..io.write_errors import write_errors
from ..text.vocabulary import align_token_ends, check_token_rows
from .backbone import Backbone
from .distributed import split_between_processes, sum_across_processes
from .loading import decoder_layers
from .memory import free_models, release_memory
from .offload import is_on_disk
from .task import DECODER

SINK_TOKENS = 4
"""Leading positions of a sequence that are never sampled: attention sinks have activations hundreds of times larger."""
BATCH_TOKENS = 1024
"""Padded tokens of one forward batch."""
BUDGET = 2**28
"""Bytes of one backbone's sampled activations that stay in memory; larger tensors go to a temporary file."""


@dataclass(frozen=True)
class Sampling:
    """How much calibration text is run and kept.

    Attributes:
        tokens: Paired tokens kept, for all layers; 2,048 tokens of a 28-layer, 1,536-wide backbone are 352 MB.
        block: Tokens of one minibatch of CKA.
        seed: Seed of the random choice of tokens and of their order.
    """

    tokens: int = 2048
    block: int = 256
    seed: int = 0


@dataclass(frozen=True, eq=False)
class ActivationPair:
    """Activations of the same tokens in two backbones.

    Attributes:
        old: Outputs of the old backbone's layers, (L_o, tokens, D_o).
        new: Outputs of the new backbone's layers, (L_n, tokens, D_n).
    """

    old: Tensor
    new: Tensor


def paired_activations(
    old: Backbone, new: Backbone, texts: Sequence[str], sampling: Sampling = Sampling(), *, device_map: Any = None,
    dtype: torch.dtype | str = "auto",
) -> ActivationPair:  # fmt: skip
    """Run both backbones, one after the other, on the same texts and keep a random sample of their common tokens."""
    chosen = choose_tokens(old, new, texts, sampling)
    sides = []
    for backbone, side in ((old, 1), (new, 2)):
        with backbone.running(task=DECODER, dtype=dtype, device_map=device_map) as model:
            sides.append(layer_outputs(model, backbone, texts, [(pair[0], pair[side]) for pair in chosen]))
        del model
        free_models()
    return ActivationPair(*sides)


def layer_outputs(model: Any, backbone: Backbone, texts: Sequence[str], places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the outputs of all decoder layers at some tokens; several processes share the batches.

    Args:
        model: The loaded model.
        backbone: Its backbone.
        texts: The calibration texts.
        places: Index of the text and position in it, for each token.

    Returns:
        The outputs before the final norm, (L, places, D), in the model's dtype.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row, (text, position) in enumerate(places):
        wanted.setdefault(text, []).append((row, position))
    arch = backbone.arch
    kept = allocate((arch.layers, len(places), arch.hidden), model.dtype)
    for _, (batch, inputs) in split_between_processes(list(batches(backbone, texts, sorted(wanted)))):
        rows = torch.tensor([row for text in batch for row, _ in wanted[text]])
        where = torch.tensor([(line, position) for line, text in enumerate(batch) for _, position in wanted[text]])
        with record_layer_outputs(model, arch.layer_path, where) as outputs, torch.inference_mode():
            forward_pass(body(model), inputs)
        for layer, hidden in enumerate(outputs):
            kept[layer, rows] = hidden
    return sum_across_processes(kept)


def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros, in memory up to `BUDGET` bytes, else in a temporary file deleted along with it."""
    size = math.prod(shape) * dtype.itemsize
    if size <= BUDGET:
        return torch.zeros(*shape, dtype=dtype)
    with write_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here; later it would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
        mapped = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(*shape)


def batches(
    backbone: Backbone, texts: Sequence[str], chosen: Iterable[int]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Group texts of similar length into batches of at most `BATCH_TOKENS` tokens.

    Args:
        backbone: The backbone whose tokenizer is used.
        texts: All texts.
        chosen: Indices of the texts to use.

    Yields:
        The indices of a batch's texts, and the model's inputs, padded on the right.
    """
    ids = {text: encode_text(backbone, texts[text])["input_ids"] for text in chosen}
    order = sorted(ids, key=lambda text: (len(ids[text]), text))
    batch: list[int] = []
    for text in order:
        if batch and len(ids[text]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch, pad_batch([ids[number] for number in batch])
            batch = []
        batch.append(text)
    if batch:
        yield batch, pad_batch([ids[number] for number in batch])


def pad_batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Pad rows of token ids on the right, where causal attention never looks; return ids and mask, (rows, length)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def length_batches(rows: Sequence[Any]) -> list[list[int]]:
    """Group rows of similar length, by the number of their ``ids``, into batches of at most `BATCH_TOKENS` tokens."""
    groups: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if groups and len(rows[number].ids) * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def encode_text(backbone: Backbone, text: str) -> dict[str, Any]:
    """Tokenize a text with special tokens and character offsets, truncated to the backbone's context."""
    encoded = backbone.tokenizer(text, return_offsets_mapping=True, truncation=False)
    check_token_rows(backbone.tokenizer, encoded["input_ids"], backbone.arch.vocabulary, repr(backbone))
    return {name: encoded[name][: backbone.context] for name in ("input_ids", "offset_mapping")}


def forward_pass(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Run a model once without a cache, on its own device; `body` leaves the head out."""
    return model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)


def hidden_state(output: Any) -> Tensor:
    """Return the hidden state of a layer's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def record_layer_outputs(
    model: Any, layer_path: str, where: Int[Tensor, "places 2"]
) -> Iterator[list[Float[Tensor, "places hidden"]]]:
    """Record the output of every decoder layer, before the final norm, at some (row, position) of a batch."""
    outputs: list[Tensor] = []
    offloaded = is_on_disk(model)

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(hidden_state(output).detach()[where[:, 0], where[:, 1]].cpu())
        if offloaded:  # otherwise the next layer reuses the same memory
            release_memory()

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model, layer_path)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def choose_tokens(old: Backbone, new: Backbone, texts: Sequence[str], sampling: Sampling) -> list[tuple[int, int, int]]:
    """Draw tokens that end at the same character in both tokenizers: ``(text, old position, new position)``.

    Raises:
        LoraSuiteError: When there are fewer than four such tokens.
    """
    return _sample(_pair_tokens(old, new, texts), sampling)


def _pair_tokens(old: Backbone, new: Backbone, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pair the tokens of each text that end at the same character in both tokenizers."""
    spans = ([encode_text(backbone, text)["offset_mapping"] for text in texts] for backbone in (old, new))
    return [align_token_ends(left, right, skip=SINK_TOKENS) for left, right in zip(*spans, strict=True)]


def _sample(pairs: Sequence[Sequence[tuple[int, int]]], sampling: Sampling) -> list[tuple[int, int, int]]:
    """Draw ``(text, old position, new position)``: texts at random until they hold enough, then tokens at random.

    So no more text is run than needed, and a minibatch of CKA is a random sample rather than consecutive tokens.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    pool: list[tuple[int, int, int]] = []
    for text in torch.randperm(len(pairs), generator=generator).tolist():
        if len(pool) >= sampling.tokens:
            break
        pool += [(text, a, b) for a, b in pairs[text]]
    if len(pool) < 4:
        raise LoraSuiteError(
            "the calibration text has too few tokens that end at the same character in both tokenizers",
            got=len(pool), wanted="at least 4", do="pass a longer text",
        )  # fmt: skip
    order = torch.randperm(len(pool), generator=generator)[: sampling.tokens]
    return [pool[number] for number in order.tolist()]
