"""Shared by the benchmarks: tasks, cached stages, the machine, intervals."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_lorasuite.arch.spec import Architecture
from peft_lorasuite.text.examples import Example, format_example, read_examples

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("peft_lorasuite", "torch", "transformers", "peft", "accelerate")
ATTENTION = ("q", "k", "v", "o")
GB = 10**9


@dataclass(frozen=True)
class Recipe:
    """Samples, epochs and target parts that an adapter of a task is trained with."""

    samples: int
    epochs: int
    parts: tuple[str, ...]


RECIPES = {
    "arc": Recipe(1600, 1, ATTENTION),
    "facts": Recipe(480, 5, (*ATTENTION, "gate", "up", "down")),
    "math": Recipe(1600, 1, (*ATTENTION, "gate", "up", "down")),
}
"""Task -> recipe of its source adapter, and of full retraining on the new backbone."""


@dataclass(frozen=True)
class Task:
    """Examples of one task.

    Attributes:
        train: Labeled examples that methods may learn from.
        dev: Examples of the training file to choose settings on.
        test: Examples that are scored, once per reported table.
        options: Possible answers of an example, or None for exact answers.
        prompts: Unlabeled prompts of the task.
        seen: Number of test items, the first ones, whose fact a prompt asks for in other words; 0 without facts.
        labeled: Examples that the rows with 100 samples draw from; all of ``train`` if None.
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    options: Callable[[Example], list[str]] | None
    prompts: list[str]
    seen: int = 0
    labeled: list[Example] | None = None


def load_task(name: str, data: Path, limit: int) -> Task:
    """Read a task from a folder in the format of the LLM-Adapters collection.

    ``arc``: ARC-Easy. ``facts``: invented facts in two wordings, tested in a third; 120 of them are prompts, 100 of
    these have labels, and only full retraining sees the other 120. ``math``: chains of thought.
    """
    if name == "arc":
        train = read_examples(data / "ARC-Easy_train.json")
        test = read_examples(data / "ARC-Easy_test.json")[:limit]
        return Task(train[:1600], train[1600:1800], test, _choices, [format_example(one) for one in train[:128]])
    if name == "facts":
        names = json.loads((data / "facts_options.json").read_text(encoding="utf-8"))
        train, test = read_examples(data / "facts_train.json"), read_examples(data / "facts_test.json")
        seen = train[:120]
        prompts = [format_example(one) for one in seen]
        return Task(train, train[240:], test[:limit], lambda example: names, prompts, len(seen), labeled=seen[:100])
    if name == "math":
        records = json.loads((data / "math_data.json").read_text(encoding="utf-8"))
        train = read_examples([record for record in records if record["output"]])  # a few have no solution
        sets = ("AddSub", "SVAMP", "MultiArith", "SingleEq")
        test = [one for name in sets for one in read_examples(data / f"{name}_test.json")[: limit // len(sets)]]
        return Task(train[:2000], train[-200:], test, None, [format_example(one) for one in train[:128]])
    raise SystemExit(f"unknown task {name!r}; known: arc, facts, math")


def _choices(example: Example) -> list[str]:
    """Options of a multiple-choice question whose answers are named answer1, answer2, ..."""
    return [f"answer{n}" for n in range(1, 6) if f"Answer{n}:" in example.instruction]


def paths_of(arch: Architecture, parts: Iterable[str]) -> list[str]:
    """Paths, within a layer, of the modules that hold one of these parts."""
    wanted = set(parts)
    return [site.path for site in arch.sites if wanted & set(site.parts)]


def names_of(arch: Architecture, parts: Iterable[str]) -> list[str]:
    """Last names of these modules, as `finetune` takes them."""
    return [path.rpartition(".")[2] for path in paths_of(arch, parts)]


def modules_of(arch: Architecture, parts: Iterable[str]) -> list[str]:
    """Full names of these modules in every layer: the target modules of a LoRA."""
    paths = paths_of(arch, parts)
    return [f"{arch.layer_path}.{layer}.{path}" for layer in range(arch.layers) for path in paths]


def machine() -> dict[str, Any]:
    """Return what a figure depends on; no host name, no path."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu, "cores": os.cpu_count(), "ram_gb": round(memory, 1), "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES}, "date": date.today().isoformat(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }  # fmt: skip


def write_json(path: Path, values: Any) -> None:
    """Write JSON as the committed results are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def stage(folder: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one stage, or read its result if it is there: an interrupted benchmark continues where it stopped."""
    path = folder / f"{name}.json"
    if not path.is_file():
        start = time.perf_counter()
        found = work() | {"seconds": round(time.perf_counter() - start, 1), "peak_gb": peak_gb(), "machine": machine()}
        write_json(path, {"row": name, **found})
        hidden = ("machine", "prompts", "right", "generated_right", "report")
        shown = ", ".join(f"{key} {value}" for key, value in found.items() if key not in hidden)
        print(f"{name}: {shown}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def pairs_of(texts: Iterable[str]) -> dict[str, str]:
    """Split ``NAME=VALUE`` arguments."""
    return dict(text.split("=", 1) for text in texts)


def peak_gb() -> float:
    """Return the largest resident memory of this process so far, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def watch(command: list[str]) -> dict[str, float]:
    """Run Python with a command; return its wall and processor seconds and its peak anonymous memory in GB, sampled.

    Mapped file pages are not counted: the operating system can drop them at any time.
    """
    start, most, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-W", "ignore", *command])
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        most = max([most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed with exit code {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "cpu_seconds": round(worked, 1), "peak_gb": round(most / GB, 3)}


def fastest(work: Callable[[], Any], tries: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of the fastest of some runs: other work on the machine only ever adds to them."""
    times = []
    for _ in range(tries):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def hide_loading_bars() -> None:
    """Keep transformers from showing a progress bar for every model that is loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5 / (1 + z * z / count)
    return round(middle - half, 4), round(middle + half, 4)


def paired(left: Iterable[Any], right: Iterable[Any]) -> tuple[float, float, float]:
    """Return the mean difference left - right of 0-to-1 outcomes per item, with its 95 % interval (normal)."""
    gaps = [float(a) - float(b) for a, b in zip(left, right, strict=True)]
    mean = sum(gaps) / len(gaps)
    spread = 1.96 * (sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1) / len(gaps)) ** 0.5
    return round(mean, 4), round(mean - spread, 4), round(mean + spread, 4)
