"""Models small enough for a test, one of every family: real transformers classes with random weights.

Norm gains and biases are random too: with gains of one and biases of zero, many a mistake changes nothing.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from versions import installed_spelling, needs, needs_type

from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.compat import spell_scaling
from peft_lorasuite.models.loading import auto_class

VOCABULARY = 120
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
} | IDS
GROUPED = SIZES | {"num_key_value_heads": 2}
MINICPM = {
    **GROUPED,
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
}
"""A config.json as MiniCPM's first release has it: no model_type, no rotary base, nothing about a tied head."""
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4} | IDS
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 256} | IDS
QWEN3_5 = GROUPED | {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GEMMA4 = GROUPED | {
    "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": False,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "final_logit_softcapping": 5.0,
}  # fmt: skip
GEMMA4_SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
"""What makes a Gemma 4 one with per-layer embeddings whose last layers have no keys and values, as E2B and E4B."""
OTHER = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
FALCON, OPT = OTHER | {"ffn_hidden_size": 48}, OTHER | {"ffn_dim": 48}

PICO: dict[str, dict[str, Any]] = {
    "bloom": BLOOM,
    "cohere2": GROUPED | {"sliding_window": 8, "layer_types": ALTERNATING, "logit_scale": 0.4},
    "falcon": FALCON,
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GEMMA,
    "gemma3": {
        "text_config": GEMMA | {"layer_types": ALTERNATING},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": VOCABULARY - 1,
        "boi_token_index": VOCABULARY - 2,
        "eoi_token_index": VOCABULARY - 3,
    },
    "gemma3_text": GEMMA | {"layer_types": ALTERNATING},
    "gemma4_text": GEMMA4,
    "glm4": GROUPED | {"head_dim": 16},
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": GROUPED
    | {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "llama": GROUPED,
    "minicpm": MINICPM | {"model_type": "minicpm"},
    "ministral": GROUPED | {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING},
    "mistral": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 8, "layer_types": ALTERNATING},
    "opt": OPT,
    "phi": SIZES,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "qwen3_5_text": QWEN3_5,
    "smollm3": GROUPED | {"no_rope_layers": [1, 0, 1]},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
}
"""Config values by ``model_type``."""
TEXT_MODEL = {name: value for name, value in GROUPED.items() if name not in IDS}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "num_heads": 4}
QWEN_VL: dict[str, Any] = {
    "text_config": TEXT_MODEL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "image_token_id": VOCABULARY - 1,
    "video_token_id": VOCABULARY - 2,
    "vision_start_token_id": VOCABULARY - 3,
    "vision_end_token_id": VOCABULARY - 4,
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma4": {
        "text_config": {name: value for name, value in GEMMA4.items() if name not in IDS},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "eoi_token_id": VOCABULARY - 6,
        "eoa_token_index": VOCABULARY - 7,
    }
    | {f"{name}_token_id": VOCABULARY - 1 - n for n, name in enumerate(("image", "video", "audio", "boi", "boa"))},
    "llava": {
        "text_config": TEXT_MODEL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16},
        "image_token_index": VOCABULARY - 1,
    },
    "mistral3": {
        "text_config": TEXT_MODEL | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "image_size": 8, "head_dim": 8},
        "image_token_index": VOCABULARY - 1,
    },
    "qwen3_5": {
        "text_config": {name: value for name, value in QWEN3_5.items() if name not in IDS},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "out_hidden_size": 32,
        },
    },
    "qwen2_vl": QWEN_VL
    | {"vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}},
    "qwen2_5_vl": QWEN_VL
    | {
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    },
}
"""Config values of multimodal types, whose vision towers have the sizes of the text model."""


