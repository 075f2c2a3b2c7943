"""How fast: maps against a naive formulation and against reading, upgrades, collections, start-up, calibration.

    python benchmarks/speed.py --old OLD --new NEW --adapter ADAPTER --map MAP [--only layer,reading,...]

OLD, NEW, ADAPTER and MAP are folders of a real pair; `layer` and `growth` make random backbones of their own. Each
figure is a JSON file under --out, written when measured; delete one to measure it again. What is timed twice is given
by its fastest run: other work on the machine only ever adds to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import torch
from common import stage
from growth import WEIGHTS_ONLY, grow
from random_pair import MINICPM_1B, MINICPM_2B, backbone
from safetensors import safe_open

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.arch.layout import heads_first
from peft_lorasuite.arch.spec import ATTENTION
from peft_lorasuite.linalg.basis import hidden_map, pseudo_inverse
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.linalg.similarity import head_similarity, layer_similarity
from peft_lorasuite.mapping.build import Pairing
from peft_lorasuite.methods.lorasuite import move
from peft_lorasuite.models.activations import Sampling, batches, built_in_text, chosen_tokens, paired_activations, run
from peft_lorasuite.planning.rates import fastest
from peft_lorasuite.upgrading.collection import upgrade_many

RANK, LOOPED = 16, 32
"""Rank of the updates; pairs of heads of which the time of the loop over all is told."""
FFN = ("gate", "up", "down")


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """Maps and factors of single layers at the shape of MiniCPM-1B to 2B: naive against factored."""
    place = Path(args.scratch)
    old = Backbone.open(backbone(place / "1b", layers=args.layers, vocabulary=8192, **MINICPM_1B))
    new = Backbone.open(backbone(place / "2b", layers=args.layers, vocabulary=8192, seed=1, **MINICPM_2B))
    ids = torch.arange(8192)
    E_o, E_n = old.embedding(ids), new.embedding(ids)
    found: dict[str, Any] = {"layers": [], "threads": torch.get_num_threads()}
    found["hidden_map"] = {
        "factored": fastest(lambda: pseudo_inverse(hidden_map(E_o, E_n))),
        "naive": fastest(lambda: torch.linalg.pinv(naive.hidden_map(E_o, E_n)), 1),
    }
    hidden = hidden_map(E_o, E_n)
    built, pairing = UpgradeMap.build(old, new, WEIGHTS_ONLY), Pairing(old, new, hidden, WEIGHTS_ONLY)
    for number, pair in enumerate(built.layers):
        told = {
            "factored": fastest(lambda n=number: pairing.layer(n, n)),
            "factored_update": fastest(lambda pair=pair: moved(built, pair)),
            **naive_layer(old, new, number, hidden, moved(built, pair)),
        }
        ours, rest = told["factored"] + told["factored_update"], told["naive_maps"] + told["naive_update"]
        told["ratio_heads_moved_once"] = rest / ours
        told["ratio"] = (rest - told["naive_head_similarity"] + told["naive_pair_loop"]) / ours
        found["layers"].append({name: round(value, 6) for name, value in told.items()})
        print(found["layers"][-1], flush=True)
    found["ratio"] = round(min(one["ratio"] for one in found["layers"]), 1)
    return found


def moved(built: UpgradeMap, pair: Any) -> dict[str, LowRank]:
    """A random update of every module of a layer, carried over and cut to its rank."""
    found = {}
    for number, part in enumerate(built.old.arch.parts):
        rows, columns = built.old.arch.shape(part)
        generator = torch.Generator().manual_seed(number)
        update = LowRank(torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        found[part] = move(built, pair, part, update, match_size=True)[0].truncated(RANK)[0]
    return found


def naive_layer(
    old: Backbone, new: Backbone, number: int, hidden: torch.Tensor, updates: dict[str, LowRank]
) -> dict[str, float]:
    """Time the naive form of one layer; hold its similarities against ours, where both compute the same thing."""
    left, right = ({part: side.part(number, part) for part in (*ATTENTION, *FFN)} for side in (old, new))
    heads = old.arch.heads, new.arch.heads
    start = time.perf_counter()
    scores = naive.head_similarity(left, right, heads, hidden)
    compared = time.perf_counter()
    looped = naive.pair_loop(left, right, heads, hidden, LOOPED)
    ours = head_similarity(
        {p: heads_first(left[p] if p == "o" else left[p] @ hidden, p, heads[0]) for p in ("q", "k", "v")}
        | {"o": heads_first(hidden.T @ left["o"], "o", heads[0])},
        {p: heads_first(right[p], p, heads[1]) for p in ATTENTION}, *heads,
    )  # fmt: skip
    begun = time.perf_counter()
    naive.head_maps(left, right, heads, hidden, scores)
    naive.unit_maps(left, right, hidden)
    mapped = time.perf_counter()
    for update in updates.values():
        naive.cut(update.delta(), RANK)
    return {
        "naive_head_similarity": compared - start, "naive_maps": compared - start + mapped - begun,
        "naive_update": time.perf_counter() - mapped, "naive_pair_loop": looped,
        "largest_difference": float((scores - ours).abs().max()),
    }  # fmt: skip


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The weight part of a map against reading both checkpoints once and moving each attention projection once."""
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    hidden = UpgradeMap.load(args.map).hidden
    for side in (old, new):
        len(side.tokenizer)  # read before the clock starts

    def floor() -> None:
        for side in (old, new):
            for file in sorted(Path(side.name).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (a safetensors handle, no dict)
                        opened.get_tensor(name).clone()
        for number in range(old.arch.layers):
            for part in ATTENTION:
                weight = old.part(number, part)
                hidden.T @ weight if part == "o" else weight @ hidden

    told = {"floor": fastest(floor), "weight_part": fastest(lambda: UpgradeMap.build(old, new, WEIGHTS_ONLY), 2)}
    return {**rounded(told), "ratio": round(told["weight_part"] / told["floor"], 2), "threads": torch.get_num_threads()}


def one_upgrade(args: argparse.Namespace) -> dict[str, Any]:
    """One adapter with a ready map, by weights: in a running process, through the command line, and its memory."""
    built = UpgradeMap.load(args.map)
    told = {"in_process": fastest(lambda: upgrade(args.adapter, built, method="lorasuite"))}
    told["command"] = fastest(lambda: command(args, args.adapter))
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
    return {**rounded(told), "mb_beyond_imports": round((after - before) / 1024, 1), "threads": torch.get_num_threads()}


def command(args: argparse.Namespace, adapter: str) -> None:
    """One call of the command line."""
    words = ["upgrade", adapter, "--from", args.old, "--to", args.new, "--map", args.map, "--method", "lorasuite"]
    with tempfile.TemporaryDirectory() as place:
        called = [sys.executable, "-m", "peft_lorasuite", *words, "-o", f"{place}/out", "--quiet"]
        subprocess.run(called, check=True)


def collection(args: argparse.Namespace) -> dict[str, Any]:
    """A hundred adapters in one call against a hundred calls (five are timed), by weights with a ready map."""
    count, few = 100, 5
    with tempfile.TemporaryDirectory() as place:
        names = [Path(place) / f"adapter-{number}" for number in range(count)]
        for name in names:
            name.symlink_to(Path(args.adapter).resolve())
        start = time.perf_counter()
        done = upgrade_many(names, args.map, Path(place) / "out", method="lorasuite")
        together = time.perf_counter() - start
    if any(one.status != "done" for one in done):
        raise SystemExit(f"failed: {next(one.error for one in done if one.error)}")
    each = sum(fastest(lambda: command(args, args.adapter), 1) for _ in range(few)) / few
    told = {"together": together, "one_call": each}
    return {**rounded(told), "adapters": count, "calls_timed": few, "ratio": round(count * each / together, 1)}


def sections(args: argparse.Namespace) -> dict[str, Any]:
    """Cross-LoRA and transport: what they keep in the map is built once, and an upgrade with it ready."""
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    built, told = UpgradeMap.load(args.map), {}
    for method in ("cross-lora", "transport"):
        start = time.perf_counter()
        built = built.with_section(method, old, new)
        told[f"{method}, section"] = time.perf_counter() - start
        told[method] = fastest(lambda m=method, b=built: upgrade(args.adapter, b, method=m), 2)
    return {**rounded(told), "threads": torch.get_num_threads()}


def start_up(args: argparse.Namespace) -> dict[str, Any]:
    """Wall time of commands that need no tensor, and of importing the package."""
    del args
    here = [sys.executable, "-m", "peft_lorasuite"]
    words = {"--help": ["--help"], "upgrade --help": ["upgrade", "--help"], "families": ["families"]}
    calls = {name: [*here, *arguments] for name, arguments in words.items()}
    calls |= {"import": [sys.executable, "-c", "import peft_lorasuite"], "python": [sys.executable, "-c", "pass"]}
    told = {
        name: fastest(lambda call=call: subprocess.run(call, capture_output=True), 5) for name, call in calls.items()
    }
    return rounded(told)


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    """Activations and CKA of all layers against the plain forward passes over the same batches."""
    old, new = (Backbone.open(name) for name in (args.old, args.new))
    texts, sampling = built_in_text(), Sampling()
    chosen = sorted({text for text, _, _ in chosen_tokens(old, new, texts, sampling)})
    told = {"loading": 0.0, "forward": 0.0}
    for side in (old, new):
        start = time.perf_counter()
        model = side.load()
        told["loading"] += time.perf_counter() - start
        with torch.inference_mode():
            told["forward"] += fastest(
                lambda m=model, s=side: [run(m.base_model, b) for _, b in batches(s, texts, chosen)], 2
            )
        del model
    start = time.perf_counter()
    pair = paired_activations(old, new, texts, sampling)
    read = time.perf_counter()
    layer_similarity("cka", pair.old, pair.new)
    told |= {"activations": read - start - told["loading"], "cka": time.perf_counter() - read}
    ratio = (told["activations"] + told["cka"]) / told["forward"]
    return {**rounded(told), "ratio": round(ratio, 3), "threads": torch.get_num_threads()}


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Round seconds for the file."""
    return {name: round(value, 4) for name, value in values.items()}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "layer": layer, "reading": reading, "upgrade": one_upgrade, "collection": collection, "sections": sections,
    "start-up": start_up, "calibration": calibration, "growth": grow,
}  # fmt: skip


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", help="old backbone, a folder")
    parser.add_argument("--new", help="new backbone, a folder")
    parser.add_argument("--adapter", help="adapter of the old backbone, a folder")
    parser.add_argument("--map", help="the pair's upgrade map, a folder")
    parser.add_argument("--layers", type=int, default=2, help="layers that are timed in the naive form (default: 2)")
    parser.add_argument(
        "--scratch", default=tempfile.gettempdir() + "/peft-lorasuite-speed", help="for random backbones"
    )
    parser.add_argument("--out", default="benchmarks/results/speed", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    args = parser.parse_args()
    for name in args.only.split(","):
        stage(args.out, name, lambda name=name: PARTS[name](args))


if __name__ == "__main__":
    main()
