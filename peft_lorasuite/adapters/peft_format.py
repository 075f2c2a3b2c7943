"""PEFT's adapter types and tensor names: which types are read directly, converted to LoRA first, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import LoraSuiteError, short_message
from ..io.source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REPORT = "lorasuite_report.json"
"""File next to the weights: the upgrade report."""
RECORD = "lorasuite_finetune.json"
"""File next to the weights: how they were trained."""
PREFIX = "base_model.model."
DIRECT_KINDS = ("LORA", "ADALORA")
"""Types whose factors are read; other types that change weights are converted to LoRA on the old backbone first."""
LORA_DEFAULTS = {"r": 8, "lora_alpha": 8}
"""What PEFT takes for entries that a LoRA's config does not have."""
MIXED_KINDS = ("XLORA",)
"""Types whose config names other adapters, which PEFT would load."""
SHOWN_NAMES = 5
"""Names of adapters that an error message lists."""
PROMPT_KINDS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of ``init_lora_weights`` values that move part of the backbone's weights into the adapter."""
ENDINGS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
    "token_adapter.trainable_tokens_delta", "lora_A", "lora_B", "lora_E", "base_layer.bias", "base_layer.weight",
    "bias", "weight",
)  # fmt: skip
"""Endings of tensor names, after the module's path; a longer one comes before its own suffix."""
TRAINED_BIAS = ("base_layer.bias", "bias")
_LINEAR = ("lora_A.weight", "lora_B.weight", "lora_B.bias", *TRAINED_BIAS)
LINEAR_ENDINGS = {
    "lora": _LINEAR,
    "dora": (*_LINEAR, "lora_magnitude_vector"),
    "adalora": ("lora_A", "lora_B", "lora_E", *TRAINED_BIAS),
}
"""Kind -> endings of the tensors that it has in a linear module."""
OPTIONAL_ENDINGS = ("lora_B.bias", *TRAINED_BIAS)
"""Endings that can be absent; of the others, a module has all or none."""
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
COPIED = "a copy of "
"""Start of the reason for copies of other tensors, which do not count in the coverage."""
COPY = f"{COPIED}the backbone's weight, which PEFT saves with its update"
"""Why such a copy is not transferred."""
PRUNED = "its rank is zero after pruning"
"""Why the tensors of a module are not transferred that AdaLoRA has pruned completely: it changes nothing."""
UNUSED_TABLE_ENDINGS = {
    "base_layer.weight": COPY,
    **dict.fromkeys(TRAINED_BIAS, "the head's bias: only its weight is transferred"),
    "lora_B.bias": "a token table's bias: only its weight is transferred",
}
"""Ending of a tensor that can be saved with a token table's update -> why it is not transferred."""
OTHER_FORMULAS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "use_bdlora", "use_qalora",
)  # fmt: skip
"""Options with which a LoRA computes something else than ``W + scaling * B A``."""


@dataclass(frozen=True)
class Subfolder(Source):
    """A subfolder of a repository."""

    subfolder: str = ""

    def fetch(self, filename: str) -> Any:
        """Return the local path of a file in the subfolder, or None if it does not exist."""
        return super().fetch(f"{self.subfolder}/{filename}")


def select_adapter(source: Source, adapter_name: str | None, *, names_result: bool = False) -> Source:
    """Select one adapter of a folder or repository: the only one, or the one in the subfolder of that name.

    PEFT saves every adapter except the one named ``default`` to a subfolder.

    Args:
        source: The folder or repository.
        adapter_name: Name of the adapter.
        names_result: Whether the name is also given to the result; a folder with a single adapter then accepts any.

    Raises:
        LoraSuiteError: If there is no adapter of that name, or there are several and none was selected.
    """
    names = _subfolders(source) if adapter_name not in (None, "default") else set()
    if source.fetch(CONFIG) is not None and adapter_name not in names:
        if adapter_name not in (None, "default", source.name.rstrip("/").rpartition("/")[2]) and not names_result:
            raise LoraSuiteError(
                "has no adapter of that name" if names else "has a single adapter, which has no name",
                where=source.name, got=adapter_name, wanted=_list_names(names), do="leave adapter_name out",
            )  # fmt: skip
        return source
    names = names or _subfolders(source)
    if not names:
        return source
    if adapter_name is None or adapter_name not in names:
        raise LoraSuiteError(
            "has adapters in subfolders, and none was selected" if adapter_name in (None, "default")
            else "has no adapter of that name",
            where=source.name, got=adapter_name, wanted=_list_names(names),
            do="select one (--adapter-name, adapter_name=)",
        )  # fmt: skip
    if source.folder is not None:
        return Source(str(source.folder / adapter_name), source.kind)
    return Subfolder(**{field.name: getattr(source, field.name) for field in fields(Source)}, subfolder=adapter_name)


def _list_names(names: set[str]) -> str | None:
    """Return the names of subfolders in words, checkpoints of a training from the last one."""
    last = sorted(names, key=lambda name: [int(piece) if piece.isdigit() else 0 for piece in name.split("-")[1:]])
    ordered = last[::-1] if all(name.startswith("checkpoint-") for name in names) else sorted(names)
    more = f" or {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    return " or ".join(ordered[:SHOWN_NAMES]) + more if ordered else None


