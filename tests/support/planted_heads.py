"""Planted changes of attention heads: which there are, in which order, shared by how many, and their dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from canon import GROUPED, Canon
from torch import Tensor

from peft_lorasuite.arch.layout import heads_first
from peft_lorasuite.arch.spec import ATTENTION, Architecture, Heads


def more_heads(canon: Canon, generator: torch.Generator, arch: Architecture) -> None:
    """Double the heads with dead ones; under ALiBi, head i keeps its slope as number 2 i + 1 of twice as many."""
    heads = arch.heads
    groups: list[int | None] = [*range(heads.key_value), *[None] * heads.key_value]
    if arch.positions == "alibi":
        groups = [number // 2 if number % 2 else None for number in range(2 * heads.key_value)]
    regrouped(canon, groups, heads, generator)


def regrouped(canon: Canon, groups: Sequence[int | None], heads: Heads, generator: torch.Generator) -> None:
    """Take over old key/value groups with their query heads, in this order; None is a group of dead heads."""
    query = [None if group is None else group * heads.group + n for group in groups for n in range(heads.group)]
    for layer, own in zip(canon.layers, _in_layers(heads, canon.arch), strict=True):
        for part in ATTENTION:
            _selected(layer, part, own, groups if part in ("k", "v") else query, generator)
    canon.set(heads=len(query))
    if canon.name in GROUPED:
        canon.set(groups=len(groups))


def _in_layers(heads: Heads, arch: Architecture) -> list[Heads]:
    """Return the heads with the size that they have in each layer."""
    sizes = {layer: own.heads.size for own in arch.other_sizes for layer in own.layers}
    return [replace(heads, size=sizes.get(number, heads.size)) for number in range(arch.layers)]


def _selected(
    layer: dict[str, Tensor], part: str, heads: Heads, numbers: Sequence[int | None], generator: torch.Generator
) -> None:
    """Lay out chosen heads of a part; new query, key and value rows are random, new output columns zero."""
    for key in (part, f"{part}.bias", f"self_attn.{part}_norm.weight"):
        if key not in layer or key == "o.bias" or ("norm" in key and layer[key].shape[0] == heads.size):
            continue
        old = layer[key] if part != "o" else layer[key].T
        blocks = old.reshape(heads.count(part), heads.size, *old.shape[1:])
        fill = 0.0 if part == "o" else old.std()
        chosen = [
            torch.randn(blocks[0].shape, generator=generator) * fill if number is None else blocks[number]
            for number in numbers
        ]
        new = torch.cat(chosen)
        layer[key] = new.T if part == "o" else new
    sinks = layer.get("self_attn.sinks")
    if part == "q" and sinks is not None:
        layer["self_attn.sinks"] = torch.stack([torch.zeros(()) if n is None else sinks[n] for n in numbers])


def permuted_heads(canon: Canon, generator: torch.Generator) -> None:
    """Permute the key/value groups, and the query heads of each group with them."""
    heads = canon.arch.heads
    regrouped(canon, torch.randperm(heads.key_value, generator=generator).tolist(), heads, generator)
    heads = canon.arch.heads
    query = [
        group * heads.group + int(n)
        for group in range(heads.key_value)
        for n in torch.randperm(heads.group, generator=generator)
    ]
    for layer, own in zip(canon.layers, _in_layers(heads, canon.arch), strict=True):
        for part in ("q", "o", "q_gate"):
            _selected(layer, part, own, query, generator)


def dead_heads(canon: Canon, generator: torch.Generator) -> None:
    """Put as many groups of heads whose output columns are zero among the others (Llama's count divides D)."""
    heads = canon.arch.heads
    groups: list[int | None] = [*range(heads.key_value)]
    for place in torch.randint(heads.key_value + 1, (heads.key_value,), generator=generator).tolist():
        groups.insert(place, None)
    canon.values["head_dim"] = heads.size
    regrouped(canon, groups, heads, generator)


def replicated_groups(canon: Canon, generator: torch.Generator) -> None:
    """Give every query head keys and values of its own: GQA to MHA."""
    heads = canon.arch.heads
    numbers = [number for number in range(heads.key_value) for _ in range(heads.group)]
    for layer, own in zip(canon.layers, _in_layers(heads, canon.arch), strict=True):
        for part in ("k", "v"):
            _selected(layer, part, own, numbers, generator)
    canon.set(groups=heads.query)


def turned_heads(canon: Canon, generator: torch.Generator) -> None:
    """Change the dimensions inside heads: v and o by any invertible map, q and k only as positions let through."""
    arch = canon.arch
    for number, layer in enumerate(canon.layers):
        for group in range(arch.heads.key_value):
            V, Q = _invertible(arch.heads.size, generator), _position_free(arch, number, generator)
            _turn(layer, "v", arch, [group], V)
            _turn(layer, "k", arch, [group], Q)
            members = [group * arch.heads.group + n for n in range(arch.heads.group)]
            _turn(layer, "q", arch, members, torch.linalg.inv(Q).T)
            _turn(layer, "o", arch, members, torch.linalg.inv(V).T)


def _turn(layer: dict[str, Tensor], part: str, arch: Architecture, numbers: Sequence[int], M: Tensor) -> None:
    blocks = heads_first(layer[part], part, arch.heads).clone()
    blocks[list(numbers)] = M @ blocks[list(numbers)]
    flat = blocks.reshape(-1, blocks.shape[-1])
    layer[part] = flat.T if part == "o" else flat
    if part != "o" and f"{part}.bias" in layer:
        biases = layer[f"{part}.bias"].reshape(-1, arch.heads.size).clone()
        biases[list(numbers)] = biases[list(numbers)] @ M.T
        layer[f"{part}.bias"] = biases.reshape(-1)


def _position_free(arch: Architecture, layer: int, generator: torch.Generator) -> Tensor:
    """Turn and scale each rotary pair; dimensions that do not turn may be mixed at will."""
    rotated = arch.rotary_size if arch.positions == "rotary" and arch.theta(layer) else 0
    M, half = torch.zeros(arch.heads.size, arch.heads.size), rotated // 2
    angle = 6.28 * torch.rand(half, generator=generator)
    size = 0.5 + torch.rand(half, generator=generator)
    first, second = torch.arange(half), torch.arange(half, rotated)
    M[first, first] = M[second, second] = size * angle.cos()
    M[first, second], M[second, first] = -size * angle.sin(), size * angle.sin()
    M[rotated:, rotated:] = _invertible(arch.heads.size - rotated, generator)
    return M


def _invertible(size: int, generator: torch.Generator) -> Tensor:
    """A random square matrix with singular values between 0.5 and 2."""
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return U @ torch.diag(0.5 + 1.5 * torch.rand(size, generator=generator)) @ V
