"""Layouts beside those of the small models of `pico`: refused ones, and checkpoints of another class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_config, pico_model, pico_tokenizer, save_backbone
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.arch.config_values import read_config_values
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"do_layer_norm_before": False}, "no norm with gains before each block and before the head"),
        ({"layer_norm_elementwise_affine": False}, "no norm with gains before each block"),
        ({"_remove_final_layer_norm": True}, "before the head"),
        ({"word_embed_proj_dim": 16}, "the embedding of this OPT is projected .*got word_embed_proj_dim 16"),
    ],
)
def test_an_opt_of_another_layout_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture(pico_config("opt", **overrides))


def test_an_opt_of_another_layout_is_taken_as_without_a_converter() -> None:
    model = AutoModelForCausalLM.from_config(pico_config("opt", do_layer_norm_before=False))
    arch = Backbone.open(model).arch
    assert not arch.has_converter
    assert not read_config_values(model.config)


def test_a_checkpoint_of_the_whole_qwen3_5_is_that_of_its_text_model(tmp_path: Path) -> None:
    """As on the Hub: a config of the multimodal type, and tensors of the text model under its path."""
    whole = AutoModelForImageTextToText.from_config(pico_config("qwen3_5"))
    backbone = Backbone.open(str(save_backbone(tmp_path / "whole", whole, pico_tokenizer(["cat"]))))
    text = whole.model.language_model
    assert backbone.arch.site("q").layers == (1, 2)
    parts = backbone.part(1, "q"), backbone.part(1, "q_gate")
    assert torch.equal(
        torch.stack(parts).unflatten(1, (4, 16)).transpose(0, 1).reshape(128, 32),
        text.layers[1].self_attn.q_proj.weight,
    )
    assert torch.equal(backbone.gain(2, "up"), text.layers[2].post_attention_layernorm.weight + 1)
    loaded = backbone.load(dtype=torch.float32)
    assert torch.equal(loaded(input_ids=IDS).logits, whole.eval()(input_ids=IDS).logits)


def test_updates_of_linear_attention_are_reported_as_not_transferred(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["in_proj_qkv", "gate_proj"], init_lora_weights=False)
    peft.get_peft_model(pico_model("qwen3_5_text"), config).save_pretrained(tmp_path)
    adapter = read_adapter(Source(str(tmp_path), "adapter"), architecture(pico_config("qwen3_5_text")))
    assert set(adapter.updates) == {(0, "gate"), (1, "gate"), (2, "gate")}
    assert {name.partition(".layers.")[2].partition(".lora")[0] for name in adapter.unused} == {
        "0.linear_attn.in_proj_qkv"
    }
    assert set(adapter.unused.values()) == {"the converter of qwen3_5 describes no such module in this layer"}
