"""Architectures that are read from a model: linear modules by full name, with their shapes, without other towers."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from any_model import OTHERS, load, other_backbone
from pico import pico_model
from tiny_types import logits_of, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from versions import needs_tiny

from peft_lorasuite import Architecture, LoraSuiteError
from peft_lorasuite.arch.registry import without_converters
from peft_lorasuite.mapping.fingerprint import read_identity
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.derived import derive_architecture
from peft_lorasuite.models.peft_names import names_of_experts

NOT_TRAINED = {
    "jamba": {"dt_proj", "out_proj", "x_proj"},
    "mamba": {"dt_proj", "out_proj", "x_proj"},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_sites_are_the_linear_modules_of_the_text_model(model_type: str, tmp_path: Path) -> None:
    needs_tiny(model_type)
    folder = other_backbone(tmp_path, model_type)
    with without_converters(model_type):
        backbone = Backbone.open(str(folder))
        arch = backbone.arch
        in_memory = Backbone.open(load(folder))
        assert in_memory.arch == arch
        assert read_identity(in_memory).samples == read_identity(backbone).samples
    model = load(folder)
    linear = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "visual" not in name and name != arch.head
    }  # fmt: skip
    assert {site.path: site.shape for site in arch.sites} == {
        name: tuple(module.weight.shape) for name, module in linear.items()
    }
    assert all(site.bias == (linear[site.path].bias is not None) for site in arch.sites)
    left_out = {site.path.rpartition(".")[2] for site in arch.sites if not site.trained}
    assert left_out == NOT_TRAINED.get(model_type, set())
    assert model.get_submodule(arch.embedding) is model.get_input_embeddings()
    assert model.get_submodule(arch.head) is model.get_output_embeddings()
    assert arch.tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert not arch.has_converter
    assert Architecture.from_dict(arch.to_dict()) == arch
    assert arch.find(arch.sites[-1].path) == (2, arch.sites[-1])


def test_modules_with_transposed_weights_have_the_shape_of_a_linear_module() -> None:
    model = pico_model("gpt2")
    with without_converters("gpt2"):
        arch = Backbone.open(model).arch
    assert arch.shape("transformer.h.0.attn.c_attn") == (96, 32)
    assert all(site.conv1d for site in arch.sites)


def test_a_model_without_a_head_is_refused() -> None:
    decoder = pico_model("llama").model
    with without_converters("llama"), pytest.raises(LoraSuiteError, match="no language-model head"):
        Backbone.open(decoder).arch  # noqa: B018


def test_a_type_that_transformers_does_not_know_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    folder = other_backbone(tmp_path, "xglm")
    text = (folder / "config.json").read_text().replace('"xglm"', '"owlet"')
    (folder / "config.json").write_text(text)
    with pytest.raises(LoraSuiteError, match=r"no converter for model type 'owlet'.*docs/add-a-family\.md"):
        Backbone.open(str(folder)).arch  # noqa: B018


def leaves(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}


def test_a_shared_expert_has_no_lora_since_peft_takes_its_names_for_those_of_experts() -> None:
    """PEFT adds the parameters of all experts instead of this module."""
    needs_tiny("qwen2_moe")
    model = tiny_model("deepseek_v3")
    taken = names_of_experts(model, leaves(model))
    assert taken == {"gate", "gate_proj", "up_proj", "down_proj"}
    name = "model.layers.2.mlp.shared_experts.down_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[name], r=2))
    assert isinstance(adapted.get_submodule(f"base_model.model.{name}"), torch.nn.Linear)
    assert adapted.peft_config["default"].target_parameters == {"down_proj"}
    trained = {site.path.rpartition(".")[2] for site in derive_architecture(model).sites if site.trained}
    assert trained
    assert not trained & taken


@pytest.mark.parametrize(
    ("model_type", "lost"),
    [
        ("laguna", "model.layers.1.mlp.shared_experts.down_proj"),
        ("inkling2_text", "model.layers.2.self_attn.k_proj.sconv.weight_proj"),
    ],
)
def test_a_module_whose_tensors_peft_does_not_find_again_has_no_lora(
    model_type: str, lost: str, tmp_path: Path
) -> None:
    """The renaming of older checkpoints hits the names of these tensors, and PEFT leaves them out with a warning."""
    needs_tiny(model_type)
    adapted = peft.get_peft_model(tiny_model(model_type), peft.LoraConfig(target_modules=[lost]))
    torch.nn.init.ones_(adapted.get_submodule(f"base_model.model.{lost}").lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = peft.PeftModel.from_pretrained(tiny_model(model_type), str(tmp_path))
    assert not again.get_submodule(f"base_model.model.{lost}").lora_B["default"].weight.any()
    sites = {site.path: site.trained for site in derive_architecture(tiny_model(model_type)).sites}
    assert not sites[lost]
    assert any(sites.values())


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "llama4_text"])
def test_other_types_keep_all_names(model_type: str) -> None:
    model = tiny_model(model_type)
    assert not names_of_experts(model, leaves(model))


def test_the_layers_of_a_model_that_loops_over_them_are_counted_once() -> None:
    needs_tiny("hrm_text")
    model = tiny_model("hrm_text")
    assert derive_architecture(model).layers == 3 < model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["gpt_neo", "olmo_hybrid", "zamba"])
def test_a_tiny_type_is_small_and_says_something(model_type: str) -> None:
    needs_tiny(model_type)
    model = tiny_model(model_type)
    assert sum(weight.numel() for weight in model.parameters()) < 300_000
    assert logits_of(model, torch.tensor([[3, 4, 5, 6]])).std() > 0.1


def test_a_model_in_memory_keeps_its_modules_and_weights() -> None:
    needs_tiny("gpt_neo")
    model = tiny_model("gpt_neo")
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert any(site.trained for site in derive_architecture(model).sites)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
