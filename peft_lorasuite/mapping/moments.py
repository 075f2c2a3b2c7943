"""What two backbones' modules read and write on the same tokens, as sums of products gathered in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arch.layout import head_rows
from ..arch.spec import WRITERS, Architecture
from ..models.activations import Sampling, batches, chosen_tokens, encode, padded, run
from ..models.backbone import Backbone
from ..progress import Progress, silent

WIDE = 2048
"""Widest input of a module whose products with itself are kept whole."""
SKETCH = 1024
"""Random directions in which a wider input of the new backbone is looked at, and its old partner not squared."""
BUDGET = 3 * 10**9
"""Bytes of sums held at a time; more layers than fit are gathered in further runs over the text."""
Signal = tuple[int, str]
"""New layer, and a part (its module's input), a writing part and ``" out"`` (its output without the bias), or a part
and ``" grad"`` (the gradient of the next tokens' NLL at its output)."""


class Moments:
    """Running sums over paired tokens of an old signal x and a new signal y; never the signals themselves.

    Attributes:
        cross: ``sum x y^T (old, new)``; of a wide y its directions ``sketch^T y``.
        old: ``sum x x^T``, or None where x is wide.
        new: ``sum y y^T`` in the same directions as ``cross``, or None for an output.
        old_energy: ``sum x * x``.
        new_energy: ``sum y * y``.
        sketch: Orthonormal directions ``(new, SKETCH)`` of a wide y, or None.
    """

    def __init__(self, old: int, new: int, *, output: bool = False, hidden: bool = False, seed: int = 0) -> None:
        wide = max(old, new) > WIDE and not output and not hidden
        self.sketch = _directions(new, seed) if wide and new > SKETCH else None
        seen = new if self.sketch is None else SKETCH
        self.cross = torch.zeros(old, seen)
        self.old = None if wide else torch.zeros(old, old)
        self.new = None if output else torch.zeros(seen, seen)
        self.old_energy, self.new_energy = torch.zeros(old), torch.zeros(new)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        tensors = (self.cross, self.old, self.new, self.sketch)
        return 4 * sum(tensor.numel() for tensor in tensors if tensor is not None)

    def add(self, x: Float[Tensor, "tokens old"], y: Float[Tensor, "tokens new"]) -> None:
        """Count some more tokens."""
        x, y = x.float(), y.float()
        self.old_energy += (x**2).sum(dim=0)
        self.new_energy += (y**2).sum(dim=0)
        if self.sketch is not None:
            y = y @ self.sketch
        self.cross += x.T @ y
        if self.old is not None:
            self.old += x.T @ x
        if self.new is not None:
            self.new += y.T @ y


def _directions(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, SKETCH, generator=torch.Generator().manual_seed(seed))).Q


def empty(old: Architecture, new: Architecture, name: str) -> Moments:
    """Return the sums of one kind of signal before any token."""
    part, _, kind = name.partition(" ")
    side = 0 if kind else 1
    sizes = old.shape(part)[side], new.shape(part)[side]
    return Moments(*sizes, output=kind == "out", hidden=not kind and part not in WRITERS)


def gather(
    old: Backbone, new: Backbone, pairs: Sequence[tuple[int, int]], names: Sequence[str], texts: Sequence[str],
    sampling: Sampling, *, device_map: Any = None, dtype: torch.dtype | str = "auto", progress: Progress = silent,
) -> Iterator[tuple[tuple[int, int], dict[str, Moments]]]:  # fmt: skip
    """Run both backbones over the same texts and give the sums of every pair of layers.

    Args:
        old: Old backbone.
        new: New backbone; both are loaded at once.
        pairs: Layer pairs, old and new.
        names: Kinds of `Signal` to gather.
        texts: Calibration texts.
        sampling: How many tokens.
        device_map: As in transformers.
        dtype: Of the runs.
        progress: Shows how far it is.

    Yields:
        A pair of layers and its sums, by name.
    """
    chosen = chosen_tokens(old, new, texts, sampling)
    places: dict[int, list[tuple[int, int]]] = {}
    for text, left, right in chosen:
        places.setdefault(text, []).append((left, right))
    one = sum(empty(old.arch, new.arch, name).bytes for name in names)
    step = max(1, BUDGET // max(one, 1))
    loaded = {"dtype": dtype, "device_map": device_map}
    with old.running(**loaded) as left, new.running(**loaded) as right:
        models = (left, right)
        for start in range(0, len(pairs), step):
            group = pairs[start : start + step]
            sums = {(j, name): empty(old.arch, new.arch, name) for _, j in group for name in names}
            for batch, inputs in progress("gathering activations", list(batches(old, texts, sorted(places)))):
                _count(models, (old, new), group, names, batch, inputs, places, [texts[text] for text in batch], sums)
            for i, j in group:
                yield (i, j), {name: sums.pop((j, name)) for name in names}


def _count(
    models: Sequence[Any], backbones: tuple[Backbone, Backbone], group: Sequence[tuple[int, int]],
    names: Sequence[str], batch: Sequence[int], inputs: dict[str, Tensor], places: dict[int, list[tuple[int, int]]],
    texts: Sequence[str], sums: dict[Signal, Moments],
) -> None:  # fmt: skip
    """Run one batch: the old backbone's signals are kept until the new one's, a moment later, are counted with them."""
    old, new = backbones
    rows = [(line, left, right) for line, text in enumerate(batch) for left, right in places[text]]
    where = torch.tensor(rows).T
    kept: dict[Signal, Tensor] = {}
    partner = dict(group)

    def keep(layer: int, name: str, values: Tensor) -> None:
        kept[partner[layer], name] = _by_line(values, batch)[where[0], where[1]].cpu()

    def count(layer: int, name: str, values: Tensor) -> None:
        sums[layer, name].add(kept.pop((layer, name)), _by_line(values, batch)[where[0], where[2]].cpu())

    other = padded([encode(new, text)["input_ids"] for text in texts])
    with listening(models[0], old.arch, [i for i, _ in group], names, keep):
        _run(models[0], inputs, names)
    with listening(models[1], new.arch, [j for _, j in group], names, count):
        _run(models[1], other, names)


def _run(model: Any, inputs: dict[str, Tensor], names: Sequence[str]) -> None:
    """Run a batch, backwards too if gradients are wanted; the weights get none."""
    if not any(name.endswith(" grad") for name in names):
        with torch.inference_mode():
            run(model.base_model, inputs)
        return
    model.requires_grad_(False)  # `Backbone.running` puts back what belongs to the caller
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, result: result.requires_grad_())
    try:
        with torch.enable_grad():
            logits = run(model, inputs).logits[:, :-1].float()
            wanted = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:].to(logits.device)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").backward()
    finally:
        handle.remove()