EXPERTS: dict[str, dict[str, Any]] = {
    "gpt_oss": GROUPED
    | {"head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8,
       "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mixtral": GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_moe": GROUPED
    | {"head_dim": 16, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}  # fmt: skip
"""Config values of mixtures of experts."""


def pico_config(model_type: str, **overrides: Any) -> Any:
    """Return a transformers config of about 20,000 weights; ``overrides`` replace its values."""
    needs_type(model_type)
    if model_type == "stablelm" and overrides.get("qk_layernorm"):
        needs("transformers", "5.0", "random weights of norms without biases")
    values = (PICO | MULTIMODAL | EXPERTS)[model_type] | overrides
    if model_type == "minicpm":
        return PretrainedConfig.from_dict({name: value for name, value in values.items() if value is not None})
    if model_type == "gemma3" or model_type in MULTIMODAL:
        own = (PICO | MULTIMODAL)[model_type]
        text = {name: overrides.pop(name) for name in list(overrides) if name in own["text_config"]}
        values = own | overrides | {"text_config": own["text_config"] | text}
    return AutoConfig.for_model(**installed_spelling(values | {"model_type": model_type}))


def pico_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a model with random weights, gains and biases, in float32 and evaluation mode.

    A MiniCPM is the Granite that computes the same (its own class is not in transformers).
    """
    if model_type in EXPERTS:
        needs("transformers", "5.0", "experts as 3-D parameters")
        needs("peft", "0.19", "the order of the factors of 3-D parameters")
    config = pico_config(model_type, **overrides)
    arch = architecture(config)
    if arch.runs_as:
        values = {name: value for name, value in config.to_dict().items() if name != "auto_map"}
        config = AutoConfig.for_model(**spell_scaling(values | dict(arch.runs_as)))
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    randomize(model, seed, gain_offset=arch.gain_offset)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, *, gain_offset: float = 0.0) -> None:
    """Draw every weight of a model: gains around one, biases around zero, matrices by their input size."""
    generator = torch.Generator().manual_seed(seed)
    for name, scale in model.named_buffers():
        if name.endswith("layer_scalar"):
            scale.copy_(0.5 + torch.rand(scale.shape, generator=generator))
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.6 + 0.8 * torch.rand(weight.shape, generator=generator) - gain_offset)
        else:
            weight.copy_(noise / weight.shape[1] ** 0.5)


def pico_tokenizer(words: list[str], *, marker: str = "Ġ", bos: bool = False) -> Any:
    """Return a fast BPE tokenizer that knows whole words and, for every other text, pieces and characters.

    Args:
        words: Lower-case words; their order gives the ids. A word of n letters costs up to n pieces beside the 46
            that are always there, so about 20 short words fit the pico models' vocabulary.
        marker: How a word start is written: ``"Ġ"`` as in byte-level BPE, ``"▁"`` as in SentencePiece.
        bos: Whether a text starts with ``<s>``. For a Qwen2 folder keep marker and bos as they are: transformers
            rebuilds its tokenizer from vocabulary and merges alone.
    """
    special = ["<unk>", "<s>", "</s>"]
    letters = [*string.ascii_lowercase, *string.digits, *".,:?!'", "Ċ" if marker == "Ġ" else "\n", marker]
    merges = dict.fromkeys((marker + word[:cut], word[cut]) for word in words for cut in range(len(word)))
    whole = [marker + word for word in words]
    vocabulary = dict.fromkeys([*special, *whole, *letters, *(left + right for left, right in merges)])
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, list(merges), unk_token="<unk>"))
    if marker == "Ġ":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=marker, prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(replacement=marker, prepend_scheme="first")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def save_backbone(folder: Path, model: Any, tokenizer: Any = None, config: dict[str, Any] | None = None) -> Path:
    """Write a model as transformers does, and its tokenizer; ``config`` replaces config.json (MiniCPM)."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_states() -> list[str]:
    """Return where the process's random numbers are: Python's, NumPy's and torch's."""
    return [str(state) for state in (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())]


def unrelated_pair(root: Path, words: list[str]) -> tuple[Path, Path]:
    """Write two backbones of other families, sizes and weights with one vocabulary: ``root/old``, ``root/new``."""
    tokenizer = pico_tokenizer(words)
    new = pico_model("qwen2", seed=2, hidden_size=48, intermediate_size=64)
    return (
        save_backbone(root / "old", pico_model("llama", seed=1), tokenizer),
        save_backbone(root / "new", new, tokenizer),
    )
