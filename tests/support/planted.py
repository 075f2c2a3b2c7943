"""Planted upgrades: changes of a backbone that keep its function, so that the right adapter is known exactly.

Each change takes a `Canon` and a generator and changes the canon in place. Which family admits which change stands in
`ADMITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from canon import GROUPED, Canon
from canon_experts import permuted_experts, rebase_experts
from pico import EXPERTS, PICO, VOCABULARY, pico_tokenizer
from planted_heads import dead_heads, more_heads, permuted_heads, replicated_groups, turned_heads
from torch import Tensor

from peft_lorasuite.arch.spec import OUTPUT_PROJECTIONS
from peft_lorasuite.text.vocabulary import shared_tokens

EVERY = tuple(name for name in PICO | EXPERTS if name != "gemma3")
"""Gemma 3 with pictures has the same layers as its text model, and the same converter."""
LAYER_SCALED = ("gemma4_text",)
LAYER_NORMED = ("bloom", "cohere2", "falcon", "gpt2", "gpt_neox", "gptj", "opt", "phi", "stablelm", "starcoder2")
RMS = tuple(name for name in EVERY if name not in LAYER_NORMED)
POST_NORMED = ("gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3")
QK_NORMED = ("gemma3_text", "gemma4_text", "olmo2", "olmo3", "qwen3", "qwen3_5_text", "qwen3_moe")
HEAD_SIZE = RMS
"""Their configs state the head size; elsewhere it is the hidden size over the heads, and both grow together."""
PER_LAYER = ("layer_types", "no_rope_layers")
"""Config values with an entry for each layer."""
ADMITS: dict[str, tuple[str, ...]] = {
    "vocabulary": EVERY,
    "permuted hidden": EVERY,
    "rotated hidden": tuple(name for name in RMS if name not in POST_NORMED),  # a norm behind would have to turn too
    "widened hidden": EVERY,
    "permuted heads": tuple(name for name in EVERY if name != "bloom"),  # ALiBi ties a head to its index
    "turned heads": tuple(name for name in EVERY if name not in QK_NORMED),
    "dead heads": tuple(name for name in HEAD_SIZE if not name.startswith("olmo")),  # it normalizes all heads at once
    "replicated groups": GROUPED,
    "merged groups": GROUPED,
    "units": tuple(name for name in EVERY if name != "bloom" and name not in EXPERTS),
    "permuted units": tuple(name for name in EVERY if name not in EXPERTS),
    "permuted experts": tuple(EXPERTS),
    "layer scales": LAYER_SCALED,
    "depth": EVERY,
}
"""Change -> the types that admit it."""
WORDS = ["the", "a", "of", "and", "cat", "sat", "on", "mat", "dog", "ran", "to", "red", "sun", "big", "in"]
NEW_ROWS = VOCABULARY + 17
POSITIONS = ("transformer.wpe.weight", "model.decoder.embed_positions.weight")
"""Tables of learned positions."""
PLE_TABLES = ("model.per_layer_model_projection.weight", "model.embed_tokens_per_layer.weight")
"""What per-layer embeddings are computed from: rows of all layers, and columns of all layers."""


OLD_WORDS, NEW_WORDS = WORDS, ["fox", *WORDS[:3:-1], "hat", "is", "log"]
"""Words of the two tokenizers: most are shared, in another order."""


def vocabulary(canon: Canon, generator: torch.Generator) -> None:
    """Permute the vocabulary, add tokens and remove some; tokens of one side alone get random rows."""
    tokenizers = pico_tokenizer(OLD_WORDS), pico_tokenizer(NEW_WORDS)
    left, right = shared_tokens(*tokenizers, old_rows=VOCABULARY, new_rows=NEW_ROWS)
    tied = canon.arch.tied
    names = ("embedding", "head", *[name for name in ("lm_head.bias", PLE_TABLES[1]) if name in canon.outer])
    drawn: dict[str, Tensor] = {}
    for name in names:
        old = canon.outer[name]
        drawn[name] = torch.randn(NEW_ROWS, *old.shape[1:], generator=generator) * old.std()
        drawn[name][right] = old[left]
    if tied:
        ratio = float(canon.outer["head"].norm() / canon.outer["embedding"].norm())
        drawn["head"] = drawn["embedding"] * ratio
    canon.outer |= drawn
    canon.set(vocabulary=NEW_ROWS)
    if PLE_TABLES[1] in canon.outer:
        canon.values["vocab_size_per_layer_input"] = NEW_ROWS


def rebased(
    canon: Canon, stream: Tensor, reader: Callable[[Tensor, Tensor], Tensor], norm: Callable[[Tensor], Tensor]
) -> None:
    """Put the hidden space on another basis.

    Args:
        canon: What is changed.
        stream: ``(D_n, D_o)``: the new residual state from the old one.
        reader: (old gain, new gain) -> ``(D_o, D_n)``: the old normed state from the new one.
        norm: Old gain or bias of a norm -> the new one.
    """
    arch = canon.arch

    def renormed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change the norms; return what reads behind each of them."""
        old = {key: value for key, value in tensors.items() if _is_norm(key)}
        tensors |= {key: norm(value) for key, value in old.items()}
        return {
            key.removesuffix(".weight"): reader(value, tensors[key])
            for key, value in old.items()
            if key.endswith(".weight")
        }

    for layer in canon.layers:
        readers = renormed(layer)
        for part in [part for part in arch.parts if part in layer]:
            if part not in OUTPUT_PROJECTIONS:
                path = arch.site(part).norm
                layer[part] = layer[part] @ (stream.T if path is None else readers[path])
            else:
                layer |= {key: stream @ layer[key] for key in (part, f"{part}.bias") if key in layer}
        rebase_experts(layer, arch, stream, readers)
        for key in [key for key in layer if key.startswith("linear_attn.")]:  # what Qwen3.5 has beside its sites
            if ".in_proj" in key:
                layer[key] = layer[key] @ readers["input_layernorm"]
            elif ".out_proj" in key:
                layer[key] = stream @ layer[key]
    readers = renormed(canon.outer)
    canon.outer["head"] = canon.outer["head"] @ readers[arch.final_norm]
    for name in ("embedding", *POSITIONS, PLE_TABLES[0]):
        if name in canon.outer:
            canon.outer[name] = canon.outer[name] @ stream.T


