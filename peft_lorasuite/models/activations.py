"""Calibration runs: what each layer of two backbones puts out for the same text, token by token."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoraSuiteError
from ..text.vocabulary import align_token_ends
from .backbone import Backbone
from .distributed import split_between_processes, sum_across_processes
from .memory import free_models, release_memory
from .offload import is_on_disk

log = logging.getLogger(__name__)

SINK_TOKENS = 4
"""First positions of a sequence, whose activations are hundreds of times larger than the rest: never counted."""
BATCH_TOKENS = 1024
"""Tokens of one forward batch."""


BUDGET = 2**28
"""Bytes of a backbone's kept activations that stay in memory; more of them go to a file in the temporary folder."""


@dataclass(frozen=True)
class Sampling:
    """How much calibration text is run and kept.

    Attributes:
        tokens: Paired tokens kept, for all layers; 2,048 tokens of a 28-layer, 1,536-wide backbone are 352 MB.
        block: Tokens of one minibatch of CKA.
        seed: Of the random choice of tokens and its order.
    """

    tokens: int = 2048
    block: int = 256
    seed: int = 0


@dataclass(frozen=True, eq=False)
class ActivationPair:
    """Activations of the same tokens in two backbones: ``(L_o, N, D_o)`` and ``(L_n, N, D_n)``."""

    old: Tensor
    new: Tensor


def paired_activations(
    old: Backbone, new: Backbone, texts: Sequence[str], sampling: Sampling = Sampling(), *, device_map: Any = None,
    dtype: torch.dtype | str = "auto",
) -> ActivationPair:  # fmt: skip
    """Run both backbones, one after the other, over the same texts and keep a random sample of common tokens."""
    chosen = choose_tokens(old, new, texts, sampling)
    sides = []
    for backbone, side in ((old, 1), (new, 2)):
        with backbone.running(dtype=dtype, device_map=device_map) as model:
            sides.append(layer_outputs(model, backbone, texts, [(pair[0], pair[side]) for pair in chosen]))
        del model
        free_models()
    return ActivationPair(*sides)


def layer_outputs(model: Any, backbone: Backbone, texts: Sequence[str], places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the outputs of every decoder layer at some ``(text, position)``: (L, places, D), in the model's dtype.

    Several processes take batches in turn.
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
            forward_pass(model.base_model, inputs)
        for layer, hidden in enumerate(outputs):
            kept[layer, rows] = hidden
    return sum_across_processes(kept)


def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros: in memory up to `BUDGET` bytes, beyond that in a nameless file that goes with it."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size <= BUDGET:
        return torch.zeros(*shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        held = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
    return torch.from_numpy(held).view(dtype).view(*shape)


def batches(
    backbone: Backbone, texts: Sequence[str], chosen: Iterable[int]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Cut texts into batches of like length, at most `BATCH_TOKENS` tokens each, padded on the right."""
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
    """Pad token ids on the right; causal attention never looks there."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def encode_text(backbone: Backbone, text: str) -> dict[str, Any]:
    """Tokenize one text as the model is fed, with its special tokens and character offsets, up to its context."""
    found = backbone.tokenizer(text, return_offsets_mapping=True, truncation=False)
    return {name: found[name][: backbone.context] for name in ("input_ids", "offset_mapping")}


def forward_pass(model: Any, inputs: dict[str, Tensor]) -> Any:
    """One forward pass without a cache, on the model's own device; ``model.base_model`` leaves the head out."""
    return model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)


def hidden_state(output: Any) -> Tensor:
    """Return a layer's hidden state, whether it comes alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def record_layer_outputs(
    model: Any, layer_path: str, where: Int[Tensor, "places 2"]
) -> Iterator[list[Float[Tensor, "places hidden"]]]:
    """Collect every decoder layer's output, before the final norm, at some (line, position) of a batch."""
    outputs: list[Tensor] = []
    layers_go = is_on_disk(model)

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(hidden_state(output).detach()[where[:, 0], where[:, 1]].cpu())
        if layers_go:  # else the next layer takes the same memory
            release_memory()

    handles = [layer.register_forward_hook(keep) for layer in model.get_submodule(layer_path)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def choose_tokens(old: Backbone, new: Backbone, texts: Sequence[str], sampling: Sampling) -> list[tuple[int, int, int]]:
    """Draw tokens that both tokenizers end at the same character: ``(text, old position, new position)``."""
    return _choose(_pairs(old, new, texts), sampling)


def _pairs(old: Backbone, new: Backbone, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pair the tokens of every text that end at the same character in both tokenizers."""
    spans = ([encode_text(backbone, text)["offset_mapping"] for text in texts] for backbone in (old, new))
    return [align_token_ends(left, right, skip=SINK_TOKENS) for left, right in zip(*spans, strict=True)]


def _choose(pairs: Sequence[Sequence[tuple[int, int]]], sampling: Sampling) -> list[tuple[int, int, int]]:
    """Draw ``(text, old position, new position)``: texts at random until they hold enough, then tokens at random.

    No more text is run than is needed, and a block of CKA is a random sample, never a contiguous stretch.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    pool: list[tuple[int, int, int]] = []
    for text in torch.randperm(len(pairs), generator=generator).tolist():
        if len(pool) >= sampling.tokens:
            break
        pool += [(text, a, b) for a, b in pairs[text]]
    if len(pool) < 4:
        raise LoraSuiteError(
            "the tokenizers cut the calibration text at too few common places",
            got=len(pool),
            wanted="at least 4",
            do="give a longer text",
        )
    order = torch.randperm(len(pool), generator=generator)[: sampling.tokens]
    return [pool[number] for number in order.tolist()]
