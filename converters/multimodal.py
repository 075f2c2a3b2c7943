"""LLaVA, Mistral 3, Qwen2-VL and Qwen2.5-VL: the text model; vision towers and projectors are left as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_lorasuite.arch.registry import architecture, register
from peft_lorasuite.arch.spec import Architecture

from .qwen2 import qwen2

TEXT = "model.language_model"


def inside(text: Architecture, config: Any, *, stored: str, stored_head: str) -> Architecture:
    """Return a text model's architecture with its paths in a multimodal model.

    Args:
        text: Architecture of the text model by itself.
        config: Config of the multimodal model.
        stored: Path of the text model in the checkpoint.
        stored_head: Path of the head in the checkpoint.
    """
    names = ("layer_path", "embedding", "final_norm", "embedding_norm")
    paths = {name: path and f"{TEXT}.{path.partition('.')[2]}" for name in names for path in [getattr(text, name)]}
    head = () if stored_head == "lm_head" else (("lm_head", stored_head),)
    tied = bool(config.tie_word_embeddings)
    return replace(text, **paths, head="lm_head", tied=tied, disk=((TEXT, stored), *head))


@register("llava", "mistral3")
def llava(config: Any) -> Architecture:
    """Describe the text model of a LLaVA or Mistral 3 backbone, which can be of any family."""
    text = architecture(config.text_config)
    stored = f"language_model.{text.layer_path.partition('.')[0]}"
    return inside(text, config, stored=stored, stored_head="language_model.lm_head")


@register("qwen2_vl", "qwen2_5_vl")
def qwen2_vl(config: Any) -> Architecture:
    """Describe the text model of a Qwen2-VL or Qwen2.5-VL backbone; the rotary positions of text are Qwen2's."""
    return inside(qwen2(config.text_config), config, stored="model", stored_head="lm_head")
