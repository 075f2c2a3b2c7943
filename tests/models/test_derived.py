"""What is read from a model without weights where a type has no converter."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_types import logits_of, tiny_config, tiny_model

from peft_lorasuite.models.derived import derive_architecture
from peft_lorasuite.models.peft_names import names_of_experts


def leaves(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}


def test_a_shared_expert_has_no_lora_since_peft_takes_its_names_for_those_of_experts() -> None:
    """PEFT adds the parameters of all experts instead of this module."""
    model = tiny_model("deepseek_v3")
    taken = names_of_experts(model, leaves(model))
    assert taken == {"gate", "gate_proj", "up_proj", "down_proj"}
    name = "model.layers.2.mlp.shared_experts.down_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[name], r=2))
    assert isinstance(adapted.get_submodule(f"base_model.model.{name}"), torch.nn.Linear)
    assert adapted.peft_config["default"].target_parameters == {"down_proj"}
    trained = {site.path.rpartition(".")[2] for site in derive_architecture(model.config).sites if site.trained}
    assert trained
    assert not trained & taken


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "llama4_text"])
def test_other_types_keep_all_names(model_type: str) -> None:
    model = tiny_model(model_type)
    assert not names_of_experts(model, leaves(model))


def test_the_layers_of_a_model_that_loops_over_them_are_counted_once() -> None:
    config = tiny_config("hrm_text")
    arch = derive_architecture(config)
    assert arch.layers == 3 < config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["gpt_neo", "olmo_hybrid", "zamba"])
def test_a_tiny_type_is_small_and_says_something(model_type: str) -> None:
    model = tiny_model(model_type)
    assert sum(weight.numel() for weight in model.parameters()) < 300_000
    assert logits_of(model, torch.tensor([[3, 4, 5, 6]])).std() > 0.1
