"""Peak anonymous memory and time of `map`, against its bound and against what `map --plan` forecasts.

    python benchmarks/memory.py OLD NEW --out benchmarks/results/memory/NAME.json [--deeper] [--runs weights,low-memory]
    python benchmarks/memory.py --table benchmarks/results/memory/*.json

OLD and NEW are folders or Hub ids. With ``--deeper`` NEW is replaced by a random model of its config with twice the
layers, written to a scratch folder. The runs, each a process of its own: ``ordinary`` (calibration in the checkpoint's
own dtype), ``low-memory`` (the same with the layers on disk, ``low-memory-float32``: converted one at a time), and
``weights`` (no calibration, `--layer-map proportional`). A run that is in the file already is not made again.
The forecast's rates are measured by the clock on the wall just before each run, so that it says little on a crowded
machine. Mapped file pages are the operating system's and not counted. "libraries" is what a process holds that has
imported everything and read both tokenizers. A layer map that differs between ordinary and low memory is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, watched
from safetensors.torch import save_file

from peft_lorasuite import MapOptions
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.planning.plan import plan
from peft_lorasuite.planning.rates import measure_rates

GB = 10**9
RUNS: dict[str, list[str]] = {
    "ordinary": [],
    "low-memory": ["--low-memory"],
    "low-memory-float32": ["--low-memory", "--dtype", "float32"],
    "weights": ["--layer-map", "proportional"],
}
LIBRARIES = """
import sys, time
from transformers import AutoModelForCausalLM
import peft_lorasuite.mapping.build
from peft_lorasuite.models.backbone import Backbone
kept = [Backbone.open(name).tokenizer for name in sys.argv[1:]]
time.sleep(1)
"""


def taken(command: list[str]) -> dict[str, float]:
    """Watch a command; its peak in GB."""
    found = watched(command)
    return {"seconds": found["seconds"], "cpu_seconds": found["cpu_seconds"], "peak_gb": round(found["peak"] / GB, 3)}


def deeper(place: str, folder: Path, times: int = 2) -> Path:
    """Write a random model of a backbone's config with more layers, a shard a layer, in the checkpoint's dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    backbone = Backbone.open(place)
    config = AutoConfig.from_pretrained(place)
    config.num_hidden_layers *= times
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * times
    config.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = {name: weight for name, weight in shell.named_parameters() if name not in tied}
    layer_path = backbone.arch.layer_path
    shards: dict[str, list[str]] = {}
    for name in names:
        number = name.removeprefix(f"{layer_path}.").partition(".")[0] if name.startswith(layer_path) else "rest"
        shards.setdefault(f"model-{number}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for shard, held in shards.items():
        drawn = {name: _drawn(names[name], generator, config.num_hidden_layers) for name in held}
        save_file(drawn, folder / shard, metadata={"format": "pt"})
    table = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def _drawn(weight: torch.Tensor, generator: torch.Generator, layers: int) -> torch.Tensor:
    if weight.ndim == 1:
        return torch.ones(weight.shape, dtype=weight.dtype)
    return (torch.randn(weight.shape, generator=generator) / (layers * weight.shape[1]) ** 0.5).to(weight.dtype)


def forecast(old: str, new: str, run: str) -> dict[str, Any]:
    """Return what `map --plan` says of a run, with the rates that the machine has right now."""
    options = MapOptions(layer_map="proportional" if run == "weights" else "cka")
    rates = measure_rates()
    planned = plan(
        old, new, options, rates=rates, low_memory=run.startswith("low-memory"),
        dtype="float32" if run.endswith("float32") else "auto",
    )  # fmt: skip
    told = {"seconds": planned.seconds, "memory_gb": planned.memory / GB, "mapped_gb": planned.mapped / GB}
    told |= {"bound_gb": planned.bound / GB}
    shown = {key: round(value, 3) for key, value in told.items()}
    return {**shown, "rates": {name: round(value, 3) for name, value in vars(rates).items()}}


def compared(found: dict[str, Any], planned: dict[str, Any], libraries: float) -> dict[str, Any]:
    """Set a run against its bound and its forecast."""
    bound = planned.pop("bound_gb")
    planned["time_ratio"] = round(planned["seconds"] / found["seconds"], 2)
    planned["memory_ratio"] = round((planned["memory_gb"] + libraries) / found["peak_gb"], 2)
    return {"bound_gb": bound, "within_bound": found["peak_gb"] <= bound, "forecast": planned}


def measure(old: str, new: str, run: str, libraries: float) -> dict[str, Any]:
    """Make one run, and set it against its bound and its forecast."""
    planned = forecast(old, new, run)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "map"
        found = taken(["-m", "peft_lorasuite", "map", old, new, "-o", str(place), "--quiet", *RUNS[run]])
        stored = json.loads((place / "map.json").read_text(encoding="utf-8"))
    found |= {"parts": stored["facts"]["seconds"]} | compared(found, planned, libraries)
    found |= {"load_average": [round(value, 1) for value in os.getloadavg()], "layer_map": stored["layers"]}
    return found


def table(paths: list[Path]) -> str:
    """Return the runs of some files as a table in Markdown."""
    head = "pair (layers)", "run", "peak", "bound", "forecast", "wall time", "forecast"
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|---:|"]
    for path in paths:
        told = json.loads(path.read_text(encoding="utf-8"))
        pair = f"{told['old']} ({told['layers'][0]}) to {told['new']} ({told['layers'][1]})"
        for name, run in told["runs"].items():
            expected = run["forecast"]["memory_gb"] + told["libraries_gb"]
            memory = f"{run['peak_gb']:.2f} GB | {run['bound_gb']:.2f} GB | {expected:.2f} GB"
            times = f"{run['seconds']:.0f} s | {run['forecast']['seconds']:.0f} s"
            lines.append(f"| {pair} | {name} | {memory} | {times} |")
    return "\n".join(lines)


def main() -> None:
    """Make the runs that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--out")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print the table of these files instead")
    parser.add_argument("--deeper", action="store_true", help="NEW as a random model with twice the layers")
    parser.add_argument("--forecast", action="store_true", help="make the forecasts of the runs in the file anew")
    parser.add_argument("--runs", default=",".join(RUNS))
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if not (args.old and args.new and args.out):
        parser.error("OLD, NEW and --out are required")
    out = Path(args.out)
    told = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"runs": {}}
    scratch = Path(tempfile.mkdtemp())
    try:
        new = str(deeper(args.new, scratch)) if args.deeper else args.new
        libraries = taken(["-c", LIBRARIES, args.old, new])["peak_gb"]
        layers = [Backbone.open(name).arch.layers for name in (args.old, new)]
        names = [Path(args.old).name, f"{Path(args.new).name}, random" if args.deeper else Path(args.new).name]
        told |= {"old": names[0], "new": names[1], "layers": layers, "libraries_gb": libraries}
        told |= {"threads": torch.get_num_threads(), "machine": machine()}
        for run in args.runs.split(","):
            if run not in told["runs"] or args.forecast:
                known = told["runs"].get(run)
                told["runs"][run] = (
                    {**known, **compared(known, forecast(args.old, new, run), libraries)}
                    if known else measure(args.old, new, run, libraries)
                )  # fmt: skip
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                shown = {key: value for key, value in told["runs"][run].items() if key != "layer_map"}
                print(run, json.dumps(shown), flush=True)
    finally:
        shutil.rmtree(scratch)
    maps = [told["runs"][run]["layer_map"] for run in ("ordinary", "low-memory") if run in told["runs"]]
    if any(one != maps[0] for one in maps):
        raise SystemExit("the layer maps of ordinary and low memory differ")


if __name__ == "__main__":
    main()
