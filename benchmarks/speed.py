"""Speed: maps against a naive formulation and against reading, upgrades, collections, start-up, calibration, growth.

    python benchmarks/speed.py --old OLD --new NEW --adapter ADAPTER --map MAP [--only layer,reading,...]
    python benchmarks/speed.py --only demo,start-up

OLD, NEW, ADAPTER and MAP are folders of a real pair; ``layer`` and ``growth`` make random backbones of their own,
``demo`` compares upgrades of the demo pair with full retraining, as Figure 1 of the LoRASuite paper does, and
``dtypes`` compares float32 with bfloat16 on the given pair, or on the demo pair, and ``distill`` is timed there against
bare passes. Each figure
is a JSON file under --out, written when measured; delete one to measure it again. Repeated timings give the fastest
run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ATTENTION, RESULTS, fastest, stage, watch
from safetensors import safe_open
from speed_demo import compare, draw, run_one
from speed_distill import distillation
from speed_dtype import dtypes
from speed_growth import grow
from speed_layer import WEIGHTS_ONLY, layer

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.linalg.similarity import layer_similarity
from peft_lorasuite.methods.sections import add_section
from peft_lorasuite.models.activations import Sampling, batches, choose_tokens, forward_pass, paired_activations
from peft_lorasuite.text.calibration import built_in_text
from peft_lorasuite.upgrading.collection import upgrade_many


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Time the weight part of a map against reading both checkpoints, and moving each attention projection, once.

    The seconds are the processor's, so that the ratios hold where other work runs on the machine.
    """
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    hidden = UpgradeMap.load(args.map).hidden
    for side in (old, new):
        len(side.tokenizer)  # loaded before the clock starts

    def read() -> None:
        for side in (old, new):
            for file in sorted(Path(side.name).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (a safetensors handle, no dict)
                        opened.get_tensor(name).clone()

    def move_attention() -> None:
        for number in range(old.arch.layers):
            for part in ATTENTION:
                weight = old.part(number, part)
                hidden.T @ weight if part == "o" else weight @ hidden

    works = {
        "reading": read,
        "attention": move_attention,
        "weight_part": partial(UpgradeMap.build, old, new, WEIGHTS_ONLY),
    }
    times = {name: fastest(work, 2, time.process_time) for name, work in works.items()}
    ratios = {
        "ratio_to_reading": times["weight_part"] / times["reading"],
        "ratio": times["weight_part"] / (times["reading"] + times["attention"]),
    }
    return {**_rounded(times), **_rounded(ratios), "threads": torch.get_num_threads()}


def one_upgrade(args: argparse.Namespace) -> dict[str, Any]:
    """Time one upgrade by weights with a ready map: in a running process and by command; also its memory."""
    built = UpgradeMap.load(args.map)
    times = {"in_process": fastest(lambda: upgrade(args.adapter, built, method="lorasuite"))}
    times["command"] = fastest(lambda: command(args, args.adapter))
    program = (
        "import json, resource, sys, peft, transformers\n"
        "import peft_lorasuite.upgrading.upgrade, peft_lorasuite.methods.lorasuite\n"
        "now = int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])\n"
        "peft_lorasuite.upgrade(sys.argv[1], sys.argv[2], method='lorasuite').save(sys.argv[3])\n"
        "print(json.dumps([now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-W", "ignore", "-c", program, args.adapter, args.map, f"{place}/out"]
        before, after = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    memory = round((after - before) / 1024, 1)
    return {**_rounded(times), "mb_beyond_imports": memory, "threads": torch.get_num_threads()}


def command(args: argparse.Namespace, adapter: str) -> float:
    """Run one upgrade by command; return the seconds of the processor."""
    words = ["upgrade", adapter, "--from", args.old, "--to", args.new, "--map", args.map, "--method", "lorasuite"]
    with tempfile.TemporaryDirectory() as place:
        return watch(["-m", "peft_lorasuite", *words, "-o", f"{place}/out", "--quiet"])["cpu_seconds"]


def collection(args: argparse.Namespace) -> dict[str, Any]:
    """Time a hundred adapters in one call against a hundred calls (five are timed), by weights with a ready map.

    The seconds are the processor's; a call includes the import of the libraries.
    """
    count, few = 100, 5
    with tempfile.TemporaryDirectory() as place:
        names = [Path(place) / f"adapter-{number}" for number in range(count)]
        for name in names:
            name.symlink_to(Path(args.adapter).resolve())
        start = time.process_time()
        done = upgrade_many(names, args.map, Path(place) / "out", method="lorasuite")
        together = time.process_time() - start
    if any(one.status != "done" for one in done):
        raise SystemExit(f"failed: {next(one.error for one in done if one.error)}")
    each = min(command(args, args.adapter) for _ in range(few))
    times = {"together": together, "one_call": each}
    return {**_rounded(times), "adapters": count, "calls_timed": few, "ratio": round(count * each / together, 1)}


def section(args: argparse.Namespace) -> dict[str, Any]:
    """Time what Cross-LoRA stores in the map, once a pair, and an upgrade with it."""
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    start = time.perf_counter()
    built = add_section(UpgradeMap.load(args.map), "cross-lora", old, new)
    times = {"cross-lora, section": time.perf_counter() - start}
    times["cross-lora"] = fastest(lambda: upgrade(args.adapter, built, method="cross-lora"), 2)
    return {**_rounded(times), "threads": torch.get_num_threads()}


def start_up(args: argparse.Namespace) -> dict[str, Any]:
    """Time commands that need no tensor, and the import of the package."""
    del args
    here = [sys.executable, "-m", "peft_lorasuite"]
    words = {"--help": ["--help"], "upgrade --help": ["upgrade", "--help"], "families": ["families"]}
    calls = {name: [*here, *arguments] for name, arguments in words.items()}
    calls |= {"import": [sys.executable, "-c", "import peft_lorasuite"], "python": [sys.executable, "-c", "pass"]}
    return _rounded(
        {name: fastest(lambda call=call: subprocess.run(call, capture_output=True), 5) for name, call in calls.items()}
    )


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    """Time activations and CKA of all layers against the plain forward passes over the same batches."""
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    texts, sampling = built_in_text(), Sampling()
    chosen = sorted({text for text, _, _ in choose_tokens(old, new, texts, sampling)})
    times = {"loading": 0.0, "forward": 0.0}
    for side in (old, new):
        start = time.perf_counter()
        model = side.load()
        times["loading"] += time.perf_counter() - start
        with torch.inference_mode():
            times["forward"] += fastest(
                lambda m=model, s=side: [forward_pass(m.base_model, b) for _, b in batches(s, texts, chosen)], 2
            )
        del model
    start = time.perf_counter()
    pair = paired_activations(old, new, texts, sampling)
    read = time.perf_counter()
    layer_similarity("cka", pair.old, pair.new)
    times |= {"activations": read - start - times["loading"], "cka": time.perf_counter() - read}
    ratio = (times["activations"] + times["cka"]) / times["forward"]
    return {**_rounded(times), "ratio": round(ratio, 3), "threads": torch.get_num_threads()}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "layer": layer, "reading": reading, "upgrade": one_upgrade, "collection": collection, "sections": section,
    "start-up": start_up, "calibration": calibration, "growth": grow, "demo": compare, "dtypes": dtypes,
    "distill": distillation,
}  # fmt: skip


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", help="old backbone, a folder")
    parser.add_argument("--new", help="new backbone, a folder")
    parser.add_argument("--adapter", help="adapter of the old backbone, a folder")
    parser.add_argument("--map", help="the pair's upgrade map, a folder")
    parser.add_argument(
        "--prompts", default="built-in", help="prompts of ``dtypes``, a file; by default the built-in ones"
    )
    parser.add_argument("--methods", default="transplant,distill", help="methods of ``dtypes`` (default: both)")
    parser.add_argument("--number", type=int, default=64, help="how many of them are read (default: 64)")
    parser.add_argument("--layers", type=int, default=2, help="layers that are timed in the naive form (default: 2)")
    parser.add_argument(
        "--scratch", default=tempfile.gettempdir() + "/peft-lorasuite-speed", help="folder for random backbones"
    )
    parser.add_argument("--out", default=RESULTS / "speed", type=Path, help="folder for the results")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one)))
        return
    for name in args.only.split(","):
        found = stage(args.out, name, lambda name=name: PARTS[name](args))
        if name == "demo":
            draw(found, args.out)


if __name__ == "__main__":
    main()