def _subfolders(source: Source) -> set[str]:
    """Return the names of the subfolders that contain an adapter."""
    if source.folder is not None:
        return {path.parent.name for path in source.folder.glob(f"*/{CONFIG}")}
    return {name.removesuffix(f"/{CONFIG}") for name in source.listing if name.endswith(f"/{CONFIG}")}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise `LoraSuiteError` for adapters that cannot be transferred, and for malformed entries of the config."""
    _check_types(config, where)
    kind, init = config["peft_type"], config.get("init_lora_weights")
    if kind in PROMPT_KINDS:
        raise LoraSuiteError(
            f"a {kind.lower().replace('_', ' ')} adapter is a prompt, which only its own backbone understands",
            where=where, got=kind, wanted="an adapter that changes weights",
            do="train the prompt on the new backbone, or distill the prompt into a LoRA first",
        )  # fmt: skip
    if kind in MIXED_KINDS:
        raise LoraSuiteError(
            "the adapter is a mixture of other adapters", where=where, got=kind, wanted="a single adapter",
            do="upgrade its adapters one by one",
        )  # fmt: skip
    if kind == "LORA" and isinstance(init, str) and init.lower().startswith(MUTATING_INITS):
        raise LoraSuiteError(
            f"the adapter was initialized by {init} and not converted, so it belongs to a changed copy of its backbone",
            where=where, got=f"init_lora_weights={init}",
            do="convert it to a plain LoRA with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
        )  # fmt: skip
    for option in OTHER_FORMULAS:
        if _has_effect(option, config.get(option)):
            raise LoraSuiteError(
                f"adapters with {option} are not transferred", where=where, got=config[option],
                do="train the adapter again without that option",
            )  # fmt: skip
    _check_adalora(config, where)


def _has_effect(option: str, value: Any) -> bool:
    """Whether PEFT computes something else for this value; an empty object is a sub-config with its defaults."""
    if option == "layer_replication" and value:
        ends = [0, *(end for start, end in value if start < end)]
        return [start for start, end in value if start < end] != ends[:-1]
    return bool(value) or isinstance(value, dict)


def _check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise `LoraSuiteError` for a ``peft_type`` or ``task_type`` that PEFT does not have."""
    kinds = [*DIRECT_KINDS, *PROMPT_KINDS]
    if config["peft_type"] not in kinds:
        from peft import PeftType  # importing PEFT takes longer than an upgrade

        kinds = [kind.value for kind in PeftType]
    for option, known in (("peft_type", kinds), ("task_type", [None, *TASKS])):
        if config.get(option) not in known:
            raise LoraSuiteError(
                f"PEFT has no such {option}", where=f"{where}/{CONFIG}", got=repr(config[option]),
                wanted=" or ".join(sorted(filter(None, known))), do="fix the config, or fetch the adapter again",
            )  # fmt: skip


def _check_adalora(config: Mapping[str, Any], where: str) -> None:
    """Raise `LoraSuiteError` for an AdaLoRA without its scaling, or with a schedule that PEFT refuses."""
    if config["peft_type"] != "ADALORA":
        return
    for name in ("lora_alpha", "init_r"):
        if not (config.get(name) or 0) > 0:
            raise LoraSuiteError(
                "malformed value" if name in config else "missing value", where=f"{where}/{CONFIG}, {name}",
                got=config.get(name), wanted="a number above 0", do="fix the config, or fetch the adapter again",
            )  # fmt: skip
    from peft import AdaLoraConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of entries that it does not know
            AdaLoraConfig.from_peft_type(**AdaLoraConfig.check_kwargs(**config))
    except (ValueError, TypeError) as error:
        raise LoraSuiteError(
            f"PEFT refuses the config: {short_message(error)}", where=f"{where}/{CONFIG}",
            do="fix the config, or fetch the adapter again",
        ) from error  # fmt: skip


def adapter_kind(config: Mapping[str, Any]) -> str:
    """Return ``lora``, ``dora`` or ``adalora``, as which the result is written; ``lora`` for converted types."""
    if config["peft_type"] == "ADALORA":
        return "adalora"
    return "dora" if config.get("use_dora") and config["peft_type"] == "LORA" else "lora"


def needs_backbones(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the upgrade of an adapter needs the backbones, by its config and the names of its tensors."""
    names = list(names)
    if config["peft_type"] not in DIRECT_KINDS or config.get("use_dora"):
        return True
    if config.get("target_parameters") or any(".experts." in name for name in names):
        return True
    endings = ("base_layer.bias", "bias", "weight", "lora_embedding_A", "token_adapter.trainable_tokens_delta")
    found = {(ending, module.rpartition(".")[2]) for module, ending in map(split_ending, names)}
    return any(ending in endings or name in ("lm_head", "embed_out") for ending, name in found)


def split_ending(name: str) -> tuple[str, str]:
    """Split a tensor's name into the path of its module and its ending; the ending is empty if it is unknown."""
    for ending in ENDINGS:
        if name.endswith(f".{ending}"):
            return name[: -len(ending) - 1], ending
    return name, ""


def is_trained_bias(name: str) -> bool:
    """Whether a tensor is a bias of the backbone that was trained, by its name; a LoRA's own bias is not."""
    return split_ending(name)[1] in TRAINED_BIAS


def skip_reason(owned: Mapping[str, str], family: str) -> str:
    """Return why the tensors of a module outside the layers' linear modules are not transferred.

    Args:
        owned: Ending -> name of the module's tensors.
        family: Model family of the backbone.
    """
    if set(owned) <= {*TRAINED_BIAS}:
        return "a LoRA has no biases outside of the layers' linear modules, such as a norm's or the head's"
    if any(".experts." in name for name in owned.values()):
        return f"{family} has no such experts"
    if "weight" in owned:
        return "only token tables are transferred from modules_to_save; train it as LoRA instead"
    return f"the converter of {family} describes no such module in this layer"
