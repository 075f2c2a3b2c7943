"""What the points of gate.py are made of: backbones whose fate as an upgrade is known, and tasks.

The backbones are the demo pair's, changed without a change of function, or damaged.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_language as language
import torch
from demo_pair import DATA, PROMPTS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_lorasuite.text.examples import Example, read_examples

INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
Change = Callable[[LlamaForCausalLM, torch.Generator], LlamaForCausalLM]
Items = tuple[list[Example], list[Example], int]
"""Training items, test items, and how many of the former serve as prompts."""


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
    """Change the basis of the hidden space, with new norm gains; the function stays the same.

    Args:
        model: The backbone.
        stream: ``(D_n, D_o)`` with orthonormal columns: the new residual state from the old one.
        generator: Draws the gains.
    """
    wide, size = stream.shape
    config = _like(model, hidden_size=wide, rms_norm_eps=model.config.rms_norm_eps * size / wide)
    new = LlamaForCausalLM(config).eval()  # every weight is overwritten

    def gains(old: Any, fresh: Any) -> Tensor:
        """Draw a norm's gain; return what turns the weights behind it."""
        fresh.weight.copy_(0.6 + 0.8 * torch.rand(wide, generator=generator))
        return (size / wide) ** 0.5 * old.weight[:, None] * stream.T / fresh.weight

    new.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ stream.T)
    for before, after in zip(model.model.layers, new.model.layers, strict=True):
        for norm, paths in zip(("input_layernorm", "post_attention_layernorm"), INPUTS, strict=True):
            turn = gains(getattr(before, norm), getattr(after, norm))
            for path in paths:
                after.get_submodule(path).weight.copy_(before.get_submodule(path).weight @ turn)
        for path in OUTPUTS:
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
        for paths, chosen in zip(INPUTS, (rows, units), strict=True):
            for path in paths:
                layer.get_submodule(path).weight.copy_(layer.get_submodule(path).weight[chosen].clone())
        for path, chosen in zip(OUTPUTS, (rows, units), strict=True):
            layer.get_submodule(path).weight.copy_(layer.get_submodule(path).weight[:, chosen].clone())
    return new


def noisy(level: float) -> Change:
    """Return a change that adds noise, as a fraction of each matrix's standard deviation."""

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
    """Shuffle the rows of the embedding: every word gets the embedding of another one."""
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


def code() -> Items:
    """Return the demo's own items: forty code words, applied to what the backbone knows."""
    return read_examples(DATA / "train.json"), read_examples(DATA / "test.json"), PROMPTS


def format_() -> Items:
    """Return the same questions without "in code", answered in another order and with articles: only a format."""
    facts = language.World.create().facts

    def plain(item: Example) -> Example:
        question = item.instruction.removeprefix("in code, ")
        words = question.rstrip(".?").split()
        first, second = (word for word in words if word in language.ATTRIBUTES)
        known = facts[words[-1]]
        answer = f"the {known[second]} and the {known[first]}"
        return Example(question, answer, answer=answer)

    train, test, prompts = code()
    return [plain(item) for item in train], [plain(item) for item in test], prompts


def names() -> Items:
    """Return questions about invented names, two words for every animal.

    Every name is in the training items, so that retraining can learn it; the prompts ask for one half of the animals,
    and the test items, in another wording, for the other half.
    """
    facts, draw = language.World.create().facts, random.Random(3)
    given = {animal: " ".join(draw.sample(language.CODES, 2)) for animal in facts}
    asked = [
        "name the {a}.",
        "give the name of the {a}.",
        "tell me the name of the {a}.",
        "what is the name of the {a}?",
    ]
    animals = list(facts)
    half = len(animals) // 2

    def items(chosen: list[str], forms: list[str]) -> list[Example]:
        return [Example(form.format(a=one), given[one], answer=given[one]) for form in forms for one in chosen]

    prompted, others = (items(chosen, asked[:3]) for chosen in (animals[:half], animals[half:]))
    return prompted + others, items(animals[half:], asked[3:]), len(prompted)


TASKS: dict[str, Callable[[], Items]] = {"code": code, "format": format_, "names": names}
"""Task -> its items."""
