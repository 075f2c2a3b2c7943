"""Tiny models of every causal language model type of transformers: real classes with random weights, under a second."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from pico import pico_tokenizer
from tiny_sizes import ATTENTION, FIXES, OPTIONAL, PER_LAYER, SIZE_OF
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

WORDS = """
red big old new hot wet dry shy sly odd cat dog cow pig hen fox owl bee ant bat sun sky sea ice fog mud oak elm fig pea
nut jam tea pie egg ham cup pot pan box bag bed car bus van jet map pen
""".split()  # noqa: SIM905 (a list of 48 strings is no easier to read)
"""Words of three letters, of which a word start costs the tokenizer two pieces."""
FIRST_WORD = 3
"""Token id of the first word, after the special tokens; all other tokens are pieces of words."""
SMALL_LOGITS = 0.5
LINEAR = (torch.nn.Linear, Conv1D)
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_REFUSED = ("out_proj", "conv1d")
"""Modules that PEFT refuses in these types."""
MIXTURE = ("weight_proj", "gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that PEFT takes for those of experts, whose weights are parameters, or that it writes but does not read."""
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava", "internvl", "glm4v")
"""Popular types that `AutoModelForCausalLM` does not load."""
WHOLE = ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
"""Types whose checkpoints have a vision tower, and from which `AutoModelForCausalLM` loads the text model."""
TYPES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny model."""

    hidden: int = 32
    intermediate: int = 48
    layers: int = 3
    heads: int = 4
    groups: int = 2

    def of(self, name: str) -> int:
        """Return a size by its name in `tiny_sizes`; a name may be a number."""
        if name.isdecimal():
            return int(name)
        derived = {
            "head": max(self.hidden // self.heads, 8), "expert": 32, "window": 64, "positions": 512,
            "inner": 2 * self.hidden, "inner head": self.hidden // 2,
        }  # fmt: skip
        return derived[name] if name in derived else getattr(self, name)

    def table(self) -> dict[str, int]:
        """Return every value of a config that is a size."""
        return {name: self.of(size) for name, size in SIZE_OF.items()}


OLD, NEW = Sizes(), Sizes(hidden=64, intermediate=64, layers=4, heads=8, groups=4)


def tiny_config(model_type: str, sizes: Sizes = OLD) -> Any:
    """Return a small config of a model type.

    Raises:
        Exception: Whatever the config class raises for its own defaults or for the sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**_values(cls(), sizes))


def _values(default: Any, sizes: Sizes) -> dict[str, Any]:
    """Return the values by which a small config differs from one of the same class with its defaults."""
    table, values = sizes.table(), {}
    aliases = getattr(type(default), "attribute_map", None) or {}
    for name, value in default.to_dict().items():
        inner = vars(default).get(name)
        if hasattr(inner, "to_dict"):
            values[name] = _values(inner, sizes)
        elif name in aliases or (value is None and name in OPTIONAL):
            continue
        elif isinstance(value, (list, tuple)):
            if name in table and name != "eos_token_id":
                values[name] = [table[name]] * sizes.layers
            elif name in PER_LAYER and len(value) >= sizes.layers:
                values[name] = _cut(list(value), sizes.layers)
        elif name in table:
            values[name] = table[name]
    values |= {name: True for name in ("is_decoder",) if name in vars(default)}
    return values | {name: _fixed(one, sizes) for name, one in FIXES.get(default.model_type, {}).items()}


def _cut(values: list[Any], count: int) -> list[Any]:
    """Cut a list to some layers, with every kind of layer in it, attention last."""
    if not all(isinstance(one, str) for one in values):
        return values[:count]
    kinds = list(dict.fromkeys(values))
    return sorted([*kinds, *(values if len(kinds) == 1 else kinds * count)][:count], key=ATTENTION.__contains__)


