"""Every family with its variants, as cases of a parametrized test."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from pico import GEMMA4_SHARED, MULTIMODAL, PICO, pico_config, pico_model

from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import Architecture

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True}),
    ("falcon", {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    ("cohere2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"attention_bias": True, "num_key_value_heads": 1}),
    ("gemma4_text", {"attention_k_eq_v": True, "attention_bias": True}),
    ("gemma4_text", GEMMA4_SHARED),
    ("glm4", {"attention_bias": False, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-6}),
    ("gpt2", {"n_inner": None, "tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 777.0, "tie_word_embeddings": True}),
    ("gptj", {"rotary_dim": 8, "n_inner": None, "tie_word_embeddings": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 5e5}),
    ("minicpm", {"tie_word_embeddings": False}),
    ("minicpm", {"hidden_act": "relu", "num_key_value_heads": None}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    (
        "olmo3",
        {
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 7e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7e5},
            },
        },
    ),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    ("phi", {"qk_layernorm": True, "num_key_value_heads": 2}),
    ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": True, "sliding_window": 8}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}),
    ("starcoder2", {"use_bias": False, "sliding_window": 4}),
]
CASES = [(name, {}) for name in PICO | MULTIMODAL] + VARIANTS
FAMILIES = pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{n}{'+' * bool(o)}{'+'.join(o)}" for n, o in CASES]
)


@cache
def build(case: int) -> tuple[Any, Architecture]:
    model_type, overrides = CASES[case]
    return pico_model(model_type, seed=case, **overrides), architecture(pico_config(model_type, **overrides))
