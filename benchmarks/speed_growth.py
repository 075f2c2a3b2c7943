"""Growth of time: maps with layers, hidden size, heads and calibration tokens; upgrades with rank and adapters."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
from common import fastest
from random_pair import SMALL, backbone
from speed_layer import WEIGHTS_ONLY

from peft_lorasuite import Backbone, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.upgrading.collection import upgrade_many

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS, HIDDEN, HEADS = (2, 4, 8, 16), (256, 512, 1024, 1536), (4, 8, 16, 32)
TOKENS, RANKS, ADAPTERS = (512, 1024, 2048, 4096), (8, 16, 32, 64, 128), (2, 8, 32, 128)
Point = tuple[float, float]


def exponent(points: Sequence[Point]) -> float:
    """Return the slope of the upper half of the points on logarithmic axes, where constant costs matter least."""
    upper = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2 - 1 :]]
    mean = [sum(values) / len(upper) for values in zip(*upper, strict=True)]
    cross = sum((x - mean[0]) * (y - mean[1]) for x, y in upper)
    return cross / sum((x - mean[0]) ** 2 for x, _ in upper)


def grow(args: argparse.Namespace) -> dict[str, Any]:
    """Time every series, fit the exponents and draw them."""
    place = Path(args.scratch)
    series = {
        "map: layers": [(n, mapping(pair(place, layers=n), "weights")) for n in LAYERS],
        "map: hidden size": [(size, mapping(pair(place, hidden=size), "weights")) for size in HIDDEN],
        "map: heads": [(count, mapping(pair(place, heads=count), "weights")) for count in HEADS],
        "map: calibration tokens": [(n, mapping(pair(place), "calibration", n)) for n in TOKENS],
        "upgrade: rank": [(rank, upgrading(place, rank)) for rank in RANKS],
        "upgrade: adapters": [(count, collection(place, count)) for count in ADAPTERS],
    }
    found = {name: {"points": points, "exponent": round(exponent(points), 2)} for name, points in series.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    draw(found, args.out / "growth.png")
    return {"series": found, "threads": torch.get_num_threads()}


def pair(place: Path, *, layers: int = 2, hidden: int = 256, heads: int = 4) -> tuple[Path, Path]:
    """Return two random backbones; the new one is wider in its feed-forward part."""
    shape = {**SMALL, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    shape["intermediate_size"] = 2 * hidden + hidden // 2
    wide = {**shape, "intermediate_size": 3 * hidden}
    name = f"{layers}-{hidden}-{heads}"
    return (
        backbone(place / f"old-{name}", layers=layers, **shape),
        backbone(place / f"new-{name}", layers=layers, seed=1, **wide),
    )


def mapping(both: tuple[Path, Path], what: str, tokens: int = 2048) -> float:
    """Return the seconds of a map: of its matched layers, or of its calibration with CKA."""
    options = WEIGHTS_ONLY if what == "weights" else MapOptions(tokens=tokens)
    sides = [Backbone.open(name) for name in both]
    return min(UpgradeMap.build(*sides, options).facts["seconds"][what] for _ in range(3))


def upgrading(place: Path, rank: int) -> float:
    """Return the seconds of one upgrade by weights of an adapter of this rank, reading it included."""
    both = pair(place, layers=4, hidden=1024)
    adapter, built = lora(place, both[0], rank), weight_map(both)
    return fastest(lambda: upgrade(adapter, built, method="lorasuite"), 5)


def collection(place: Path, count: int) -> float:
    """Return the seconds of a collection of so many adapters, writing them included."""
    both = pair(place, layers=4)
    adapter, built, out = lora(place, both[0], 16), weight_map(both), place / "out"

    def work() -> None:
        shutil.rmtree(out, ignore_errors=True)
        names = []
        for number in range(count):
            link = place / f"link-{number}"
            link.unlink(missing_ok=True)
            link.symlink_to(adapter)
            names.append(link)
        upgrade_many(names, built, out, method="lorasuite")

    return fastest(work, 2)


def weight_map(both: tuple[Path, Path]) -> UpgradeMap:
    """Return the map of a pair, by weights."""
    return UpgradeMap.build(*both, WEIGHTS_ONLY)


def lora(place: Path, base: Path, rank: int) -> Path:
    """Write a random LoRA on all linear modules."""
    folder = place / f"lora-{base.name}-{rank}"
    if not folder.is_dir():
        config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(Backbone.open(base).load(dtype=torch.float32), config).save_pretrained(folder)
    return folder


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for every series, both axes logarithmic, with the fitted exponent."""
    figure, panels = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for axes, (name, one) in zip(panels.flat, found.items(), strict=True):
        x, y = zip(*one["points"], strict=True)
        axes.loglog(x, y, "o-", color="black")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_yticks([min(y), max(y)], [f"{min(y):.2g}", f"{max(y):.2g}"])
        axes.minorticks_off()
        axes.set_title(f"{name}: exponent {one['exponent']:g}", fontsize=10)
        axes.set_xlabel(name.partition(": ")[2])
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)
