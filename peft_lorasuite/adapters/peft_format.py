"""The kinds of PEFT adapters: which are read as they are, which are converted first, which are refused and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..errors import LoraSuiteError
from ..io.source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DIRECT_KINDS = ("LORA", "ADALORA")
"""Kinds whose factors are read; every other kind that changes weights goes through a LoRA on the old backbone."""
PROMPT_KINDS = (
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
_LINEAR = ("lora_A.weight", "lora_B.weight", "lora_B.bias", *TRAINED_BIAS)
LINEAR_ENDINGS = {
    "lora": _LINEAR,
    "dora": (*_LINEAR, "lora_magnitude_vector"),
    "adalora": ("lora_A", "lora_B", "lora_E", *TRAINED_BIAS),
}
"""Kind -> ends of the tensors that it has in a linear module."""
OPTIONAL_ENDINGS = ("lora_B.bias", *TRAINED_BIAS)
"""Those of them that may be absent; where one of the others is, all are."""
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
UNUSED_TABLE_ENDINGS = {
    "base_layer.weight": "a copy of the backbone's own table, which PEFT saves beside its update",
    **dict.fromkeys(TRAINED_BIAS, "the head's bias: only its weight is transferred"),
    "lora_B.bias": "a token table's bias: only its weight is transferred",
}
"""What may be stored beside a token table's update, and why it is not transferred."""
OTHER_FORMULAS = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Options that make a LoRA compute something else than ``W + s B A``."""


@dataclass(frozen=True)
class Subfolder(Source):
    """A sub-folder of a place."""

    subfolder: str = ""

    def fetch(self, filename: str) -> Any:
        """Return the local path of a file of the sub-folder, or None."""
        return super().fetch(f"{self.subfolder}/{filename}")


def select_adapter(source: Source, adapter_name: str | None, *, names_result: bool = False) -> Source:
    """Return the place of one adapter: the folder itself, or a sub-folder of that name if it holds several.

    PEFT saves every adapter but the one called ``default`` to a sub-folder.

    Args:
        source: The folder or repository.
        adapter_name: Which adapter.
        names_result: The name is also what the result is called: a place that holds a single adapter may have any.
    """
    if source.fetch(CONFIG) is not None:
        own = (None, "default", source.name.rstrip("/").rpartition("/")[2])
        if adapter_name not in own and not names_result and adapter_name not in _named_inside(source):
            raise LoraSuiteError(
                "the place holds a single adapter, which has no name", where=source.name, got=adapter_name,
                do="leave adapter_name out",
            )  # fmt: skip
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
    return Subfolder(**{field.name: getattr(source, field.name) for field in fields(Source)}, subfolder=adapter_name)


def _named_inside(source: Source) -> set[str]:
    if source.folder is not None:
        return {path.parent.name for path in source.folder.glob(f"*/{CONFIG}")}
    return {name.removesuffix(f"/{CONFIG}") for name in source.listing if name.endswith(f"/{CONFIG}")}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that has no weights to carry, or whose weights belong to a changed backbone."""
    _check_names(config, where)
    kind, init = config["peft_type"], config.get("init_lora_weights")
    if kind in PROMPT_KINDS:
        raise LoraSuiteError(
            f"a {kind.lower().replace('_', ' ')} adapter is a prompt, which means something to its own backbone alone",
            where=where, got=kind, wanted="an adapter that changes weights",
            do="train the prompt again on the new backbone, or distil what it does into a LoRA first",
        )  # fmt: skip
    if kind == "LORA" and isinstance(init, str) and init.startswith(MUTATING):
        raise LoraSuiteError(
            f"the adapter was initialized by {init} and not converted: it belongs to a changed copy of its backbone",
            where=where, got=f"init_lora_weights={init}",
            do="save it again with save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER), "
            "which makes a plain LoRA of it",
        )  # fmt: skip
    for option in OTHER_FORMULAS:
        if config.get(option):
            raise LoraSuiteError(
                f"adapters with {option} are not transferred", where=where, got=config[option],
                do="train it again without that option",
            )  # fmt: skip
    _check_scalings(config, where)


def _check_names(config: Mapping[str, Any], where: str) -> None:
    """Refuse a kind or task that PEFT does not know."""
    kinds = [*DIRECT_KINDS, *PROMPT_KINDS]
    if config["peft_type"] not in kinds:
        from peft import PeftType  # importing PEFT takes longer than an upgrade

        kinds = [kind.value for kind in PeftType]
    for option, known in (("peft_type", kinds), ("task_type", [None, *TASKS])):
        if config.get(option) not in known:
            raise LoraSuiteError(
                f"PEFT knows no such {option}", where=f"{where}/{CONFIG}", got=repr(config[option]),
                wanted=" or ".join(sorted(filter(None, known))), do="mend the config, or fetch the adapter again",
            )  # fmt: skip


def _check_scalings(config: Mapping[str, Any], where: str) -> None:
    patterns = config.get("alpha_pattern") or {}
    faults = [] if isinstance(patterns, dict) else [("alpha_pattern", patterns, "a number by module")]
    scalings = {"lora_alpha": config.get("lora_alpha", 1), **(patterns if not faults else {})}
    faults += [(name, value, "a number") for name, value in scalings.items() if not _is_number(value)]
    if config["peft_type"] == "ADALORA":
        own = {"lora_alpha": config.get("lora_alpha"), "init_r": config.get("init_r")}
        faults += [(name, value, "a number above zero") for name, value in own.items()
                   if value is None or not _is_number(value) or value <= 0]  # fmt: skip
    faults += [(name, name, "a name or a regular expression") for name in scalings if not _is_pattern(name)]
    for name, value, wanted in faults:
        raise LoraSuiteError(
            "a scaling in the adapter's config is wrong", where=f"{where}, {name}", got=repr(value)[:80],
            wanted=wanted, do="mend the config, or fetch the adapter again",
        )  # fmt: skip


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_pattern(name: str) -> bool:
    try:
        return bool(re.compile(name))
    except re.error:
        return False


def adapter_kind(config: Mapping[str, Any]) -> str:
    """Return what the result is to be again: ``lora``, ``dora`` or ``adalora``."""
    if config["peft_type"] == "ADALORA":
        return "adalora"
    return "dora" if config.get("use_dora") and config["peft_type"] == "LORA" else "lora"


def needs_backbones(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether carrying an adapter reads the backbones' weights or tokenizers, by its config and its tensors' names."""
    if config["peft_type"] not in DIRECT_KINDS or config.get("use_dora"):
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


def skip_reason(owned: Mapping[str, str], family: str) -> str:
    """Say why the tensors of a module that is no linear module of a layer are not transferred."""
    if set(owned) <= {*TRAINED_BIAS}:
        return "a bias of no linear module of a layer (a norm's or the head's) has no place in a LoRA"
    if "weight" in owned:
        return "a module trained in full (modules_to_save) that is no token table: train it as LoRA instead"
    return f"{family} has no such module in its layers"
