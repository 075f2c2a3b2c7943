"""Classifiers on pico backbones: with random updates, whose transfer is exact, and trained ones that know a rule."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peft_lorasuite.arch.registry import architecture

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


def texts(count: int, seed: int = 0, length: int = 4) -> list[str]:
    """Return random texts of the words, each of which is one token."""
    source = random.Random(seed)
    return [" " + " ".join(source.choices(WORDS, k=length)) for _ in range(count)]


def rule(word: str) -> int:
    """Return the class of a word, one of three."""
    return WORDS.index(word) % 3


def encode(batch: list[str]) -> Any:
    """Tokenize texts of one length."""
    return pico_tokenizer(WORDS)(batch, return_tensors="pt")


def targets(batch: list[str], kind: str, problem: str | None) -> torch.Tensor:
    """Return the labels of texts: by their last word, or by every word."""
    if kind == "TOKEN_CLS":
        return torch.tensor([[rule(word) for word in text.split()] for text in batch])
    last = torch.tensor([rule(text.split()[-1]) for text in batch])
    if problem == "regression":
        return last.float()[:, None] - 1
    if problem == "multi_label_classification":
        return torch.stack([last == 0, last != 1, last == 2], dim=1).float()
    return last


def add_adapter(folder: Path, kind: str, labels: int, seed: int = 0, **config: Any) -> Any:
    """Load a backbone as a classifier, and put a new LoRA on all its linear modules."""
    torch.manual_seed(seed)
    model = CLASSES[kind].from_pretrained(folder, num_labels=labels)
    arch = architecture(model.config)
    modules = [arch.module(n, site) for n, site in arch.modules]
    conv1d = any(site.conv1d for site in arch.sites)
    settings = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": conv1d, "task_type": kind} | config
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=modules, **settings))


def random_classifier(folder: Path, backbone: Path, kind: str, labels: int = 5) -> Any:
    """Save an adapter with random updates and a random head, and return the model with it."""
    tuned = add_adapter(backbone, kind, labels)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.copy_(torch.randn(weight.shape) / 2)
    tuned.save_pretrained(folder)
    return tuned.eval()


def trained_classifier(root: Path, kind: str = "SEQ_CLS", problem: str | None = None, steps: int = 80) -> Any:
    """Write two unrelated backbones and an adapter of the old one that knows the rule; return the adapted model."""
    tokenizer = pico_tokenizer(WORDS)
    old = save_backbone(root / "old", pico_model("llama", seed=1, num_hidden_layers=2), tokenizer)
    new = pico_model("qwen2", seed=2, hidden_size=48, intermediate_size=64, num_hidden_layers=2)
    save_backbone(root / "new", new, tokenizer)
    tuned = add_adapter(old, kind, 1 if problem == "regression" else 3)
    tuned.config.problem_type = problem
    optimizer = torch.optim.AdamW((weight for weight in tuned.parameters() if weight.requires_grad), lr=1e-2)
    for step in range(steps):
        batch = texts(32, seed=step)
        optimizer.zero_grad()
        tuned.train()(**encode(batch), labels=targets(batch, kind, problem)).loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(root / "adapter")
    return tuned


@torch.no_grad()
def right(model: Any, batch: list[str], kind: str = "SEQ_CLS", problem: str | None = None) -> float:
    """Return the share of outputs that follow the rule; for a regression those on the right side of both limits."""
    got, wanted = model(**encode(batch)).logits, targets(batch, kind, problem)
    if problem == "regression":
        return float(((got - wanted).abs() < 0.5).float().mean())
    if problem == "multi_label_classification":
        return float(((got > 0) == (wanted > 0.5)).float().mean())
    return float((got.argmax(-1) == wanted).float().mean())
