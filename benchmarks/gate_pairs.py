"""Backbones whose fate as an upgrade is known: the demo pair's, changed without a change of function, or damaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_pair import DATA
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

READ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
WRITE = ("self_attn.o_proj", "mlp.down_proj")


def demo(side: str) -> LlamaForCausalLM:
    """Load a backbone of the demo pair in float32."""
    return AutoModelForCausalLM.from_pretrained(DATA / side, dtype=torch.float32).eval()


def save(model: Any, side: str, folder: Path) -> Path:
    """Write a backbone with the tokenizer of one of the pair's."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DATA / side).save_pretrained(folder)
    return folder


@torch.no_grad()
def rebased(model: LlamaForCausalLM, stream: Tensor, generator: torch.Generator) -> LlamaForCausalLM:
    """Put the hidden space on another basis, with norm gains drawn anew; the function stays.

    Args:
        model: The backbone.
        stream: ``(D_n, D_o)`` with orthonormal columns: the new residual state from the old one.
        generator: Draws the gains.
    """
    wide, size = stream.shape
    config = _like(model, hidden_size=wide, rms_norm_eps=model.config.rms_norm_eps * size / wide)
    new = LlamaForCausalLM(config).eval()  # every weight of it is written over

    def gains(old: Any, fresh: Any) -> Tensor:
        """Draw a norm's gain; return what turns the weights behind it."""
        fresh.weight.copy_(0.6 + 0.8 * torch.rand(wide, generator=generator))
        return (size / wide) ** 0.5 * old.weight[:, None] * stream.T / fresh.weight

    new.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ stream.T)
    for before, after in zip(model.model.layers, new.model.layers, strict=True):
        for norm, paths in zip(("input_layernorm", "post_attention_layernorm"), READ, strict=True):
            turn = gains(getattr(before, norm), getattr(after, norm))
            for path in paths:
                after.get_submodule(path).weight.copy_(before.get_submodule(path).weight @ turn)
        for path in WRITE:
            after.get_submodule(path).weight.copy_(stream @ before.get_submodule(path).weight)
    new.lm_head.weight.copy_(model.lm_head.weight @ gains(model.model.norm, new.model.norm))
    return new


def rotated(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Rotate the hidden space."""
    size = model.config.hidden_size
    return rebased(model, torch.linalg.qr(torch.randn(size, size, generator=generator))[0], generator)


def widened(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Widen the hidden space by half, and rotate it."""
    size = model.config.hidden_size
    return rebased(model, torch.linalg.qr(torch.randn(3 * size // 2, size, generator=generator))[0], generator)


@torch.no_grad()
def permuted(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Permute hidden units, heads (as many key/value heads as query heads) and feed-forward units."""
    size, heads, wide = (getattr(model.config, f"{key}") for key in ("hidden_size", "num_attention_heads", "head_dim"))
    new = rebased(model, torch.eye(size)[torch.randperm(size, generator=generator)], generator)
    for layer in new.model.layers:
        order = torch.randperm(heads, generator=generator)
        rows = (order[:, None] * wide + torch.arange(wide)).flatten()
        units = torch.randperm(model.config.intermediate_size, generator=generator)
        for paths, chosen in zip(READ, (rows, units), strict=True):
            for path in paths:
                layer.get_submodule(path).weight.copy_(layer.get_submodule(path).weight[chosen].clone())
        for path, chosen in zip(WRITE, (rows, units), strict=True):
            layer.get_submodule(path).weight.copy_(layer.get_submodule(path).weight[:, chosen].clone())
    return new


@torch.no_grad()
def deepened(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Insert a layer that adds nothing, and rotate the hidden space."""
    new = LlamaForCausalLM(_like(model, num_hidden_layers=model.config.num_hidden_layers + 1)).eval()
    tensors = {key: value for key, value in model.state_dict().items() if "layers" not in key}
    for number in range(len(new.model.layers)):
        source = max(number - 1, 0)  # the first layer stands twice, once without effect
        part = {k: v for k, v in model.state_dict().items() if k.startswith(f"model.layers.{source}.")}
        tensors |= {key.replace(f"layers.{source}.", f"layers.{number}.", 1): value for key, value in part.items()}
    new.load_state_dict(tensors)
    for path in WRITE:
        new.model.layers[1].get_submodule(path).weight.zero_()
    return rotated(new, generator)


def noisy(level: float) -> Callable[[LlamaForCausalLM, torch.Generator], LlamaForCausalLM]:
    """Return a change that adds noise of a share of each matrix's own spread."""

    def change(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
        new = copy.deepcopy(model)
        with torch.no_grad():
            for weight in new.parameters():
                if weight.ndim == 2:
                    weight += level * weight.std() * torch.randn(weight.shape, generator=generator)
        return new

    return change


@torch.no_grad()
def shuffled(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Shuffle the rows of the embedding: every word gets another one's."""
    new = copy.deepcopy(model)
    table = new.model.embed_tokens.weight
    table.copy_(table[torch.randperm(len(table), generator=generator)].clone())
    return new


def untrained(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Draw a backbone of the same shape at random."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
        return LlamaForCausalLM(model.config).eval()


def same(model: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Change nothing."""
    del generator
    return model


def _like(model: LlamaForCausalLM, **values: Any) -> LlamaConfig:
    config = {**model.config.to_dict(), **values}
    return LlamaConfig(**{key: value for key, value in config.items() if key not in ("architectures", "dtype")})
