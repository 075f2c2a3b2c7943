"""Experts and routers of a pico backbone, taken apart into one weight per expert and part, and planted changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_lorasuite.arch.experts import Experts
from peft_lorasuite.arch.spec import Architecture

if TYPE_CHECKING:
    from canon import Canon

NAMES = ("experts.", "router.")
"""Beginnings of the keys in a canon's layer: ``experts.<number>.<part>[.bias]``, ``router.weight``, ``router.bias``."""


def take_experts(rest: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Take the experts out of a layer's tensors."""
    experts = arch.experts
    if experts is None:
        return {}
    taken = {f"router.{kind}": rest.pop(f"{experts.router}.{kind}") for kind in ("weight", "bias")
             if f"{experts.router}.{kind}" in rest}  # fmt: skip
    both, down = (rest.pop(f"{experts.path}.{name}") for name in ("gate_up_proj", "down_proj"))
    if experts.transposed:
        both, down = both.mT, down.mT
    biases = rest.pop(f"{experts.path}.gate_up_proj_bias", None), rest.pop(f"{experts.path}.down_proj_bias", None)
    for number in range(experts.count):
        gate, up = _halves(both[number], experts)
        taken |= {f"experts.{number}.gate": gate, f"experts.{number}.up": up, f"experts.{number}.down": down[number]}
        if biases[0] is not None and biases[1] is not None:
            gate, up = _halves(biases[0][number], experts)
            taken |= {f"experts.{number}.gate.bias": gate, f"experts.{number}.up.bias": up}
            taken[f"experts.{number}.down.bias"] = biases[1][number]
    return taken


def _halves(rows: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    return (rows[0::2], rows[1::2]) if experts.transposed else (rows[: len(rows) // 2], rows[len(rows) // 2 :])


def put_experts(layer: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Return the tensors of a layer's experts by their names; the inverse of `take_experts`."""
    experts = arch.experts
    if experts is None:
        return {}
    put = {f"{experts.router}.{key.removeprefix('router.')}": layer[key] for key in layer if key.startswith("router.")}
    for ending, name in (("", ""), (".bias", "_bias")):
        if f"experts.0.gate{ending}" not in layer:
            continue
        each = range(experts.count)
        gate, up, down = (
            torch.stack([layer[f"experts.{n}.{part}{ending}"] for n in each]) for part in ("gate", "up", "down")
        )
        both = torch.stack([gate, up], dim=2).flatten(1, 2) if experts.transposed else torch.cat([gate, up], dim=1)
        if experts.transposed and not ending:
            both, down = both.mT, down.mT
        put |= {f"{experts.path}.gate_up_proj{name}": both, f"{experts.path}.down_proj{name}": down}
    return put


def rebase_experts(layer: dict[str, Tensor], arch: Architecture, stream: Tensor, readers: dict[str, Tensor]) -> None:
    """Put the experts and the router of a layer on another basis of the hidden space; see `planted.rebased`."""
    for key in [key for key in layer if key.startswith(NAMES) and arch.experts is not None]:
        if key.endswith((".gate", ".up", "router.weight")):
            layer[key] = layer[key] @ readers[arch.experts.norm]
        elif key.endswith((".down", ".down.bias")):
            layer[key] = stream @ layer[key]


def permuted_experts(canon: Canon, generator: torch.Generator) -> None:
    """Permute the experts of every layer, and the units of each expert."""
    experts = canon.arch.experts
    assert experts is not None
    for layer in canon.layers:
        order = torch.randperm(experts.count, generator=generator).tolist()
        old = {key: layer.pop(key) for key in list(layer) if key.startswith("experts.")}
        for new, number in enumerate(order):
            units = torch.randperm(experts.intermediate, generator=generator)
            for key in [key for key in old if key.startswith(f"experts.{number}.")]:
                part = key.split(".", 2)[2]
                value = old[key][:, units] if part == "down" else old[key] if part == "down.bias" else old[key][units]
                layer[f"experts.{new}.{part}"] = value
        layer |= {key: layer[key][order] for key in layer if key.startswith("router.")}
