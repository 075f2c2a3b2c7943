"""Structural differences of two architectures: one sentence each, and none for sizes."""

from __future__ import annotations

import pytest
import torch
from pico import GEMMA4_SHARED, pico_config
from transformers.activations import ACT2FN
from versions import installed_spelling

from peft_lorasuite.arch.differences import SAME_FUNCTION, differences
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import Architecture


def arch(name: str, **overrides: object) -> Architecture:
    return architecture(pico_config(name, **overrides))


def text(old: Architecture, new: Architecture) -> str:
    return "\n".join(differences(old, new))


def test_sizes_are_not_structural_differences() -> None:
    assert differences(arch("llama"), arch("llama", hidden_size=64, num_hidden_layers=5, intermediate_size=99)) == []
    assert differences(arch("llama"), arch("ministral")) == []


def test_a_part_of_one_backbone_is_reported_in_both_directions() -> None:
    llama, neox = arch("llama"), arch("gpt_neox")
    assert "only the old layers have a gate projection: its updates are dropped" in text(llama, neox)
    assert "only the new layers have a gate projection: it gets no update" in text(neox, llama)


def test_split_to_fused_costs_energy_and_fused_to_split_does_not() -> None:
    llama, phi3, neox = arch("llama"), arch("phi3"), arch("gpt_neox")
    fused = differences(llama, phi3)
    assert [line.partition(" are ")[0] for line in fused if "one joint rank" in line] == ["q, k, v", "gate, up"]
    split = [line for line in differences(phi3, llama) if "fused in" in line]
    assert len(split) == 2
    assert all(line.endswith("exact") for line in split)
    assert "q, k, v are fused part after part in the old layers and head by head in the new ones: exact" in text(
        phi3, neox
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("qwen2", "llama", "q, k, v have a bias in the old layers and none in the new ones"),
        ("llama", "phi", "q, k, v, o, up, down have a bias in the new layers and none in the old ones"),
        ("bloom", "llama", "positions are alibi in the old backbone and rotary in the new one"),
        ("gpt_neox", "llama", "25% of a head is rotated in the old backbone and 100% in the new one"),
        ("llama", "gpt_neox", "one after the other in the old layers and in parallel in the new ones"),
        ("smollm3", "llama", "heads are rotated in 67% of the old layers and in 100% of the new ones"),
        ("llama", "phi", "norms are RMSNorm in the old backbone and LayerNorm in the new one"),
        ("llama", "olmo2", "only the old layers have a norm before feed-forward"),
        ("llama", "gemma2", "only the new layers have a norm after attention"),
        ("llama", "qwen3", "only the new backbone normalizes queries and keys"),
        ("llama", "gemma2", "the activation function is silu in the old backbone and gelu_new in the new one"),
        ("granite", "llama", "multiplied by 0.4 in the old backbone and by 1 in the new one: compensated"),
    ],
)
def test_a_difference_is_named(old: str, new: str, words: str) -> None:
    assert words in text(arch(old), arch(new))


def test_attention_types_are_named() -> None:
    mha, gqa, mqa = (arch("llama", num_key_value_heads=groups) for groups in (4, 2, 1))
    assert "is MHA (4 query and 4 key/value heads) in the old backbone and GQA (4 query and 2 key/value" in text(
        mha, gqa
    )
    assert "averaged over" in text(gqa, mqa)
    assert "repeated for" in text(mqa, mha)


def test_a_rotary_base_and_a_threshold_are_named() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert "the rotary base is 10000 in the old backbone and 500000" in text(
        arch("llama"), arch("llama", **installed_spelling({"rope_parameters": rope}))
    )
    sparse = arch("minicpm", hidden_act="fatrelu", hidden_act_param=0.03)
    assert "is relu above 0.03 in the old backbone and silu in the new one" in text(sparse, arch("minicpm"))


def test_two_names_of_one_activation_function_are_not_a_difference() -> None:
    assert differences(arch("llama", hidden_act="gelu_new"), arch("llama", hidden_act="gelu_pytorch_tanh")) == []
    x = torch.linspace(-6, 6, 201)
    for name, same in SAME_FUNCTION.items():
        torch.testing.assert_close(ACT2FN[name](x), ACT2FN[same](x), atol=1e-6, rtol=1e-5)
    assert (ACT2FN["gelu"](x) - ACT2FN["gelu_new"](x)).abs().max() > 1e-4


def test_the_sizes_keys_and_scales_of_gemma_4_are_reported() -> None:
    gemma, llama = arch("gemma4_text", attention_k_eq_v=True), arch("llama")
    found = text(gemma, llama)
    assert "keys and values share a projection in 2 of the old layers and in 0 of the new ones" in found
    assert "100% or 25% of a head is rotated in the old backbone and 100% in the new one" in found
    assert "(4 query and 2 key/value heads) and MQA (4 query and 1 key/value heads) in the old backbone" in found
    assert "only the old backbone normalizes values" in found
    assert "only the old backbone multiplies the output of each layer by a scalar of its own" in found
    shared = text(llama, arch("gemma4_text", **GEMMA4_SHARED))
    assert "0 of the old layers and 2 of the new ones take keys and values from an earlier layer" in shared
    assert "only the new layers have a ple_down projection" in shared
