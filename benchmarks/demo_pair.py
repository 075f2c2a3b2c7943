"""The demo pair for the benchmarks: its items, its map, and how a row is made, timed and scored.

Development items are training items about animals that nothing else of the development split asks about, as the test
items are: settings are chosen there, and the test items are scored once.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from common import modules_of, names_of

import peft_lorasuite
from peft_lorasuite import Backbone, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.methods.sections import add_section
from peft_lorasuite.model import attach
from peft_lorasuite.text.examples import Example, format_example, read_examples
from peft_lorasuite.training.finetune import finetune
from peft_lorasuite.training.scoring import score
from peft_lorasuite.upgrading.upgrade import Upgraded

DATA = Path(peft_lorasuite.__file__).parent / "data" / "demo"
TEMPLATE = "Question: {instruction}\nAnswer: "
PROMPTS = 600
"""Unlabeled prompts of `transplant` and `distill`."""
READ: dict[str, Any] = {"prompts": PROMPTS, "length": 8}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("copy", {}),
    "lorasuite": ("lorasuite", {}),
    "lorasuite-reference": ("lorasuite", {"normalize": "none"}),
    "cross-lora": ("cross-lora", {}),
    "transplant": ("transplant", {**READ, "rank": 64}),
    "transplant-built-in-prompts": ("transplant", {"rank": 64, "length": 8}),
    "distill": ("distill", {**READ, "epochs": 5, "learning_rate": 3e-3}),
}
"""Row -> method and its options."""
FULL: dict[str, Any] = {"samples": None, "epochs": 5, "learning_rate": 3e-3, "warmup": 0.05}
"""Retraining on all training items, by the recipe of the pair's own adapter."""
RATES = (3e-4, 1e-3, 3e-3)
DEV_ANIMALS = 0.2


def animal(item: Example) -> str:
    """Return the animal that a question asks about: its last word."""
    return item.instruction.rstrip(".?").rpartition(" ")[2]


@dataclass
class Made:
    """A model with a row's adapter, and what making it took.

    Attributes:
        model: The PEFT model, or the backbone alone.
        seconds: Time to make it, without the map and without scoring.
        peak_mb: Largest resident memory of the process in that time, in MB.
        report: Facts of the upgrade's report.
    """

    model: Any
    seconds: float = 0.0
    peak_mb: int = 0
    report: dict[str, Any] = field(default_factory=dict)


