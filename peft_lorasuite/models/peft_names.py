"""Names of modules that PEFT takes for others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def names_of_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Return those last names of modules that PEFT, in a model's config, takes for names of experts.

    PEFT reads adapters that were written for the modules of experts in transformers 4: in a mixture of experts it
    replaces ``down_proj`` by the parameters of all experts, and so a dense layer or a shared expert of that name cannot
    have a LoRA.

    Args:
        model: A model of transformers; it may be without weights.
        names: Last names of its modules.
    """
    import peft

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before PEFT 0.19
        return set()

    def is_replaced(name: str) -> bool:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a part of a fused parameter without the others
            return True
        return name not in (config.target_modules or ())

    return {name for name in set(names) if is_replaced(name)}
