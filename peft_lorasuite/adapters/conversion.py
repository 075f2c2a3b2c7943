"""Conversion of other PEFT types (LoHa, LoKr, OFT, IA3, ...) to a LoRA of their backbone, before the upgrade."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat import converts_to_lora
from ..errors import LoraSuiteError
from ..io.source import Source
from ..io.temporary import temporary_folder
from ..linalg.lowrank import LowRank, low_rank_approximation
from ..models.backbone import Backbone
from .adapter import Adapter
from .class_head import adapter_task, saved_head
from .key_names import SHARED, parse_names
from .peft_format import PREFIX
from .peft_model import add_adapter_strict, normalized_folder
from .token_tables import DELTA, find_table

RANK = 16
"""Default rank of the LoRA, unless the adapter's config has a larger ``r``."""


def convert_to_lora(
    source: Source, config: Mapping[str, Any], tensors: Mapping[str, Tensor], old: Backbone, rank: int | None,
    from_tensors: Callable[..., Adapter],
) -> Adapter:  # fmt: skip
    """Load an adapter on its backbone and convert it to LoRA, with PEFT's conversion if the type supports it.

    Args:
        source: Folder or repository of the adapter.
        config: The adapter's PEFT config.
        tensors: Saved name -> tensor.
        old: The backbone.
        rank: Rank of the LoRA; by default the adapter's ``r`` or `RANK`, whichever is larger.
        from_tensors: The function of `parsing` that returns an `Adapter`.
    """
    head = saved_head(tensors, old.arch, where=source.name)
    task = adapter_task(config, head, where=source.name).running
    # random state forked, because PEFT initializes factors randomly before it loads them
    running = old.running(task=task, dtype=torch.float32, device_map="cpu")
    with running as backbone, torch.random.fork_rng(), temporary_folder() as written:
        folder = normalized_folder(source, config, tensors, old.arch, written)
        model = add_adapter_strict(backbone, folder, source.name)
        layers = _layers(model, source.name)
        smallest = min(min(layer.get_base_layer().weight.shape) for layer in layers.values())
        rank = min(rank or max(int(config.get("r") or 0), RANK), smallest)
        try:
            factors, biases, kept = _convert_layers(model, layers, rank, config)
        except NotImplementedError as error:
            raise LoraSuiteError(
                "PEFT cannot merge this type, so that it cannot be converted to a LoRA", where=source.name,
                got=config["peft_type"], do="train a LoRA, on the old backbone or on the new one",
            ) from error  # fmt: skip
    plain = {"peft_type": "LORA"} | {name: config.get(name) for name in ("task_type", "trainable_token_indices")}
    lora = {f"{PREFIX}{name}.lora_{end}.weight": value for name, pair in factors.items()
            for end, value in (("A", pair.A), ("B", pair.B))}  # fmt: skip
    lora |= {f"{PREFIX}{name}.lora_B.bias": bias for name, bias in biases.items()}
    saved = {name: key for name, key in parse_names(tensors, old.arch).items() if find_table(key.module, old.arch)}
    lora |= {name: tensors[name] for name, key in saved.items() if key.ending in ("weight", DELTA)}
    lora |= {name: tensors[name] for name in (head.names if head else ())}
    adapter = from_tensors(lora, plain, old.arch, source=source, old=old)
    facts = {"converted": {"from": config["peft_type"], "rank": rank, "energy_kept": round(kept, 6)}}
    return replace(adapter, **_source_names(adapter, tensors, set(factors)), facts=facts)


def _layers(model: Any, where: str) -> dict[str, Any]:
    """Return the linear modules that have an adapter, by their path in the backbone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        name.removeprefix(PREFIX): module for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge") and _is_linear(module.get_base_layer())
    }  # fmt: skip
    if not layers:
        raise LoraSuiteError(
            "the adapter changes no linear modules, and changes of norms or single tokens alone are not transferred",
            where=where, got=model.active_peft_config.peft_type.value, do="train a LoRA on the new backbone",
        )  # fmt: skip
    return layers


def _is_linear(module: Any) -> bool:
    return module.weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)


def _convert_layers(
    model: Any, layers: Mapping[str, Any], rank: int, config: Mapping[str, Any]
) -> tuple[dict[str, LowRank], dict[str, Tensor], float]:
    """Return factors and bias changes by module, and the mean fraction of the energy that the factors keep."""
    changes = {name: _weight_change(layer) for name, layer in layers.items()}
    biases = {name: bias for name, (_, bias) in changes.items() if bias is not None}
    if not biases and config.get("bias", "none") == "none" and converts_to_lora(model):
        factors = {name: _convert_by_peft(layer, rank) for name, layer in layers.items()}
    else:
        factors = {name: low_rank_approximation(change, rank)[0] for name, (change, _) in changes.items()}
    kept = [
        factors[name].norm() ** 2 / float((change**2).sum()) for name, (change, _) in changes.items() if change.any()
    ]
    return factors, biases, sum(kept) / len(kept) if kept else 1.0


def _convert_by_peft(layer: Any, rank: int) -> LowRank:
    import peft

    with _in_float32(layer.get_base_layer()):
        _, tensors = peft.convert_to_lora(layer, rank)
    A, B = (next(value for name, value in tensors.items() if end in name) for end in ("lora_A", "lora_B"))
    return LowRank(A.detach().float(), B.detach().float())


def _weight_change(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return what merging its adapter adds to a module's weight, ``(out, in)``, and bias; restores the module."""
    base = layer.get_base_layer()
    with _in_float32(base) as before, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some types warn about rounding errors
        layer.merge()
        change = {name: value.detach().float() - before[name].float() for name, value in base.named_parameters()}
    layer.merged_adapters.clear()
    weight = change["weight"].T if type(base).__name__ == "Conv1D" else change["weight"]
    bias = change.get("bias")
    return weight, bias if bias is not None and bool(bias.any()) else None


@contextmanager
def _in_float32(base: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Replace a module's parameters by float32 copies inside the block: in bfloat16 the change would be rounded away.

    Yields:
        The original parameters by name.
    """
    own = {name: value.data for name, value in base.named_parameters()}
    for value in base.parameters():
        value.data = value.data.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    try:
        yield own
    finally:
        for name, value in base.named_parameters():
            value.data = own[name]


def _source_names(adapter: Adapter, tensors: Mapping[str, Tensor], modules: set[str]) -> dict[str, Any]:
    """Return ``names`` and ``unused`` of an `Adapter` by the tensors of the source, not of the LoRA.

    Tensors outside of any module, such as VB-LoRA's vector bank, belong to every update.
    """
    parsed = parse_names(tensors, adapter.arch)
    owners = {
        name: next((m for m in modules if f"{key.module}.".startswith(f"{m}.")), None) for name, key in parsed.items()
    }
    paths = {key: adapter.arch.module(key[0], adapter.arch.site(key[1])) for key in adapter.updates}
    common = [name for name, owner in owners.items() if owner is None and parsed[name].module.startswith(SHARED)]
    names = {key: (*(name for name, owner in owners.items() if owner == path), *common) for key, path in paths.items()}
    kept = [*(table.names for table in adapter.tables.values()), adapter.head.names if adapter.head else ()]
    used = {name for owned in [*names.values(), *kept] for name in owned}
    reason = "it is not in a linear module of a decoder layer"
    return {"names": names, "unused": {name: parsed[name].reason or reason for name in tensors if name not in used}}
