"""The kinds of cases: which file is mutated, the command that reads it, and what a right result is."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from mutations import NAMES, mutate_json, mutate_lines, mutate_prompts, mutate_safetensors
from world import CONFIGS, Effect, World

from peft_lorasuite import UpgradeMap, upgrade_many

Change = Callable[[Path], None]
"""Mutates a file in place."""
Judge = Callable[[], str]
"""Returns ``same`` (the mutation changed nothing), ``followed`` (the change that was asked for), ``valid`` (no truth is
known; finite, and PEFT loads it), or what is wrong."""


ROW = {"row": "base", "accuracy": 0.5, "interval": [0.4, 0.6], "items": 100, "nll": 1.0, "seconds": None}


@dataclass
class Case:
    """A mutated input.

    Attributes:
        call: Arguments of the command line, or a function.
        output: What it writes.
        judge: Judges the output of a call that succeeded.
    """

    call: list[Any] | Callable[[], Any]
    output: Path
    judge: Judge


def close(found: Effect, wanted: Effect, exact: Effect | None = None) -> bool:
    """Whether two adapters add the same to every weight, or to those where ``exact`` is 1."""
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    gaps = {name: (found[name] - wanted[name]) * (1.0 if exact is None else exact[name]) for name in wanted}
    return all(float(gap.abs().max()) <= 2e-4 * scale + 1e-6 for gap in gaps.values())


def judge_adapter(world: World, folder: Path, out: Path, name: str, backbone: str) -> str:
    """Compare a result with what PEFT makes of the mutated adapter on the old backbone, and of the clean one.

    On the map of the old backbone to itself, the result must be what was read.
    """
    found, keys = world.effect(backbone, out.resolve())
    if keys:
        return f"wrong: PEFT does not use all tensors of the result: {keys[:2]}"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        return "wrong: the result is not finite"
    if close(found, world.clean[name, backbone]):
        return "same"
    if backbone == "new":
        return "wrong: the result differs from that of the clean input"
    try:
        truth = world.effect("old", folder)[0]
    except Exception as error:
        return f"wrong: accepted what PEFT refuses ({type(error).__name__}), with another result than the clean one"
    if not close(found, truth, world.exact[name]):
        return "wrong: the result is not what PEFT makes of the input"
    report = json.loads((out / "lorasuite_report.json").read_text())
    if not any(bool(tensor.any()) for tensor in truth.values()) and "warnings" not in report["facts"]:
        return "wrong: an adapter that changes nothing is not reported"
    return "followed"


def of_adapter(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate an adapter's config or weights, and upgrade it to its own backbone."""
    name = rng.choice(["lora", "lora", "lora", "patterns", "patterns", "dora", "tables", "tokens", "loha", "adalora"])
    folder = Path(shutil.copytree(world.adapter(name), place / "adapter"))
    change(folder / file)
    out = place / "out" / "result"
    call = ["upgrade", folder, "--to", world.old, "--from", world.old, "--map", world.identity]
    call += ["--method", "lorasuite", "-o", out]
    return Case(call, out, lambda: judge_adapter(world, folder, out, name, "old"))


