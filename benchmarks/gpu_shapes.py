"""Random models of published shapes on an accelerator: time, peak memory and the models' own share of every step."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from common import modules_of
from demo_pair import forget_peak, peak_mb
from random_pair import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.text.calibration import built_in_text

PROMPTS, LENGTH = 128, 48
"""Prompts that `transplant` and `distill` read, and tokens of an answer."""
SAMPLES, TOKENS, BATCH, STEPS = 10_000, 256, 16, 20
"""Training that a LoRA on the new backbone would take; so many steps of it are timed."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value: int
    vocabulary: int

    def small(self) -> Shape:
        """Return a shape for a try on a CPU."""
        hidden, heads = self.hidden // 16, max(self.heads // 4, 4)
        return replace(
            self, layers=max(self.layers // 8, 2), hidden=hidden - hidden % heads, intermediate=self.intermediate // 16,
            heads=heads, key_value=heads, vocabulary=2000,
        )  # fmt: skip


PAIRS = {
    "minicpm": (Shape(52, 1536, 3840, 24, 8, 73440), Shape(40, 2304, 5760, 36, 36, 122753)),
    "qwen": (Shape(24, 2048, 5504, 16, 16, 151936), Shape(36, 2048, 11008, 16, 2, 151936)),
    "llama": (Shape(32, 4096, 11008, 32, 32, 32000), Shape(32, 4096, 14336, 32, 8, 128256)),
}
"""MiniCPM-S-1B and MiniCPM-2B, Qwen1.5-1.8B and Qwen2.5-3B, Llama-2-7B and Llama-3-8B."""


class Clock:
    """Times steps on a device, and how much of each the passes of the models take.

    Args:
        device: The device.
    """

    def __init__(self, device: str) -> None:
        self.module = getattr(torch, device.partition(":")[0])
        self.inside = 0.0

    def now(self) -> float:
        """Return the time when the device has done what it was given."""
        if hasattr(self.module, "synchronize"):
            self.module.synchronize()
        return time.perf_counter()

    def watch(self, model: Any) -> None:
        """Count the forward passes of a model's decoder."""
        starts: list[float] = []
        model.model.register_forward_pre_hook(lambda *_: starts.append(self.now()))
        model.model.register_forward_hook(lambda *_: self._add(starts.pop()))

    @contextmanager
    def backward_counted(self) -> Iterator[None]:
        """Count backward passes as well."""
        plain = torch.autograd.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            start = self.now()
            plain(*args, **kwargs)
            self._add(start)

        torch.autograd.backward = timed
        try:
            yield
        finally:
            torch.autograd.backward = plain

    def _add(self, start: float) -> None:
        self.inside += self.now() - start

    def step(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Run a step; return its seconds, its peak memory beside what was there, and the share in the models."""
        gc.collect()
        on_device = hasattr(self.module, "max_memory_allocated")
        if on_device:
            self.module.empty_cache()
            self.module.reset_peak_memory_stats()
            before = self.module.memory_allocated()
        else:
            forget_peak()
            before = peak_mb() * 2**20
        self.inside, start = 0.0, self.now()
        with self.backward_counted():
            made = work()
        seconds = self.now() - start
        peak = self.module.max_memory_allocated() if on_device else peak_mb() * 2**20
        figures = {"seconds": seconds, "peak_gb": peak / 1e9, "own_gb": (peak - before) / 1e9}
        return made, {**{key: round(value, 2) for key, value in figures.items()},
                      "in_models": round(self.inside / seconds, 3)}  # fmt: skip


def make_model(shape: Shape, folder: Path, device: str, seed: int) -> Any:
    """Make a model with random bfloat16 weights on the device, with a tokenizer of words beside it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value, vocab_size=shape.vocabulary,
        max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    tokenizer(shape.vocabulary).save_pretrained(folder)
    config.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model.requires_grad_(False)


def make_adapter(model: Any, folder: Path) -> Path:
    """Write a random LoRA of all linear modules, and leave the model as it was."""
    arch = Backbone.open(model).arch
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=modules_of(arch, arch.parts), task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    tuned.save_pretrained(folder)
    tuned.unload()
    return folder


def measure_pair(name: str, device: str, *, small: bool) -> dict[str, Any]:
    """Measure map, upgrade, `transplant`, `distill` and the training of a LoRA on one pair of shapes."""
    shapes = [shape.small() if small else shape for shape in PAIRS[name]]
    clock, found = Clock(device), {}
    prompts = [" ".join(text.split()[:24]) for text in built_in_text() if len(text.split()) >= 24]
    prompts = [f"{prompts[number % len(prompts)]} word{number}" for number in range(PROMPTS if not small else 16)]
    options: dict[str, Any] = {"length": 8 if small else LENGTH}
    with tempfile.TemporaryDirectory() as root:
        models = [
            make_model(shape, Path(root) / side, device, seed)
            for seed, (shape, side) in enumerate(zip(shapes, ("old", "new"), strict=True))
        ]
        adapter = make_adapter(models[0], Path(root) / "adapter")
        for model in models:
            clock.watch(model)
        sides = dict(zip(("old", "new"), map(Backbone.open, models), strict=True))
        built, found["map"] = clock.step(lambda: UpgradeMap.build(*sides.values()))
        _, found["upgrade by weights"] = clock.step(lambda: upgrade(adapter, built, method="lorasuite"))
        for method in ("transplant", "distill"):
            run = partial(upgrade, adapter, built, method=method, options=options, prompts=prompts, **sides)
            _, found[method] = clock.step(run)
        sides.clear()
        del run, models[0]  # training has the device for itself
        found["LoRA on 10,000 samples"] = train_lora(models[0], clock, small=small)
    own = found["map"]["seconds"] + found["upgrade by weights"]["seconds"]
    whole = found["LoRA on 10,000 samples"]["seconds"]
    return {"steps": found, "time_saved_by_weights": round(1 - own / whole, 4),
            "time_saved_by_transplant": round(1 - found["transplant"]["seconds"] / whole, 4)}  # fmt: skip


def train_lora(model: Any, clock: Clock, *, small: bool) -> dict[str, float]:
    """Time some steps of training a LoRA, and scale the time to one pass over all samples."""
    arch = Backbone.open(model).arch
    config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=modules_of(arch, arch.parts), task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW(weight for weight in tuned.parameters() if weight.requires_grad)
    batch, tokens, steps = (4, 32, 3) if small else (BATCH, TOKENS, STEPS)
    ids = torch.randint(arch.vocabulary, (batch, tokens), device=model.device)

    def work() -> None:
        for _ in range(steps):
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    _, figures = clock.step(work)
    scaled = figures["seconds"] * SAMPLES / (steps * batch)
    return {**figures, "timed_steps": steps, "timed_seconds": figures["seconds"], "seconds": round(scaled, 1)}
