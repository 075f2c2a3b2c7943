"""Other PEFT kinds (LoHa, LoKr, OFT, IA3, ...) as a LoRA of their old backbone, before they are transferred."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError
from ..io.source import Source
from ..linalg.lowrank import LowRank, low_rank_approximation
from ..models.backbone import Backbone
from .adapter import Adapter
from .peft_format import CONFIG, PREFIX
from .peft_model import load_checked

RANK = 16
"""Rank of the LoRA where neither the caller nor the adapter's own config names a larger one."""


def convert_to_lora(
    source: Source, config: Mapping[str, Any], tensors: Mapping[str, Tensor], old: Backbone, rank: int | None,
    from_tensors: Callable[..., Adapter],
) -> Adapter:  # fmt: skip
    """Load an adapter on its backbone and make a LoRA of it, by PEFT where PEFT can."""
    # forked, since PEFT draws factors before it reads them
    with old.running(dtype=torch.float32, device_map="cpu") as backbone, torch.random.fork_rng():
        model = load_checked(backbone, source.require(CONFIG).parent, source.name)
        layers = _layers(model, source.name)
        smallest = min(min(layer.get_base_layer().weight.shape) for layer in layers.values())
        wanted = min(rank or max(int(config.get("r") or 0), RANK), smallest)
        factors, biases, kept = _factors(model, layers, wanted, config)
    plain = {"peft_type": "LORA", "task_type": config.get("task_type")}
    lora = {f"{PREFIX}{name}.lora_{end}.weight": value for name, pair in factors.items()
            for end, value in (("A", pair.A), ("B", pair.B))}  # fmt: skip
    lora |= {f"{PREFIX}{name}.lora_B.bias": bias for name, bias in biases.items()}
    adapter = from_tensors(lora, plain, old.arch, source=source, old=old)
    facts = {"converted": {"from": config["peft_type"], "rank": wanted, "energy_kept": round(kept, 6)}}
    return replace(adapter, **_source_names(adapter, tensors, set(factors)), facts=facts)


def _layers(model: Any, where: str) -> dict[str, Any]:
    """Return the adapted linear modules by their path in the backbone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        name.removeprefix(PREFIX): module for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge") and _is_linear(module.get_base_layer())
    }  # fmt: skip
    if not layers:
        raise LoraSuiteError(
            "the adapter changes no linear module, and what changes norms or single tokens alone is not transferred",
            where=where, got=model.active_peft_config.peft_type.value, do="train a LoRA on the new backbone",
        )  # fmt: skip
    return layers


def _is_linear(module: Any) -> bool:
    return module.weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)


def _factors(
    model: Any, layers: Mapping[str, Any], rank: int, config: Mapping[str, Any]
) -> tuple[dict[str, LowRank], dict[str, Tensor], float]:
    """Return factors and bias changes by module, and the mean share of the energy that the factors keep."""
    changes = {name: _change(layer) for name, layer in layers.items()}
    biases = {name: bias for name, (_, bias) in changes.items() if bias is not None}
    if not biases and config.get("bias", "none") == "none" and model.supports_lora_conversion():
        found = {name: _convert_by_peft(layer, rank) for name, layer in layers.items()}
    else:
        found = {name: low_rank_approximation(change, rank)[0] for name, (change, _) in changes.items()}
    shares = [
        found[name].norm() ** 2 / float((change**2).sum()) for name, (change, _) in changes.items() if change.any()
    ]
    return found, biases, sum(shares) / len(shares) if shares else 1.0


def _convert_by_peft(layer: Any, rank: int) -> LowRank:
    import peft

    with _in_float32(layer.get_base_layer()):
        _, tensors = peft.convert_to_lora(layer, rank)
    A, B = (next(value for name, value in tensors.items() if end in name) for end in ("lora_A", "lora_B"))
    return LowRank(A.detach().float(), B.detach().float())


def _change(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return what merging a module's adapter adds to its weight ``(out, in)`` and bias; the module stays as it was."""
    base = layer.get_base_layer()
    with _in_float32(base) as before, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds warn that merging rounds
        layer.merge()
        change = {name: value.detach().float() - before[name].float() for name, value in base.named_parameters()}
    layer.merged_adapters.clear()
    weight = change["weight"].T if type(base).__name__ == "Conv1D" else change["weight"]
    bias = change.get("bias")
    return weight, bias if bias is not None and bool(bias.any()) else None


@contextmanager
def _in_float32(base: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let a module hold float32 copies of its parameters for a while: what bfloat16 rounds away is the whole update."""
    own = {name: value.data for name, value in base.named_parameters()}
    for value in base.parameters():
        value.data = value.data.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    try:
        yield own
    finally:
        for name, value in base.named_parameters():
            value.data = own[name]


def _source_names(adapter: Adapter, tensors: Mapping[str, Tensor], modules: set[str]) -> dict[str, Any]:
    """Name the adapter's own tensors instead of the LoRA's: by module, those of no module with every update."""
    owners = {name: next((m for m in modules if name.startswith(f"{PREFIX}{m}.")), None) for name in tensors}
    places = {key: f"{adapter.arch.layer_path}.{key[0]}.{adapter.arch.site(key[1]).path}" for key in adapter.updates}
    common = [name for name, owner in owners.items() if owner is None and "." not in name.removeprefix("base_model.")]
    names = {
        key: (*(name for name, owner in owners.items() if owner == place), *common) for key, place in places.items()
    }
    info = {name for owned in names.values() for name in owned}
    unused = dict.fromkeys((name for name in tensors if name not in info), "no linear module of a decoder layer")
    return {"names": names, "unused": unused}