def _is_norm(key: str) -> bool:
    """Whether a tensor belongs to a norm of the hidden state (and not of queries or keys)."""
    owner = f".{key}".split(".")[-2]
    return owner.startswith("ln_") or (
        "norm" in owner and owner not in ("q_norm", "k_norm", "per_layer_projection_norm") and "linear_attn" not in key
    )


def permuted_hidden(canon: Canon, generator: torch.Generator) -> None:
    """Permute the hidden units."""
    order = torch.randperm(canon.arch.hidden, generator=generator)
    P = torch.eye(canon.arch.hidden)[order]
    rebased(canon, P, lambda old, new: P.T, lambda value: value[order])


def rotated_hidden(canon: Canon, generator: torch.Generator) -> None:
    """Rotate the hidden space; the old gains go into the next weights, the new ones are random again."""
    size = canon.arch.hidden
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    fresh = lambda value: 0.6 + 0.8 * torch.rand(size, generator=generator)  # noqa: E731 (one of two like arguments)
    rebased(canon, Q, lambda old, new: old[:, None] * Q.T / new, fresh)


def widened_hidden(canon: Canon, generator: torch.Generator) -> None:
    """Widen the hidden size: zero coordinates under an RMSNorm, every unit repeated under a LayerNorm."""
    size, arch = canon.arch.hidden, canon.arch
    if canon.name in RMS:
        wide = size + 16
        S, root = torch.eye(wide, size), (size / wide) ** 0.5
        extra = 0.6 + 0.8 * torch.rand(wide - size, generator=generator)
        rebased(canon, S, lambda old, new: S.T, lambda value: torch.cat([value * root, extra]))
        canon.values |= {"rms_norm_eps": canon.config.rms_norm_eps * size / wide, "head_dim": arch.heads.size}
        if canon.name == "minicpm":
            canon.values["dim_model_base"] = canon.config.dim_model_base * wide / size
        canon.set(hidden=wide)
        return
    S = torch.eye(size).repeat_interleave(2, dim=0)
    rebased(canon, S, lambda old, new: S.T / 2, lambda value: value.repeat_interleave(2))
    canon.set(hidden=2 * size)
    more_heads(canon, generator, arch)
    if canon.name == "bloom":  # its feed-forward layer is four times the hidden size
        reunited(canon, [*range(arch.intermediate), *[None] * arch.intermediate], generator)


def reunited(canon: Canon, numbers: Sequence[int | None], generator: torch.Generator) -> None:
    """Take over feed-forward units in this order; None is a new one: random inside, zero outside.

    In a layer with a multiple of the units, each multiple is taken over in this order.
    """
    size = min(layer["down"].shape[1] for layer in canon.layers)
    for layer in canon.layers:
        for key in [key for key in layer if key.partition(".")[0] in ("gate", "up", "down") and key != "down.bias"]:
            units = layer[key].T if key == "down" else layer[key]
            fill = 0.0 if key == "down" else units.std()
            parts = len(units) // size
            new = torch.randn(parts, len(numbers), *units.shape[1:], generator=generator) * fill
            kept = [place for place, number in enumerate(numbers) if number is not None]
            new[:, kept] = units.unflatten(0, (parts, size))[:, [numbers[place] for place in kept]]
            new = new.flatten(0, 1)
            layer[key] = new.T if key == "down" else new


