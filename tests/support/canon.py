"""A pico backbone taken apart into canonical parts, and put together again under another config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from canon_experts import NAMES, put_experts, take_experts
from pico import EXPERTS, PICO, pico_config, pico_model
from torch import Tensor

from peft_lorasuite.arch.layout import join, split
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import OUTPUT_PROJECTIONS, Architecture

KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "groups": "num_key_value_heads",
}
OWN_KEYS = {
    "bloom": {"layers": "n_layer", "heads": "n_head"},
    "gpt2": {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd", "intermediate": "n_inner"},
    "gptj": {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd", "intermediate": "n_inner"},
    "opt": {"intermediate": "ffn_dim"},
    "falcon": {"intermediate": "ffn_hidden_size", "groups": "num_kv_heads"},
}
"""Names of the sizes in a config, and where a type has its own."""
GROUPED = tuple(name for name in PICO | EXPERTS if name not in ("bloom", "gpt2", "gpt_neox", "gptj", "opt", "gemma3"))
"""Types whose config has a number of key/value heads."""
BASE = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "phi": {"num_key_value_heads": 2},
    "olmo2": {"rms_norm_eps": 1e-9},
    "olmo3": {"rms_norm_eps": 1e-9},
    "qwen3_5_text": {"rms_norm_eps": 1e-9},
    "gemma4_text": {"rms_norm_eps": 1e-9},
}
"""What the pico configs are given beside, so that every change has something to do. In OLMo, Qwen3.5 and Gemma 4,
hidden, query and key norms share one epsilon, of which widening changes the first alone; it is made too small to
matter."""


@dataclass
class Canon:
    """A backbone taken apart; residual and embedding multipliers are folded in, gains are effective ones.

    Attributes:
        name: Its ``model_type``.
        values: What its config has beyond the pico config.
        outer: ``embedding`` and ``head`` as the model uses them, and every other tensor outside the layers, by name.
        layers: Per layer: part -> weight (rows in head order), ``<part>.bias``, and the norms by their path.
    """

    name: str
    values: dict[str, Any]
    outer: dict[str, Tensor]
    layers: list[dict[str, Tensor]]

    @property
    def config(self) -> Any:
        """Its transformers config."""
        return pico_config(self.name, **self.values)

    @property
    def arch(self) -> Architecture:
        """Its shape and layout."""
        return architecture(self.config)

    def set(self, **sizes: int) -> None:
        """Change sizes in the config, whatever it calls them."""
        keys = KEYS | OWN_KEYS.get(self.name, {})
        self.values = self.values | {keys[name]: value for name, value in sizes.items()}

    def copy(self) -> Canon:
        """Return a copy whose tensors may be replaced."""
        return Canon(self.name, dict(self.values), dict(self.outer), [dict(layer) for layer in self.layers])


def read(name: str, seed: int = 0, **values: Any) -> Canon:
    """Take a pico model with random weights apart."""
    values = BASE.get(name, {}) | values
    arch = architecture(pico_config(name, **values))
    tensors = {key: tensor.clone() for key, tensor in pico_model(name, seed, **values).state_dict().items()}
    table = tensors.pop(f"{arch.embedding}.weight")
    outer = {"embedding": table * arch.embedding_scale, "head": tensors.pop(f"{arch.head}.weight", table)}
    layers = []
    for number in range(arch.layers):
        prefix = f"{arch.layer_path}.{number}."
        rest = {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        layer = _parts(rest, arch, number) | take_experts(rest, arch)
        layers.append(layer | {key: _gain(key, value, arch.gain_offset) for key, value in rest.items()})
    outer |= {key: _gain(key, value, arch.gain_offset) for key, value in tensors.items()}
    return Canon(name, values, outer, layers)


def _parts(rest: dict[str, Tensor], arch: Architecture, number: int) -> dict[str, Tensor]:
    layer: dict[str, Tensor] = {}
    for site in [site for site in arch.sites if site.is_in(number)]:
        factor = arch.residual_scale if site.parts[0] in OUTPUT_PROJECTIONS else 1.0
        weight = rest.pop(f"{site.path}.weight") * factor
        layer |= split(weight.T if site.conv1d else weight, site, arch.in_layer(number))
        if site.bias:
            biases = split(rest.pop(f"{site.path}.bias") * factor, site, arch.in_layer(number))
            layer |= {f"{part}.bias": bias for part, bias in biases.items()}
    return layer


@torch.no_grad()
def write(canon: Canon) -> Any:
    """Put the backbone together as a transformers model in float32."""
    arch, model = canon.arch, pico_model(canon.name, **canon.values)
    outer = dict(canon.outer)
    table, head = outer.pop("embedding") / arch.embedding_scale, outer.pop("head")
    if arch.tied:  # the head is the table up to a factor, which the final norm takes
        ratio = float((head * table).sum() / (table * table).sum())
        outer = {key: value * ratio if key.startswith(arch.final_norm) else value for key, value in outer.items()}
    tensors = {key: _gain(key, value, -arch.gain_offset) for key, value in outer.items()}
    tensors |= {f"{arch.embedding}.weight": table, f"{arch.head}.weight": table if arch.tied else head}
    for number, layer in enumerate(canon.layers):
        modules = _modules(layer, arch, number)
        norms = {key: _gain(key, value, -arch.gain_offset) for key, value in layer.items() if
                 key.partition(".")[0] not in arch.parts and not key.startswith(NAMES)}  # fmt: skip
        own = modules | norms | put_experts(layer, arch)
        tensors |= {f"{arch.layer_path}.{number}.{key}": value for key, value in own.items()}
    model.load_state_dict(tensors, strict=True)
    return model


def _modules(layer: dict[str, Tensor], arch: Architecture, number: int) -> dict[str, Tensor]:
    modules = {}
    for site in [site for site in arch.sites if site.is_in(number)]:
        factor = arch.residual_scale if site.parts[0] in OUTPUT_PROJECTIONS else 1.0
        weight = join(layer, site, arch.in_layer(number)) / factor
        modules[f"{site.path}.weight"] = weight.T if site.conv1d else weight
        if site.bias:
            biases = {part: layer[f"{part}.bias"] for part in site.parts}
            modules[f"{site.path}.bias"] = join(biases, site, arch.in_layer(number)) / factor
    return modules


def _gain(key: str, value: Tensor, offset: float) -> Tensor:
    """Add the offset to a norm's gain: the only vectors called ``weight``."""
    return value + offset if key.endswith(".weight") and value.ndim == 1 else value