def _fixed(value: Any, sizes: Sizes) -> Any:
    """Return a value of `FIXES` for some sizes."""
    if isinstance(value, tuple):
        *kinds, last = value
        return [*(kinds * sizes.layers)[: sizes.layers - 1], last]
    if isinstance(value, dict):
        return {name: _fixed(one, sizes) for name, one in value.items()}
    return sizes.of(value) if value in ("heads", "hidden", "head", "inner head", "groups", "layers") else value


def load_type(model_type: str, folder: Path) -> Any:
    """Load a saved model in evaluation mode."""
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type != "emu3"  # its text model has other names
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def tiny_model(model_type: str, sizes: Sizes = OLD, seed: int = 0) -> Any:
    """Return a model in evaluation mode, in float32, whose matrices and biases are random.

    Gains keep the values of the class: many types have one-dimensional weights of other meanings.
    """
    torch.manual_seed(seed)
    whole = model_type in (*WHOLE, *MULTIMODAL)
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model = auto.from_config(tiny_config(model_type, sizes), dtype=torch.float32).eval()
    _draw(model, seed)
    if model_type not in WHOLE:  # of which the text model alone runs on text
        _enlarge_logits(model)
    _only_words(model)
    return model


@torch.no_grad()
def _enlarge_logits(model: torch.nn.Module) -> None:
    """Make logits that a type divides by a constant as large as those of other types."""
    spread = logits_of(model, torch.tensor([[3, 4, 5, 6, 7, 8]])).std()
    if spread < SMALL_LOGITS:
        model.get_output_embeddings().weight.div_(spread)


@torch.no_grad()
def _only_words(model: torch.nn.Module) -> None:
    """Make all tokens but the words unlikely, so that the text of an answer has the tokens that were generated."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None:
        weight[:FIRST_WORD] *= 0.1
        weight[FIRST_WORD + len(WORDS) :] *= 0.1


@torch.no_grad()
def _draw(module: torch.nn.Module, seed: int, names: str = "") -> None:
    """Draw the matrices and biases whose names contain ``names``."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if names in name and (weight.ndim > 1 or name.endswith(".bias")):
            size = weight.shape[-1] if weight.ndim > 1 else 100
            weight.copy_(torch.randn(weight.shape, generator=generator) / size**0.5)


def save_type(model_type: str, folder: Path, *, sizes: Sizes = OLD, seed: int = 0, adapter: Path | None = None) -> None:
    """Write a tiny model and its tokenizer and, if asked, a LoRA that PEFT trained nothing of but filled at random."""
    tiny_model(model_type, sizes, seed).save_pretrained(folder)
    pico_tokenizer(WORDS).save_pretrained(folder)
    if adapter is not None:
        save_adapter(load_type(model_type, folder), folder, adapter, seed + 1)


def save_adapter(model: Any, base: Path, folder: Path, seed: int) -> None:
    """Write a LoRA on the linear modules that a text runs through, with random factors."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=lora_targets(model), task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, config)
    _draw(adapted, seed, names=".lora_B.")
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))


def lora_targets(model: Any) -> list[str]:
    """Return the names of the linear modules that a text runs through and PEFT accepts, without the head.

    A router that returns more than one tensor is none of them, nor is a module that splits its input into groups. A
    mixture of experts has its LoRA on the attention.
    """
    refused = MAMBA_REFUSED if model.config.model_type in MAMBA else ()
    if any(weight.ndim == 3 and ".experts." in name for name, weight in model.named_parameters()):
        refused = (*refused, *MIXTURE)
    head, found = model.get_output_embeddings(), {}

    def rows(module: Any) -> int:
        return module.nf if isinstance(module, Conv1D) else module.out_features

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if torch.is_tensor(output) and output.shape[-1] == rows(module):
                found[name] = module

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not head and name.rpartition(".")[2] not in refused
    ]
    logits_of(model, torch.tensor([[5, 6, 7, 8]]))
    for hook in hooks:
        hook.remove()
    return sorted(found)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits, (rows, positions, tokens), of rows of equal length, without cache and without a mask."""
    return model(input_ids=ids).logits.float()
