"""Samples of the weights: every tensor of the text model counts, and copies in other dtypes are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import MULTIMODAL, PICO, VOCABULARY, pico_model, pico_tokenizer, save_backbone

from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.io.checkpoint import Checkpoint
from peft_lorasuite.mapping.samples import EMPTY, KINDS, hash_weights
from peft_lorasuite.models.backbone import Backbone


@pytest.mark.parametrize("family", PICO | MULTIMODAL)
def test_a3_every_tensor_of_the_text_model_is_in_the_sample(family: str) -> None:
    model = pico_model(family)
    arch = architecture(model.config)
    kept = hash_weights(Backbone.open(model))
    assert set(kept) == set(KINDS)
    assert None not in kept.values()
    assert (kept["head"] == EMPTY) == arch.tied
    for name, weight in model.named_parameters():
        if any(other in name for other in ("vision", "visual", "multi_modal")):
            continue
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1)
        changed = [kind for kind, text in hash_weights(Backbone.open(model)).items() if text != kept[kind]]
        assert changed, name
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize("row", [0, VOCABULARY - 1])
def test_the_first_and_the_last_row_of_a_table_are_in_the_sample(row: int) -> None:
    model = pico_model("llama")
    kept = hash_weights(Backbone.open(model))
    with torch.no_grad():
        model.lm_head.weight[row] += 1
    now = hash_weights(Backbone.open(model))
    assert {kind for kind in KINDS if now[kind] != kept[kind]} == {"head"}


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3", "minicpm"])
def test_the_files_of_a_model_have_the_sample_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model = pico_model(family)
    folder = save_backbone(tmp_path / "model", model, pico_tokenizer(["a"]))
    assert hash_weights(Backbone.open(folder)) == hash_weights(Backbone.open(model))


def test_a_base_model_without_its_prefix_and_head_has_the_same_sample(tmp_path: Path) -> None:
    """GPT-2 is stored so on the Hub, with the causal mask as a tensor named bias."""
    model = pico_model("gpt2")
    whole = save_backbone(tmp_path / "whole", model)
    model.transformer.save_pretrained(tmp_path / "bare")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
    save_file(tensors, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    assert hash_weights(Backbone.open(tmp_path / "bare")) == hash_weights(Backbone.open(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_of_bfloat16_weights_in_another_dtype_has_the_same_sample(dtype: torch.dtype) -> None:
    """Float16 rounds the smallest of them."""
    model = pico_model("qwen2").to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.logspace(-6, 0, weight.shape[-1]).to(torch.bfloat16))
    kept = hash_weights(Backbone.open(model))
    assert hash_weights(Backbone.open(model.to(dtype))) == kept


def test_weights_that_are_no_plain_numbers_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_backbone(tmp_path / "model", pico_model("llama"))
    kept = hash_weights(Backbone.open(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(768, 1, dtype=torch.uint8)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert hash_weights(Backbone.open(folder)) == {**kept, "projections": None, "head": None}


def test_the_files_of_a_backbone_are_sampled_once_and_a_model_in_memory_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.open(save_backbone(tmp_path / "model", pico_model("llama")))
    kept = hash_weights(backbone)
    monkeypatch.setattr(Checkpoint, "rows", None)
    assert hash_weights(backbone) == kept
    model = pico_model("llama")
    memory = Backbone.open(model)
    assert hash_weights(memory) == kept
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert hash_weights(memory) != kept
