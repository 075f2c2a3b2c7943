"""Adapters whose tokenizer has tokens that the backbone lacks, trained and saved with PEFT in all of its layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from peft_lorasuite import UpgradeMap
from peft_lorasuite.mapping.upgrade_map import MapOptions

WORDS = ["the", "a", "of", "and", "cat", "sat", "on", "mat", "dog", "ran", "to", "red", "sun", "big", "in"]
TOKENS = ["<tool>", "<end_tool>"]
PROMPTS = [f"<tool> the {word}<end_tool> cat" for word in WORDS] + ["the red cat sat on <tool>"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save of the embedding": {"modules_to_save": ["embed_tokens"]},
    "trainable_token_indices": {"trainable_token_indices": True},
    "trainable_token_indices by table": {"trainable_token_indices": {"embed_tokens": True, "lm_head": True}},
    "LoRA of both tables": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "save_embedding_layers": {},
}
"""Layout -> values of the LoRA config; True stands for the ids of the added tokens."""


@dataclass
class Base:
    """A backbone on disk and its tokenizer."""

    folder: Path
    rows: int
    tokenizer: Any

    def model(self, rows: int | None = None) -> Any:
        """Load the backbone, resized with transformers."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        if rows is not None:
            torch.manual_seed(7)
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model


def base(folder: Path, family: str = "llama", *, padding: int = 0, seed: int = 0, **values: Any) -> Base:
    """Write a backbone whose table has as many rows as its tokenizer has tokens, and ``padding`` more."""
    tokenizer = pico_tokenizer(WORDS)
    rows = len(tokenizer) + padding
    model = pico_model(family, seed, vocab_size=rows, **values)
    return Base(save_backbone(folder, model, tokenizer), rows, tokenizer)


def grown(tokenizer: Any, tokens: list[str] = TOKENS) -> tuple[Any, list[int]]:
    """Return a copy of a tokenizer with further tokens, and their ids."""
    import copy

    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return grown, grown.convert_tokens_to_ids(tokens)


def train(folder: Path, old: Base, layout: str, *, rows: int | None = None, **values: Any) -> Any:
    """Train a LoRA with two more tokens in one of the layouts; see `train_with`."""
    ids = grown(old.tokenizer)[1]
    settings = dict(LAYOUTS[layout])
    indices = settings.get("trainable_token_indices")
    if indices is not None:
        settings["trainable_token_indices"] = ids if indices is True else dict.fromkeys(indices, ids)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    saved = {"save_embedding_layers": True} if layout == "save_embedding_layers" else {}
    return train_with(folder, old, peft.LoraConfig(**settings | values), rows=rows, **saved)


def plain_lora() -> Any:
    """Return the config of a LoRA that trains no token."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def train_with(
    folder: Path, old: Base, config: Any, *, rows: int | None = None, base: str = "", grow: bool = True, **saved: Any
) -> Any:
    """Train an adapter with two more tokens for some steps and save it with PEFT, the tokenizer beside it.

    Args:
        folder: Where it is saved.
        old: The backbone.
        config: The PEFT config.
        rows: Rows that the tables are resized to; by default the tokens.
        base: Name of the backbone in the config.
        grow: Whether tokens are added.
        **saved: Keyword arguments of ``save_pretrained``.
    """
    tokenizer = grown(old.tokenizer)[0] if grow and not base else old.tokenizer
    torch.manual_seed(0)
    model = peft.get_peft_model(old.model(len(tokenizer) if rows is None else rows), config)
    model.peft_config["default"].base_model_name_or_path = base or str(old.folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    model.save_pretrained(folder, **saved)
    tokenizer.save_pretrained(folder)
    return model.eval()


def identity_map(old: Base, new: Base) -> UpgradeMap:
    """Build the map of two backbones with layers matched in order."""
    return UpgradeMap.build(old.folder, new.folder, MapOptions(layer_map="first"))


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Return the logits of some prompts, (prompts, length, tokens of the tokenizer)."""
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    found = model(**batch).logits[..., : len(tokenizer)]
    return found * batch["attention_mask"][..., None]
