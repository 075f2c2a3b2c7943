"""Models of types that are taken as if they had no converter, with adapters that PEFT trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from pico import GROUPED, IDS, VISION, VOCABULARY, pico_tokenizer, randomize, save_backbone
from transformers import AutoConfig

from peft_lorasuite.models.loading import auto_class

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
FIRST_WORD = 3
"""Token id of the first word, after the special tokens."""
PROMPTS = [f" the {a} {b} {c}" for a in WORDS[:2] for b in WORDS[2:4] for c in WORDS[8:]]
MAMBA = {"state_size": 8, "time_step_rank": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "codegen": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "rotary_dim": 4}
    | IDS,
    "exaone4": GROUPED,
    "glm4v": {
        "text_config": GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": VISION | {"depth": 1, "num_heads": 4, "out_hidden_size": 32, "image_size": 8},
        "image_token_id": VOCABULARY - 1,
        "video_token_id": VOCABULARY - 2,
    },
    "jamba": GROUPED
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3} | MAMBA | IDS,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256} | IDS,
    "xglm": {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4} | IDS,
}
"""Config values by ``model_type``: dense and tied (mpt, xglm) or not (codegen), with norms behind the projections
(exaone4), multimodal (glm4v), recurrent (mamba), hybrid with experts (jamba), with experts (mixtral)."""


@torch.no_grad()
def other_backbone(folder: Path, model_type: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a backbone with random weights and the tokenizer of `WORDS`, whose tokens it prefers in its answers."""
    config = AutoConfig.for_model(model_type, **(OTHERS[model_type] | overrides))
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    head = model.get_output_embeddings().weight
    head[:FIRST_WORD] *= 0.1
    head[FIRST_WORD + len(WORDS) :] *= 0.1
    return save_backbone(folder, model, pico_tokenizer(WORDS))


def load(folder: Path) -> Any:
    """Load a backbone with transformers."""
    config = AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(folder: Path, base: Path, modules: Any, **options: Any) -> Path:
    """Write a random LoRA of a backbone that changes its predictions, with PEFT."""
    config = peft.LoraConfig(
        r=4, lora_alpha=24, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(0)
    return _save(peft.get_peft_model(load(base), config), folder, base)


@torch.no_grad()
def save_trained(folder: Path, base: Path, config: Any) -> Path:
    """Write an adapter of any kind as if it had been trained: all of its weights are changed."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.3 * torch.randn_like(weight)
    return _save(model, folder, base)


def _save(model: Any, folder: Path, base: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


def log_probs(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return the next-token log-probabilities after the prompts, of a backbone or with an adapter."""
    model = load(base)
    return log_probs_of(model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter)).eval())


@torch.no_grad()
def log_probs_of(model: Any) -> torch.Tensor:
    """Return the next-token log-probabilities of a model after the prompts."""
    ids = torch.tensor([pico_tokenizer(WORDS)(prompt)["input_ids"] for prompt in PROMPTS])
    return model(input_ids=ids).logits[:, -1].float().log_softmax(-1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL divergence from log-probabilities to others, in nats."""
    return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))