def permuted_units(canon: Canon, generator: torch.Generator) -> None:
    """Permute the feed-forward units of all layers."""
    reunited(canon, torch.randperm(canon.arch.intermediate, generator=generator).tolist(), generator)


def units(canon: Canon, generator: torch.Generator) -> None:
    """Permute the feed-forward units and put new ones among them."""
    size, wide = canon.arch.intermediate, canon.arch.intermediate + 7
    order = torch.randperm(wide, generator=generator).tolist()
    reunited(canon, [number if number < size else None for number in order], generator)
    canon.set(intermediate=wide)


def layer_scales(canon: Canon, generator: torch.Generator) -> None:
    """Multiply the layers' outputs by other scalars, and what they add and read of it without a norm accordingly."""
    arch, ratio = canon.arch, 1.0
    norms = [f"{arch.site(part).post_norm}.weight" for part in OUTPUT_PROJECTIONS if part in arch.parts]
    for layer in canon.layers:
        layer |= {key: layer[key] * ratio for key in norms}
        layer |= {key: layer[key] / ratio for key in ("ple_gate",) if key in layer}
        scale = 0.4 + 1.2 * torch.rand(1, generator=generator)
        ratio *= float(scale / layer["layer_scalar"])
        layer["layer_scalar"] = scale


SILENCED = ("o", "o.bias", "linear_attn.out_proj.weight", "ple_down")
"""What is zero in a layer that adds nothing to the residual stream."""


def depth(canon: Canon, generator: torch.Generator) -> None:
    """Insert two layers that add nothing to the residual stream."""
    values = {key: list(value) for key in PER_LAYER if (value := getattr(canon.config, key, None))}
    for _ in range(2):
        place = int(torch.randint(len(canon.layers) + 1, (), generator=generator))
        original = min(place, len(canon.layers) - 1)
        like = canon.layers[original]
        for entries in values.values():
            entries.insert(place, entries[original])
        drawn = {key: value for key, value in like.items() if key != "layer_scalar"}
        silent = {key: torch.randn(value.shape, generator=generator) * value.std() for key, value in drawn.items()}
        ends = [key for key in like if key in SILENCED or f".{key}".endswith((".down", ".down.bias"))]
        silent |= {key: torch.zeros_like(like[key]) for key in ends}
        silent |= {key: torch.ones(1) for key in like if key == "layer_scalar"}
        canon.layers.insert(place, silent)
        for key in [key for key in canon.outer if key in PLE_TABLES]:
            canon.outer[key] = _with_layer(canon.outer[key], key, place, canon.arch.ple_size, generator)
    canon.set(layers=len(canon.layers))
    canon.values |= values


def _with_layer(table: Tensor, key: str, place: int, size: int, generator: torch.Generator) -> Tensor:
    """Insert random rows or columns of a layer into a table of per-layer embeddings."""
    dim = PLE_TABLES.index(key)
    layers = list(table.split(size, dim=dim))
    layers.insert(place, torch.randn(layers[0].shape, generator=generator) * table.std())
    return torch.cat(layers, dim=dim)


def permuted_embeddings(canon: Canon, generator: torch.Generator) -> None:
    """Permute the units of the per-layer embeddings, which all layers share a norm of."""
    size = canon.arch.ple_size
    order = torch.randperm(size, generator=generator)
    for dim, key in enumerate(PLE_TABLES):
        table = canon.outer[key].unflatten(dim, (-1, size))
        canon.outer[key] = table.index_select(dim + 1, order).flatten(dim, dim + 1)
    norm = "model.per_layer_projection_norm.weight"
    canon.outer[norm] = canon.outer[norm][order]
    for layer in canon.layers:
        layer |= {"ple_gate": layer["ple_gate"][order], "ple_down": layer["ple_down"][:, order]}


CHANGES: dict[str, Callable[[Canon, torch.Generator], None]] = {
    "vocabulary": vocabulary,
    "permuted hidden": permuted_hidden,
    "rotated hidden": rotated_hidden,
    "widened hidden": widened_hidden,
    "permuted heads": permuted_heads,
    "turned heads": turned_heads,
    "dead heads": dead_heads,
    "replicated groups": replicated_groups,
    "units": units,
    "permuted units": permuted_units,
    "permuted experts": permuted_experts,
    "layer scales": layer_scales,
    "permuted embeddings": permuted_embeddings,
    "depth": depth,
}
"""Every change but the merged groups, which start from an old backbone with replicated ones. Per-layer embeddings are
permuted in the tests of Gemma 4."""
