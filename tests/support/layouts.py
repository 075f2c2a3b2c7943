"""Pico models that hold the same weights in two formats: other names, fused projections, folded multipliers."""

from __future__ import annotations

from typing import Any

import torch
from pico import MINICPM, pico_model


@torch.no_grad()
def split_phi3(fused: Any) -> Any:
    """Return the Llama that computes the same as a Phi-3."""
    model = pico_model("llama", rms_norm_eps=fused.config.rms_norm_eps)
    weights = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    width, groups = 32, 16
    for layer in range(fused.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        rows = weights.pop(f"{prefix}self_attn.qkv_proj.weight").split([width, groups, groups])
        weights |= {f"{prefix}self_attn.{part}_proj.weight": one for part, one in zip("qkv", rows, strict=True)}
        gate, up = weights.pop(f"{prefix}mlp.gate_up_proj.weight").chunk(2)
        weights |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def llama_format(plain: Any) -> Any:
    """Fold MiniCPM's multipliers into the weights, as the published conversion does."""
    sizes = {name: MINICPM[name] for name in ("rms_norm_eps",)}
    model = pico_model("llama", **sizes, tie_word_embeddings=False)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    weights["lm_head.weight"] = weights["lm_head.weight"] / (MINICPM["hidden_size"] / MINICPM["dim_model_base"])
    weights["model.embed_tokens.weight"] *= MINICPM["scale_emb"]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= MINICPM["scale_depth"] / MINICPM["num_hidden_layers"] ** 0.5
    model.load_state_dict(weights)
    return model


def layouts() -> dict[str, tuple[Any, Any, dict[str, Any] | None]]:
    """Format -> the model in both formats, and the config.json of the first where it is not its own."""
    fused, plain = pico_model("phi3", seed=5), pico_model("minicpm", seed=5)
    whole = pico_model("gemma3", seed=5)
    text = pico_model("gemma3_text", rms_norm_eps=whole.config.get_text_config().rms_norm_eps)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    vision = pico_model("qwen2_vl", seed=5)
    qwen = pico_model("qwen2", rms_norm_eps=vision.config.get_text_config().rms_norm_eps)
    qwen.model.load_state_dict(vision.model.language_model.state_dict())
    qwen.lm_head.load_state_dict(vision.lm_head.state_dict())
    return {
        "fused and split": (fused, split_phi3(fused), None),
        "MiniCPM plain and llama format": (plain, llama_format(plain), MINICPM | {"model_type": "minicpm"}),
        "Gemma 3 multimodal and text class": (whole, text, None),
        "Qwen2-VL and its text model": (vision, qwen, None),
    }
