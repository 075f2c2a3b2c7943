"""Backbones of any shape with random weights, on disk, for timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_lorasuite.text.calibration import built_in_text

MINICPM_1B = {
    "hidden_size": 1536, "intermediate_size": 3840, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
MINICPM_2B = {
    "hidden_size": 2304, "intermediate_size": 5760, "num_attention_heads": 36, "num_key_value_heads": 36,
    "head_dim": 64,
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def backbone(folder: Path, *, layers: int, vocabulary: int = 4096, seed: int = 0, **shape: Any) -> Path:
    """Write a Llama of a shape with random bfloat16 weights and a tokenizer of words; return its folder."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=2048)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer(vocabulary).save_pretrained(folder)
    return folder


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of the calibration text, and of invented ones up to the vocabulary."""
    words = sorted({word for text in built_in_text() for word in text.split()})[: vocabulary - 2]
    known = ["<unk>", "</s>", *words]
    known += [f"word{number}" for number in range(vocabulary - len(known))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
