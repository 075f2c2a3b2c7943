"""Peak anonymous memory and time of `map` and `upgrade`, each run a process of its own.

    python benchmarks/memory.py OLD NEW --out FILE.json [--runs weights,low-memory] [--deeper]
    python benchmarks/memory.py OLD NEW --out FILE.json --runs ordinary,upgrade,transplant --adapter ADAPTER \
        --prompts FILE [--dtype float32]
    python benchmarks/memory.py --table FILE.json ...

OLD, NEW and ADAPTER are folders or Hub ids. Runs of `map`: ``ordinary`` (calibration in the checkpoint's own dtype),
``low-memory`` (the layers stay on disk; ``low-memory-float32``: converted one at a time), ``weights`` (no calibration,
`--layer-map proportional`). They are compared with the bound and the forecast of `map --plan`; its rates are measured
just before. ``upgrade`` is one by weights with a ready map, ``transplant`` one on at most 128 prompts. Runs that the
file has are not made again. With --deeper NEW is replaced by a random model of its config with twice the layers.

Mapped file pages are not counted. The bound is four times the larger model's layer in float32, both embeddings and
1 GB; the ordinary calibration adds the larger model. Different layer maps with ordinary and low memory are an error.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import GB, machine, watch, write_json
from safetensors.torch import save_file

from peft_lorasuite import MapOptions
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.planning.plan import measure_rates, plan

MAPS: dict[str, list[str]] = {
    "ordinary": [],
    "low-memory": ["--low-memory"],
    "low-memory-float32": ["--low-memory", "--dtype", "float32"],
    "weights": ["--layer-map", "proportional"],
}
"""Run of `map` -> its options."""
UPGRADES = {"upgrade": "lorasuite", "transplant": "transplant"}
"""Run of `upgrade` -> its method."""


def write_deeper(place: str, folder: Path, times: int = 2) -> Path:
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
    weights = {name: weight for name, weight in shell.named_parameters() if name not in tied}
    layer_path = backbone.arch.layer_path
    shards: dict[str, list[str]] = {}
    for name in weights:
        number = name.removeprefix(f"{layer_path}.").partition(".")[0] if name.startswith(layer_path) else "rest"
        shards.setdefault(f"model-{number}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        drawn = {name: _random(weights[name], generator, config.num_hidden_layers) for name in names}
        save_file(drawn, folder / shard, metadata={"format": "pt"})
    index = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _random(weight: torch.Tensor, generator: torch.Generator, layers: int) -> torch.Tensor:
    if weight.ndim == 1:
        return torch.ones(weight.shape, dtype=weight.dtype)
    return (torch.randn(weight.shape, generator=generator) / (layers * weight.shape[1]) ** 0.5).to(weight.dtype)


def forecast(old: str, new: str, run: str) -> dict[str, Any]:
    """Return what `map --plan` forecasts for a run, with the rates that the machine has right now."""
    options = MapOptions(layer_map="proportional" if run == "weights" else "cka")
    planned = plan(
        old, new, options, rates=measure_rates(), low_memory=run.startswith("low-memory"),
        dtype="float32" if run.endswith("float32") else "auto",
    )  # fmt: skip
    sides = planned.old, planned.new
    bound = 16 * max(side.layer for side in sides) + sum(side.table * side.stored for side in sides) + GB
    if run == "ordinary":
        bound += max(side.arch.parameter_count() * side.stored for side in sides)
    found = planned.to_dict()
    found = {"seconds": found["seconds"], "memory_gb": found["memory"] / GB, "bound_gb": bound / GB}
    return {name: round(value, 3) for name, value in found.items()}


def compare(found: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Compare a run with its bound and its forecast."""
    bound = planned.pop("bound_gb")
    planned["time_ratio"] = round(planned["seconds"] / found["seconds"], 2)
    planned["memory_ratio"] = round(planned["memory_gb"] / found["peak_gb"], 2)
    return {"bound_gb": bound, "within_bound": found["peak_gb"] <= bound, "forecast": planned}