class DemoPair:
    """The demo pair with its task, or two backbones of its kind.

    Args:
        old: Folder of the old backbone.
        new: Folder of the new backbone.
        adapter: Folder of the old backbone's adapter.
        dev: Whether to learn from one part of the training items and to score on another.
        train: Other training items than the pair's own.
        test: Other test items.
        device: Where the backbones are loaded, as a ``device_map``.
    """

    def __init__(
        self, old: Path = DATA / "old", new: Path = DATA / "new", adapter: Path = DATA / "adapter", *,
        dev: bool = False, train: Sequence[Example] | None = None, test: Sequence[Example] | None = None,
        device: str | None = None,
    ) -> None:  # fmt: skip
        self.old, self.new = (Backbone.open(side, device_map=device) for side in (old, new))
        self.adapter = adapter
        whole = list(train or read_examples(DATA / "train.json"))
        self.train, self.test = whole, list(test or read_examples(DATA / "test.json"))
        if dev:
            names = sorted({animal(item) for item in whole})
            held_out = set(names[: round(DEV_ANIMALS * len(names))])
            self.train = [item for item in whole if animal(item) not in held_out]
            self.test = [item for item in whole if animal(item) in held_out][:300]
        self.dev, self.prompts = dev, PROMPTS

    @cached_property
    def map(self) -> UpgradeMap:
        """The pair's upgrade map, built on the pair's own text."""
        return self.build(MapOptions())

    def build(self, options: MapOptions) -> UpgradeMap:
        """Build a map with other options."""
        return UpgradeMap.build(self.old, self.new, options, calibration=DATA / "calibration.txt")

    def upgrade(
        self, row: str, *, seed: int = 0, upgrade_map: UpgradeMap | None = None, **options: Any
    ) -> tuple[Upgraded, float]:
        """Upgrade the adapter by the method of a row; also return the seconds that its section of the map took."""
        method, settings = METHODS[row]
        settings = settings | options
        used, section = upgrade_map or self.map, 0.0
        if method == "cross-lora":
            start = time.perf_counter()
            used = add_section(used, method, self.old, self.new, options=settings)
            section = time.perf_counter() - start
        task = [format_example(item, TEMPLATE) for item in self.train[: self.prompts]]
        prompts = "built-in" if "built-in" in row else task
        upgraded = upgrade(
            self.adapter, used, method=method, options=settings, old=self.old, new=self.new, prompts=prompts, seed=seed
        )
        return upgraded, section

    def upgrade_once(self, row: str, **settings: Any) -> Callable[[bool], Made]:
        """Upgrade; return a function that puts the adapter on the new backbone, trainable or not."""
        _ = self.map  # built before the clock starts
        (upgraded, section), seconds, peak = timed(lambda: self.upgrade(row, **settings))
        found = upgraded.report
        report = {"method": dict(found.method), "rank": found.rank, **found.facts}
        report.pop("differences", None)
        if section:
            report["section_seconds"] = round(section, 2)

        def attached(trainable: bool) -> Made:
            model = attach(self.new.load(dtype="float32"), upgraded, is_trainable=trainable)
            return Made(model, seconds - section, peak, report)

        return attached

    def upgraded(self, row: str, *, trainable: bool = False, **settings: Any) -> Made:
        """Return the new backbone with the adapter that a row's method makes."""
        return self.upgrade_once(row, **settings)(trainable)

    def fresh(
        self, rank: int = 32, alpha: int | None = None, parts: Sequence[str] | None = None, seed: int = 0, *,
        old: bool = False,
    ) -> Any:  # fmt: skip
        """Return the new (or old) backbone with a new LoRA on all modules or on those of some parts."""
        backbone = self.old if old else self.new
        targets = modules_of(backbone.arch, backbone.arch.parts if parts is None else parts)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.get_peft_model(backbone.load(dtype="float32"), config)

    def tuned(self, made: Made, *, seed: int = 0, parts: Sequence[str] | None = None, **training: Any) -> Made:
        """Train it on labeled samples, 100 by default."""
        names = names_of(self.new.arch, self.new.arch.parts if parts is None else parts)
        model, seconds, peak = timed(
            lambda: finetune(
                made.model, self.train, template=TEMPLATE, tokenizer=self.new.tokenizer, modules=names, seed=seed,
                **training,
            )
        )  # fmt: skip
        return Made(model, made.seconds + seconds, max(peak, made.peak_mb), made.report)

    def vanilla(
        self, *, rank: int = 32, alpha: int | None = None, seed: int = 0, parts: Any = None, **training: Any
    ) -> Made:
        """Train a new LoRA on labeled samples."""
        return self.tuned(Made(self.fresh(rank, alpha, parts, seed)), seed=seed, parts=parts, **training)

    def full(self, seed: int = 0, **more: Any) -> Made:
        """Retrain on all training items."""
        return self.vanilla(rank=16, alpha=32, seed=seed, **{**FULL, **more})

    def adapted(self) -> Any:
        """Return the old backbone with its adapter."""
        return peft.PeftModel.from_pretrained(self.old.load(dtype="float32"), self.adapter).eval()

    def score(self, model: Any, *, old: bool = False) -> dict[str, Any]:
        """Score on the test items (development items of a development pair); ``right`` has one 0 or 1 an item."""
        found = score(model.eval(), (self.old if old else self.new).tokenizer, self.test, TEMPLATE, batch_size=64)
        right = "".join(str(int(value)) for value in found.right)
        return {"nll": round(found.nll, 4), "accuracy": round(found.accuracy, 4), "items": found.n, "right": right}


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Run; also return the seconds and the process's largest resident memory in that time, in MB."""
    forget_peak()
    start = time.perf_counter()
    done = work()
    return done, time.perf_counter() - start, peak_mb()


def forget_peak() -> None:
    """Reset the process's recorded peak to what it holds now, without freed memory; only Linux can."""
    gc.collect()
    place = Path("/proc/self/clear_refs")
    if place.exists() and os.access(place, os.W_OK):
        libc = find_library("c")
        if libc is not None and hasattr(ctypes.CDLL(libc), "malloc_trim"):
            ctypes.CDLL(libc).malloc_trim(0)
        place.write_text("5")


def peak_mb() -> int:
    """Return the largest resident memory since `forget_peak`, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