def of_adapter_tokenizer(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate a tokenizer that was saved beside an adapter."""
    del rng
    folder = Path(shutil.copytree(world.adapter("lora"), place / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world.old / name, folder / name)
    change(folder / file)
    out = place / "out" / "result"
    call = ["upgrade", folder, "--to", world.new, "--from", world.old, "--map", world.map]
    call += ["--method", "lorasuite", "-o", out]
    return Case(call, out, lambda: judge_adapter(world, folder, out, "lora", "new"))


def of_map(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate a map, and upgrade with it."""
    folder = Path(shutil.copytree(world.map, place / "map"))
    change(folder / file)
    out = place / "out" / "result"
    call = ["upgrade", world.adapter("lora"), "--to", world.new, "--map", folder, "--method", "lorasuite", "-o", out]

    def judge() -> str:
        verdict = judge_adapter(world, world.adapter("lora"), out, "lora", "new")
        # other matched layers, or other values of the same tensors, are another map, which nothing contradicts
        free = verdict.startswith("wrong: the result differs") and _same_shape(folder / file, world.map / file)
        return "valid" if free else verdict

    return Case(call, out, judge)


def _same_shape(mutated: Path, clean: Path) -> bool:
    if mutated.suffix == ".json":
        one, other = (json.loads(path.read_text()) for path in (mutated, clean))
        return one["layers"] != other["layers"]
    headers = []
    for path in (mutated, clean):
        data = path.read_bytes()
        headers.append(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return json.loads(headers[0]) == json.loads(headers[1])


def of_backbone(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate a file of the new backbone, and upgrade to it or build a map for it."""
    clean = world.home / "sharded" if "index" in file else world.new
    folder = Path(shutil.copytree(clean, place / "new"))
    change(folder / file)
    out = place / "out" / "result"
    if rng.random() < 0.15:
        calibrated = ["--calibration", world.home / "text.txt", "--tokens", 64, "--block", 16]
        call = ["map", world.old, folder, *rng.choice([calibrated, ["--layer-map", "proportional"]]), "-o", out]
        return Case(call, out, lambda: _judge_map(out))
    call = ["upgrade", world.adapter("lora"), "--to", folder, "--map", world.map, "--method", "lorasuite", "-o", out]
    return Case(call, out, lambda: judge_adapter(world, world.adapter("lora"), out, "lora", "new"))


def _judge_map(out: Path) -> str:
    UpgradeMap.load(out)
    return "valid"


def of_prompts(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate a file of prompts or samples; `copy` reads it and does not use it."""
    path = place / file
    shutil.copyfile(world.home / file, path)
    change(path)
    out = place / "out" / "result"
    call = ["upgrade", world.adapter("lora"), "--to", world.new, "--from", world.old, "--map", world.map]
    call += ["--method", "lorasuite", "--prompts", path, "-o", out]
    return Case(call, out, lambda: judge_adapter(world, world.adapter("lora"), out, "lora", "new"))


def of_report(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate the report of a result, and inspect it."""
    folder = Path(shutil.copytree(world.results["lora"], place / "adapter"))
    change(folder / file)
    out = place / "out" / "report.html"
    return Case(["inspect", folder, "-o", out], out, lambda: _judge_page(out))


def of_chat(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate an adapter, and ask the model a question with it, as PEFT loads it."""
    folder = Path(shutil.copytree(world.adapter(rng.choice(list(CONFIGS))), place / "adapter"))
    change(folder / file)
    call = ["chat", "--base", world.old, "--adapter", folder, "--prompt", "the red cat", "--length", 2]
    return Case(call, place / "out", lambda: "valid")


class _Active(HTMLParser):
    """Collects tags and attributes that a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "iframe", "object", "link") else []
        self.found += [name for name, _ in attrs if name.startswith("on")]


def _judge_page(out: Path) -> str:
    parser = _Active()
    parser.feed(out.read_text(encoding="utf-8"))
    return f"wrong: active content {parser.found}" if parser.found else "valid"


def of_results(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate a measured result, and inspect a map with it."""
    del rng
    (place / "rows").mkdir()
    (place / "rows" / file).write_text(json.dumps(ROW))
    change(place / "rows" / file)
    out = place / "out" / "report.html"
    return Case(["inspect", world.map, "--rows", place / "rows", "-o", out], out, lambda: _judge_page(out))


def of_journal(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Mutate the journal of a collection, and run it again."""
    out = Path(shutil.copytree(world.home / "many", place / "out" / "many"))
    change(out / file)

    def judge() -> str:
        results = [path for path in out.iterdir() if path.is_dir()]
        return judge_adapter(world, world.adapter("lora"), results[0], "lora", "new")

    return Case(lambda: upgrade_many([str(world.adapter("lora"))], world.map, out, method="lorasuite"), out, judge)


def of_names(world: World, place: Path, rng: random.Random, file: str, change: Change) -> Case:
    """Give folders and adapters other names."""
    del file, change
    folder, name = place / "adapter", rng.choice(NAMES)
    try:
        folder = Path(shutil.copytree(world.adapter("lora"), place / "in" / (name or "adapter")))
    except OSError:
        shutil.copytree(world.adapter("lora"), folder)
    out = place / "out" / (rng.choice(NAMES) or "result")
    call = ["upgrade", folder, "--to", world.new, "--map", world.map, "--method", "lorasuite", "-o", out]
    call += ["--adapter-name", rng.choice(NAMES) or "x"] if rng.random() < 0.3 else []
    return Case(call, out, lambda: judge_adapter(world, folder, out, "lora", "new"))


def mutation(rng: random.Random) -> Change:
    """Return a function that mutates a file in place, by its kind."""

    def change(path: Path) -> None:
        by_suffix = {".safetensors": mutate_safetensors, ".json": mutate_json, ".jsonl": mutate_lines}
        mutate = mutate_prompts if path.stem == "prompts" else by_suffix[path.suffix]
        path.write_bytes(mutate(path.read_bytes(), rng))

    return change


KINDS: dict[str, tuple[int, Callable[[World, Path, random.Random, str, Change], Case], tuple[str, ...]]] = {
    "adapter config": (22, of_adapter, ("adapter_config.json",)),
    "adapter tensors": (22, of_adapter, ("adapter_model.safetensors",)),
    "map": (14, of_map, ("map.json",)),
    "map tensors": (6, of_map, ("core.safetensors",)),
    "backbone config": (10, of_backbone, ("config.json",)),
    "tokenizer": (6, of_backbone, ("tokenizer_config.json", "tokenizer.json", "generation_config.json")),
    "weights index": (4, of_backbone, ("model.safetensors.index.json",)),
    "weights": (4, of_backbone, ("model.safetensors",)),
    "prompts": (4, of_prompts, ("prompts.jsonl", "prompts.txt")),
    "adapter tokenizer": (3, of_adapter_tokenizer, ("tokenizer.json", "tokenizer_config.json")),
    "chat": (4, of_chat, ("adapter_config.json", "adapter_model.safetensors")),
    "results": (1, of_results, ("a.json",)),
    "report": (3, of_report, ("lorasuite_report.json",)),
    "journal": (2, of_journal, ("journal.jsonl",)),
    "names": (3, of_names, ("",)),
}
"""Kind -> weight, function, files."""