def _by_line(values: Tensor, batch: Sequence[int]) -> Float[Tensor, "lines tokens size"]:
    """Undo the flattening of lines and tokens that some modules are given."""
    return values.reshape(len(batch), -1, values.shape[-1])


@contextmanager
def listening(
    model: Any,
    arch: Architecture,
    layers: Sequence[int],
    names: Sequence[str],
    hear: Callable[[int, str, Tensor], None],
) -> Iterator[None]:
    """Call ``hear(layer, name, values)`` with the signals of forward passes inside the block."""
    handles = []
    for layer in layers:
        for name in names:
            part, _, kind = name.partition(" ")
            site = arch.site(part)
            module = model.get_submodule(f"{arch.layer_path}.{layer}.{site.path}")
            rows = head_rows(site, arch)[part] if kind == "grad" else None
            handles.append(module.register_forward_hook(_hook(layer, name, kind, rows, hear)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    layer: int, name: str, kind: str, rows: Tensor | None, hear: Callable[[int, str, Tensor], None]
) -> Callable[..., None]:
    def hook(module: Any, args: Any, result: Any) -> None:
        if rows is not None:
            result.register_hook(lambda gradient: hear(layer, name, gradient[..., rows]))
            return
        values = args[0]
        if kind == "out":
            bias = getattr(module, "bias", None)
            values = result if bias is None else result - bias
        hear(layer, name, values.detach())

    return hook
