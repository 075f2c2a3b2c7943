"""The kinds of PEFT adapters: which are read as they are, which are converted first, which are refused and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .errors import LoraSuiteError
from .source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = ("LORA", "ADALORA")
"""Kinds whose factors are read; every other kind that changes weights goes through a LoRA on the old backbone."""
PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` that move a part of the backbone's weights into the adapter."""
ENDINGS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
    "token_adapter.trainable_tokens_delta", "lora_A", "lora_B", "lora_E", "base_layer.bias", "base_layer.weight",
    "bias", "weight",
)  # fmt: skip
"""Ends of tensor names after the module's path, a longer one before its own end."""
TRAINED_BIAS = ("base_layer.bias", "bias")
BESIDE = {
    "base_layer.weight": "a copy of the backbone's own table, which PEFT saves beside its update",
    **dict.fromkeys(TRAINED_BIAS, "the head's bias: only its weight is carried"),
}
"""What may be stored beside a token table's update, and why it is not carried."""
OTHER_FORMULAS = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Options that make a LoRA compute something else than ``W + s B A``."""


@dataclass(frozen=True)
class Inside(Source):
    """A sub-folder of a place."""

    subfolder: str = ""

    def fetch(self, filename: str) -> Any:
        """Return the local path of a file of the sub-folder, or None."""
        return super().fetch(f"{self.subfolder}/{filename}")


def select(source: Source, adapter_name: str | None) -> Source:
    """Return the place of one adapter: the folder itself, or a sub-folder of that name if it holds several.

    PEFT saves every adapter but the one called ``default`` to a sub-folder.
    """
    if source.fetch(CONFIG) is not None:
        return source
    inside = _named_inside(source)
    if not inside:
        return source
    if adapter_name not in inside:
        raise LoraSuiteError(
            "the folder holds adapters in sub-folders, and none was chosen" if adapter_name in (None, "default")
            else "the folder holds no adapter of that name",
            where=source.name, got=adapter_name, wanted=" or ".join(sorted(inside)), do="choose one with adapter_name",
        )  # fmt: skip
    if source.folder is not None:
        return Source(str(source.folder / adapter_name), source.kind)
    return Inside(**{field.name: getattr(source, field.name) for field in fields(Source)}, subfolder=adapter_name)


def _named_inside(source: Source) -> set[str]:
    if source.folder is not None:
        return {path.parent.name for path in source.folder.glob(f"*/{CONFIG}")}
    return {name.removesuffix(f"/{CONFIG}") for name in source.listing if name.endswith(f"/{CONFIG}")}


def check(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that has no weights to carry, or whose weights belong to a changed backbone."""
    kind, init = config["peft_type"], config.get("init_lora_weights")
    if kind in PROMPTS:
        raise LoraSuiteError(
            f"a {kind.lower().replace('_', ' ')} adapter is a prompt, which means something to its own backbone alone",
            where=where, got=kind, wanted="an adapter that changes weights",
            do="train the prompt again on the new backbone, or distil what it does into a LoRA first",
        )  # fmt: skip
    if kind == "LORA" and isinstance(init, str) and init.startswith(MUTATING):
        raise LoraSuiteError(
            f"the adapter was initialised by {init} and not converted: it belongs to a changed copy of its backbone",
            where=where, got=f"init_lora_weights={init}",
            do="save it again with save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER), "
            "which makes a plain LoRA of it",
        )  # fmt: skip
    for option in OTHER_FORMULAS:
        if config.get(option):
            raise LoraSuiteError(
                f"adapters with {option} are not carried", where=where, got=config[option],
                do="train it again without that option",
            )  # fmt: skip
    scalings = {"lora_alpha": config.get("lora_alpha", 1), "init_r": config.get("init_r", 1)}
    for name, value in {**scalings, **(config.get("alpha_pattern") or {})}.items():
        if not isinstance(value, (int, float)):
            raise LoraSuiteError(
                "a scaling in the adapter's config is no number", where=f"{where}, {name}", got=repr(value),
                wanted="a number", do="mend the config, or fetch the adapter again",
            )  # fmt: skip


def kind_of(config: Mapping[str, Any]) -> str:
    """Return what the result is to be again: ``lora``, ``dora`` or ``adalora``."""
    if config["peft_type"] == "ADALORA":
        return "adalora"
    return "dora" if config.get("use_dora") and config["peft_type"] == "LORA" else "lora"


def needs_backbones(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether carrying an adapter reads the backbones' weights or tokenizers, by its config and its tensors' names."""
    if config["peft_type"] not in READ or config.get("use_dora"):
        return True
    needy = ("base_layer.bias", "bias", "weight", "lora_embedding_A", "token_adapter.trainable_tokens_delta")
    found = {(ending, module.rpartition(".")[2]) for module, ending in map(ending_of, names)}
    return any(ending in needy or name in ("lm_head", "embed_out") for ending, name in found)


def ending_of(name: str) -> tuple[str, str]:
    """Take a tensor's name apart into its module and what of the module it is; the latter is empty if unknown."""
    for ending in ENDINGS:
        if name.endswith(f".{ending}"):
            return name[: -len(ending) - 1], ending
    return name, ""


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Group tensors: module -> {ending: name}; the ending of a tensor of no known kind is empty."""
    grouped: dict[str, dict[str, str]] = {}
    for name in tensors:
        module, ending = ending_of(name)
        grouped.setdefault(module, {})[ending] = name
    return grouped


def why_not(owned: Mapping[str, str], family: str) -> str:
    """Say why the tensors of a module that is no linear module of a layer are not carried."""
    if set(owned) <= {*TRAINED_BIAS}:
        return "a bias of no linear module of a layer (a norm's or the head's) has no place in a LoRA"
    if "weight" in owned:
        return "a module trained in full (modules_to_save) that is no token table: train it as LoRA instead"
    return f"{family} has no such module in its layers"