def measure_map(old: str, new: str, run: str, place: Path) -> dict[str, Any]:
    """Build a map in ``place``, and compare the run with its bound and its forecast."""
    planned = forecast(old, new, run)
    found = watch(["-m", "peft_lorasuite", "map", old, new, "-o", str(place), "--overwrite", "--quiet", *MAPS[run]])
    stored = json.loads((place / "map.json").read_text(encoding="utf-8"))
    return {
        **found, "parts": stored["facts"]["seconds"], **compare(found, planned),
        "load_average": [round(value, 1) for value in os.getloadavg()], "layer_map": stored["layers"],
    }  # fmt: skip


def measure_upgrade(old: str, new: str, run: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Upgrade the adapter with a map in ``scratch``, which is built first if it is not there."""
    if not (scratch / "map").exists():
        watch(["-m", "peft_lorasuite", "map", old, new, "-o", str(scratch / "map"), "--quiet"])
    command = ["upgrade", args.adapter, "--from", old, "--to", new, "--map", str(scratch / "map")]
    command += ["--method", UPGRADES[run], "-o", str(scratch / run), "--quiet"]
    if run == "transplant":
        command += ["--dtype", args.dtype, *(["--prompts", args.prompts] if args.prompts else [])]
    return watch(["-m", "peft_lorasuite", *command])


def table(paths: list[Path]) -> str:
    """Return the runs of some files as a table in Markdown."""
    titles = "pair (layers)", "run", "peak", "bound", "forecast", "wall time", "forecast"
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|---:|---:|"]
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        pair = f"{found['old']} ({found['layers'][0]}) to {found['new']} ({found['layers'][1]})"
        for name, run in found["runs"].items():
            planned, bound = run.get("forecast"), f"{run['bound_gb']:.2f} GB" if "bound_gb" in run else "-"
            memory = f"{planned['memory_gb']:.2f} GB" if planned else "-"
            seconds = f"{planned['seconds']:.0f} s" if planned else "-"
            cells = [pair, name, f"{run['peak_gb']:.2f} GB", bound, memory, f"{run['seconds']:.0f} s", seconds]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Make the runs that the file lacks."""
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"runs": {}}
    new = str(write_deeper(args.new, scratch / "deeper")) if args.deeper else args.new
    layers = [Backbone.open(name).arch.layers for name in (args.old, new)]
    names = [Path(args.old).name, f"{Path(args.new).name}, random" if args.deeper else Path(args.new).name]
    found |= {"old": names[0], "new": names[1], "layers": layers, "threads": torch.get_num_threads()}
    found["machine"] = machine()
    for run in args.runs.split(","):
        if run in found["runs"]:
            continue
        if run in MAPS:
            row = measure_map(args.old, new, run, scratch / "map")
        else:
            row = measure_upgrade(args.old, new, run, args, scratch)
        found["runs"][run] = row
        write_json(args.out, found)
        print(run, json.dumps({key: value for key, value in row.items() if key != "layer_map"}), flush=True)
    maps = [found["runs"][run]["layer_map"] for run in ("ordinary", "low-memory") if run in found["runs"]]
    if any(one != maps[0] for one in maps):
        raise SystemExit("the layer maps of ordinary and low memory differ")


def main() -> None:
    """Read the arguments; measure, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--out", type=Path, help="JSON file of the runs")
    parser.add_argument("--runs", default=",".join(MAPS), help=f"default: {','.join(MAPS)}; also {', '.join(UPGRADES)}")
    parser.add_argument("--adapter", help="adapter of OLD, for upgrade and transplant")
    parser.add_argument(
        "--prompts", default="built-in", help="unlabeled prompts for transplant; by default the built-in ones"
    )
    parser.add_argument("--dtype", default="auto", help="of the models in transplant: float32 is faster on some CPUs")
    parser.add_argument("--deeper", action="store_true", help="NEW as a random model with twice the layers")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print the table of these files instead")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    runs = set(args.runs.split(","))
    if unknown := runs - {*MAPS, *UPGRADES}:
        parser.error(f"unknown runs {', '.join(sorted(unknown))}; known: {', '.join([*MAPS, *UPGRADES])}")
    if not (args.old and args.new and args.out) or (runs & set(UPGRADES) and not args.adapter):
        parser.error("OLD, NEW and --out are required, and --adapter for upgrades")
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


if __name__ == "__main__":
    main()
